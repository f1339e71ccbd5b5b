"""Attention, and the residual stream's norms and merging, on any device and in any dtype, by array operations.

`triton` has the same three functions for NVIDIA GPUs; `kernels` has both by name.

Shape letters: b batch, q queries, n tokens, t tokens out, d width, h heads, k head width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.models.merging import Matching, merge_tokens


class LayerNorm(NamedTuple):
    """What a norm is made of: scale and bias, float32 [d], and what is added to the variance."""

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
    logits = jnp.einsum("bhqk,bhnk->bhqn", q, k, preferred_element_type=jnp.float32)
    if size is not None:
        logits += jnp.log(size)[:, None, None, :]
    if q.dtype == jnp.float32:
        # Softmax, divided after the product, which for ViT-S/16 is three times smaller: a fifth faster on CPU.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
        y = jnp.einsum("bhqn,bhnk->bhqk", weights, v) / weights.sum(axis=-1, keepdims=True)
    else:
        y = jnp.einsum("bhqn,bhnk->bhqk", nn.softmax(logits).astype(q.dtype), v)
    return y.transpose(0, 2, 1, 3), k.astype(jnp.float32).mean(axis=1)


def add_and_norm(x: jax.Array, branch: jax.Array | None, norm: LayerNorm) -> tuple[jax.Array, jax.Array]:
    """The sum of x and branch, both [b, n, d], and its LayerNorm, in float32, both of x's dtype.

    branch: None for nothing to be added.
    """
    if branch is not None:
        x += branch
    # The fast variance, E[x^2] - E[x]^2, costs 8e-4 of accuracy where activations are large.
    y = x.astype(jnp.float32)
    y -= y.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + norm.eps)
    return x, (y * (factor * norm.scale[None, None]) + norm.bias[None, None]).astype(x.dtype)


def merge_and_norm(
    x: jax.Array, branch: jax.Array, size: jax.Array, matching: Matching, tokens_out: int, norm: LayerNorm
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens x + branch, [b, n, d], as their size-weighted means [b, t, d], the LayerNorm of these, and their sizes.

    size: float32 [b, n], as are the sizes returned, [b, t].
    """
    x, size = merge_tokens(x + branch, size, matching, tokens_out)
    return *add_and_norm(x, None, norm), size
