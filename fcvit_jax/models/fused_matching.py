"""The matchings of ToMe and Nearest for NVIDIA GPUs: one Pallas kernel instead of a dozen programs by XLA.

Shape letters: b batch, n tokens, h heads, k head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fcvit_jax.models.merging import Matching
from fcvit_jax.models.rules import Attended, Layer, Nearest, match_tokens, split_tokens

_MOST = 128  # at most so many tokens of a window propose, or are proposed to


def match(
    qkv: jax.Array,
    x: jax.Array,
    size: jax.Array,
    layer: Layer,
    prefix: int,
    proportional: bool = True,
    interpret: bool = False,
) -> Matching:
    """Match as the layer's rule does, `rules.ToMe` or `rules.Nearest`, with one program for each window of an image.

    qkv: [b, n, 3, h, k], bfloat16. x: [b, n, h k], the tokens after attention. size: float32 [b, n]. proportional:
    whether attention is. All similarities of a window are in registers at once: if more than 128 tokens of a window
    propose, or are proposed to, the rule itself is called instead.
    """
    b, n, _, h, k = qkv.shape
    rule = layer.rule
    nearest = rule if isinstance(rule, Nearest) else None
    sides = split_tokens(layer, prefix, nearest is not None and nearest.checkerboard)
    windows = len(sides[0])
    counts = sides[0].shape[1], sides[1].shape[1]
    wide, tall = max(16, pl.next_power_of_2(k)), max(16, pl.next_power_of_2(max(counts)))
    queries, keys, values = qkv.transpose(2, 0, 3, 1, 4)
    attended = Attended(values, queries, keys, values, size if proportional else None)
    if tall > _MOST:
        if nearest is None:
            # The barrier keeps XLA from computing the mean twice.
            mean = jax.lax.optimization_barrier(qkv[:, :, 1].astype(jnp.float32).mean(axis=2))
            return match_tokens(mean, layer, prefix)
        return rule(attended, x, size, layer, prefix)
    weights = [] if nearest is None else [nearest.weights(attended, size, layer, prefix)]
    share = nearest.features if nearest else 0.0
    features = [x.reshape(b, n, h, k)] if share else []

    side = pl.BlockSpec((None, tall), lambda window, image: (window, 0))
    tokens = pl.BlockSpec((None, n), lambda window, image: (image, 0))
    target, order = pl.pallas_call(
        functools.partial(
            _match,
            counts=counts,
            width=k,
            removed=layer.removed,
            prefix=prefix,
            share=share,
            exact=interpret,
        ),
        grid=(windows, b),
        in_specs=[
            side,
            side,
            pl.BlockSpec((None, n, None, h, wide), lambda window, image: (image, 0, 1, 0, 0)),
            *[pl.BlockSpec((None, n, h, wide), lambda window, image: (image, 0, 0, 0))] * len(features),
            *[tokens] * len(weights),
        ],
        out_specs=[tokens] * 2,
        out_shape=[jax.ShapeDtypeStruct((b, n), jnp.int32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="match",
    )(
        *(np.pad(part, ((0, 0), (0, tall - part.shape[1])), constant_values=n) for part in sides),
        qkv,
        *features,
        *weights,
    )
    return Matching(target, layer.tokens_out, order, keep_norm=nearest is not None and nearest.keep_norm)


def _match(
    rows_a_ref, rows_b_ref, k_ref, *refs,
    counts: tuple[int, int], width: int, removed: int, prefix: int, share: float, exact: bool
) -> None:  # fmt: skip
    """Match one window of one image.

    share: weight of the cosine of the features. refs: features, if these are compared; weights, if pairs have a cost;
    and two outputs.
    """
    *refs, target_ref, order_ref = refs
    x_ref, weight_ref = refs[: bool(share)], refs[bool(share) :]
    window, windows = pl.program_id(0), pl.num_programs(0)
    columns = jnp.arange(k_ref.shape[-1])
    index = jnp.arange(rows_a_ref.shape[0])
    there_a, there_b = index < counts[0], index < counts[1]
    rows_a, rows_b = rows_a_ref[...], rows_b_ref[...]
    heads = k_ref.shape[1]

    def part(ref, rows, there, head):
        mask = there[:, None] & (columns < width)[None, :]
        where = ref.at[rows[:, None], head, columns[None, :]]
        return plgpu.load(where, mask=mask, other=0.0).astype(jnp.float32)

    def inverse_norm(squares):
        return 1.0 / jnp.sqrt(jnp.maximum(squares, 1e-30))

    def products(a, b):
        # X6: float32 by tensor cores.
        precision = jax.lax.Precision.HIGHEST if exact else jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
        axes = (((1,), (1,)), ((), ()))
        return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)

    def cosine(ref):
        """Compare the heads side by side."""

        def add(head, totals):
            a, b = part(ref, rows_a, there_a, head), part(ref, rows_b, there_b, head)
            return totals[0] + products(a, b), totals[1] + (a * a).sum(axis=1), totals[2] + (b * b).sum(axis=1)

        zero = jnp.zeros(index.shape, jnp.float32)
        total, squares_a, squares_b = jax.lax.fori_loop(
            0, heads, add, (jnp.zeros((len(index), len(index)), jnp.float32), zero, zero)
        )
        return total * (inverse_norm(squares_a)[:, None] * inverse_norm(squares_b)[None, :])

    def directions(rows, there):
        """Scale the mean over heads to length 1."""
        first = jnp.zeros((len(index), len(columns)), jnp.float32)
        total = jax.lax.fori_loop(0, heads, lambda head, sums: sums + part(k_ref, rows, there, head), first) / heads
        return total * inverse_norm((total * total).sum(axis=1))[:, None]

    similarity = products(directions(rows_a, there_a), directions(rows_b, there_b))
    for ref in x_ref:
        similarity = (similarity + share * cosine(ref)) / (1.0 + share)
    # NaNs rank below any cosine, and padding below NaNs, so that every token has a place of its own.
    similarity = jnp.where(similarity == similarity, similarity, -2.0)
    similarity = jnp.where(there_b[None, :], similarity, -3.0)
    proposal = similarity.max(axis=1)
    best = jnp.where(similarity == proposal[:, None], index[None, :], len(index)).min(axis=1)
    if weight_ref:
        own = plgpu.load(weight_ref[0].at[rows_a], mask=there_a, other=1.0)
        others = plgpu.load(weight_ref[0].at[rows_b], mask=there_b, other=1.0)
        other = jnp.where(best[:, None] == index[None, :], others[None, :], 0.0).sum(axis=1)
        proposal = (proposal - 1.0) * own * other
        proposal = jnp.where(there_a, proposal, -jnp.inf)
    else:
        proposal = jnp.where(there_a, proposal, -4.0)

    before = index[None, :] < index[:, None]
    mine, other = proposal[:, None], proposal[None, :]
    rank = ((other > mine) | ((other == mine) & before)).astype(jnp.int32).sum(axis=1)
    stays = rank >= removed
    stays_too = jnp.where(stays & there_a, 1, 0)
    first = prefix + window * (sum(counts) - removed)  # of the window in the output
    behind_a = first + counts[0] - removed
    position = first + jnp.where(before, stays_too[None, :], 0).sum(axis=1)
    gone = prefix + windows * (sum(counts) - removed) + window * removed + rank
    for where, to, place, there in (
        (rows_a, jnp.where(stays, position, behind_a + best), jnp.where(stays, position, gone), there_a),
        (rows_b, behind_a + index, behind_a + index, there_b),
    ):
        plgpu.store(target_ref.at[where], to, mask=there)
        plgpu.store(order_ref.at[place], where, mask=there)
    if prefix:
        leading = jnp.arange(pl.next_power_of_2(prefix))
        mask = (leading < prefix) & (window == 0)
        plgpu.store(target_ref.at[leading], leading, mask=mask)
        plgpu.store(order_ref.at[leading], leading, mask=mask)
