"""The architecture of a Vision Transformer: one frozen dataclass, which a checkpoint stores."""

import dataclasses
import math
from typing import Any

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, from_fields, setting

GELUS = ("exact", "tanh", "quick")
POOLS = ("token", "avg", "token_avg", "dist_avg", "map")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions along two axes: how a patch's coordinates turn the pairs of a head's features.

    With head width w, frequency j = 0 .. w/4 - 1 turns by coordinate / period_j, period_j = theta^(4 j / w). The first
    w/4 angles come from one coordinate, the rest from the other. Prefix tokens are not turned.

    theta: the base of the periods. periods: the w/4 periods themselves, if the weights store them.
    rotation: pairs of features are i and i + w/2 ("half"), or 2 i and 2 i + 1 ("interleaved").
    coordinates: "centred": 2 pi (2 (i + 1/2) / n - 1) for row or column i of n (DINOv3); "index": i + offset.
    reference: (rows, columns) to which indices are scaled, (i + offset) / n * reference (EVA-02); None: unscaled.
    x_first: the first angles come from the column.
    """

    theta: float = setting(100.0, above=0)
    rotation: str = setting("half", choices=("half", "interleaved"))
    coordinates: str = setting("centred", choices=("centred", "index"))
    offset: float = 0.0
    reference: tuple[int, int] | None = setting(None, low=1)
    x_first: bool = False
    periods: tuple[float, ...] | None = setting(None, above=0)

    def __post_init__(self) -> None:
        check_settings(self, "rotary.")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The architecture of a ViT, as stored in a checkpoint. Raises InputError if the fields contradict each other.

    Sequence: class token, distillation token, registers, patches in row-major order. All tokens before the patches are
    prefix tokens.
    """

    image_size: tuple[int, int] = setting((224, 224), low=1)  # (height, width) in pixels
    patch_size: int = setting(16, low=1)
    embed_dim: int = setting(768, low=1)
    depth: int = setting(12, low=1)
    num_heads: int = setting(12, low=1)
    mlp_dim: int = setting(3072, low=1)
    num_classes: int = setting(1000, low=0)  # 0: no head, the logits are the pooled features
    class_token: bool = True
    dist_token: bool = False
    num_registers: int = setting(0, low=0)
    no_embed_class: bool = False  # the position embedding has no entries for prefix tokens (DeiT-III, registers)
    patch_bias: bool = True
    pre_norm: bool = False  # a norm in front of the blocks (CLIP)
    qkv_bias: bool = True
    layer_scale: float | None = setting(None, low=0)  # initial value of LayerScale; None: the model has none
    gelu: str = setting("exact", choices=GELUS)
    norm_eps: float = setting(1e-6, low=0)
    # token | avg (of the patches) | token_avg (both, side by side) | dist_avg (mean of a distilled model's two heads) |
    # map (attention of a learned probe to all tokens, and an MLP)
    pool: str = setting("token", choices=POOLS)
    fc_norm: bool = False  # the last norm comes after the pooling instead of before
    representation_size: int = setting(
        0, low=0
    )  # width of a tanh layer in front of the head (the ViT paper's pre-training); 0: none
    proportional_attention: bool = True  # a merged token attracts attention in proportion to its size
    learned_positions: bool = True  # False: the model has no position embedding (DINOv3)
    rotary: Rotary | None = None  # None: positions do not turn queries and keys
    key_bias: bool = True  # False: with qkv_bias, only queries and values have biases (EVA, DINOv3)
    attn_norm: bool = False  # a norm between attention and its output projection (EVA-CLIP)
    gated: bool = False  # SwiGLU instead of GELU in the MLPs, whose hidden width is mlp_dim
    mlp_norm: bool = False  # a norm between the two layers of the MLPs (EVA-02)
    map_heads: int = setting(0, low=0)  # of the pool "map"; 0: num_heads
    map_mlp_dim: int = setting(0, low=0)  # hidden width of its MLP; 0: mlp_dim
    cut_off: bool = False  # pixels below and right of the last whole patch are left out (SigLIP so400m/14 at 384)
    head_bias: bool = True  # False: the head is a projection (CLIP), and the logits are the image's embedding
    projection_dim: int = setting(0, low=0)  # width of a projection without a bias in front of the head; 0: none
    unit_features: bool = False  # the head takes features of length 1 (class embeddings, CLIP, SigLIP)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.embed_dim % self.num_heads:
            raise InputError(f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads")
        odd = any(side % self.patch_size for side in self.image_size)
        if min(self.grid) < 1 or (odd and not self.cut_off):
            height, width = self.image_size
            raise InputError(f"image_size {height}x{width} does not divide into patches of {self.patch_size} pixels")
        if self.pool not in ("avg", "map") and not self.class_token:
            raise InputError(f"pool {self.pool!r} needs a class token")
        if self.pool == "dist_avg" and not self.dist_token:
            raise InputError("pool 'dist_avg' needs a distillation token")
        if self.fc_norm and self.pool == "token_avg":
            raise InputError("pool 'token_avg' needs the norm before the pooling: fc_norm must be false")
        if self.pool == "map" and (self.fc_norm or self.embed_dim % (self.map_heads or self.num_heads)):
            raise InputError("pool 'map' needs fc_norm false, and an embed_dim that divides into its heads")
        if (self.projection_dim or self.unit_features) and (self.pool == "dist_avg" or self.representation_size):
            raise InputError("class embeddings need one feature vector an image: not pool 'dist_avg', nor a tanh layer")
        if not (self.learned_positions or self.rotary):
            raise InputError("a model needs positions: set learned_positions to true, or give rotary")
        if self.rotary and self.head_dim % 4:
            raise InputError(f"rotary positions need a head width of 4, 8, 12, ...: it is {self.head_dim}")
        if self.rotary and self.rotary.periods and 4 * len(self.rotary.periods) != self.head_dim:
            raise InputError(f"rotary.periods has {len(self.rotary.periods)} periods: it must be {self.head_dim // 4}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.embed_dim // self.num_heads

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    @property
    def num_prefix_tokens(self) -> int:
        return self.class_token + self.dist_token + self.num_registers

    @property
    def pooled_tokens(self) -> int:
        """The number of leading tokens that the pooling uses; 0 if it uses the patches too."""
        return {"token": 1, "dist_avg": 2}.get(self.pool, 0)

    @property
    def headless(self) -> bool:
        """Whether the output is features, or an embedding by a projection, instead of classes."""
        return not (self.num_classes and self.head_bias)

    @property
    def output_dim(self) -> int:
        """The width of the output: classes, an embedding, or pooled features."""
        return self.num_classes or self.embed_dim * (1 + (self.pool == "token_avg"))

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first layer."""
        return self.num_prefix_tokens + self.num_patches

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON object that `from_dict` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ViTConfig":
        """Build it from a stored configuration. Raises InputError that names unknown or missing fields.

        Fields that the first version of the format lacked may be missing; the model then lacks those parts.
        """
        expected = [field.name for field in dataclasses.fields(cls)]
        later = expected[expected.index("learned_positions") :]
        if odd := sorted({*expected} ^ {*fields, *later}):
            raise InputError(f"model configuration: unknown or missing fields {', '.join(odd)}")
        return from_fields(cls, fields, "model configuration: ")
