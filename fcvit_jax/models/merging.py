"""A matching of tokens, and what is done with one: merge, unmerge, follow. Pure functions of fixed shapes.

Token Merging, arXiv 2210.09461, section 3. How a matching is found is a rule's business (`models.rules`); nothing here
depends on it.

Shape letters: b batch, n tokens in, t tokens out, d width, p patches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.compiling import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matching:
    """Where every token of a sequence goes, and what it contributes there. A pytree.

    target: int32 [b, n], the position in the output. Every position from 0 to tokens_out - 1 needs a token of positive
        weight.
    tokens_out: the length of the output, t.
    order: int32 [b, n], each of 0 to n - 1 once: first the t tokens that stay, in the order of the output, then those
        that are merged away. Optional: float32 merging is faster with it.
    weight: float32 [b, n], with what weight a token enters the mean; 0 prunes it. None: its size.
    gain: float32 [b, n], how much size it brings to its target. None: its size, and nothing if it is pruned.
    keep_norm: scale each merged token to the weighted mean of its members' norms (as MLERP, arXiv 2312.01026).
    """

    target: jax.Array
    tokens_out: int = dataclasses.field(metadata={"static": True})
    order: jax.Array | None = None
    weight: jax.Array | None = None
    gain: jax.Array | None = None
    keep_norm: bool = dataclasses.field(default=False, metadata={"static": True})


def merge_tokens(x: jax.Array, size: jax.Array, matching: Matching) -> tuple[jax.Array, jax.Array]:
    """Replace matched tokens by their weighted mean.

    x: [b, n, d], any float dtype. size: float32 [b, n]. Returns [b, t, d] in the dtype of x, and the sizes, float32
    [b, t]. Sums run in float32. A token that nothing is merged into keeps its value to the last bit.
    """
    weight = size if matching.weight is None else matching.weight
    by_order = x.dtype == jnp.float32 and matching.order is not None
    merge = _merge_by_order if by_order else _merge_by_product
    merged, total = merge(x, weight, matching)
    if matching.keep_norm:
        wanted, found = merge(_norms(x), weight, matching)[0], _norms(merged)
        scale = wanted / jnp.where(found > 0, found, 1.0)
        alone = _members(matching)[..., None] == 1
        merged = jnp.where(alone, merged, (merged.astype(jnp.float32) * scale).astype(x.dtype))
    if matching.gain is not None:
        return merged, _sum_by_target(matching.gain, matching)
    if matching.weight is not None:
        return merged, _sum_by_target(jnp.where(matching.weight > 0, size, 0.0), matching)
    return merged, total


def _merge_by_order(x: jax.Array, weight: jax.Array, matching: Matching) -> tuple[jax.Array, jax.Array]:
    """Gather the tokens that stay; one product adds those that are merged away."""
    order, count = matching.order, matching.tokens_out
    assert order is not None
    staying, leaving = order[:, :count], order[:, count:]
    kept, gone = _take_rows(x, staying), _take_rows(x, leaving)
    weights, goals = _take_rows(weight, order), _take_rows(matching.target, leaving)
    into = jnp.where(goals[:, None] == np.arange(count)[None, :, None], weights[:, None, count:], 0.0)
    added = into.sum(axis=-1)
    sums = jnp.einsum("btr,brd->btd", into, gone, precision=jax.lax.Precision.HIGHEST)
    total = weights[:, :count] + added
    return kept + (sums - kept * added[..., None]) / total[..., None], total


def _merge_by_product(x: jax.Array, weight: jax.Array, matching: Matching) -> tuple[jax.Array, jax.Array]:
    """One product with the weights of the means, in the dtype of x: matrix units are faster than a gather."""
    slots = np.arange(matching.tokens_out)[None, :, None]
    into = jnp.where(matching.target[:, None, :] == slots, weight[:, None, :], 0.0)
    total = into.sum(axis=-1)
    return einsum("btn,bnd->btd", (into / total[..., None]).astype(x.dtype), x), total


def _sum_by_target(values: jax.Array, matching: Matching) -> jax.Array:
    """Float32 [b, n] -> [b, t]: the sum over the tokens of each target."""
    slots = np.arange(matching.tokens_out)[None, :, None]
    return jnp.where(matching.target[:, None, :] == slots, values[:, None, :], 0.0).sum(axis=-1)


def _norms(x: jax.Array) -> jax.Array:
    """Euclidean norms, float32 [b, n, 1]; the gradient of a zero is zero."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _members(matching: Matching) -> jax.Array:
    """How many tokens enter the mean of each target: float32 [b, t]."""
    counted = jnp.ones(matching.target.shape, jnp.float32)
    if matching.weight is not None:
        counted = jnp.where(matching.weight > 0, counted, 0.0)
    return _sum_by_target(counted, matching)


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [b, m, ...] of [b, n, ...], by an index [b, m]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")


def follow_patches(source: jax.Array, matching: Matching) -> jax.Array:
    """Update the source map, int32 [b, p]: for each patch, the index of the token that it is in after this matching.

    A pruned token's patches follow its target, so that the map stays total; `follow_pruned` tells them apart.
    """
    return jnp.take_along_axis(matching.target, source, axis=1)


def follow_pruned(pruned: jax.Array, source: jax.Array, matching: Matching) -> jax.Array:
    """Update which patches were pruned, bool [b, p]. source: the source map before this matching."""
    if matching.weight is None:
        return pruned
    return pruned | (jnp.take_along_axis(matching.weight, source, axis=1) == 0)


def unmerge_tokens(x: jax.Array, source: jax.Array) -> jax.Array:
    """Copy every token's value back to its patches: [b, t, d] and int32 [b, p] -> [b, p, d], in row-major order."""
    return jnp.take_along_axis(x, source[..., None], axis=1)
