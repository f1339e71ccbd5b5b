"""Attention, norms and merging for NVIDIA GPUs, each in one pass over memory: Pallas kernels that Triton compiles.

XLA writes the logits of attention to memory, and cuDNN takes no bias that is the same for all queries. Forward only, in
bfloat16; docs/tuning_notes.md has the gain of each. `interpret` computes them without a GPU, slowly.

Shape letters: b batch, n tokens in, t tokens out, d width, h heads, k head width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fcvit_jax.models.merging import Matching

_QUERIES, _KEYS = 64, 64  # of a tile of attention


class Affine(NamedTuple):
    """A LayerNorm's scale and bias, float32 [d] each, and eps, a Python float that is added to the variance."""

    scale: jax.Array
    bias: jax.Array
    eps: float


def attend(qkv: jax.Array, size: jax.Array | None, interpret: bool = False) -> jax.Array:
    """Compute what `attention.attend` does, from queries, keys and values [b, n, 3, h, k], bfloat16.

    The softmax runs over tiles of keys in float32, as in arXiv 2205.14135. Returns [b, n, h, k].
    """
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
    return y


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
            logits = plgpu.dot(q, keys.T) * (width**-0.5 * math.log2(math.e)) + bias[None, :]  # base 2
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
    """Return the size of a smaller last tile, 0 if whole tiles cover n: 197 needs no fourth tile of 64."""
    return max(16, pl.next_power_of_2(n % tile)) if n % tile else 0  # 16: the smallest that Triton multiplies


def add_and_norm(
    x: jax.Array, branch: jax.Array | None, norm: Affine, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Add two arrays [b, n, d], the second optional; return the sum and its LayerNorm, both in the dtype of x."""
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
    """Apply LayerNorm to the rows of x, whose valid entries `mask` marks."""
    scale, bias = (plgpu.load(ref, mask=columns, other=0.0)[None, :] for ref in (scale_ref, bias_ref))
    y = x.astype(jnp.float32)
    centred = jnp.where(mask, y - (y.sum(axis=1) / width)[:, None], 0.0)
    variance = (centred * centred).sum(axis=1) / width
    return (centred * (jax.lax.rsqrt(variance + eps)[:, None] * scale) + bias).astype(x.dtype)


def merge_and_norm(
    x: jax.Array, branch: jax.Array, size: jax.Array, matching: Matching, norm: Affine, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Merge the tokens x + branch, [b, n, d], by size, as `merging.merge_tokens` does; sums run in float32.

    matching: has an order, no weights, no gains. Returns tokens [b, t, d], their LayerNorm, and sizes [b, t].
    """
    tokens_out = matching.tokens_out
    b, n, d = x.shape
    wide = pl.next_power_of_2(d)
    rows = max(1, 4096 // wide)
    whole = pl.BlockSpec((None, n, wide), lambda i, image: (image, 0, 0))
    each = pl.BlockSpec((None, n), lambda i, image: (image, 0))
    vector = pl.BlockSpec((wide,), lambda i, image: (0,))
    tile = pl.BlockSpec((None, rows, wide), lambda i, image: (image, i, 0))
    merged = jax.ShapeDtypeStruct((b, tokens_out, d), x.dtype)
    mean, normed, total = pl.pallas_call(
        functools.partial(
            _merge_and_norm, width=d, eps=norm.eps, tokens_out=tokens_out, keep_norm=bool(matching.keep_norm)
        ),
        grid=(pl.cdiv(tokens_out, rows), b),
        in_specs=[whole, whole, each, each, each, vector, vector],
        out_specs=[tile, tile, pl.BlockSpec((None, rows), lambda i, image: (image, i))],
        out_shape=[merged, merged, jax.ShapeDtypeStruct((b, tokens_out), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_and_norm",
    )(x, branch, size, matching.target, matching.order, norm.scale, norm.bias)
    return mean, normed, total


def _merge_and_norm(
    x_ref, branch_ref, size_ref, target_ref, order_ref, scale_ref, bias_ref, mean_ref, normed_ref, total_ref,
    *, width: int, eps: float, tokens_out: int, keep_norm: bool
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

    # Add the merged-away tokens that belong in this tile, one after the other.
    index = jnp.arange(pl.next_power_of_2(removed))
    leaving = plgpu.load(order_ref.at[tokens_out + index], mask=index < removed, other=0)
    goals = plgpu.load(target_ref.at[leaving], mask=index < removed, other=-1)
    arriving = (first <= goals) & (goals < first + rows)

    def add(_, carry):
        last, summed, total, length = carry
        this = jnp.where(arriving & (index > last), index, len(index)).min()
        source = plgpu.load(order_ref.at[tokens_out + this])
        row = plgpu.load(x_ref.at[source, columns], mask=columns < width, other=0.0)
        row += plgpu.load(branch_ref.at[source, columns], mask=columns < width, other=0.0)
        row = row.astype(jnp.float32)
        weight = jnp.where(slots == plgpu.load(target_ref.at[source]), plgpu.load(size_ref.at[source]), 0.0)
        length += weight * jnp.sqrt((row * row).sum()) if keep_norm else 0.0
        return this, summed + weight[:, None] * row[None, :], total + weight, length

    def norms(rows):
        return jnp.sqrt(jnp.maximum((rows * rows).sum(axis=1), 1e-30))

    own, kept = total, kept.astype(jnp.float32)
    carry = jnp.int32(-1), kept * own[:, None], own, own * norms(kept) if keep_norm else own
    _, summed, total, length = jax.lax.fori_loop(0, arriving.astype(jnp.int32).sum(), add, carry)
    mean = summed / total[:, None]
    if keep_norm:
        mean *= jnp.where(total == own, 1.0, length / total / norms(mean))[:, None]
    mean = mean.astype(mean_ref.dtype)
    plgpu.store(mean_ref, mean, mask=mask)
    plgpu.store(normed_ref, _normed(mean, mask, scale_ref, bias_ref, columns < width, width, eps), mask=mask)
    plgpu.store(total_ref, total, mask=there)
