"""The model's memory-bound parts for NVIDIA GPUs, each in one pass over memory: Pallas kernels that Triton compiles.

XLA writes the logits of attention to memory, and cuDNN takes no bias that is the same for all queries; LayerNorm,
matching and merging pass over the tokens several times. `kernels` chooses them; `docs/performance.md` has what each is
worth. Forward only. `interpret` computes them without a GPU, slowly.

Shape letters: b batch, n tokens in, t tokens out, d width, h heads, k head width, w windows.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fcvit_jax.models import xla
from fcvit_jax.models.merging import Matching, match_tokens, window_order
from fcvit_jax.models.schedule import Layer

_QUERIES, _KEYS = 64, 64  # of a tile of attention
_MATCHED = 128  # tokens that propose, at most: their similarities to all others are in registers at once


def attend(
    parts: tuple[jax.Array, ...], size: jax.Array | None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Proportional attention as `xla.attend`, bfloat16 alone; that one is called where few queries come apart.

    The softmax is kept running over tiles of keys, as in arXiv 2205.14135, in float32. What comes with it, for `match`,
    is qkv itself.
    """
    if len(parts) != 1:
        return xla.attend(parts, size)
    (qkv,) = parts
    b, n, _, h, k = qkv.shape
    wide, tail = max(16, pl.next_power_of_2(k)), _tail(n, _KEYS)
    keys = n // _KEYS * _KEYS + tail
    bias = jnp.zeros((1, n), jnp.float32) if size is None else jnp.log2(size)

    def all_of(part: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, keys, None, None, wide), lambda i, head, image: (image, 0, part, head, 0))

    y = pl.pallas_call(
        functools.partial(_attend, n=n, width=k, tail=tail),
        grid=(pl.cdiv(n, _QUERIES), h, b),
        in_specs=[
            pl.BlockSpec((None, _QUERIES, None, None, wide), lambda i, head, image: (image, i, 0, head, 0)),
            all_of(1),
            all_of(2),
            pl.BlockSpec((None, keys), lambda i, head, image: (0 if size is None else image, 0)),
        ],
        out_specs=pl.BlockSpec((None, _QUERIES, None, wide), lambda i, head, image: (image, i, head, 0)),
        out_shape=jax.ShapeDtypeStruct((b, n, h, k), qkv.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend",
    )(qkv, qkv, qkv, bias)
    return y, qkv


def _attend(q_ref, k_ref, v_ref, bias_ref, o_ref, *, n: int, width: int, tail: int) -> None:
    columns = jnp.arange(q_ref.shape[1]) < width
    whole, start = n // _KEYS, pl.program_id(0) * _QUERIES

    def attend(queries: int) -> None:
        mine = (start + jnp.arange(queries) < n)[:, None] & columns[None, :]
        q = plgpu.load(q_ref.at[pl.dslice(0, queries), :], mask=mine, other=0.0)

        def over_keys(first, count: int, carry):
            summed, highest, weight = carry
            there, inside = pl.dslice(first, count), first + jnp.arange(count) < n
            mask = inside[:, None] & columns[None, :]
            keys = plgpu.load(k_ref.at[there, :], mask=mask, other=0.0)
            bias = plgpu.load(bias_ref.at[there], mask=inside, other=-jnp.inf)
            logits = plgpu.dot(q, keys.T) * (width**-0.5 * math.log2(math.e)) + bias[None, :]  # to the base of 2
            higher = jnp.maximum(highest, logits.max(axis=-1))
            shrink, weights = jnp.exp2(highest - higher), jnp.exp2(logits - higher[:, None])
            values = plgpu.load(v_ref.at[there, :], mask=mask, other=0.0)
            summed = summed * shrink[:, None] + plgpu.dot(weights.astype(values.dtype), values)
            return summed, higher, weight * shrink + weights.sum(axis=-1)

        carry = jnp.zeros(q.shape, jnp.float32), jnp.full(queries, -1e30, jnp.float32), jnp.zeros(queries, jnp.float32)
        carry = jax.lax.fori_loop(0, whole, lambda tile, carry: over_keys(tile * _KEYS, _KEYS, carry), carry)
        if tail:
            carry = over_keys(whole * _KEYS, tail, carry)
        summed, _, weight = carry
        plgpu.store(o_ref.at[pl.dslice(0, queries), :], (summed / weight[:, None]).astype(o_ref.dtype), mask=mine)

    few = _tail(n, _QUERIES)
    if 0 < few < _QUERIES:
        pl.when(start + few >= n)(lambda: attend(few))
        pl.when(start + few < n)(lambda: attend(_QUERIES))
    else:
        attend(_QUERIES)


def _tail(n: int, tile: int) -> int:
    """The size of a smaller tile for what is left of n behind whole ones: 197 need no fourth of 64. 0 for nothing."""
    return max(16, pl.next_power_of_2(n % tile)) if n % tile else 0  # 16: the least that Triton multiplies


def match(qkv: jax.Array, layer: Layer, prefix: int, interpret: bool = False) -> Matching:
    """Matching as `merging.match_tokens` of the keys' mean over the heads, a program for each window of an image.

    qkv: [b, n, 3, h, k]. That function itself is called where a window is too large for a program.
    """
    b, n, _, h, k = qkv.shape
    if layer.windows is None:
        windows, rows = 1, np.arange(n, dtype=np.int32)[None]
        first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    else:
        windows, patches = layer.windows, n - prefix
        order = window_order(*layer.regroup, patches) if layer.regroup else np.arange(patches, dtype=np.int32)
        rows, first_a, first_b = prefix + order.reshape(windows, -1), 0, 1
    sides = rows[:, first_a::2], rows[:, first_b::2]
    counts = sides[0].shape[1], sides[1].shape[1]
    wide, tall = max(16, pl.next_power_of_2(k)), max(16, pl.next_power_of_2(max(counts)))
    if tall > _MATCHED:
        # Behind the barrier, which keeps XLA from computing the mean twice.
        return match_tokens(jax.lax.optimization_barrier(qkv[:, :, 1].astype(jnp.float32).mean(axis=2)), layer, prefix)

    side = pl.BlockSpec((None, tall), lambda window, image: (window, 0))
    tokens = pl.BlockSpec((None, n), lambda window, image: (image, 0))
    return Matching(
        *pl.pallas_call(
            functools.partial(_match, counts=counts, width=k, removed=layer.removed, prefix=prefix, exact=interpret),
            grid=(windows, b),
            in_specs=[
                *[side] * 2,
                pl.BlockSpec((None, n, None, h, wide), lambda window, image: (image, 0, 1, 0, 0)),
            ],
            out_specs=[tokens] * 2,
            out_shape=[jax.ShapeDtypeStruct((b, n), jnp.int32)] * 2,
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
            interpret=interpret,
            name="match",
        )(*(np.pad(part, ((0, 0), (0, tall - part.shape[1])), constant_values=n) for part in sides), qkv)
    )


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


def add_and_norm(
    x: jax.Array, branch: jax.Array | None, norm: xla.Affine, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `xla.add_and_norm`."""
    b, n, d = x.shape
    wide = pl.next_power_of_2(d)
    rows = max(1, 4096 // wide)
    tile, vector = pl.BlockSpec((rows, wide), lambda i: (i, 0)), pl.BlockSpec((wide,), lambda i: (0,))
    flat = jax.ShapeDtypeStruct((b * n, d), x.dtype)
    parts = [x] if branch is None else [x, branch]
    *total, normed = pl.pallas_call(
        functools.partial(_add_and_norm, count=b * n, width=d, eps=norm.eps),
        grid=(pl.cdiv(b * n, rows),),
        in_specs=[vector, vector, *[tile] * len(parts)],
        out_specs=[tile] * len(parts),
        out_shape=[flat] * len(parts),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="add_and_norm",
    )(norm.scale, norm.bias, *(part.reshape(b * n, d) for part in parts))
    return total[0].reshape(x.shape) if total else x, normed.reshape(x.shape)


def _add_and_norm(scale_ref, bias_ref, x_ref, *refs, count: int, width: int, eps: float) -> None:
    *summing, normed_ref = refs
    rows, columns = (jnp.arange(size) for size in normed_ref.shape)
    mask = (pl.program_id(0) * len(rows) + rows < count)[:, None] & (columns < width)[None, :]
    x = plgpu.load(x_ref, mask=mask, other=0.0)
    if summing:
        branch_ref, sum_ref = summing
        branch = plgpu.load(branch_ref, mask=mask, other=0.0)
        x = (x.astype(jnp.float32) + branch.astype(jnp.float32)).astype(x.dtype)
        plgpu.store(sum_ref, x, mask=mask)
    plgpu.store(normed_ref, _normed(x, mask, scale_ref, bias_ref, columns < width, width, eps), mask=mask)


def _normed(x, mask, scale_ref, bias_ref, columns, width: int, eps: float):
    """LayerNorm of the rows of x, of which `mask` tells what is there."""
    scale, bias = (plgpu.load(ref, mask=columns, other=0.0)[None, :] for ref in (scale_ref, bias_ref))
    y = x.astype(jnp.float32)
    centred = jnp.where(mask, y - (y.sum(axis=1) / width)[:, None], 0.0)
    variance = (centred * centred).sum(axis=1) / width
    return (centred * (jax.lax.rsqrt(variance + eps)[:, None] * scale) + bias).astype(x.dtype)


def merge_and_norm(
    x: jax.Array,
    branch: jax.Array,
    size: jax.Array,
    matching: Matching,
    tokens_out: int,
    norm: xla.Affine,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.merge_and_norm`; sums run in float32."""
    b, n, d = x.shape
    wide = pl.next_power_of_2(d)
    rows = max(1, 4096 // wide)
    whole = pl.BlockSpec((None, n, wide), lambda i, image: (image, 0, 0))
    each = pl.BlockSpec((None, n), lambda i, image: (image, 0))
    vector = pl.BlockSpec((wide,), lambda i, image: (0,))
    tile = pl.BlockSpec((None, rows, wide), lambda i, image: (image, i, 0))
    merged = jax.ShapeDtypeStruct((b, tokens_out, d), x.dtype)
    mean, normed, total = pl.pallas_call(
        functools.partial(_merge_and_norm, width=d, eps=norm.eps, tokens_out=tokens_out),
        grid=(pl.cdiv(tokens_out, rows), b),
        in_specs=[whole, whole, each, each, each, vector, vector],
        out_specs=[tile, tile, pl.BlockSpec((None, rows), lambda i, image: (image, i))],
        out_shape=[merged, merged, jax.ShapeDtypeStruct((b, tokens_out), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_and_norm",
    )(x, branch, size, *matching, norm.scale, norm.bias)
    return mean, normed, total


def _merge_and_norm(
    x_ref, branch_ref, size_ref, target_ref, order_ref, scale_ref, bias_ref, mean_ref, normed_ref, total_ref,
    *, width: int, eps: float, tokens_out: int
) -> None:  # fmt: skip
    rows, columns = mean_ref.shape[0], jnp.arange(mean_ref.shape[1])
    first, removed = pl.program_id(0) * rows, order_ref.shape[0] - tokens_out
    slots = first + jnp.arange(rows)
    there = slots < tokens_out
    mask = there[:, None] & (columns < width)[None, :]
    staying = plgpu.load(order_ref.at[slots], mask=there, other=0)
    whole = staying[:, None], columns[None, :]
    kept = plgpu.load(x_ref.at[whole], mask=mask, other=0.0) + plgpu.load(branch_ref.at[whole], mask=mask, other=0.0)
    total = plgpu.load(size_ref.at[staying], mask=there, other=1.0)

    # Of those that are merged away, the ones that come into this tile, one after the other.
    index = jnp.arange(pl.next_power_of_2(removed))
    leaving = plgpu.load(order_ref.at[tokens_out + index], mask=index < removed, other=0)
    goals = plgpu.load(target_ref.at[leaving], mask=index < removed, other=-1)
    arriving = (first <= goals) & (goals < first + rows)

    def add(_, carry):
        last, summed, total = carry
        this = jnp.where(arriving & (index > last), index, len(index)).min()
        source = plgpu.load(order_ref.at[tokens_out + this])
        row = plgpu.load(x_ref.at[source, columns], mask=columns < width, other=0.0)
        row += plgpu.load(branch_ref.at[source, columns], mask=columns < width, other=0.0)
        weight = jnp.where(slots == plgpu.load(target_ref.at[source]), plgpu.load(size_ref.at[source]), 0.0)
        return this, summed + weight[:, None] * row.astype(jnp.float32)[None, :], total + weight

    carry = jnp.int32(-1), kept.astype(jnp.float32) * total[:, None], total
    _, summed, total = jax.lax.fori_loop(0, arriving.astype(jnp.int32).sum(), add, carry)
    mean = (summed / total[:, None]).astype(mean_ref.dtype)
    plgpu.store(mean_ref, mean, mask=mask)
    plgpu.store(normed_ref, _normed(mean, mask, scale_ref, bias_ref, columns < width, width, eps), mask=mask)
    plgpu.store(total_ref, total, mask=there)
