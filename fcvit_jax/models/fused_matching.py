"""Token Merging's matching for NVIDIA GPUs: one Pallas kernel that Triton compiles, where XLA makes a dozen programs.

Shape letters: b batch, n tokens, h heads, k head width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fcvit_jax.models.merging import Matching
from fcvit_jax.models.rules import Layer, match_tokens, split_tokens

_MOST = 128  # tokens that propose, and that are proposed to


def match(qkv: jax.Array, layer: Layer, prefix: int, interpret: bool = False) -> Matching:
    """Match as `rules.ToMe` does, by a program for each window of an image.

    qkv: [b, n, 3, h, k], bfloat16. `rules.match_tokens` is called instead if more than 128 tokens of a window propose,
    or are proposed to: all similarities of a window are in registers at once.
    """
    b, n, _, h, k = qkv.shape
    sides = split_tokens(layer, prefix)
    windows = len(sides[0])
    counts = sides[0].shape[1], sides[1].shape[1]
    wide, tall = max(16, pl.next_power_of_2(k)), max(16, pl.next_power_of_2(max(counts)))
    if tall > _MOST:
        # Behind the barrier, which keeps XLA from computing the mean twice.
        return match_tokens(jax.lax.optimization_barrier(qkv[:, :, 1].astype(jnp.float32).mean(axis=2)), layer, prefix)

    side = pl.BlockSpec((None, tall), lambda window, image: (window, 0))
    tokens = pl.BlockSpec((None, n), lambda window, image: (image, 0))
    target, order = pl.pallas_call(
        functools.partial(_match, counts=counts, width=k, removed=layer.removed, prefix=prefix, exact=interpret),
        grid=(windows, b),
        in_specs=[side, side, pl.BlockSpec((None, n, None, h, wide), lambda window, image: (image, 0, 1, 0, 0))],
        out_specs=[tokens] * 2,
        out_shape=[jax.ShapeDtypeStruct((b, n), jnp.int32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="match",
    )(*(np.pad(part, ((0, 0), (0, tall - part.shape[1])), constant_values=n) for part in sides), qkv)
    return Matching(target, layer.tokens_out, order)


def _match(
    rows_a_ref, rows_b_ref, k_ref, target_ref, order_ref,
    *, counts: tuple[int, int], width: int, removed: int, prefix: int, exact: bool
) -> None:  # fmt: skip
    window, windows = pl.program_id(0), pl.num_programs(0)
    columns = jnp.arange(k_ref.shape[-1])
    index = jnp.arange(rows_a_ref.shape[0])
    there_a, there_b = index < counts[0], index < counts[1]

    def directions(rows, there):
        where = rows[:, None], columns[None, :]
        mask = there[:, None] & (columns < width)[None, :]

        def add(head, total):
            return total + plgpu.load(k_ref.at[where[0], head, where[1]], mask=mask, other=0.0).astype(jnp.float32)

        total = jax.lax.fori_loop(0, k_ref.shape[1], add, jnp.zeros(mask.shape, jnp.float32)) / k_ref.shape[1]
        return total / jnp.sqrt(jnp.maximum((total * total).sum(axis=1), 1e-30))[:, None]

    rows_a, rows_b = rows_a_ref[...], rows_b_ref[...]
    similarity = jax.lax.dot_general(
        directions(rows_a, there_a),
        directions(rows_b, there_b),
        (((1,), (1,)), ((), ())),
        # The latter: float32 by tensor cores.
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
        preferred_element_type=jnp.float32,
    )
    # Below any cosine: what is no number, and then what is not there. Every token so has a place of its own.
    similarity = jnp.where(similarity == similarity, similarity, -2.0)
    similarity = jnp.where(there_b[None, :], similarity, -3.0)
    proposal = similarity.max(axis=1)
    best = jnp.where(similarity == proposal[:, None], index[None, :], len(index)).min(axis=1)
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
