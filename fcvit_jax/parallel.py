"""Devices: one mesh axis over all hosts, the ways an array lies on it, and how several processes start."""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcvit_jax.errors import InputError

# Smaller leaves are kept whole on every device: to gather them costs more than they weigh.
_SMALLEST_SHARDED = 2**16  # numbers


def start_processes(where: str) -> None:
    """Join the other processes of this run; to be called before anything else touches JAX.

    where: "" for a run of one process; "auto" leaves it to JAX to find out from Slurm, Open MPI, Kubernetes or a TPU
    pod; "HOST:PORT,COUNT,INDEX" says it: the address of process 0, how many processes there are, which one this is.
    Raises InputError where that has another form or the others are not found.
    """
    if not where:
        return
    # Between CPUs one program after the other: with several in flight, their collectives once waited for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        if where == "auto":
            jax.distributed.initialize()
            return
        address, count, index = where.split(",")
        if ":" not in address or not 0 <= int(index) < int(count):
            raise ValueError
        jax.distributed.initialize(address, int(count), int(index))
    except ValueError:
        raise InputError(
            f"--distributed {where!r}: write auto, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1"
        ) from None
    except RuntimeError as error:
        raise InputError(f"--distributed {where!r}: the processes do not find each other ({error})") from error


def data_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data"."""
    # Auto axes: with the default, Explicit, the class token does not concatenate with sharded patches.
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


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


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError where a batch does not spread evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(f"batch_size is {batch_size}: it must be a positive multiple of the {mesh.size} devices")
