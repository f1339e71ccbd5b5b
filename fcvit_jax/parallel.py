"""Devices and processes: one mesh axis over all hosts, the ways an array lies on it, how processes start and end."""

import collections
import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fcvit_jax.errors import InputError

# Smaller leaves are kept whole on every device: to gather them costs more than they weigh.
_SMALLEST_SHARDED = 2**16  # numbers

# How the processes tell each other that one has stopped, and that all have finished.
_STOPPED, _FINISHED = "fcvit_jax/stopped", "fcvit_jax/finished"
_TOLD = "error: another process stopped: see its message"
_LOOK = 0.5  # seconds between two looks at whether another process has stopped
_DAY_MS = 24 * 60 * 60 * 1000
_EXCHANGE = re.compile("gloo|nccl|coordination|barrier|unavailable|deadline", re.IGNORECASE)


def start_processes(where: str) -> None:
    """Join the other processes of this run; to be called before anything else touches JAX.

    where: "" for a run of one process; "auto" leaves it to JAX to find out from Slurm, Open MPI, Kubernetes or a TPU
    pod; "HOST:PORT,COUNT,INDEX" says it: the address of process 0, how many processes there are, which one this is.
    Raises InputError where that has another form, the others are not found, or they have other numbers of devices.
    """
    if not where:
        return
    found = re.fullmatch(r"(.*:\d+),(\d+),(\d+)", where)
    if where != "auto" and not (found and int(found[3]) < int(found[2])):
        raise InputError(
            f"--distributed {where!r}: write auto, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1"
        )
    # Between CPUs one program after the other: with several in flight, their collectives once waited for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        if found:
            jax.distributed.initialize(found[1], int(found[2]), int(found[3]))
        else:
            jax.distributed.initialize()
    except ValueError:
        raise InputError(
            "--distributed auto: nothing here tells of other processes (Slurm, Open MPI, Kubernetes or a TPU pod "
            "does); write HOST:PORT,COUNT,INDEX"
        ) from None
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--distributed {where!r}: the processes do not find each other ({why})") from error
    owners = collections.Counter(device.process_index for device in jax.devices())
    counts = [count for _, count in sorted(owners.items())]
    if len(set(counts)) > 1:
        raise InputError(
            f"--distributed: the processes have {', '.join(map(str, counts))} devices, and a batch is shared out "
            "evenly; give each as many (CUDA_VISIBLE_DEVICES)"
        )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Where one of several processes fails inside, the others end too: within seconds, and with one line.

    Left alone, they would wait for it in the next exchange, and break off in its midst after minutes. One that was
    killed, and so could not tell, is noticed when that happens. Whoever is done waits for the others.
    """
    from jax._src import distributed  # its store of keys, which has no public name; Orbax relies on it too

    client: Any = distributed.global_state.client
    if client is None:  # a process by itself
        yield
        return
    ending = threading.Lock()  # whoever has it, says why this process ends
    watching = threading.Thread(target=_watch, args=(client, ending), daemon=True)
    watching.start()
    try:
        yield
        client.wait_at_barrier(_FINISHED, _DAY_MS)
        ending.acquire()
    except BaseException as error:
        ending.acquire()
        status = error.code if isinstance(error, SystemExit) else 1
        if isinstance(error, jax.errors.JaxRuntimeError) and _EXCHANGE.search(str(error)):
            print(f"{_TOLD} ({str(error).splitlines()[0]})", file=sys.stderr)
            status = 2
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # where process 0 is gone, so are the keys
            client.key_value_set(_STOPPED, "", allow_overwrite=True)
        _leave(status if isinstance(status, int) else 1)
    watching.join()


def _watch(client: Any, ending: threading.Lock) -> None:
    while not ending.locked():
        time.sleep(_LOOK)
        try:
            client.key_value_try_get(_STOPPED)
        except jax.errors.JaxRuntimeError:  # there is no such key
            continue
        if ending.acquire(blocking=False):
            print(_TOLD, file=sys.stderr)
            _leave(2)


def _leave(status: int) -> None:
    """End the process as it stands: at a usual exit JAX would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    # So that all have looked before the exchanges break; and last goes process 0, which takes the keys along.
    time.sleep(_LOOK * (2 if jax.process_index() else 6))
    os._exit(status)


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Devices along one axis, "data"; by default all of all hosts."""
    devices = devices or jax.devices()
    # Auto axes: with the default, Explicit, the class token does not concatenate with sharded patches.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device: parameters."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """Rows spread over the devices: images, labels."""
    return NamedSharding(mesh, PartitionSpec("data"))


def fully_sharded(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a tree of parameters or of an optimizer's state: the longest axis that divides.

    Every device holds its share of the large leaves, and XLA gathers each where it is used (ZeRO stage 3,
    arXiv 1910.02054, known as FSDP). Leaves that are small, or of which no axis divides, are replicated.
    """

    def place(leaf: Any) -> NamedSharding:
        axes = [axis for axis, length in enumerate(leaf.shape) if length % mesh.size == 0]
        if leaf.size < _SMALLEST_SHARDED or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*["data" if axis == longest else None for axis in range(leaf.ndim)]))

    return jax.tree.map(place, tree)


def settled(arrays: Any) -> Any:
    """The arrays, which are being computed; between CPU devices, when they are there.

    Otherwise so many programs are in flight that one device has no room for the next, which the others are waiting for
    in an exchange: for ever.
    """
    return jax.block_until_ready(arrays) if jax.default_backend() == "cpu" and jax.device_count() > 1 else arrays


def sum_over_processes(count: int) -> int:
    """The sum of what each process has counted; all of them call it together."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(count)))) if jax.process_count() > 1 else count


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar on the terminal of the first process, gone when it is done."""
    return tqdm(*args, **kwargs, leave=False, disable=None if jax.process_index() == 0 else True)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError where a batch does not spread evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        nearest = max(1, round(batch_size / mesh.size)) * mesh.size
        raise InputError(
            f"batch_size is {batch_size}: it must be a positive multiple of the {mesh.size} devices; the nearest is "
            f"config.batch_size={nearest}"
        )
