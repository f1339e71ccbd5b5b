"""Devices and processes: one mesh axis over all hosts, its shardings, how processes start and end."""

import collections
import contextlib
import functools
import itertools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fcvit_jax.compiling import largest_divisor
from fcvit_jax.errors import InputError

# Smaller leaves are kept whole on every device: gathering them costs more than it saves.
_SMALLEST_SHARDED = 2**16  # numbers

_PEER_STOPPED = "error: another process stopped: see its message"
_FOREVER = 10 * 365 * 24 * 60 * 60.0  # seconds
_EXCHANGE = re.compile("gloo|nccl|coordination|barrier|unavailable|deadline", re.IGNORECASE)


def start_processes(where: str) -> None:
    """Join the other processes of this run, before anything else uses JAX.

    where: "" for one process; "auto": as Slurm, Open MPI, Kubernetes or a TPU pod reports; "HOST:PORT,COUNT,INDEX": the
    address of process 0, the number of processes, and which one this is. Raises InputError if it has another form, the
    others are not found, or their numbers of devices differ.
    """
    if not where:
        return
    found = re.fullmatch(r"(.*:\d+),(\d+),(\d+)", where)
    if where != "auto" and not (found and int(found[3]) < int(found[2])):
        raise InputError(
            f"--distributed {where!r}: write auto, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1"
        )
    # One program at a time on CPUs: with several in flight, their collectives once deadlocked.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        if found:
            jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
        else:
            jax.distributed.initialize()
    except ValueError:
        raise InputError(
            "--distributed auto: found no Slurm, Open MPI, Kubernetes or TPU pod that lists the processes; "
            "write HOST:PORT,COUNT,INDEX"
        ) from None
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--distributed {where!r}: the processes cannot find each other ({why})") from error
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        told = ", ".join(str(counts[process]) for process in sorted(counts))
        raise InputError(
            f"--distributed: the processes have {told} devices, but batches are split "
            "evenly; give each as many (CUDA_VISIBLE_DEVICES)"
        )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End all processes, within seconds and with a one-line message, if one of them fails inside.

    Otherwise they would wait for minutes in the next exchange. A process that was killed is noticed when an exchange
    breaks. A process that has finished waits for the others.
    """
    if not jax.distributed.is_initialized():
        yield
        return
    from orbax.checkpoint import multihost  # its barriers are the only public way to JAX's coordination service

    # Process 0 hears from every other one, and notifies every other one. A message is a barrier of two processes, at
    # which the receiver waits from the beginning.
    here = jax.process_index()
    peers = range(1) if here else range(1, jax.process_count())
    ending = threading.Lock()  # its holder reports why this process ends

    def meet(sender: int, receiver: int, seconds: float) -> None:
        barrier = multihost.get_barrier_sync_fn(processes={sender, receiver})
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the peer has ended already
            barrier(key=f"fcvit_jax: {sender} has ended, {receiver}", timeout_ms=int(1000 * seconds))

    def listen(peer: int) -> None:
        meet(peer, here, _FOREVER)
        if ending.acquire(blocking=False):
            print(_PEER_STOPPED, file=sys.stderr)
            leave(2)

    def tell() -> None:
        for peer in peers:
            meet(here, peer, 2.0)

    def leave(status: int) -> NoReturn:
        tell()
        sys.stdout.flush()
        sys.stderr.flush()
        # The others hear of it before exchanges break; process 0, which hosts the coordination service, goes last.
        time.sleep(1.0 if here else 3.0)
        # Nothing else ends a process whose main thread waits in an exchange; and at a usual exit JAX waits for the
        # other processes.
        os._exit(status)

    listening = [threading.Thread(target=listen, args=(peer,), daemon=True) for peer in peers]
    for thread in listening:
        thread.start()
    finish = functools.partial(multihost.get_barrier_sync_fn(), timeout_ms=int(1000 * _FOREVER))
    try:
        yield
        finish(key="fcvit_jax: all have finished")
    except BaseException as error:
        ending.acquire()
        status = error.code if isinstance(error, SystemExit) else 1
        if isinstance(error, jax.errors.JaxRuntimeError) and _EXCHANGE.search(str(error)):
            print(f"{_PEER_STOPPED} ({str(error).splitlines()[0]})", file=sys.stderr)
            status = 2
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        leave(status if isinstance(status, int) else 1)
    ending.acquire()
    finish(key="fcvit_jax: all know it")
    tell()
    for thread in listening:
        thread.join()


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether to stop: this process or another one received SIGTERM.

    All processes must call it equally often, as none may stop alone: JAX's coordination service catches the signal
    and answers the same call alike in all of them. In a thread of a notebook no signal can be caught.
    """
    came: list[bool] = []
    if jax.process_count() > 1:
        numbers = itertools.count(1)

        def requested() -> bool:
            if not came and multihost_utils.reached_preemption_sync_point(next(numbers)):
                came.append(True)
            return bool(came)

        yield requested
    elif threading.current_thread() is not threading.main_thread():
        yield lambda: False
    else:
        before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
        try:
            yield lambda: bool(came)
        finally:
            signal.signal(signal.SIGTERM, before)


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices along one axis, "data"; by default all devices of all hosts."""
    devices = devices or jax.devices()
    # Auto axes: with the default, Explicit, the class token cannot be concatenated with sharded patches.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def inference_mesh(batch_size: int) -> Mesh:
    """Make a `data_mesh`; on the CPU of a single process, of as many devices as divide the batch."""
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[: largest_divisor(max(batch_size, 1), len(devices))]
    return data_mesh(devices)


def share_cpu(batch_size: int) -> None:
    """Use a CPU as two JAX devices for inference, unless the user chose a number or JAX has created its devices.

    The threads of one device wait for each other at every operation. Two devices, with half of a batch each, wait once
    a batch: up to 14 % faster on two cores, where four devices were slower. A batch that does not divide keeps one: a
    program on one of two devices takes up to 8 % more time. More cores get two devices too, unmeasured: the threads of
    both devices share one pool of all cores, and each device keeps a copy of the weights.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = jax.config.jax_num_cpu_devices != -1 or "xla_force_host_platform_device_count" in flags  # pyright: ignore
    if not chosen and batch_size % 2 == 0 and usable_cores() > 1 and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has created its devices
            jax.config.update("jax_num_cpu_devices", 2)


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def replicated(mesh: Mesh) -> NamedSharding:
    """Make the sharding of parameters: the same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Make the sharding of images and labels: rows spread over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def fully_sharded(mesh: Mesh, tree: Any) -> Any:
    """Make a sharding for each leaf of parameters or an optimizer's state, along the longest axis that divides.

    XLA gathers each leaf where it is used (ZeRO stage 3, arXiv 1910.02054, known as FSDP). Small leaves, and those
    without an axis that divides, are replicated.
    """

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if leaf.size < _SMALLEST_SHARDED or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*["data" if axis == longest else None for axis in range(leaf.ndim)]))

    return jax.tree.map(place, tree)


def settled(arrays: Any) -> Any:
    """Return the arrays; several CPU devices compute them first: with many in flight, exchanges deadlock."""
    return jax.block_until_ready(arrays) if jax.default_backend() == "cpu" and jax.device_count() > 1 else arrays


def whole(array: Any) -> np.ndarray:
    """Return all rows of an array on the host of every process; all of them call it together."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def sum_over_processes(count: int) -> int:
    """Add up the counts of all processes; all of them call it together."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(count)))) if jax.process_count() > 1 else count


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """Show a progress bar on the terminal of the first process, and remove it when it is done."""
    return tqdm(*args, **kwargs, leave=False, disable=None if jax.process_index() == 0 else True)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise InputError if a batch does not spread evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise InputError(
            f"batch_size is {batch_size}: it must be a positive multiple of the {mesh.size} devices; the nearest is "
            f"config.batch_size={nearest}"
        )
