"""Devices: one mesh axis, and the two ways an array lies on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fcvit_jax.errors import InputError


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


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError where a batch does not spread evenly over the devices."""
    if batch_size < 1 or batch_size % mesh.size:
        raise InputError(f"batch_size is {batch_size}: it must be a positive multiple of the {mesh.size} devices")
