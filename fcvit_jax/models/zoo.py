"""The one table of named models, under timm's names: configuration, preprocessing, source of the weights, top-1.

A name is an architecture (`vit_small_patch16_224`) or one set of its weights
(`vit_small_patch16_224.augreg_in21k_ft_in1k`). An architecture alone has no preprocessing: timm's ViT and DeiT weights
share every shape and key, and differ in the pixels they expect.
"""

import difflib
from dataclasses import dataclass

from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig


@dataclass(frozen=True)
class Model:
    """A named model. `preprocess` and what follows are None for an architecture without weights.

    source: `hf-hub:timm/NAME`, or the address of torchvision's file. top1: fraction of ImageNet-1k's validation images,
    as timm (results-imagenet.csv) or torchvision reports it with this preprocessing; None if it is not known here.
    """

    name: str
    config: ViTConfig
    preprocess: Preprocess | None = None
    source: str | None = None
    top1: float | None = None


# size -> (embed_dim, depth, num_heads)
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}


def _config(size: str, patch_size: int, pixels: int, **fields) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    return ViTConfig((pixels, pixels), patch_size, width, depth, heads, mlp_dim=4 * width, **fields)


def _architectures() -> dict[str, ViTConfig]:
    table = {
        f"vit_{size}_patch{patch}_{pixels}": _config(size, patch, pixels)
        for size in ("tiny", "small", "base", "large", "huge")
        for patch in (8, 14, 16, 32)
        for pixels in (224, 384)
        if pixels % patch == 0
    }
    table["vit_large_patch16_512"] = _config("large", 16, 512)
    table["vit_huge_patch14_518"] = _config("huge", 14, 518)
    table["vit_base_patch16_224_miil"] = _config("base", 16, 224, qkv_bias=False)
    clip = dict(pre_norm=True, patch_bias=False, norm_eps=1e-5)
    for size, patch in (("base", 32), ("base", 16), ("large", 14)):
        table[f"vit_{size}_patch{patch}_clip_224"] = _config(size, patch, 224, **clip)
        table[f"vit_{size}_patch{patch}_clip_quickgelu_224"] = _config(size, patch, 224, **clip, gelu="quick")
    dinov2 = dict(layer_scale=1e-5, num_classes=0)
    for size in ("small", "base", "large"):
        table[f"vit_{size}_patch14_dinov2"] = _config(size, 14, 518, **dinov2)
        registers = dict(num_registers=4, no_embed_class=True)
        table[f"vit_{size}_patch14_reg4_dinov2"] = _config(size, 14, 518, **dinov2, **registers)
    distilled = dict(dist_token=True, pool="dist_avg")
    for size, pixels in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384)):
        table[f"deit_{size}_patch16_{pixels}"] = _config(size, 16, pixels)
        table[f"deit_{size}_distilled_patch16_{pixels}"] = _config(size, 16, pixels, **distilled)
    deit3 = dict(layer_scale=1e-6, no_embed_class=True)
    for size in ("small", "medium", "base", "large"):
        for pixels in (224, 384) if size != "medium" else (224,):
            table[f"deit3_{size}_patch16_{pixels}"] = _config(size, 16, pixels, **deit3)
    table["deit3_huge_patch14_224"] = _config("huge", 14, 224, **deit3)
    return table


