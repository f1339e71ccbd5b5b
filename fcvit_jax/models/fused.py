"""The transformer blocks as fused programs for NVIDIA GPUs, and the choice between them and the plain blocks.

They compute what `vit.Block` does, for inference in bfloat16. A residual branch is added together with the next norm.
Shape letters: b batch, n tokens, d width.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import InputError
from fcvit_jax.models.attention import Attention, project_qkv
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.layers import MLP, Linear, norm_params, scale_branch
from fcvit_jax.models.merging import Matching
from fcvit_jax.models.rules import Layer, Nearest, ToMe
from fcvit_jax.models.schedule import MergeSchedule

# "xla": the plain blocks. "triton": these, on NVIDIA GPUs. "interpreted": these, without a GPU, slowly.
KERNELS = ("xla", "triton", "interpreted")


def choose_kernels(dtype: Any, devices: Iterable[Any], schedule: MergeSchedule, config: ViTConfig) -> str:
    """Choose the fastest of `KERNELS` for inference: "triton" on NVIDIA GPUs in bfloat16, if it has the rules.

    Models with rotary positions, or with a norm after attention, have no such programs.

    XLA cannot split these programs, so each device computes its own images (`compiling.on_each_device`). This has not
    been run on several GPUs yet.
    """

    def runs_triton(device: Any) -> bool:
        capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are named otherwise
        return device.platform == "gpu" and bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0

    fits = dtype == jnp.bfloat16 and _without_kernels(schedule, config) is None
    return "triton" if fits and all(map(runs_triton, devices)) else "xla"


def check(kernels: str, dtype: Any, train: bool, schedule: MergeSchedule, config: ViTConfig) -> None:
    """Raise InputError if these kernels cannot run a model with this dtype, mode and schedule."""
    if kernels not in KERNELS:
        raise InputError(f"kernels is {kernels!r}: choose one of {', '.join(KERNELS)}")
    if train or dtype != jnp.bfloat16:
        raise InputError(f"kernels is {kernels!r}: it is for inference in bfloat16 only; choose 'xla'")
    if what := _without_kernels(schedule, config):
        raise InputError(f"kernels is {kernels!r}: it has no program for {what}; choose 'xla'")


def _without_kernels(schedule: MergeSchedule, config: ViTConfig) -> str | None:
    """Name the first part of a model or a schedule that has no fused program; None if all parts have one."""
    if config.rotary or config.attn_norm:
        return "rotary positions" if config.rotary else "a norm after attention"
    return next((f"the merge rule {rule}" for rule in schedule.rules if type(rule) not in (ToMe, Nearest)), None)


class Stream(NamedTuple):
    """The residual stream: x [b, n, d], and the branch that the next norm adds to it."""

    x: jax.Array
    branch: Any = None

    @property
    def total(self) -> jax.Array:
        return self.x if self.branch is None else self.x + self.branch


def run_blocks(
    config: ViTConfig, x: jax.Array, plan: tuple[Layer, ...], interpret: bool
) -> tuple[jax.Array, list[tuple[jax.Array, jax.Array, Matching | None]]]:
    """Apply the blocks as `ViT._run_blocks` does. Call it in a compact method: its module gets the parameters."""
    stream, size, pooled, layers = Stream(x), jnp.ones(x.shape[:2], jnp.float32), None, []
    for index, layer in enumerate(plan):
        block = FusedBlock(config, interpret, name=f"blocks_{index}")
        if index == config.depth - 1 and config.pooled_tokens:
            pooled, _, _ = block(stream, size, layer, config.pooled_tokens)
        stream, size, matching = block(stream, size, layer)
        layers.append((stream.total, size, matching))
    return (pooled or stream).total, layers


class FusedBlock(nn.Module):
    """Attention, merging and MLP; with `only`, for the first `only` tokens and without merging."""

    config: ViTConfig
    interpret: bool

    @nn.compact
    def __call__(
        self, stream: Stream, size: jax.Array, layer: Layer, only: int = 0
    ) -> tuple[Stream, jax.Array, Matching | None]:
        # Imported here: JAX builds for other devices may lack Pallas's Triton backend.
        from fcvit_jax.models.fused_kernels import add_and_norm, merge_and_norm
        from fcvit_jax.models.fused_matching import match

        config, matching = self.config, None
        norm1, norm2 = (NormParams(config, name=name)() for name in ("norm1", "norm2"))
        x, normed = add_and_norm(*stream, norm1, self.interpret)
        sizes, qkv = size if layer.tokens_in < config.num_tokens else None, None
        if only:
            y = Attention(config, jnp.bfloat16, name="attn")(normed, sizes, queries=only).y
        else:
            y, qkv = FusedAttention(config, self.interpret, name="attn")(normed, sizes)
        stream = Stream(x[:, : only or None], scale_branch(self, "ls1", y, config))
        if layer.removed and qkv is not None:
            matching = match(
                qkv,
                stream.total,
                size,
                layer,
                config.num_prefix_tokens,
                config.proportional_attention,
                self.interpret,
            )
            x, normed, size = merge_and_norm(*stream, size, matching, norm2, self.interpret)
        else:
            x, normed = add_and_norm(*stream, norm2, self.interpret)
        y = MLP(config, jnp.bfloat16, name="mlp")(normed)
        return Stream(x, scale_branch(self, "ls2", y, config)), size, matching


class NormParams(nn.Module):
    """The parameters of a LayerNorm that a fused program computes."""

    config: ViTConfig

    @nn.compact
    def __call__(self) -> Any:
        from fcvit_jax.models.fused_kernels import Affine

        return Affine(*norm_params(self, self.config.embed_dim), self.config.norm_eps)


class FusedAttention(nn.Module):
    """`attention.Attention` by a kernel: the output, and queries, keys and values [b, n, 3, heads, head width]."""

    config: ViTConfig
    interpret: bool

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        from fcvit_jax.models.fused_kernels import attend

        config, (batch, tokens, width) = self.config, x.shape
        qkv = project_qkv(config, jnp.bfloat16)(x)
        qkv = qkv.reshape(batch, tokens, 3, config.num_heads, width // config.num_heads)
        y = attend(qkv, size if config.proportional_attention else None, self.interpret)
        return Linear(width, jnp.bfloat16, name="proj")(y.reshape(x.shape)), qkv
