"""One program for all schedules of a rule: tokens stay in place, and a mask marks those that are left.

How many tokens each layer removes, and whether in windows, are arguments. The program computes what the real model
computes, at about the cost of the dense one, and compiles once; each real model takes seconds to compile.

It is exact because every token carries its place in the sequence that the real model would have. The sets A and B of
bipartite matching alternate by place, and ties go to the first place.

Shape letters: b batch, n tokens (all, merged away or not), d width, l layers.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fcvit_jax.models.attention import Attention
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.layers import MLP, LayerNorm
from fcvit_jax.models.merging import Matching, merge_tokens
from fcvit_jax.models.positions import grid_coordinates, merge_coordinates
from fcvit_jax.models.rules import Attended, Layer, Nearest, Rule, ToMe, compare, window_order
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import Block, Merged, ViT

WINDOWS = (2, 2)  # of local stages
_GONE = 1e-37  # the size of a token that is merged away, in attention: its logarithm is finite


class Rates(NamedTuple):
    """Rates of the layers of a schedule: int32 [l], tokens removed in each window, and bool [l], whether in windows."""

    removed: jax.typing.ArrayLike
    local: jax.typing.ArrayLike


def rates(schedule: MergeSchedule, config: ViTConfig, rule: Rule) -> Rates | None:
    """Express a schedule for the simulator of a rule; None if the simulator lacks its rule, windows or pooling.

    Raises InputError if the schedule does not fit the model.
    """
    plan = schedule.plan(config)
    # Pooling by attention would see the tokens that are merged away.
    if (
        not can_simulate(rule)
        or config.pool == "map"
        or any(
            layer.removed
            and (layer.rule != rule or layer.windows not in (None, math.prod(WINDOWS)) or _odd(layer.regroup))
            for layer in plan
        )
    ):
        return None
    removed = np.array([layer.removed for layer in plan], np.int32)
    return Rates(removed, np.array([layer.windows is not None for layer in plan]))


def can_simulate(rule: Rule) -> bool:
    """Return whether a rule has a simulator; schedules of other rules must be compiled."""
    return type(rule) in (ToMe, Nearest)


def _odd(regroup: tuple[tuple[int, int], tuple[int, int]] | None) -> bool:
    return regroup is not None and regroup[1] != WINDOWS


class SimulatedViT(ViT):
    """A ViT that merges by a rule as `rates` say, which may be traced; everything else is as in `ViT`.

    In `out`, sequences keep their length: tokens that are merged away have size 0, and "source" is not followed.
    """

    rule: Rule = ToMe()
    rates: Rates = Rates(0, False)

    def _run_blocks(self, x: jax.Array, plan: tuple, train: bool) -> tuple[jax.Array, list[Merged]]:
        config = self.config
        place = jnp.broadcast_to(jnp.arange(config.num_tokens, dtype=jnp.int32), x.shape[:2])
        coordinates = grid_coordinates(config)
        if coordinates is not None:
            coordinates = jnp.broadcast_to(jnp.asarray(coordinates), (*x.shape[:2], 2))
        tokens = Tokens(x, jnp.ones(x.shape[:2], jnp.float32), place, coordinates)
        for index in range(config.depth):
            only = config.pooled_tokens if index == config.depth - 1 else 0
            layer = Rates(*(jnp.asarray(each)[index] for each in self.rates))
            block = _SimulatedBlock(config, self.dtype, 0.0, 0.0, self.rule, name=f"blocks_{index}")
            after = block(tokens, layer, only)
            if only:
                return after.x, [Merged(tokens.x, tokens.size)] * config.depth
            tokens = after
        return tokens.x, [Merged(tokens.x, tokens.size)] * config.depth


class Tokens(NamedTuple):
    """Tokens in place: x [b, n, d]; their sizes, float32 [b, n], 0 if merged away; their places, int32 [b, n].

    coordinates: float32 [b, n, 2], if positions are rotary.
    """

    x: jax.Array
    size: jax.Array
    place: jax.Array
    coordinates: jax.Array | None


class _SimulatedBlock(Block):
    rule: Rule

    @nn.compact
    def __call__(self, tokens: Tokens, layer: Rates, only: int = 0) -> Tokens:  # type: ignore[override]
        config = self.config
        norm1, norm2 = (LayerNorm(config.norm_eps, name=name) for name in ("norm1", "norm2"))
        masked = dataclasses.replace(config, proportional_attention=True)  # otherwise the mask would be left out
        attention, mlp = Attention(masked, self.dtype, name="attn"), MLP(config, self.dtype, name="mlp")
        size = _left(tokens.size, config.proportional_attention)
        attended = attention(norm1(tokens.x), size, tokens.coordinates, only)
        tokens = tokens._replace(x=tokens.x[:, : only or None] + self._branch(attended.y, "ls1", False))
        if not only:
            tokens = jax.lax.cond(
                jnp.asarray(layer.removed) > 0,
                lambda: _merge(self.rule, config, attended, tokens, layer),
                lambda: tokens,
            )
        return tokens._replace(x=tokens.x + self._branch(mlp(norm2(tokens.x)), "ls2", False))


def _left(size: jax.Array, proportional: bool = True) -> jax.Array:
    """Return the sizes for attention, where tokens that are merged away weigh nothing."""
    return jnp.where(size > 0, size if proportional else 1.0, _GONE)


def _merge(rule: Rule, config: ViTConfig, attended: Attended, tokens: Tokens, layer: Rates) -> Tokens:
    """Merge as `rules.propose_pairs`, `rank_pairs` and `merge_ranked` do, among the tokens that are left."""
    x, size, place, coordinates = tokens
    prefix, (rows, columns) = config.num_prefix_tokens, config.grid
    removed, local = jnp.asarray(layer.removed), jnp.asarray(layer.local)
    patch = jnp.arange(config.num_tokens)[None] >= prefix
    left = patch & (size > 0)
    count = left.sum(axis=1, keepdims=True)
    intact = count == config.num_patches

    # The window of each token, and its index there.
    (down, across), index = WINDOWS, place - prefix
    divides = rows % down == 0 and columns % across == 0
    if divides:  # otherwise no schedule is local
        order = window_order((rows, columns), WINDOWS, config.num_patches)
        regrouped = jnp.concatenate([jnp.zeros(prefix, jnp.int32), jnp.asarray(np.argsort(order), jnp.int32)])
        index = jnp.where(local & intact, regrouped[None], index)
    length = jnp.where(local, count // (down * across), count)
    window, index = index // jnp.maximum(length, 1), index % jnp.maximum(length, 1)
    in_a = index % 2 == jnp.where(local, 0, prefix % 2)
    if isinstance(rule, Nearest) and rule.checkerboard:
        row, column = np.divmod(np.arange(config.num_patches), columns)
        even = (row + column) % 2 == 0
        inside = (row % (rows // down) + column % (columns // across)) % 2 == 0 if divides else even
        cells = jnp.where(local, jnp.asarray(inside), jnp.asarray(even))
        in_a = jnp.where(intact, jnp.concatenate([jnp.zeros(prefix, jnp.bool_), cells])[None], in_a)
    in_a, in_b = in_a & left, ~in_a & left

    assert isinstance(rule, ToMe | Nearest)
    everything = np.arange(config.num_tokens)[None]
    similarity = compare(rule.directions(attended, x), everything, everything)[:, 0]
    near = window[:, :, None] == window[:, None, :]
    similarity = jnp.where(near & in_a[:, :, None] & in_b[:, None, :], similarity, -jnp.inf)
    closest = similarity.max(axis=2)
    within = window * config.num_tokens + index  # orders the tokens by window and index
    ties = jnp.where(similarity == closest[:, :, None], within[:, None, :], jnp.iinfo(jnp.int32).max)
    best = ties.argmin(axis=2).astype(jnp.int32)

    score = closest
    if isinstance(rule, Nearest):
        if not config.class_token:  # the mean query of the tokens that are left stands in for the class token's
            share = jnp.where(size > 0, size.shape[1] / (size > 0).sum(axis=1, keepdims=True), 0.0)[:, None, :, None]
            q, turned = attended.q, attended.turned
            turned = None if turned is None else (turned[0] * share.astype(q.dtype), turned[1])
            attended = attended._replace(q=q * share.astype(q.dtype), turned=turned)
        here = Layer(config.num_tokens, config.num_tokens, class_token=config.class_token)
        own = rule.weights(attended, _left(size), here, prefix)
        score = -rule.cost(closest, own, jnp.take_along_axis(own, best, axis=1))
    mine, other = score[:, :, None], score[:, None, :]
    ahead = (other > mine) | ((other == mine) & (within[:, None, :] < within[:, :, None]))
    rank = jnp.sum(ahead & near & in_a[:, None, :], axis=2, dtype=jnp.float32)
    goes = in_a & (rank < removed.astype(jnp.float32))

    # What is left is ordered [prefix], then window by window [A kept, in order][B].
    stays = left & ~goes
    key = jnp.where(stays, (2 * window + in_b.astype(jnp.int32)) * config.num_tokens + index, jnp.iinfo(jnp.int32).max)
    before = jnp.sum(key[:, None, :] < key[:, :, None], axis=2, dtype=jnp.float32).astype(jnp.int32)
    position = jnp.arange(config.num_tokens, dtype=jnp.int32)[None]
    target = jnp.where(goes, best, position)
    keep_norm = isinstance(rule, Nearest) and rule.keep_norm
    matching = Matching(target, config.num_tokens, keep_norm=keep_norm)
    coordinates = None if coordinates is None else merge_coordinates(coordinates, size, matching)
    return Tokens(*merge_tokens(x, size, matching), jnp.where(patch, prefix + before, position), coordinates)
