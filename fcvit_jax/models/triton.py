"""The model's memory-bound parts for NVIDIA GPUs, each in one pass over memory: Pallas kernels that Triton compiles.

XLA writes the logits of attention to memory, and cuDNN takes no bias that is the same for all queries; LayerNorm and
merging pass over the tokens several times. `kernels` chooses them; `docs/performance.md` has what each is worth.
Forward only. `interpret` computes them without a GPU, slowly.

Shape letters: b batch, n tokens in, t tokens out, d width, h heads, k head width.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from fcvit_jax.models import xla
from fcvit_jax.models.merging import Matching, in_order, take_rows

_QUERIES, _KEYS = 64, 64  # of a tile of attention


def attend(
    parts: tuple[jax.Array, ...], size: jax.Array | None, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Proportional attention as `xla.attend`, bfloat16 alone; that one is called where few queries come apart.

    The softmax is kept running over tiles of keys, as in arXiv 2205.14135, in float32.
    """
    if len(parts) != 1:
        return xla.attend(parts, size)
    (qkv,) = parts
    b, n, _, h, k = qkv.shape
    wide, whole, rest = max(16, pl.next_power_of_2(k)), n // _KEYS, n % _KEYS  # 16: the least that Triton multiplies
    tail = max(16, pl.next_power_of_2(rest)) if rest else 0  # the last keys: 197 need no fourth tile of 64
    keys = whole * _KEYS + tail
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
    # Behind the barrier, which keeps XLA from computing the mean twice.
    return y, jax.lax.optimization_barrier(qkv[:, :, 1].astype(jnp.float32).mean(axis=2))


def _attend(q_ref, k_ref, v_ref, bias_ref, o_ref, *, n: int, width: int, tail: int) -> None:
    columns = jnp.arange(q_ref.shape[1]) < width
    mine = (pl.program_id(0) * _QUERIES + jnp.arange(_QUERIES) < n)[:, None] & columns[None, :]
    q = plgpu.load(q_ref, mask=mine, other=0.0)

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

    carry = jnp.zeros(q.shape, jnp.float32), jnp.full(_QUERIES, -1e30, jnp.float32), jnp.zeros(_QUERIES, jnp.float32)
    whole = n // _KEYS
    carry = jax.lax.fori_loop(0, whole, lambda tile, carry: over_keys(tile * _KEYS, _KEYS, carry), carry)
    if tail:
        carry = over_keys(whole * _KEYS, tail, carry)
    summed, _, weight = carry
    plgpu.store(o_ref, (summed / weight[:, None]).astype(o_ref.dtype), mask=mine)


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
    order = in_order(matching)
    keep, source = order[:, :tokens_out], order[:, tokens_out:]
    target = take_rows(matching.target, source)

    whole = pl.BlockSpec((None, n, wide), lambda i, image: (image, 0, 0))
    indices = [
        pl.BlockSpec((None, part.shape[1]), lambda i, image: (image, 0)) for part in (size, keep, source, target)
    ]
    vector = pl.BlockSpec((wide,), lambda i, image: (0,))
    tile = pl.BlockSpec((None, rows, wide), lambda i, image: (image, i, 0))
    merged = jax.ShapeDtypeStruct((b, tokens_out, d), x.dtype)
    mean, normed, total = pl.pallas_call(
        functools.partial(_merge_and_norm, width=d, eps=norm.eps, tokens_out=tokens_out),
        grid=(pl.cdiv(tokens_out, rows), b),
        in_specs=[whole, whole, *indices, vector, vector],
        out_specs=[tile, tile, pl.BlockSpec((None, rows), lambda i, image: (image, i))],
        out_shape=[merged, merged, jax.ShapeDtypeStruct((b, tokens_out), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_and_norm",
    )(x, branch, size, keep, source, target, norm.scale, norm.bias)
    return mean, normed, total


def _merge_and_norm(
    x_ref, branch_ref, size_ref, keep_ref, source_ref, target_ref, scale_ref, bias_ref, mean_ref, normed_ref, total_ref,
    *, width: int, eps: float, tokens_out: int
) -> None:  # fmt: skip
    rows, columns = mean_ref.shape[0], jnp.arange(mean_ref.shape[1]) < width
    first = pl.program_id(0) * rows
    slots = first + jnp.arange(rows)
    there = slots < tokens_out
    mask = there[:, None] & columns[None, :]
    keep = plgpu.load(keep_ref.at[pl.dslice(first, rows)], mask=there, other=0)
    whole = (keep[:, None], jnp.arange(mean_ref.shape[1])[None, :])
    kept = plgpu.load(x_ref.at[whole], mask=mask, other=0.0) + plgpu.load(branch_ref.at[whole], mask=mask, other=0.0)
    total = plgpu.load(size_ref.at[keep], mask=there, other=1.0)

    def add(index, carry):
        target = plgpu.load(target_ref.at[index])

        def one(carry):
            summed, total = carry
            source = plgpu.load(source_ref.at[index])
            row = plgpu.load(x_ref.at[source, :], mask=columns, other=0.0)
            row += plgpu.load(branch_ref.at[source, :], mask=columns, other=0.0)
            weight = jnp.where(slots == target, plgpu.load(size_ref.at[source]), 0.0)
            return summed + weight[:, None] * row.astype(jnp.float32)[None, :], total + weight

        return jax.lax.cond((first <= target) & (target < first + rows), one, lambda carry: carry, carry)

    carry = kept.astype(jnp.float32) * total[:, None], total
    summed, total = jax.lax.fori_loop(0, source_ref.shape[0], add, carry)
    mean = (summed / total[:, None]).astype(mean_ref.dtype)
    plgpu.store(mean_ref, mean, mask=mask)
    plgpu.store(normed_ref, _normed(mean, mask, scale_ref, bias_ref, columns, width, eps), mask=mask)
    plgpu.store(total_ref, total, mask=there)
