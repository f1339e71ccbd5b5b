"""Dense layers, MLP and LayerNorm, on tokens [b, n, d].

Parameters are float32, or cast beforehand (`vit.cast_params`); `dtype` is that of the computation. Shape letters: b
batch, n tokens, d width, m MLP width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.compiling import einsum
from fcvit_jax.models.config import ViTConfig


class Linear(nn.Module):
    """activation(x W + b): [b, n, d] -> [b, n, features]; the features from `unbiased[0]` to `unbiased[1]` get no b."""

    features: int
    dtype: Any
    use_bias: bool = True
    activation: Callable[[jax.Array], jax.Array] | None = None
    unbiased: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        """Compute the features of these columns."""
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
        bias, (start, stop) = None, self.unbiased
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features - (stop - start),))
            if stop:
                bias = jnp.concatenate([bias[:start], jnp.zeros(stop - start, bias.dtype), bias[start:]])
            bias = bias[columns].astype(self.dtype)
        return multiply(x, kernel.astype(self.dtype)[:, columns], bias, self.activation)


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Compute activation([b, n, d] @ [d, m] + [m]), with all tokens in one axis.

    With two contracted axes in the kernel's gradient, XLA:CPU materialises a transposed copy and recomputes the
    activations into it. The reshapes also keep XLA from computing GELU in place, unvectorised, in a sixth more time.
    """

    def finish(sums: jax.Array) -> jax.Array:
        y = sums.reshape(*x.shape[:-1], -1)
        y = y if bias is None else y + bias.astype(y.dtype)[None, None]
        return activation(y) if activation else y

    return einsum("nd,dm->nm", x.reshape(-1, x.shape[-1]), kernel, finish)


class MLP(nn.Module):
    """[b, n, d] -> [b, n, m] -> [b, n, d], with GELU between, or gated: SwiGLU, arXiv 2002.05202, silu(x W) * (x V)."""

    config: ViTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        if config.gated:  # the gate's columns come first
            gate, x = jnp.split(Linear(2 * config.mlp_dim, self.dtype, name="fc1")(x), 2, axis=-1)
            x = nn.silu(gate) * x
        else:
            x = Linear(config.mlp_dim, self.dtype, activation=_ACTIVATIONS[config.gelu], name="fc1")(x)
        x = LayerNorm(config.norm_eps, name="norm")(x) if config.mlp_norm else x
        return Linear(config.embed_dim, self.dtype, name="fc2")(x)


def _exact_gelu(x: jax.Array) -> jax.Array:
    # By erf, as PyTorch: `jax.nn.gelu` uses erfc, a polynomial sixteen times as long. In float32, as 1 + erf cancels.
    half = x.astype(jnp.float32) * 0.5
    return (half * (1.0 + jax.lax.erf(half * math.sqrt(2)))).astype(x.dtype)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact": _exact_gelu,
    "tanh": partial(nn.gelu, approximate=True),
    "quick": lambda x: x * nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
}


class LayerNorm(nn.Module):
    """LayerNorm over the width, computed in float32 and returned in the dtype of the input."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = norm_params(self, x.shape[-1])
        # The fast variance, E[x^2] - E[x]^2, costs 8e-4 of accuracy where activations are large.
        y = x.astype(jnp.float32).reshape(-1, x.shape[-1])  # compiles faster than with three axes
        y -= y.mean(axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * (factor * scale[None]) + bias[None]).astype(x.dtype).reshape(x.shape)


def norm_params(module: nn.Module, width: int) -> tuple[jax.Array, jax.Array]:
    """Declare a LayerNorm's scale and bias, float32 [width] each, as parameters of a module."""
    return module.param("scale", nn.initializers.ones, (width,)), module.param("bias", nn.initializers.zeros, (width,))


def scale_branch(module: nn.Module, name: str, y: jax.Array, config: ViTConfig) -> jax.Array:
    """Multiply a residual branch [b, n, d] by LayerScale's gamma, a parameter of the module, if the model has it."""
    if config.layer_scale is None:
        return y
    gamma = module.param(name, nn.initializers.constant(config.layer_scale), (config.embed_dim,))
    return y * gamma.astype(y.dtype)[None, None]
