"""The Vision Transformer, with token merging between attention and MLP.

ViT: arXiv 2010.11929; DeiT and its distillation token: arXiv 2012.12877; LayerScale: arXiv 2103.17239; registers: arXiv
2309.16588; token merging and proportional attention: arXiv 2210.09461, sections 3 and 4.1.

Shape letters: b batch, n tokens, d width, p patches, c classes.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.kernels import KERNELS, kernels_of
from fcvit_jax.models.layers import MLP, Attention, Norm, Stream, multiply
from fcvit_jax.models.merging import follow_patches
from fcvit_jax.models.schedule import Layer, MergeSchedule


class ViT(nn.Module):
    """A Vision Transformer that merges tokens as its schedule says.

    `model.apply({"params": params}, images)` takes normalised float images [b, height, width, 3] and returns
    `(logits, out)`: logits float32 [b, c], and `out` with

    - "embedded": [b, n, d], what enters the first layer;
    - "layers": per layer {"tokens": [b, n_l, d], "size": float32 [b, n_l], "source": int32 [b, p]}, after that layer;
      "size" is how many patches a token stands for (1 for prefix tokens), "source" the index of each patch's token;
    - "tokens": [b, n_L, d], the final sequence, normed unless the norm follows the pooling; "size", "source" of it;
    - "pooled": [b, d] (`dist_avg`: [b, 2, d], `token_avg`: [b, 2 d]); "head_logits": `dist_avg` only, float32
      [b, 2, c].

    Under jit, what is not used of `out` is not computed. Where prefix tokens are pooled, the logits need nothing else
    of the last layer: it is computed for these tokens alone, without merging, and once more for all if its tokens are
    used. That is exact, and 7 % less to compute for a dense ViT-S/16 (`flops.executed_gmacs`).

    Parameters are float32, or cast by `cast_params`; `dtype` is that of the computation. With `train=True`, dropout and
    stochastic depth, which rises linearly over the layers, need `rngs={"dropout": key}`; the last layer's two
    computations then drop different numbers.
    `kernels`: "xla", for any device and any dtype; "triton", the fused programs of `models.triton` for NVIDIA GPUs, in
    bfloat16 and without gradients, with images of its own on each (`compiling.on_each_device`); "interpreted", the same
    ones without a GPU, slowly.
    `schedule` defaults to dense; one that does not fit the model raises InputError when the model is first applied.
    """

    config: ViTConfig
    schedule: MergeSchedule | None = None
    dtype: Any = jnp.float32
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    kernels: str = "xla"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, Any]]:
        config = self.config
        if self.kernels not in KERNELS:
            raise InputError(f"kernels is {self.kernels!r}: choose one of {', '.join(KERNELS)}")
        if self.kernels != "xla" and (train or self.dtype != jnp.bfloat16):
            raise InputError(f"kernels is {self.kernels!r}: it computes in bfloat16, and not in training; choose 'xla'")
        if images.shape[1:] != (*config.image_size, 3):
            height, width = config.image_size
            raise InputError(f"images are {images.shape}: this model takes [batch, {height}, {width}, 3]")
        schedule = self.schedule or MergeSchedule.dense(config.depth)

        x = Embedding(config, self.dtype, self.dropout, name="embed")(images, train)
        prefix = config.num_prefix_tokens
        size = jnp.ones(x.shape[:2], jnp.float32)
        source = jnp.broadcast_to(jnp.arange(prefix, x.shape[1], dtype=jnp.int32), (x.shape[0], config.num_patches))
        out: dict[str, Any] = {"embedded": x, "layers": []}

        kind = nn.remat(Block, static_argnums=(3, 4, 5)) if self.remat else Block
        stream = pooled = Stream(x)
        for index, layer in enumerate(schedule.plan(config)):
            drop_path = self.drop_path * index / max(config.depth - 1, 1)
            block = kind(config, self.dtype, self.dropout, drop_path, self.kernels, name=f"blocks_{index}")
            if index == config.depth - 1 and config.pooled_tokens:
                pooled, _, _ = block(stream, size, layer, train, config.pooled_tokens)
            stream, size, matching = block(stream, size, layer, train, 0)
            if matching is not None:
                source = follow_patches(source, matching)
            out["layers"].append({"tokens": stream.tokens, "size": size, "source": source})
        if not config.pooled_tokens:
            pooled = stream

        norm = Norm(config, self.kernels, name="norm")
        if config.fc_norm:
            pool = _pool(config, pooled.tokens, size)
            _, normed = norm(Stream(pool.reshape(pool.shape[0], -1, pool.shape[-1])))
            out["tokens"], out["pooled"] = stream.tokens, normed.reshape(pool.shape)
        else:
            out["tokens"], out["pooled"] = norm(stream)[1], _pool(config, norm(pooled)[1], size)
        out |= {"size": size, "source": source}
        pooled = out["pooled"]
        if not config.num_classes:
            features = pooled.mean(axis=1) if config.pool == "dist_avg" else pooled
            return features.astype(jnp.float32), out
        if config.representation_size:
            pooled = nn.tanh(nn.Dense(config.representation_size, dtype=self.dtype, name="pre_logits")(pooled))
        head = partial(nn.Dense, config.num_classes, dtype=self.dtype, kernel_init=nn.initializers.zeros)
        if config.pool != "dist_avg":
            return head(name="head")(pooled).astype(jnp.float32), out
        both = jnp.stack([head(name="head")(pooled[:, 0]), head(name="head_dist")(pooled[:, 1])], axis=1)
        out["head_logits"] = both.astype(jnp.float32)
        return out["head_logits"].mean(axis=1), out


def cast_params(params: Any, dtype: Any) -> Any:
    """The parameters as a model of this dtype casts them, once instead of in every call: all but the norms'."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if any("norm" in key.key for key in path) else leaf.astype(dtype), params
    )


