"""The Vision Transformer, with token merging between attention and MLP.

ViT: arXiv 2010.11929; DeiT and its distillation token: arXiv 2012.12877; LayerScale: arXiv 2103.17239; registers: arXiv
2309.16588; token merging and proportional attention: arXiv 2210.09461, sections 3 and 4.1.

Shape letters: b batch, n tokens, d width, h heads, k head width, m MLP width, p patches, c classes.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import InputError
from fcvit_jax.models.attention import attend
from fcvit_jax.models.merging import Matching, follow_patches, match_tokens, merge_tokens
from fcvit_jax.models.schedule import Layer, MergeSchedule

POOLS = ("token", "avg", "token_avg", "dist_avg")
KERNELS = ("xla", "triton", "interpreted")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The architecture of a ViT, as stored in a checkpoint. Raises InputError where the fields contradict each other.

    Sequence: [class token][distillation token][registers][patches, row-major]; prefix tokens are those before patches.
    """

    image_size: tuple[int, int] = (224, 224)  # (height, width) in pixels
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000  # 0: no head, the logits are the pooled features
    class_token: bool = True
    dist_token: bool = False
    num_registers: int = 0
    no_embed_class: bool = False  # the position embedding has no entries for prefix tokens (DeiT-III, registers)
    patch_bias: bool = True
    pre_norm: bool = False  # a norm in front of the blocks (CLIP)
    qkv_bias: bool = True
    layer_scale: float | None = None  # initial value of LayerScale; None: there is none
    gelu: str = "exact"  # exact | tanh | quick
    norm_eps: float = 1e-6
    # token | avg (of the patches) | token_avg (both, side by side) | dist_avg (mean of a distilled model's two heads)
    pool: str = "token"
    fc_norm: bool = False  # the last norm comes after the pooling instead of before
    representation_size: int = 0  # width of a tanh layer in front of the head (the ViT paper's pre-training); 0: none
    proportional_attention: bool = True  # a merged token attracts attention in proportion to its size

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _KINDS[field.type](value):
                raise InputError(f"{field.name} is {value!r}: it must be {getattr(field.type, '__name__', field.type)}")
            lowest = 1 if field.name in _POSITIVE else 0
            if not isinstance(value, str | None) and min(value if isinstance(value, tuple) else (value,)) < lowest:
                raise InputError(f"{field.name} is {value}: it must be {'positive' if lowest else '0 or more'}")
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads")
        if self.image_size[0] % self.patch_size or self.image_size[1] % self.patch_size:
            height, width = self.image_size
            raise InputError(f"image_size {height}x{width} does not divide into patches of {self.patch_size} pixels")
        for name, choices in (("gelu", tuple(GELUS)), ("pool", POOLS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.pool != "avg" and not self.class_token:
            raise InputError(f"pool {self.pool!r} needs a class token")
        if self.pool == "dist_avg" and not self.dist_token:
            raise InputError("pool 'dist_avg' needs a distillation token")
        if self.fc_norm and self.pool == "token_avg":
            raise InputError("pool 'token_avg' goes with a norm before the pooling: fc_norm must be false")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.dist_token + self.num_registers

    @property
    def pooled_tokens(self) -> int:
        """How many leading tokens are all that the pooling uses; 0 where it uses the patches too."""
        return {"token": 1, "dist_avg": 2}.get(self.pool, 0)

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first layer."""
        return self.num_prefix_tokens + self.num_patches

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ViTConfig":
        """Raises InputError naming fields that are unknown or missing: a stored configuration is never guessed at."""
        expected = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted(expected ^ fields.keys()):
            raise InputError(f"model configuration: unknown or missing fields {', '.join(odd)}")
        size = fields["image_size"]
        return cls(**{**fields, "image_size": tuple(size) if isinstance(size, list) else size})


_KINDS: dict[Any, Callable[[Any], bool]] = {
    int: lambda value: type(value) is int,
    bool: lambda value: type(value) is bool,
    str: lambda value: type(value) is str,
    float: lambda value: type(value) in (int, float),
    float | None: lambda value: value is None or type(value) in (int, float),
    tuple[int, int]: lambda value: type(value) is tuple and [type(side) for side in value] == [int, int],
}
_POSITIVE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_dim")


def _exact_gelu(x: jax.Array) -> jax.Array:
    # By erf, as PyTorch; `jax.nn.gelu` goes by erfc, a sixteen times longer polynomial. In float32: 1 + erf cancels.
    half = x.astype(jnp.float32) * 0.5
    return (half * (1.0 + jax.lax.erf(half * math.sqrt(2)))).astype(x.dtype)


GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "exact": _exact_gelu,
    "tanh": partial(nn.gelu, approximate=True),
    "quick": lambda x: x * nn.sigmoid(jnp.asarray(1.702, x.dtype) * x),
}


def choose_kernels(dtype: Any, devices: Iterable[Any]) -> str:
    """The fastest `ViT.kernels` for inference in a dtype on these devices: "triton" on one NVIDIA GPU in bfloat16.

    On several, XLA could not split the kernels between them.
    """
    first, *others = devices
    if others or dtype != jnp.bfloat16 or first.platform != "gpu":
        return "xla"
    capability = str(getattr(first, "compute_capability", ""))  # "9.0"; AMD's are named otherwise
    return "triton" if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8.0 else "xla"


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
    used. That is exact, and 7 % less to compute for a dense ViT-S/16 (`flops.executed_gmacs`). Parameters are float32;
    `dtype` is that of the computation. With `train=True`, dropout and stochastic depth, which rises linearly over the
    layers, need `rngs={"dropout": key}`; the last layer's two computations then drop different numbers.
    `kernels`: "xla", for any device and any dtype; "triton", the fused programs of `models.triton` for one NVIDIA GPU,
    in bfloat16 and without gradients; "interpreted", the same ones without a GPU, slowly.
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
        x = multiply(pixels.reshape(batch, config.num_patches, -1), kernel.astype(self.dtype).reshape(-1, width))
        if config.patch_bias:
            x += self.param("bias", nn.initializers.zeros, (width,)).astype(self.dtype)[None, None]

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


class Stream(NamedTuple):
    """The residual stream: x [b, n, d], and what is still to be added to it, together with the norm that comes next."""

    x: jax.Array
    branch: jax.Array | None = None

    @property
    def tokens(self) -> jax.Array:
        return self.x if self.branch is None else self.x + self.branch


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
        y, keys = attention(normed, sizes, only or x.shape[1])
        stream = Stream(x[:, : y.shape[1]], self._branch(y, "ls1", train))

        matching = None
        if layer.removed and not only:
            matching = match_tokens(keys, layer, config.num_prefix_tokens)
            x, size, normed = norm2.of_merged(stream, size, matching, layer.tokens_out)
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


class Attention(nn.Module):
    """Multi-head self-attention in [b, n, d], of the first `queries` tokens, q of them, to all.

    Returns the output [b, q, d] and the keys' mean over the heads, float32 [b, n, k]. With `size` [b, n], attention is
    proportional to it, unless the configuration says otherwise.
    """

    config: ViTConfig
    dtype: Any
    kernels: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, size: jax.Array | None, queries: int) -> tuple[jax.Array, jax.Array]:
        config = self.config
        batch, _, width = x.shape
        sizes = size if config.proportional_attention else None
        parts = QKV(config, self.dtype, name="qkv")(x, queries)
        if self.kernels != "xla" and len(parts) == 1:
            from fcvit_jax.models import triton

            y, keys = triton.attend(parts[0], sizes, self.kernels == "interpreted"), parts[0][:, :, 1]
            # Behind the barrier, which keeps XLA from computing the mean twice.
            keys = jax.lax.optimization_barrier(keys.astype(jnp.float32).mean(axis=2))
        else:
            # Heads next to the batch: twice as fast on CPU as heads behind the tokens.
            q, k, v = (x for part in parts for x in part.transpose(2, 0, 3, 1, 4))
            q *= jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
            y, keys = attend(q, k, v, sizes).transpose(0, 2, 1, 3), k.astype(jnp.float32).mean(axis=1)
        y = y.reshape(batch, queries, width)
        y = Dense(width, dtype=self.dtype, kernel_init=_init, name="proj")(y)
        return y, keys


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
            y = multiply(x, kernel[:, columns]) + bias[None, None, columns]
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
        x = Dense(self.config.mlp_dim, dtype=self.dtype, kernel_init=_init, name="fc1")(x)
        x = GELUS[self.config.gelu](x)
        return Dense(self.config.embed_dim, dtype=self.dtype, kernel_init=_init, name="fc2")(x)


def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., d] @ [d, m], with all tokens in one axis: the gradient for the kernel is then a plain product.

    Of a product over two axes XLA on CPU transposes a copy, into which it computes the activations anew.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


# Flax asks for a product over the last axis of x and the first of the kernel, in the default precision.
Dense = partial(nn.Dense, dot_general=lambda x, kernel, *_, **__: multiply(x, kernel))
_init = nn.initializers.xavier_uniform()


class Norm(nn.Module):
    """LayerNorm of a residual stream, in float32 whatever its dtype: returns its tokens and what they are normed to."""

    config: ViTConfig
    kernels: str = "xla"

    def setup(self) -> None:
        width = self.config.embed_dim
        self.scale = self.param("scale", nn.initializers.ones, (width,))
        self.bias = self.param("bias", nn.initializers.zeros, (width,))

    def __call__(self, stream: Stream) -> tuple[jax.Array, jax.Array]:
        if self.kernels != "xla":
            from fcvit_jax.models import triton

            return triton.add_and_norm(*stream, self.scale, self.bias, self.config.norm_eps, self._interpret)
        x = stream.tokens
        # The fast variance, E[x^2] - E[x]^2, costs 8e-4 of accuracy where activations are large.
        y = x.astype(jnp.float32)
        y -= y.mean(axis=-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.config.norm_eps)
        return x, (y * (factor * self.scale[None, None]) + self.bias[None, None]).astype(x.dtype)

    def of_merged(
        self, stream: Stream, size: jax.Array, matching: Matching, tokens_out: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The same of the tokens after merging; returns their sizes in between."""
        x, branch = stream
        if self.kernels != "xla" and branch is not None:
            from fcvit_jax.models import triton

            affine = self.scale, self.bias, self.config.norm_eps
            x, normed, size = triton.merge_and_norm(x, branch, size, matching, tokens_out, *affine, self._interpret)
            return x, size, normed
        x, size = merge_tokens(stream.tokens, size, matching, tokens_out)
        return x, size, self(Stream(x))[1]

    @property
    def _interpret(self) -> bool:
        return self.kernels == "interpreted"


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
