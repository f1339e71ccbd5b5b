"""Trees of parameters as vectors, all leaves together, for SAM and the measures of flatness."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from fcvit_jax.errors import InputError

Params = Any


def dot(tree: Params, other: Params) -> jax.Array:
    """Compute the inner product, float32."""
    # Not optax.tree.vdot: it flattens the leaves, which gathers those that are spread over devices.
    products: Any = optax.tree.mul(optax.tree.cast(tree, jnp.float32), optax.tree.cast(other, jnp.float32))
    return jnp.asarray(optax.tree.sum(products))


def unit(tree: Params) -> Params:
    """Divide a tree by its norm, float32; a zero tree stays zero."""
    tree = optax.tree.cast(tree, jnp.float32)
    length = optax.tree.norm(tree)
    return optax.tree.scale(jnp.where(length > 0, 1 / length, 0.0), tree)


def orthogonal(tree: Params, other: Params) -> Params:
    """Return the part of a tree that is orthogonal to another."""
    along = unit(other)
    return optax.tree.sub(tree, optax.tree.scale(dot(tree, along), along))


def random_like(params: Params, key: jax.Array) -> Params:
    """Draw a float32 tree of the parameters' shapes from the standard normal distribution.

    A leaf's key comes from its path, so that neither the order of the tree nor its other leaves matter.
    """

    def draw(path: Any, leaf: Any) -> jax.Array:
        drawn = jax.random.normal(jax.random.fold_in(key, zlib.crc32(leaf_name(path).encode())), leaf.shape)
        # On the leaf's devices: another placement would compile programs again.
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed
        return jax.device_put(drawn, leaf.sharding) if placed else drawn

    return jax.tree.map_with_path(draw, params)


def leaf_name(path: Any) -> str:
    """Format the path that JAX gives to a leaf: "blocks_0/attn/qkv/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_float32(params: Params, why: str) -> None:
    """Raise InputError, ending in `why`, for the first leaf of another dtype."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            raise InputError(f"{leaf_name(path)} is {leaf.dtype}: {why}")
