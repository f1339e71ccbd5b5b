"""The architecture of a Vision Transformer: one frozen dataclass, which a checkpoint stores."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fcvit_jax.errors import InputError

GELUS = ("exact", "tanh", "quick")
POOLS = ("token", "avg", "token_avg", "dist_avg")


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
        for name, choices in (("gelu", GELUS), ("pool", POOLS)):
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
