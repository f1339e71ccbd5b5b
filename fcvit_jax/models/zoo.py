"""The one table of named models, under timm's names: configuration, preprocessing, source of the weights, top-1.

A name is an architecture (`vit_small_patch16_224`) or one set of weights of it
(`vit_small_patch16_224.augreg_in21k_ft_in1k`); sizes that timm leaves out are named likewise. An architecture alone has
no preprocessing: timm's ViT and DeiT weights share every shape and key, and differ in the pixels they expect.
"""

import difflib
from dataclasses import dataclass, replace

from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig


@dataclass(frozen=True)
class Model:
    """A named model. `preprocess` and what follows are None for an architecture without weights.

    source: address of the original file, in its own layout, or `hf-hub:timm/NAME`. top1: fraction of the 50,000
    ImageNet-1k validation images, as timm (results-imagenet.csv) or, for the tags tv_*, torchvision reports it with
    this preprocessing; None where that is not known here.
    """

    name: str
    config: ViTConfig
    preprocess: Preprocess | None = None
    source: str | None = None
    top1: float | None = None


# size -> (embed_dim, depth, num_heads); the MLP is four times as wide.
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
    shape = dict(embed_dim=width, depth=depth, num_heads=heads, mlp_dim=4 * width)
    return ViTConfig(image_size=(pixels, pixels), patch_size=patch_size, **shape, **fields)


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
    for size in ("tiny", "small", "base"):
        for pixels in (224, 384) if size == "base" else (224,):
            table[f"deit_{size}_patch16_{pixels}"] = _config(size, 16, pixels)
            table[f"deit_{size}_distilled_patch16_{pixels}"] = _config(size, 16, pixels, **distilled)
    for size in ("small", "medium", "base", "large"):
        for pixels in (224, 384) if size != "medium" else (224,):
            table[f"deit3_{size}_patch16_{pixels}"] = _config(size, 16, pixels, layer_scale=1e-6, no_embed_class=True)
    table["deit3_huge_patch14_224"] = _config("huge", 14, 224, layer_scale=1e-6, no_embed_class=True)
    return table


_AUGREG = "https://storage.googleapis.com/vit_models/augreg/"
_GOOGLE_SAM = "https://storage.googleapis.com/vit_models/sam/"
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/"
_DEIT = "https://dl.fbaipublicfiles.com/deit/"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"
_TORCHVISION = "https://download.pytorch.org/models/"
_HUB = "hf-hub:timm/"

_FT = "--imagenet2012-steps_20k-lr_"
_TI = _AUGREG + "Ti_16-i21k-300ep-lr_0.001-aug_none-wd_0.03-do_0.0-sd_0.0" + _FT
_S16 = _AUGREG + "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0" + _FT
_S16_1K = _AUGREG + "S_16-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0" + _FT
_S32 = _AUGREG + "S_32-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0" + _FT
_B8 = _AUGREG + "B_8-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0" + _FT
_B16 = _AUGREG + "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0" + _FT
_B16_1K = _AUGREG + "B_16-i1k-300ep-lr_0.001-aug_strong2-wd_0.1-do_0.1-sd_0.1" + _FT
_B32 = _AUGREG + "B_32-i21k-300ep-lr_0.001-aug_medium1-wd_0.03-do_0.0-sd_0.0" + _FT
_B32_384 = _AUGREG + "B_32-i21k-300ep-lr_0.001-aug_light1-wd_0.1-do_0.0-sd_0.0" + _FT
_B32_1K = _AUGREG + "B_32-i1k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.1-sd_0.1" + _FT
_L16 = _AUGREG + "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1" + _FT

