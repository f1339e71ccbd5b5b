"""Attention, and the residual stream's norms and merging, on any device and in any dtype, by array operations.

`triton` has the same functions for NVIDIA GPUs, and one for matching; `kernels` has both by name.

Shape letters: b batch, q queries, n tokens, t tokens out, d width, h heads, k head width.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.compiling import in_one_axis, largest_divisor
from fcvit_jax.models.merging import Matching, merge_tokens

_LOGITS = 4 << 20  # of float32, 16 MiB


class Affine(NamedTuple):
    """What a LayerNorm is made of: scale and bias, float32 [d], and eps, a number of Python, added to the variance."""

    scale: jax.Array
    bias: jax.Array
    eps: float


def attend(parts: tuple[jax.Array, ...], size: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Proportional attention, softmax(q k' / sqrt(k) + log(size)) v, arXiv 2210.09461, equation 1; logits are float32.

    parts: queries, keys and values in one, ([b, n, 3, h, k],), or apart, ([b, q, 1, h, k], [b, n, 2, h, k]). size:
    float32 [b, n], or None where all are 1. Returns [b, q, h, k] of their dtype, and the keys' mean over the heads,
    float32 [b, n, k].
    """
    # Heads next to the batch: twice as fast on CPU as heads behind the tokens.
    q, k, v = (x for part in parts for x in part.transpose(2, 0, 3, 1, 4))
    q *= jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    bias = None if size is None else in_one_axis(jnp.log, size)[:, None, None, :]
    if q.dtype == jnp.float32:
        y = _attend_and_divide(q, k, v, bias)
    else:
        y = jax.lax.platform_dependent(q, k, v, bias, cpu=_attend_and_divide, default=_attend_by_softmax)
    return y.astype(q.dtype).transpose(0, 2, 1, 3), _mean_over_heads(k.astype(jnp.float32))


def _mean_over_heads(k: jax.Array) -> jax.Array:
    """[b, h, n, k] -> [b, n, k]. A reduction by XLA's library for CPUs took thirty times as long."""
    return functools.reduce(operator.add, (k[:, head] for head in range(k.shape[1]))) / k.shape[1]


def _attend_by_softmax(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # Of a single query XLA makes no matrix product, and else rounds what is summed up.
    sums = jnp.float32 if q.shape[2] == 1 else q.dtype
    weights = nn.softmax(_logits(q, k, bias)).astype(q.dtype)
    return jnp.einsum("...qn,...nk->...qk", weights, v, preferred_element_type=sums).astype(jnp.float32)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("...qk,...nk->...qn", q, k, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias


def _attend_and_divide(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attention, as float32, divided by the sums of its weights after the product, which is smaller: faster on CPU.

    The library that XLA has for CPUs does it in one pass for up to 256 keys. Up to 400 are attended in two halves, on
    every device, and more by a few heads at a time on CPU.
    """
    keys = k.shape[2]
    if keys <= 256:
        return _attend_at_once(q, k, v, bias)
    if keys > 400:
        return jax.lax.platform_dependent(q, k, v, bias, cpu=_attend_by_heads, default=_attend_at_once)
    half = keys // 2
    y1, total1, most1 = _weigh(q, k, v, bias, slice(half))
    y2, total2, most2 = _weigh(q, k, v, bias, slice(half, None))
    most = jnp.maximum(most1, most2)
    factor1, factor2 = jnp.exp(most1 - most), jnp.exp(most2 - most)
    return (y1 * factor1 + y2 * factor2) / (total1 * factor1 + total2 * factor2)


def _weigh(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, keys: slice
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted values and sums of weights of these keys, both less by the factor exp(most), and most."""
    logits = _logits(q, k[..., keys, :], None if bias is None else bias[..., keys])
    most = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - most)
    y = jnp.einsum("...qn,...nk->...qk", weights.astype(v.dtype), v[..., keys, :], preferred_element_type=jnp.float32)
    return y, weights.sum(axis=-1, keepdims=True), most


def _attend_at_once(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    y, total, _ = _weigh(q, k, v, bias, slice(None))
    return y / total


def _attend_by_heads(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """By as many heads at a time as have at most 16 MiB of logits: these stay in the caches, and in heaps of glibc.

    Images and heads are one axis there: with one for each, XLA would copy the logits. Images are its outer part, so
    that they can be spread over devices.
    """
    batch, heads, queries, width = q.shape
    together = largest_divisor(heads, _LOGITS // (batch * queries * k.shape[2]))

    def group(x: jax.Array) -> jax.Array:
        """[b, h, ...] -> [groups, b * together, ...]."""
        x = jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)
        return x.reshape(len(x), batch * together, *x.shape[3:])

    if bias is not None:
        (bias,) = group(jnp.broadcast_to(bias, (batch, together, *bias.shape[2:])))
    y = jax.lax.map(lambda each: _attend_at_once(*each, bias=bias), tuple(group(x) for x in (q, k, v)))
    y = y.reshape(-1, batch, together, queries, width)
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)


def add_and_norm(x: jax.Array, branch: jax.Array | None, norm: Affine) -> tuple[jax.Array, jax.Array]:
    """The sum of x and branch, both [b, n, d], and its LayerNorm, in float32, both of x's dtype.

    branch: None for nothing to be added.
    """
    if branch is not None:
        x += branch
    # The fast variance, E[x^2] - E[x]^2, costs 8e-4 of accuracy where activations are large.
    y = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # faster to compile, as `in_one_axis`
    y -= y.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + norm.eps)
    return x, (y * (factor * norm.scale[None]) + norm.bias[None]).astype(x.dtype).reshape(x.shape)


def merge_and_norm(
    x: jax.Array, branch: jax.Array, size: jax.Array, matching: Matching, tokens_out: int, norm: Affine
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens x + branch, [b, n, d], as their size-weighted means [b, t, d], the LayerNorm of these, and their sizes.

    size: float32 [b, n], as are the sizes returned, [b, t].
    """
    x, size = merge_tokens(x + branch, size, matching, tokens_out)
    return *add_and_norm(x, None, norm), size
