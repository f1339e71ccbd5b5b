"""Matchings of tokens, and what they are used for: merge, unmerge, follow. Pure functions of fixed shapes.

Token Merging, arXiv 2210.09461, section 3. Rules (`models.rules`) find matchings; nothing here depends on how.

Shape letters: b batch, n tokens in, t tokens out, d width, p patches.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.compiling import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Matching:
    """Where every token of a sequence goes, and what it contributes there. A pytree.

    target: int32 [b, n], the position in the output. Every position from 0 to tokens_out - 1 needs a token of positive
        weight; without an order, a position that has none becomes zeros of size 0.
    tokens_out: the length of the output, t.
    order: int32 [b, n], each of 0 to n - 1 once: first the t tokens that stay, in the order of the output, then those
        that are merged away. Optional: float32 merging is faster with it.
    weight: float32 [b, n], a token's weight in the mean; 0 prunes it. None: its size.
    gain: float32 [b, n], the size that it adds to its target. None: its size, and nothing if it is pruned.
    keep_norm: scale each merged token to the weighted mean of its members' norms; "max": to the largest of them (MLERP,
        arXiv 2312.01026).
    summed: merged tokens are the weighted sums of their members instead of the means.
    """

    target: jax.Array
    tokens_out: int = dataclasses.field(metadata={"static": True})
    order: jax.Array | None = None
    weight: jax.Array | None = None
    gain: jax.Array | None = None
    keep_norm: bool | Literal["max"] = dataclasses.field(default=False, metadata={"static": True})
    summed: bool = dataclasses.field(default=False, metadata={"static": True})


def merge_tokens(x: jax.Array, size: jax.Array, matching: Matching) -> tuple[jax.Array, jax.Array]:
    """Replace matched tokens by their weighted mean.

    x: [b, n, d], any float dtype. size: float32 [b, n]. Returns [b, t, d] in the dtype of x, and the sizes, float32
    [b, t]. Sums run in float32. A token that nothing is merged into keeps its value bit for bit.
    """
    weight = size if matching.weight is None else matching.weight
    gain = matching.gain
    if gain is None and matching.weight is not None:
        gain = jnp.where(weight > 0, size, 0.0)
    by_order = x.dtype == jnp.float32 and matching.order is not None
    groups = _GroupsByOrder(matching) if by_order else _GroupsByProduct(matching)
    members, weights = groups.members(x), groups.members(weight)
    merged, total, alone = groups.mean(members, weights)
    scale = total if matching.summed else None
    if matching.keep_norm:
        lengths = groups.members(norms(x))  # not those of `members`: a rule that compares features needs all
        if matching.keep_norm == "max":
            wanted = groups.largest(jnp.where(weights > 0, lengths, 0.0))
        else:
            wanted = groups.add(weights * lengths) / total
        scale = wanted / norms(merged)
    if scale is not None:
        merged = (merged.astype(jnp.float32) * jnp.where(alone, 1.0, scale)[..., None]).astype(x.dtype)
    own, gained = (size, total) if gain is None else (gain, groups.add(groups.members(gain)))
    return groups.place(x, merged), groups.place(own, gained)


class _GroupsByOrder:
    """One group for each token that is merged away: its target, and all that merge into that. g groups.

    They are few, and equal where tokens have one target. Tokens of no group are copied.
    """

    def __init__(self, matching: Matching):
        order, count = matching.order, matching.tokens_out
        assert order is not None
        self.staying, leaving = order[:, :count], order[:, count:]
        goals = take_rows(matching.target, leaving)
        self.merging = jnp.concatenate([take_rows(self.staying, goals), leaving], axis=1)
        self.together = goals[:, :, None] == goals[:, None]
        # The group of each token of the output, any of the equal ones; -1 if it has none.
        joins = goals[:, None] == np.arange(count)[None, :, None]
        self.group = jnp.where(joins, np.arange(leaving.shape[1], dtype=np.int32), -1).max(axis=-1, initial=-1)

    def members(self, values: jax.Array) -> jax.Array:
        """Take of [b, n, ...] those of the targets, then those of the tokens that are merged away: [b, 2 g, ...]."""
        return take_rows(values, self.merging)

    def add(self, values: jax.Array) -> jax.Array:
        """Add float32 values of the members, [b, 2 g]: [b, g]."""
        own, joining = jnp.split(values, 2, axis=1)
        return own + jnp.where(self.together, joining[:, None], 0.0).sum(axis=-1)

    def largest(self, values: jax.Array) -> jax.Array:
        """Find the largest of float32 values of the members, [b, 2 g], none below 0: [b, g]."""
        own, joining = jnp.split(values, 2, axis=1)
        return jnp.maximum(own, jnp.where(self.together, joining[:, None], 0.0).max(axis=-1, initial=0.0))

    def mean(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return weighted means of the members, [b, g, d]; the sums of the weights, [b, g]; where nothing joins."""
        (own, joining), (own_weight, weight) = jnp.split(x, 2, axis=1), jnp.split(weight, 2, axis=1)
        weight = jnp.where(self.together, weight[:, None], 0.0)
        added = weight.sum(axis=-1)
        total = own_weight + added
        sums = jnp.einsum("bgr,brd->bgd", weight, joining, precision=jax.lax.Precision.HIGHEST)
        return own + (sums - own * added[..., None]) / total[..., None], total, added == 0

    def place(self, values: jax.Array, merged: jax.Array) -> jax.Array:
        """Bring the tokens' own values, [b, n, ...], and the groups', [b, g, ...], into the order of the output."""
        joined = (self.group >= 0).reshape(*self.group.shape, *(1,) * (values.ndim - 2))
        return jnp.where(joined, take_rows(merged, jnp.maximum(self.group, 0)), take_rows(values, self.staying))


class _GroupsByProduct:
    """A group for each token of the output, by one product with all: matrix units are faster than a gather."""

    def __init__(self, matching: Matching):
        self.here = matching.target[:, None, :] == np.arange(matching.tokens_out)[None, :, None]

    def members(self, values: jax.Array) -> jax.Array:
        return values

    def add(self, values: jax.Array) -> jax.Array:
        return jnp.where(self.here, values[:, None], 0.0).sum(axis=-1)

    def largest(self, values: jax.Array) -> jax.Array:
        return jnp.where(self.here, values[:, None], 0.0).max(axis=-1)

    def mean(self, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        into = jnp.where(self.here, weight[:, None], 0.0)
        total = into.sum(axis=-1)
        share = into / jnp.where(total > 0, total, 1.0)[..., None]
        merged = einsum("btn,bnd->btd", share.astype(x.dtype), x)
        return merged, total, into.max(axis=-1) == total

    def place(self, values: jax.Array, merged: jax.Array) -> jax.Array:
        return merged


def norms(x: jax.Array) -> jax.Array:
    """Compute Euclidean norms, float32 [b, n], of tokens [b, n, d]; the gradient at zero is zero."""
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1)
    return jnp.sqrt(jnp.maximum(squares, 1e-30))


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Take the rows [b, m, ...] of [b, n, ...] by an index [b, m]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")


def follow_patches(source: jax.Array, matching: Matching) -> jax.Array:
    """Update the source map, int32 [b, p]: for each patch, the index of the token that it is in after this matching.

    A pruned token's patches follow its target, so that every patch has a token; `follow_pruned` tells them apart.
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
