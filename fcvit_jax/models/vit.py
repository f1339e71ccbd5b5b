"""The Vision Transformer, with token merging between attention and MLP.

ViT: arXiv 2010.11929; DeiT and its distillation token: arXiv 2012.12877; LayerScale: arXiv 2103.17239; stochastic
depth: arXiv 1603.09382; registers: arXiv 2309.16588; token merging and proportional attention: arXiv 2210.09461,
sections 3 and 4.1. Rotary positions are in `models.positions`.

Shape letters: b batch, n tokens, d width, p patches, c classes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import InputError
from fcvit_jax.models import fused
from fcvit_jax.models.attention import Attention, AttentionPool
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.layers import MLP, LayerNorm, multiply, scale_branch
from fcvit_jax.models.merging import Matching, follow_patches, follow_pruned, merge_tokens
from fcvit_jax.models.positions import grid_coordinates, merge_coordinates
from fcvit_jax.models.rules import Layer
from fcvit_jax.models.schedule import MergeSchedule


class ViT(nn.Module):
    """A Vision Transformer that merges tokens as its schedule says.

    `model.apply({"params": params}, images)` takes normalised float images [b, height, width, 3] and returns
    `(logits, out)`: logits float32 [b, c], and `out` with

    - "embedded": [b, n, d], what enters the first layer;
    - "layers": for each layer, the sequence that leaves it:
      - "tokens": [b, n_l, d];
      - "size": float32 [b, n_l], how many patches a token stands for (1 for prefix tokens);
      - "source": int32 [b, p], the index of each patch's token;
      - "pruned": bool [b, p], the patches that a pruning rule dropped (their index in "source" is a stand-in);
    - "tokens": [b, n_L, d], the final sequence, normed unless the norm follows the pooling; "size", "source" and
      "pruned" of it;
    - "pooled": [b, d] (`dist_avg`: [b, 2, d], `token_avg`: [b, 2 d]);
    - "head_logits": `dist_avg` only, float32 [b, 2, c].

    Under jit, unused parts of `out` cost nothing. If prefix tokens are pooled, the logits need nothing else of the last
    layer: it is computed for these tokens alone, without merging, and again for all if its tokens are used. This is
    exact, and saves 7 % of the work of a dense ViT-S/16 (`flops.executed_gmacs`).

    Parameters are float32, or cast by `cast_params`; `dtype` is that of the computation. With `train=True`, dropout and
    stochastic depth, which rises linearly over the layers, need `rngs={"dropout": key}`; the last layer's two
    computations then drop different numbers. `remat` recomputes activations in the backward pass.
    `kernels`: one of `fused.KERNELS`, as `fused.choose_kernels` gives it; "xla" runs everywhere, in any dtype.
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
        if images.shape[1:] != (*config.image_size, 3):
            height, width = config.image_size
            raise InputError(f"images are {images.shape}: this model takes [batch, {height}, {width}, 3]")
        schedule = self.schedule or MergeSchedule.dense(config.depth)
        plan = schedule.plan(config)

        x = Embedding(config, self.dtype, self.dropout, name="embed")(images, train)
        out: dict[str, Any] = {"embedded": x, "layers": []}
        if self.kernels == "xla":
            pooled, layers = self._run_blocks(x, plan, train)
        else:
            fused.check(self.kernels, self.dtype, train, schedule, config)
            pooled, layers = fused.run_blocks(config, x, plan, interpret=self.kernels == "interpreted")

        source = jnp.arange(config.num_prefix_tokens, config.num_tokens, dtype=jnp.int32)
        source = jnp.broadcast_to(source, (x.shape[0], config.num_patches))
        pruned = jnp.zeros(source.shape, jnp.bool_)
        for tokens, size, matching, *_ in layers:
            if matching is not None:
                pruned = follow_pruned(pruned, source, matching)
                source = follow_patches(source, matching)
            out["layers"].append({"tokens": tokens, "size": size, "source": source, "pruned": pruned})
        last = out["layers"][-1]

        norm = LayerNorm(config.norm_eps, name="norm")
        if config.fc_norm:
            tokens, pooled = last["tokens"], norm(_pool(config, pooled, last["size"]))
        else:
            tokens, pooled = norm(last["tokens"]), _pool(config, norm(pooled), last["size"])
        if config.pool == "map":
            merged = plan[-1].tokens_out < config.num_tokens
            pooled = AttentionPool(config, self.dtype, name="pool")(tokens, last["size"] if merged else None)
        out |= {**last, "tokens": tokens, "pooled": pooled}
        if not config.num_classes:
            features = pooled.mean(axis=1) if config.pool == "dist_avg" else pooled
            return features.astype(jnp.float32), out
        if config.representation_size:
            pooled = nn.tanh(nn.Dense(config.representation_size, dtype=self.dtype, name="pre_logits")(pooled))
        if config.projection_dim:
            pooled = nn.Dense(config.projection_dim, use_bias=False, dtype=self.dtype, name="projection")(pooled)
        pooled = unit_rows(pooled).astype(self.dtype) if config.unit_features else pooled
        head = partial(
            nn.Dense, config.num_classes, config.head_bias, dtype=self.dtype, kernel_init=nn.initializers.zeros
        )
        if config.pool != "dist_avg":
            return head(name="head")(pooled).astype(jnp.float32), out
        both = jnp.stack([head(name="head")(pooled[:, 0]), head(name="head_dist")(pooled[:, 1])], axis=1)
        out["head_logits"] = both.astype(jnp.float32)
        return out["head_logits"].mean(axis=1), out

    def _run_blocks(self, x: jax.Array, plan: tuple[Layer, ...], train: bool) -> tuple[jax.Array, list["Merged"]]:
        """Apply the blocks; return the tokens to be pooled, and what leaves each layer."""
        config, coordinates = self.config, grid_coordinates(self.config)
        coordinates = None if coordinates is None else jnp.asarray(coordinates)
        layers = [Merged(x, jnp.ones(x.shape[:2], jnp.float32), coordinates=coordinates)]
        kind = nn.remat(Block, static_argnums=(2, 3, 4)) if self.remat else Block
        pooled = None
        for index, layer in enumerate(plan):
            drop_path = self.drop_path * index / max(config.depth - 1, 1)
            block = kind(config, self.dtype, self.dropout, drop_path, name=f"blocks_{index}")
            before = layers[-1]._replace(matching=None)
            if index == config.depth - 1 and config.pooled_tokens:
                pooled = block(before, layer, train, config.pooled_tokens).x
            layers.append(block(before, layer, train, 0))
        return layers[-1].x if pooled is None else pooled, layers[1:]