class Embedding(nn.Module):
    """Patches, prefix tokens and positions: images [b, height, width, 3] -> [b, n, d]."""

    config: ViTConfig
    dtype: Any
    dropout: float

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        config = self.config
        batch, width, side = images.shape[0], config.embed_dim, config.patch_size
        kernel = self.param("kernel", nn.initializers.lecun_normal((0, 1, 2)), (side, side, 3, width))
        # One product of [b p, side side 3] with [side side 3, d]: the convolution, without one.
        (down, across), pixels = config.grid, images.astype(self.dtype)
        pixels = pixels.reshape(batch, down, side, across, side, 3).transpose(0, 1, 3, 2, 4, 5)
        bias = self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype) if config.patch_bias else None
        pixels = pixels.reshape(batch, config.num_patches, -1)
        x = multiply(pixels, kernel.astype(self.dtype).reshape(-1, width), bias)

        init = nn.initializers.normal(0.02)
        prefix = [
            jnp.broadcast_to(self.param(name, init, (1, count, width)).astype(self.dtype), (batch, count, width))
            for name, count in (
                ("cls_token", config.class_token),
                ("dist_token", config.dist_token),
                ("reg_token", config.num_registers),
            )
            if count
        ]
        entries = config.num_patches if config.no_embed_class else config.num_tokens
        positions = self.param("pos_embed", init, (1, entries, width)).astype(self.dtype)
        if config.no_embed_class:
            x = jnp.concatenate([*prefix, x + positions], axis=1)
        else:
            x = jnp.concatenate([*prefix, x], axis=1) + positions
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Norm(config, name="norm_pre")(Stream(x))[1] if config.pre_norm else x


class Block(nn.Module):
    """Attention, merging, MLP, each on the residual stream; returns the stream, sizes and the matching, if any.

    With `only` above 0, the stream is returned for the first so many tokens, and nothing is merged.
    """

    config: ViTConfig
    dtype: Any
    dropout: float
    drop_path: float
    kernels: str = "xla"

    @nn.compact
    def __call__(self, stream: Stream, size: jax.Array, layer: Layer, train: bool, only: int = 0):
        config = self.config
        attention = Attention(config, self.dtype, self.kernels, name="attn")
        norm1, norm2 = (Norm(config, self.kernels, name=name) for name in ("norm1", "norm2"))
        # Before the first merge every size is 1 and its logarithm nothing.
        sizes = size if layer.tokens_in < config.num_tokens else None
        x, normed = norm1(stream)
        y, metric = attention(normed, sizes, only or x.shape[1])
        stream = Stream(x[:, : y.shape[1]], self._branch(y, "ls1", train))

        matching = None
        if layer.removed and not only:
            matching = kernels_of(self.kernels).match(metric, layer, config.num_prefix_tokens)
            x, normed, size = norm2.of_merged(stream, size, matching, layer.tokens_out)
        else:
            x, normed = norm2(stream)

        y = MLP(config, self.dtype, name="mlp")(normed)
        stream = Stream(x, self._branch(y, "ls2", train))
        # Triton adds it up together with the next norm; elsewhere `remat` would keep both parts.
        return stream if self.kernels != "xla" else Stream(stream.tokens), size, matching

    def _branch(self, y: jax.Array, scale_name: str, train: bool) -> jax.Array:
        """Dropout, LayerScale and stochastic depth (arXiv 1603.09382) of a residual branch."""
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        if self.config.layer_scale is not None:
            gamma = self.param(scale_name, nn.initializers.constant(self.config.layer_scale), (self.config.embed_dim,))
            y *= gamma.astype(y.dtype)[None, None]
        return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y)


def _pool(config: ViTConfig, x: jax.Array, size: jax.Array) -> jax.Array:
    if config.pool == "token":
        return x[:, 0]
    if config.pool == "dist_avg":
        return x[:, :2]
    # Every patch counts once, wherever it was merged.
    weight = size[:, config.num_prefix_tokens :, None]
    patches = x[:, config.num_prefix_tokens :].astype(jnp.float32)
    mean = (jnp.sum(patches * weight, axis=1) / jnp.sum(weight, axis=1)).astype(x.dtype)
    return jnp.concatenate([x[:, 0], mean], axis=1) if config.pool == "token_avg" else mean