# Preset -> name -> top-1 in percent, None if it is not known here; with torchvision's file where timm has none.
_WEIGHTS: dict[str, dict[str, float | tuple[float, str] | None]] = {
    "timm/augreg": {
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k": 75.452,
        "vit_tiny_patch16_384.augreg_in21k_ft_in1k": None,
        "vit_small_patch16_224.augreg_in21k_ft_in1k": 81.402,
        "vit_small_patch16_384.augreg_in21k_ft_in1k": None,
        "vit_small_patch16_224.augreg_in1k": 78.842,
        "vit_small_patch16_384.augreg_in1k": None,
        "vit_small_patch32_224.augreg_in21k_ft_in1k": None,
        "vit_small_patch32_384.augreg_in21k_ft_in1k": None,
        "vit_base_patch8_224.augreg_in21k_ft_in1k": None,
        "vit_base_patch8_224.augreg2_in21k_ft_in1k": None,
        "vit_base_patch16_224.augreg_in21k_ft_in1k": 84.534,
        "vit_base_patch16_224.augreg2_in21k_ft_in1k": 85.108,
        "vit_base_patch16_384.augreg_in21k_ft_in1k": 86.01,
        "vit_base_patch16_224.augreg_in1k": 79.154,
        "vit_base_patch16_384.augreg_in1k": None,
        "vit_base_patch16_224.orig_in21k_ft_in1k": 81.782,
        "vit_base_patch16_384.orig_in21k_ft_in1k": None,
        "vit_base_patch16_224.sam_in1k": 80.246,
        "vit_base_patch32_224.sam_in1k": 73.704,
        "vit_base_patch32_224.augreg_in21k_ft_in1k": 80.732,
        "vit_base_patch32_384.augreg_in21k_ft_in1k": None,
        "vit_base_patch32_224.augreg_in1k": None,
        "vit_base_patch32_384.augreg_in1k": None,
        "vit_large_patch16_224.augreg_in21k_ft_in1k": 85.856,
        "vit_large_patch16_384.augreg_in21k_ft_in1k": 87.096,
        "vit_large_patch32_384.orig_in21k_ft_in1k": None,
    },
    "timm/miil": {
        "vit_base_patch16_224_miil.in21k_ft_in1k": 84.278,
    },
    "torchvision/v1": {
        "vit_base_patch16_224.tv_in1k": (81.072, "vit_b_16-c867db91.pth"),
        "vit_base_patch32_224.tv_in1k": (75.912, "vit_b_32-d86f8d99.pth"),
        "vit_large_patch32_224.tv_in1k": (76.972, "vit_l_32-c7638314.pth"),
    },
    f"torchvision/v1,crop_pct={224 / 242}": {  # resized to 242
        "vit_large_patch16_224.tv_in1k": (79.662, "vit_l_16-852ce7e3.pth"),
    },
    "torchvision/swag": {
        "vit_base_patch16_384.tv_swag_in1k": (85.304, "vit_b_16_swag-9ac1b537.pth"),
        "vit_large_patch16_512.tv_swag_in1k": (88.064, "vit_l_16_swag-4f3808c9.pth"),
        "vit_huge_patch14_518.tv_swag_in1k": (88.552, "vit_h_14_swag-80465313.pth"),
        "vit_base_patch16_224.tv_swag_lc_in1k": (81.886, "vit_b_16_lc_swag-4e70ced5.pth"),
        "vit_large_patch16_224.tv_swag_lc_in1k": (85.146, "vit_l_16_lc_swag-4d563306.pth"),
        "vit_huge_patch14_224.tv_swag_lc_in1k": (85.708, "vit_h_14_lc_swag-c1eb923e.pth"),
    },
    "timm/clip,crop_pct=0.95": {
        "vit_base_patch16_clip_224.laion2b_ft_in12k_in1k": 86.204,
        "vit_base_patch16_clip_224.openai_ft_in12k_in1k": 85.954,
    },
    "timm/clip": {
        "vit_base_patch16_clip_224.openai_ft_in1k": 85.282,
    },
    "timm/deit": {
        "deit_tiny_patch16_224.fb_in1k": 72.19,
        "deit_small_patch16_224.fb_in1k": 79.856,
        "deit_base_patch16_224.fb_in1k": 81.98,
        "deit_base_patch16_384.fb_in1k": 83.108,
        "deit_tiny_distilled_patch16_224.fb_in1k": 74.538,
        "deit_small_distilled_patch16_224.fb_in1k": 81.204,
        "deit_base_distilled_patch16_224.fb_in1k": 83.384,
        "deit_base_distilled_patch16_384.fb_in1k": None,
        "deit3_small_patch16_224.fb_in1k": 81.382,
        "deit3_small_patch16_384.fb_in1k": None,
        "deit3_medium_patch16_224.fb_in1k": None,
        "deit3_base_patch16_224.fb_in1k": 83.8,
        "deit3_base_patch16_384.fb_in1k": None,
        "deit3_large_patch16_224.fb_in1k": 84.772,
        "deit3_large_patch16_384.fb_in1k": None,
        "deit3_huge_patch14_224.fb_in1k": None,
    },
    "timm/deit3-in22k": {
        "deit3_small_patch16_224.fb_in22k_ft_in1k": 83.082,
        "deit3_small_patch16_384.fb_in22k_ft_in1k": None,
        "deit3_medium_patch16_224.fb_in22k_ft_in1k": 84.55,
        "deit3_base_patch16_224.fb_in22k_ft_in1k": 85.728,
        "deit3_base_patch16_384.fb_in22k_ft_in1k": None,
        "deit3_large_patch16_224.fb_in22k_ft_in1k": 86.99,
        "deit3_large_patch16_384.fb_in22k_ft_in1k": None,
        "deit3_huge_patch14_224.fb_in22k_ft_in1k": None,
    },
    "timm/dinov2": {
        f"vit_{size}_patch14_{registers}dinov2.lvd142m": None
        for registers in ("", "reg4_")
        for size in ("small", "base", "large")
    },
}
ARCHITECTURES: dict[str, ViTConfig] = _architectures()


def names() -> tuple[str, ...]:
    """All names that `get` knows: architectures first, then weights."""
    return (*ARCHITECTURES, *(name for group in _WEIGHTS.values() for name in group))


def get(name: str) -> Model:
    """Look up an architecture or a set of weights. Raises InputError that offers the nearest names."""
    if name in ARCHITECTURES:
        return Model(name, ARCHITECTURES[name])
    for text, group in _WEIGHTS.items():
        if name in group:
            config, row = ARCHITECTURES[name.split(".")[0]], group[name]
            percent, file = row if isinstance(row, tuple) else (row, None)
            source = f"https://download.pytorch.org/models/{file}" if file else f"hf-hub:timm/{name}"
            crop = ",crop_pct=1" * (config.image_size == (384, 384))
            top1 = None if percent is None else round(percent / 100, 5)
            return Model(name, config, preset(text + crop, config.image_size), source, top1)
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    raise InputError(f"unknown model {name!r}" + (f"; the nearest names are {', '.join(near)}" if near else ""))