class Merged(NamedTuple):
    """The output of a layer: tokens [b, n, d], their sizes, float32 [b, n], and the matching, if any merged.

    coordinates: float32 [b, n, 2], or [1, n, 2] before the first merge, if positions are rotary.
    """

    x: jax.Array
    size: jax.Array
    matching: Matching | None = None
    coordinates: jax.Array | None = None


class Block(nn.Module):
    """Attention, merging, MLP, each on the residual stream.

    With `only`, just the first `only` tokens are computed, and nothing is merged.
    """

    config: ViTConfig
    dtype: Any
    dropout: float
    drop_path: float

    @nn.compact
    def __call__(self, before: Merged, layer: Layer, train: bool, only: int = 0) -> Merged:
        config, (x, size, _, coordinates) = self.config, before
        norm1, norm2 = (LayerNorm(config.norm_eps, name=name) for name in ("norm1", "norm2"))
        attention, mlp = Attention(config, self.dtype, name="attn"), MLP(config, self.dtype, name="mlp")
        # Before the first merge every size is 1, and its logarithm adds nothing.
        attended = attention(norm1(x), size if layer.tokens_in < config.num_tokens else None, coordinates, only)
        x = x[:, : only or None] + self._branch(attended.y, "ls1", train)

        matching = None
        if layer.removed and not only:
            matching = layer.rule(attended, x, size, layer, config.num_prefix_tokens)
            coordinates = None if coordinates is None else merge_coordinates(coordinates, size, matching)
            x, size = merge_tokens(x, size, matching)

        x = x + self._branch(mlp(norm2(x)), "ls2", train)
        return Merged(x, size, matching, coordinates)

    def _branch(self, y: jax.Array, scale: str, train: bool) -> jax.Array:
        """Apply dropout, LayerScale and stochastic depth to a residual branch."""
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = scale_branch(self, scale, y, self.config)
        return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y)


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
        # A convolution with a stride of its own width is one product of [b p, side side 3] with [side side 3, d].
        (down, across), pixels = config.grid, images.astype(self.dtype)
        pixels = pixels[:, : down * side, : across * side]
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
        if not config.learned_positions:
            x = jnp.concatenate([*prefix, x], axis=1)
        else:
            entries = config.num_patches if config.no_embed_class else config.num_tokens
            positions = self.param("pos_embed", init, (1, entries, width)).astype(self.dtype)
            if config.no_embed_class:
                x = jnp.concatenate([*prefix, x + positions], axis=1)
            else:
                x = jnp.concatenate([*prefix, x], axis=1) + positions
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return LayerNorm(config.norm_eps, name="norm_pre")(x) if config.pre_norm else x


def cast_params(params: Any, dtype: Any) -> Any:
    """Cast all parameters but the norms', as a model of this dtype does in every call."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if any("norm" in key.key for key in path) else leaf.astype(dtype), params
    )


def unit_rows(x: jax.Array) -> jax.Array:
    """Scale rows, the last axis, to length 1, in float32; zeros stay zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-30))


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
