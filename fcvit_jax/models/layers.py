"""What a block of the Vision Transformer is made of: attention, MLP and norms, on tokens [b, n, d].

Parameters are float32, or cast beforehand (`vit.cast_params`); `dtype` is that of the computation. Shape letters: b
batch, n tokens, t tokens after merging, d width, h heads, k head width, m MLP width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.compiling import einsum
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.kernels import kernels_of
from fcvit_jax.models.merging import Matching
from fcvit_jax.models.xla import Affine


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """activation([b, n, d] @ [d, m] + [m]), with all tokens in one axis: the kernel's gradient is then a plain product.

    Of a product over two axes XLA on CPU transposes a copy, into which it computes the activations anew.
    And the reshapes keep XLA from computing GELU in place, unvectorised, which makes an MLP a sixth slower.
    """

    def finish(sums: jax.Array) -> jax.Array:
        y = sums.reshape(*x.shape[:-1], -1)
        return activation(y if bias is None else y + bias.astype(y.dtype)[None, None])

    return einsum("nd,dm->nm", x.reshape(-1, x.shape[-1]), kernel, finish)


_init = nn.initializers.xavier_uniform()


class Dense(nn.Module):
    """[b, n, d] -> [b, n, features], and an elementwise function of that."""

    features: int
    dtype: Any
    activation: Callable[[jax.Array], jax.Array] = lambda x: x

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _init, (x.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return multiply(x, kernel, bias, self.activation)


def _exact_gelu(x: jax.Array) -> jax.Array:
    # By erf, as PyTorch; `jax.nn.gelu` goes by erfc, a sixteen times longer polynomial. In float32: 1 + erf cancels.
    half = x.astype(jnp.float32) * 0.5
    return (half * (1.0 + jax.lax.erf(half * math.sqrt(2)))).astype(x.dtype)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact": _exact_gelu,
    "tanh": partial(nn.gelu, approximate=True),
    "quick": lambda x: x * nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
}


class Stream(NamedTuple):
    """The residual stream: x [b, n, d], and what is still to be added to it, together with the norm that comes next."""

    x: jax.Array
    branch: jax.Array | None = None

    @property
    def tokens(self) -> jax.Array:
        return self.x if self.branch is None else self.x + self.branch


class Norm(nn.Module):
    """LayerNorm of a residual stream, in float32 whatever its dtype."""

    config: ViTConfig
    kernels: str = "xla"

    def setup(self) -> None:
        shape = (self.config.embed_dim,)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        self.affine = Affine(scale, bias, self.config.norm_eps)

    def __call__(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
        """Tokens [b, n, d], and the same normed."""
        return kernels_of(self.kernels).add_and_norm(*stream, self.affine)

    def of_merged(
        self, stream: Stream, size: jax.Array, matching: Matching, tokens_out: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens after merging [b, t, d], the same normed, and their sizes [b, t]."""
        return kernels_of(self.kernels).merge_and_norm(*stream, size, matching, tokens_out, self.affine)


class Attention(nn.Module):
    """Multi-head self-attention in [b, n, d], of the first `queries` tokens, q of them, to all.

    Returns the output [b, q, d], and what `match` of the same kernels compares tokens by. With `size` [b, n], attention
    is proportional to it, unless the configuration says otherwise.
    """

    config: ViTConfig
    dtype: Any
    kernels: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array | None, queries: int) -> tuple[jax.Array, jax.Array]:
        config = self.config
        batch, _, width = x.shape
        parts = QKV(config, self.dtype, name="qkv")(x, queries)
        y, metric = kernels_of(self.kernels).attend(parts, size if config.proportional_attention else None)
        y = y.reshape(batch, queries, width)
        return Dense(width, self.dtype, name="proj")(y), metric


class QKV(nn.Module):
    """Queries, keys and values of all tokens, ([b, n, 3, h, k],), from [b, n, d].

    Where only the first q tokens ask, ([b, q, 1, h, k], [b, n, 2, h, k]).
    """

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, queries: int) -> tuple[jax.Array, ...]:
        width, heads = self.config.embed_dim, self.config.num_heads
        kernel = self.param("kernel", _init, (width, 3 * width)).astype(self.dtype)
        bias = jnp.zeros(3 * width, self.dtype)
        if self.config.qkv_bias:
            bias = self.param("bias", nn.initializers.zeros, (3 * width,)).astype(self.dtype)

        def project(x: jax.Array, columns: slice) -> jax.Array:
            y = multiply(x, kernel[:, columns], bias[columns])
            return y.reshape(*y.shape[:2], -1, heads, width // heads)

        if queries == x.shape[1]:
            return (project(x, slice(None)),)
        return project(x[:, :queries], slice(width)), project(x, slice(width, None))


class MLP(nn.Module):
    """[b, n, d] -> [b, n, m] -> GELU -> [b, n, d]."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense(self.config.mlp_dim, self.dtype, _ACTIVATIONS[self.config.gelu], name="fc1")(x)
        return Dense(self.config.embed_dim, self.dtype, name="fc2")(x)