# name -> (preset, source, top-1 in percent); at 384 pixels the presets' crop_pct is 1.
_WEIGHTS = {
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": ("timm/augreg", _TI + "0.03-res_224.npz", 75.452),
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k": ("timm/augreg", _TI + "0.03-res_384.npz", None),
    "vit_small_patch16_224.augreg_in21k_ft_in1k": ("timm/augreg", _S16 + "0.03-res_224.npz", 81.402),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": ("timm/augreg", _S16 + "0.03-res_384.npz", None),
    "vit_small_patch16_224.augreg_in1k": ("timm/augreg", _S16_1K + "0.01-res_224.npz", 78.842),
    "vit_small_patch16_384.augreg_in1k": ("timm/augreg", _S16_1K + "0.01-res_384.npz", None),
    "vit_small_patch32_224.augreg_in21k_ft_in1k": ("timm/augreg", _S32 + "0.03-res_224.npz", None),
    "vit_small_patch32_384.augreg_in21k_ft_in1k": ("timm/augreg", _S32 + "0.03-res_384.npz", None),
    "vit_base_patch8_224.augreg_in21k_ft_in1k": ("timm/augreg", _B8 + "0.01-res_224.npz", None),
    "vit_base_patch8_224.augreg2_in21k_ft_in1k": ("timm/augreg", _HUB, None),
    "vit_base_patch16_224.augreg_in21k_ft_in1k": ("timm/augreg", _B16 + "0.01-res_224.npz", 84.534),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": ("timm/augreg", _HUB, 85.108),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": ("timm/augreg", _B16 + "0.01-res_384.npz", 86.010),
    "vit_base_patch16_224.augreg_in1k": ("timm/augreg", _B16_1K + "0.01-res_224.npz", 79.154),
    "vit_base_patch16_384.augreg_in1k": ("timm/augreg", _B16_1K + "0.01-res_384.npz", None),
    "vit_base_patch16_224.orig_in21k_ft_in1k": (
        "timm/augreg",
        _TIMM + "v0.1-vitjx/jx_vit_base_p16_224-80ecf9dd.pth",
        81.782,
    ),
    "vit_base_patch16_384.orig_in21k_ft_in1k": (
        "timm/augreg",
        _TIMM + "v0.1-vitjx/jx_vit_base_p16_384-83fb41ba.pth",
        None,
    ),
    "vit_base_patch16_224.sam_in1k": ("timm/augreg", _GOOGLE_SAM + "ViT-B_16.npz", 80.246),
    "vit_base_patch32_224.sam_in1k": ("timm/augreg", _GOOGLE_SAM + "ViT-B_32.npz", 73.704),
    "vit_base_patch32_224.augreg_in21k_ft_in1k": ("timm/augreg", _B32 + "0.03-res_224.npz", 80.732),
    "vit_base_patch32_384.augreg_in21k_ft_in1k": ("timm/augreg", _B32_384 + "0.03-res_384.npz", None),
    "vit_base_patch32_224.augreg_in1k": ("timm/augreg", _B32_1K + "0.01-res_224.npz", None),
    "vit_base_patch32_384.augreg_in1k": ("timm/augreg", _B32_1K + "0.01-res_384.npz", None),
    "vit_large_patch16_224.augreg_in21k_ft_in1k": ("timm/augreg", _L16 + "0.01-res_224.npz", 85.856),
    "vit_large_patch16_384.augreg_in21k_ft_in1k": ("timm/augreg", _L16 + "0.01-res_384.npz", 87.096),
    "vit_large_patch32_384.orig_in21k_ft_in1k": (
        "timm/augreg",
        _TIMM + "v0.1-vitjx/jx_vit_large_p32_384-9b920ba8.pth",
        None,
    ),
    "vit_base_patch16_224_miil.in21k_ft_in1k": (
        "timm/miil",
        _TIMM + "v0.1-tresnet/vit_base_patch16_224_1k_miil_84_4-2deb18e3.pth",
        84.278,
    ),
    "vit_base_patch16_224.tv_in1k": ("torchvision/v1", _TORCHVISION + "vit_b_16-c867db91.pth", 81.072),
    "vit_base_patch32_224.tv_in1k": ("torchvision/v1", _TORCHVISION + "vit_b_32-d86f8d99.pth", 75.912),
    "vit_large_patch16_224.tv_in1k": (
        f"torchvision/v1,crop_pct={224 / 242}",  # resized to 242
        _TORCHVISION + "vit_l_16-852ce7e3.pth",
        79.662,
    ),
    "vit_large_patch32_224.tv_in1k": ("torchvision/v1", _TORCHVISION + "vit_l_32-c7638314.pth", 76.972),
    "vit_base_patch16_384.tv_swag_in1k": ("torchvision/swag", _TORCHVISION + "vit_b_16_swag-9ac1b537.pth", 85.304),
    "vit_large_patch16_512.tv_swag_in1k": ("torchvision/swag", _TORCHVISION + "vit_l_16_swag-4f3808c9.pth", 88.064),
    "vit_huge_patch14_518.tv_swag_in1k": ("torchvision/swag", _TORCHVISION + "vit_h_14_swag-80465313.pth", 88.552),
    "vit_base_patch16_224.tv_swag_lc_in1k": (
        "torchvision/swag",
        _TORCHVISION + "vit_b_16_lc_swag-4e70ced5.pth",
        81.886,
    ),
    "vit_large_patch16_224.tv_swag_lc_in1k": (
        "torchvision/swag",
        _TORCHVISION + "vit_l_16_lc_swag-4d563306.pth",
        85.146,
    ),
    "vit_huge_patch14_224.tv_swag_lc_in1k": (
        "torchvision/swag",
        _TORCHVISION + "vit_h_14_lc_swag-c1eb923e.pth",
        85.708,
    ),
    "vit_base_patch16_clip_224.laion2b_ft_in12k_in1k": ("timm/clip,crop_pct=0.95", _HUB, 86.204),
    "vit_base_patch16_clip_224.openai_ft_in12k_in1k": ("timm/clip,crop_pct=0.95", _HUB, 85.954),
    "vit_base_patch16_clip_224.openai_ft_in1k": ("timm/clip", _HUB, 85.282),
    "deit_tiny_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_tiny_patch16_224-a1311bcf.pth", 72.190),
    "deit_small_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_small_patch16_224-cd65a155.pth", 79.856),
    "deit_base_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_base_patch16_224-b5f2ef4d.pth", 81.980),
    "deit_base_patch16_384.fb_in1k": ("timm/deit", _DEIT + "deit_base_patch16_384-8de9b5d1.pth", 83.108),
    "deit_tiny_distilled_patch16_224.fb_in1k": (
        "timm/deit",
        _DEIT + "deit_tiny_distilled_patch16_224-b40b3cf7.pth",
        74.538,
    ),
    "deit_small_distilled_patch16_224.fb_in1k": (
        "timm/deit",
        _DEIT + "deit_small_distilled_patch16_224-649709d9.pth",
        81.204,
    ),
    "deit_base_distilled_patch16_224.fb_in1k": (
        "timm/deit",
        _DEIT + "deit_base_distilled_patch16_224-df68dfff.pth",
        83.384,
    ),
    "deit_base_distilled_patch16_384.fb_in1k": (
        "timm/deit",
        _DEIT + "deit_base_distilled_patch16_384-d0272ac0.pth",
        None,
    ),
    "deit3_small_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_3_small_224_1k.pth", 81.382),
    "deit3_small_patch16_384.fb_in1k": ("timm/deit", _DEIT + "deit_3_small_384_1k.pth", None),
    "deit3_medium_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_3_medium_224_1k.pth", None),
    "deit3_base_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_3_base_224_1k.pth", 83.800),
    "deit3_base_patch16_384.fb_in1k": ("timm/deit", _DEIT + "deit_3_base_384_1k.pth", None),
    "deit3_large_patch16_224.fb_in1k": ("timm/deit", _DEIT + "deit_3_large_224_1k.pth", 84.772),
    "deit3_large_patch16_384.fb_in1k": ("timm/deit", _DEIT + "deit_3_large_384_1k.pth", None),
    "deit3_huge_patch14_224.fb_in1k": ("timm/deit", _DEIT + "deit_3_huge_224_1k.pth", None),
    "deit3_small_patch16_224.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_small_224_21k.pth", 83.082),
    "deit3_small_patch16_384.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_small_384_21k.pth", None),
    "deit3_medium_patch16_224.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_medium_224_21k.pth", 84.550),
    "deit3_base_patch16_224.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_base_224_21k.pth", 85.728),
    "deit3_base_patch16_384.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_base_384_21k.pth", None),
    "deit3_large_patch16_224.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_large_224_21k.pth", 86.990),
    "deit3_large_patch16_384.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_large_384_21k.pth", None),
    "deit3_huge_patch14_224.fb_in22k_ft_in1k": ("timm/deit3-in22k", _DEIT + "deit_3_huge_224_21k_v1.pth", None),
    "vit_small_patch14_dinov2.lvd142m": ("timm/dinov2", _DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth", None),
    "vit_base_patch14_dinov2.lvd142m": ("timm/dinov2", _DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth", None),
    "vit_large_patch14_dinov2.lvd142m": ("timm/dinov2", _DINOV2 + "dinov2_vitl14/dinov2_vitl14_pretrain.pth", None),
    "vit_small_patch14_reg4_dinov2.lvd142m": (
        "timm/dinov2",
        _DINOV2 + "dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
        None,
    ),
    "vit_base_patch14_reg4_dinov2.lvd142m": (
        "timm/dinov2",
        _DINOV2 + "dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        None,
    ),
    "vit_large_patch14_reg4_dinov2.lvd142m": (
        "timm/dinov2",
        _DINOV2 + "dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
        None,
    ),
}

ARCHITECTURES: dict[str, ViTConfig] = _architectures()


def names() -> tuple[str, ...]:
    """All names that `get` knows: architectures first, then weights."""
    return (*ARCHITECTURES, *_WEIGHTS)


def get(name: str) -> Model:
    """Look up an architecture or a set of weights. Raises InputError that offers the nearest names."""
    architecture = name.split(".")[0]
    if name in ARCHITECTURES:
        return Model(name, ARCHITECTURES[name])
    if name not in _WEIGHTS:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
        raise InputError(f"unknown model {name!r}" + (f"; the nearest names are {', '.join(near)}" if near else ""))
    text, source, percent = _WEIGHTS[name]
    config = ARCHITECTURES[architecture]
    preprocess = preset(text, config.image_size)
    if config.image_size == (384, 384):
        preprocess = replace(preprocess, crop_pct=1.0)
    top1 = None if percent is None else round(percent / 100, 5)
    return Model(name, config, preprocess, source + name if source == _HUB else source, top1)
