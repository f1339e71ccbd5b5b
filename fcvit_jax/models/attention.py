"""Multi-head self-attention, proportional to the tokens' sizes, by array operations on any device and in any dtype.

Shape letters: b batch, n tokens, d width, h heads, w head width, q queries.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.compiling import largest_divisor
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.layers import MLP, LayerNorm, Linear
from fcvit_jax.models.positions import rotate
from fcvit_jax.models.rules import Attended

_LOGITS = 4 << 20  # of float32: 16 MiB


class Attention(nn.Module):
    """Self-attention of tokens [b, n, d]; with `queries`, only the first `queries` tokens attend, to all.

    With `size`, float32 [b, n], attention is proportional to it, unless the configuration turns that off. With
    `coordinates`, float32 [b, n, 2] or [1, n, 2], positions are rotary; the returned q and k are not rotated.
    """

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: jax.Array, size: jax.Array | None, coordinates: jax.Array | None = None, queries: int = 0
    ) -> Attended:
        config, (batch, _, width) = self.config, x.shape
        qkv, split = (
            project_qkv(config, self.dtype),
            partial(split_heads, heads=config.num_heads, width=config.head_dim),
        )
        if queries:
            (q,), (k, v) = split(qkv(x[:, :queries], slice(width))), split(qkv(x, slice(width, None)))
        else:
            q, k, v = split(qkv(x))
        turned = None
        if config.rotary and coordinates is not None:
            mine = coordinates[:, : queries or None]
            turned = rotate(q, mine, config.rotary), rotate(k, coordinates, config.rotary)
        size = size if config.proportional_attention else None
        y = attend(*(turned or (q, k)), v, size)
        y = y.transpose(0, 2, 1, 3).reshape(batch, -1, width)
        y = LayerNorm(config.norm_eps, name="norm")(y) if config.attn_norm else y
        return Attended(Linear(width, self.dtype, name="proj")(y), q, k, v, size, turned)


class AttentionPool(nn.Module):
    """Attention pooling, [b, n, d] -> [b, d]: a learned probe attends, y + MLP(norm(y)). "MAP", arXiv 2106.04560.

    With `size`, float32 [b, n], its attention is proportional to that too.
    """

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array | None) -> jax.Array:
        config, (batch, _, width) = self.config, x.shape
        heads, qkv = config.map_heads or config.num_heads, Linear(3 * width, self.dtype, name="qkv")
        split = partial(split_heads, heads=heads, width=width // heads)
        probe = self.param("probe", nn.initializers.normal(width**-0.5), (1, 1, width)).astype(self.dtype)
        (q,), (k, v) = split(qkv(probe, slice(width))), split(qkv(x, slice(width, None)))
        q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
        y = attend(q, k, v, size if config.proportional_attention else None).reshape(batch, 1, width)
        y = Linear(width, self.dtype, name="proj")(y)
        mlp = dataclasses.replace(config, mlp_dim=config.map_mlp_dim or config.mlp_dim, gated=False, mlp_norm=False)
        return (y + MLP(mlp, self.dtype, name="mlp")(LayerNorm(config.norm_eps, name="norm")(y)))[:, 0]


def project_qkv(config: ViTConfig, dtype: Any) -> Linear:
    """Create the projection to queries, keys and values side by side, [b, n, d] -> [b, n, 3 d]: submodule "qkv"."""
    width = config.embed_dim
    keys = (0, 0) if config.key_bias else (width, 2 * width)
    return Linear(3 * width, dtype, config.qkv_bias, unbiased=keys, name="qkv")


def split_heads(y: jax.Array, heads: int, width: int) -> jax.Array:
    """Split [b, n, parts * h * w] into [parts, b, h, n, w]: heads next to the batch are twice as fast on CPU."""
    return y.reshape(*y.shape[:2], -1, heads, width).transpose(2, 0, 3, 1, 4)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, size: jax.Array | None) -> jax.Array:
    """Compute softmax(q k' / sqrt(w) + log(size)) v, arXiv 2210.09461, equation 1; logits are float32.

    q: [b, h, q, w]; k, v: [b, h, n, w]; size: float32 [b, n], or None for ones. Returns [b, h, q, w] in the dtype of q.
    """
    q *= jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    bias = None if size is None else jnp.log(size)[:, None, None, :]
    if q.dtype == jnp.float32:
        y = _attend_and_divide(q, k, v, bias)
    else:
        y = jax.lax.platform_dependent(q, k, v, bias, cpu=_attend_and_divide, default=_attend_by_softmax)
    return y.astype(q.dtype)


def _attend_by_softmax(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    # XLA computes a single query without a matrix product, and would round the addends to bfloat16.
    sums = jnp.float32 if q.shape[2] == 1 else q.dtype
    weights = nn.softmax(_logits(q, k, bias)).astype(q.dtype)
    return jnp.einsum("...qn,...nk->...qk", weights, v, preferred_element_type=sums).astype(jnp.float32)


def _logits(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("...qk,...nk->...qn", q, k, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias


def _attend_and_divide(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attend in float32, dividing by the weights' sums after the product, which is smaller: faster on CPU.

    XLA's library for CPUs handles up to 256 keys in one pass. Up to 400 keys are attended in two halves, on every
    device; more, on CPU, a few heads at a time.
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
    """Compute the weighted values and the sums of weights of these keys, both divided by exp(most), and most."""
    logits = _logits(q, k[..., keys, :], None if bias is None else bias[..., keys])
    most = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - most)
    y = jnp.einsum("...qn,...nk->...qk", weights.astype(v.dtype), v[..., keys, :], preferred_element_type=jnp.float32)
    return y, weights.sum(axis=-1, keepdims=True), most


def _attend_at_once(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    y, total, _ = _weigh(q, k, v, bias, slice(None))
    return y / total


def _attend_by_heads(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attend with as many heads at a time, or queries of one head, as have at most 16 MiB of logits.

    Such logits stay in the caches, and memory grows no faster than the tokens. Images and heads share an axis, since
    XLA would copy the logits otherwise. Images are its outer part, so that they can be spread over devices.
    """
    batch, heads, queries, width = q.shape
    a_head = batch * queries * k.shape[2]
    together, parts = largest_divisor(heads, _LOGITS // a_head), math.ceil(a_head / _LOGITS)

    def group(x: jax.Array) -> jax.Array:
        """Reshape [b, h, ...] to [groups, b * together, ...]."""
        x = jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)
        return x.reshape(len(x), batch * together, *x.shape[3:])

    if bias is not None:
        (bias,) = group(jnp.broadcast_to(bias, (batch, together, *bias.shape[2:])))

    def attend_group(group: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v = group
        if parts == 1:
            return _attend_at_once(q, k, v, bias)
        q = jnp.pad(q, ((0, 0), (0, -queries % parts), (0, 0))).reshape(len(q), parts, -1, width)
        y = jax.lax.map(lambda q: _attend_at_once(q, k, v, bias), jnp.moveaxis(q, 1, 0))
        return jnp.moveaxis(y, 0, 1).reshape(len(k), -1, width)[:, :queries]

    y = jax.lax.map(attend_group, tuple(group(x) for x in (q, k, v)))
    y = y.reshape(-1, batch, together, queries, width)
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)
