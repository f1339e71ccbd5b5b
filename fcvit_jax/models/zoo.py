"""The one table of named models, under timm's names: configuration, preprocessing, source of the weights, top-1.

A name is an architecture (`vit_small_patch16_224`) or one set of its weights
(`vit_small_patch16_224.augreg_in21k_ft_in1k`). An architecture alone has no preprocessing: timm's ViT and DeiT weights
share every shape and key, and differ in the pixels they expect.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Any

from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import Rotary, ViTConfig


@dataclass(frozen=True)
class Model:
    """A named model. `preprocess` and the fields after it are None for an architecture without weights.

    source: `hf-hub:timm/NAME`, or the address of torchvision's file. top1: fraction of ImageNet-1k's validation images,
    as timm (results-imagenet.csv) or torchvision reports it with this preprocessing; None if unknown.
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
    "so400m": (1152, 27, 16),
    "giantopt": (1536, 40, 16),
}
_SO400M_MLP = 4304


def _config(size: str, patch_size: int, pixels: int, **fields) -> ViTConfig:
    width, depth, heads = _SIZES[size]
    mlp_dim = fields.pop("mlp_dim", _SO400M_MLP if size == "so400m" else 4 * width)
    return ViTConfig((pixels, pixels), patch_size, width, depth, heads, mlp_dim, **fields)


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
    dinov2: dict[str, Any] = dict(layer_scale=1e-5, num_classes=0)
    for size in ("small", "base", "large"):
        table[f"vit_{size}_patch14_dinov2"] = _config(size, 14, 518, **dinov2)
        registers = dict(num_registers=4, no_embed_class=True)
        table[f"vit_{size}_patch14_reg4_dinov2"] = _config(size, 14, 518, **dinov2, **registers)
        if size != "small":
            table[f"vit_{size}_patch14_reg1_tipsv2"] = _config(
                size, 14, 448, **dinov2, num_registers=1, no_embed_class=True
            )
    table["vit_so400m_patch14_reg1_tipsv2"] = _config("so400m", 14, 448, **dinov2, num_registers=1, no_embed_class=True)
    giant = ViTConfig((518, 518), 14, 1536, 40, 24, 4096, gated=True, **dinov2)
    table["vit_giant_patch14_dinov2"] = giant
    table["vit_giant_patch14_reg4_dinov2"] = replace(giant, num_registers=4, no_embed_class=True)
    table["vit_giant_patch14_reg1_tipsv2"] = replace(giant, image_size=(448, 448), num_registers=1, no_embed_class=True)
    jepa: dict[str, Any] = dict(class_token=False, pool="avg", fc_norm=False, num_classes=0)
    table["vit_huge_patch14_gap_224"] = _config("huge", 14, 224, **jepa)
    table["vit_huge_patch16_gap_448"] = _config("huge", 16, 448, **jepa)
    table["vit_giant_patch16_gap_224"] = ViTConfig((224, 224), 16, 1408, 40, 16, 6144, **jepa)
    distilled = dict(dist_token=True, pool="dist_avg")
    for size, pixels in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384)):
        table[f"deit_{size}_patch16_{pixels}"] = _config(size, 16, pixels)
        table[f"deit_{size}_distilled_patch16_{pixels}"] = _config(size, 16, pixels, **distilled)
    deit3 = dict(layer_scale=1e-6, no_embed_class=True)
    for size in ("small", "medium", "base", "large"):
        for pixels in (224, 384) if size != "medium" else (224,):
            table[f"deit3_{size}_patch16_{pixels}"] = _config(size, 16, pixels, **deit3)
    table["deit3_huge_patch14_224"] = _config("huge", 14, 224, **deit3)
    return table | _clip() | _siglip() | _dinov3() | _eva02() | _perception_encoders()


def _clip() -> dict[str, ViTConfig]:
    table = {}
    for size, patch, width in (("base", 32, 512), ("base", 16, 512), ("large", 14, 768)):
        table[f"vit_{size}_patch{patch}_clip_224"] = _config(size, patch, 224, **_CLIP)
        quick = _config(size, patch, 224, **_CLIP, gelu="quick", num_classes=width)
        table[f"vit_{size}_patch{patch}_clip_quickgelu_224"] = quick
    for size, patch, pixels, classes in (
        ("base", 32, 256, 512), ("base", 32, 384, 1000), ("base", 32, 448, 1000), ("base", 16, 384, 1000),
        ("large", 14, 336, 1000), ("huge", 14, 224, 1000), ("huge", 14, 336, 1000), ("huge", 14, 378, 1024),
    ):  # fmt: skip
        table[f"vit_{size}_patch{patch}_clip_{pixels}"] = _config(size, patch, pixels, **_CLIP, num_classes=classes)
    for size, pixels, classes in (("large", 336, 768), ("huge", 224, 1024), ("huge", 378, 1024)):
        config = _config(size, 14, pixels, **_CLIP, gelu="quick", num_classes=classes)
        table[f"vit_{size}_patch14_clip_quickgelu_{pixels}"] = config
    return table


_CLIP: dict[str, Any] = dict(pre_norm=True, patch_bias=False, norm_eps=1e-5)


def _siglip() -> dict[str, ViTConfig]:
    """Make SigLIP and SigLIP 2 at fixed sizes, pooled by attention, or by the mean of the patches (`gap`)."""
    table = {}
    for size, patch, pixels in (
        *(("base", 16, pixels) for pixels in (224, 256, 384, 512)), ("base", 32, 256),
        *(("large", 16, pixels) for pixels in (256, 384, 512)), *(("so400m", 14, pixels) for pixels in (224, 378, 384)),
        *(("so400m", 16, pixels) for pixels in (256, 384, 512)), *(("giantopt", 16, pixels) for pixels in (256, 384)),
    ):  # fmt: skip
        # As timm runs them; Google trained all with tanh.
        exact = (size, patch) in (("base", 16), ("so400m", 14)) or (size == "large" and pixels < 512)
        fields: dict[str, Any] = dict(class_token=False, num_classes=0, gelu="exact" if exact else "tanh")
        fields["cut_off"] = pixels % patch > 0
        for kind, pool in (("", "map"), ("gap_", "avg")):
            table[f"vit_{size}_patch{patch}_siglip_{kind}{pixels}"] = _config(size, patch, pixels, pool=pool, **fields)
    return table


def _dinov3() -> dict[str, ViTConfig]:
    """Make DINOv3 as timm pools it, by the mean of the patches; Meta and Hugging Face take the class token."""
    table = {}
    for size, width, depth, heads, mlp_dim, gated in (
        ("small", 384, 12, 6, 1536, False), ("small_plus", 384, 12, 6, 1536, True), ("base", 768, 12, 12, 3072, False),
        ("large", 1024, 24, 16, 4096, False), ("huge_plus", 1280, 32, 20, 5120, True), ("7b", 4096, 40, 32, 8192, True),
    ):  # fmt: skip
        kinds: dict[str, dict[str, Any]] = {"": dict(qkv_bias=False), "_qkvb": dict(key_bias=False)}
        for kind, biases in kinds.items():
            table[f"vit_{size}_patch16_dinov3{kind}"] = ViTConfig(
                (256, 256), 16, width, depth, heads, mlp_dim, 0, num_registers=4, norm_eps=1e-5, layer_scale=1e-5,
                learned_positions=False, rotary=Rotary(), gated=gated, pool="avg", **biases,
            )  # fmt: skip
    del table["vit_7b_patch16_dinov3_qkvb"]
    return table


def _eva02() -> dict[str, ViTConfig]:
    table = {}
    rotary = Rotary(1e4, "interleaved", "index", reference=(16, 16))
    common: dict[str, Any] = dict(rotary=rotary, gated=True, key_bias=False)
    for size, mlp_dim, sizes in (("tiny", 512, (224, 336)), ("small", 1024, (224, 336)), ("base", 2048, (224, 448)),
                                 ("large", 2730, (224, 448))):  # fmt: skip
        fields = common | dict(mlp_dim=mlp_dim, mlp_norm=size in ("base", "large"))
        for pixels in sizes:
            table[f"eva02_{size}_patch14_{pixels}"] = _config(
                size, 14, pixels, **fields, pool="avg", fc_norm=True, num_classes=0 if pixels == 224 else 1000
            )
        for patch, pixels, classes in {"base": ((16, 224, 512),), "large": ((14, 224, 768), (14, 336, 768))}.get(
            size, ()
        ):
            config = _config(size, patch, pixels, **fields, attn_norm=True, num_classes=classes)
            table[f"eva02_{size}_patch{patch}_clip_{pixels}"] = config
    return table


def _perception_encoders() -> dict[str, ViTConfig]:
    """Make PE-core, whose outputs are the image's embedding."""
    table = {}
    for size, width, depth, heads, patch, pixels, mlp_dim, out in (
        ("tiny", 192, 12, 3, 16, 384, 768, 512), ("small", 384, 12, 6, 16, 384, 1536, 512),
        ("base", 768, 12, 12, 16, 224, 3072, 1024), ("large", 1024, 24, 16, 14, 336, 4096, 1024),
        ("gigantic", 1536, 50, 16, 14, 448, 8960, 1280),
    ):  # fmt: skip
        side, token = pixels // patch, size != "gigantic"
        rotary = Rotary(1e4, "interleaved", "index", offset=float(token), reference=(side, side), x_first=True)
        table[f"vit_pe_core_{size}_patch{patch}_{pixels}"] = ViTConfig(
            (pixels, pixels), patch, width, depth, heads, mlp_dim, out, **_CLIP, class_token=token, pool="map",
            rotary=rotary, map_heads=8, map_mlp_dim=0 if mlp_dim == 4 * width else 4 * width,
        )  # fmt: skip
    return table


_IJEPA = "https://dl.fbaipublicfiles.com/ijepa"
# Preset -> name -> top-1 in percent, None if unknown; with torchvision's file, or an address, if timm's hub has none.
_WEIGHTS: dict[str, dict[str, float | tuple[float | None, str] | None]] = {
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
        "vit_base_patch32_clip_224.laion2b": None,
        "vit_base_patch32_clip_quickgelu_224.openai": None,
        "vit_base_patch16_clip_quickgelu_224.openai": None,
        "eva02_base_patch16_clip_224.merged2b": None,
        "eva02_large_patch14_clip_224.merged2b": None,
        **{f"eva02_{size}_patch14_224.mim_in22k": None for size in ("tiny", "small", "base", "large")},
        "eva02_large_patch14_224.mim_m38m": None,
    },
    "timm/deit": {
        **{f"vit_{size}_patch{patch}_224.dino": None for size in ("small", "base") for patch in (8, 16)},
        "vit_base_patch16_224.mae": None,
        "vit_large_patch16_224.mae": None,
        "vit_huge_patch14_224.mae": None,
        "vit_huge_patch14_gap_224.in1k_ijepa": (None, f"{_IJEPA}/IN1K-vit.h.14-300e.pth.tar"),
        "vit_huge_patch14_gap_224.in22k_ijepa": (None, f"{_IJEPA}/IN22K-vit.h.14-900e.pth.tar"),
        "vit_giant_patch16_gap_224.in22k_ijepa": (None, f"{_IJEPA}/IN22K-vit.g.16-600e.pth.tar"),
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
    "timm/dinov2": dict.fromkeys(
        (
            *(
                f"vit_{size}_patch14_{registers}dinov2.lvd142m"
                for registers in ("", "reg4_")
                for size in ("small", "base", "large", "giant")
            ),
            *(
                f"vit_{size}_patch16_dinov3{biases}.lvd1689m"
                for biases in ("", "_qkvb")
                for size in ("small", "small_plus", "base", "large", "huge_plus")
            ),
            "vit_7b_patch16_dinov3.lvd1689m",
        )
    ),
    "timm/dinov2,mean=0.43/0.411/0.296,std=0.213/0.156/0.143": dict.fromkeys(
        (
            "vit_large_patch16_dinov3.sat493m",
            "vit_large_patch16_dinov3_qkvb.sat493m",
            "vit_7b_patch16_dinov3.sat493m",
        )
    ),
    "timm/dinov2,mean=0/0/0,std=1/1/1": dict.fromkeys(
        f"vit_{size}_patch14_reg1_tipsv2.webli" for size in ("base", "large", "so400m", "giant")
    ),
    "timm/deit,crop_pct=1.0": {
        "vit_huge_patch16_gap_448.in1k_ijepa": (None, f"{_IJEPA}/IN1K-vit.h.16-448px-300e.pth.tar"),
    },
    "timm/siglip": dict.fromkeys(
        (
            *(
                f"vit_{name}.{tag}webli"
                for kind in ("", "gap_")
                for name in (
                    f"base_patch16_siglip_{kind}224",
                    f"base_patch16_siglip_{kind}256",
                    f"base_patch16_siglip_{kind}384",
                    f"base_patch16_siglip_{kind}512",
                    f"large_patch16_siglip_{kind}256",
                    f"large_patch16_siglip_{kind}384",
                    f"so400m_patch14_siglip_{kind}224",
                    f"so400m_patch14_siglip_{kind}378",
                )
                for tag in ("", "v2_")
            ),
            *(
                f"vit_{name}.v2_webli"
                for kind in ("", "gap_")
                for name in (
                    f"base_patch32_siglip_{kind}256",
                    f"large_patch16_siglip_{kind}512",
                    f"so400m_patch16_siglip_{kind}256",
                    f"so400m_patch16_siglip_{kind}384",
                    f"so400m_patch16_siglip_{kind}512",
                    f"giantopt_patch16_siglip_{kind}256",
                    f"giantopt_patch16_siglip_{kind}384",
                )
            ),
            "vit_so400m_patch14_siglip_384.webli",
            "vit_so400m_patch14_siglip_gap_384.webli",
        )
    ),
    "timm/clip,crop_pct=1.0": dict.fromkeys(
        (
            "vit_base_patch16_clip_224.laion2b",
            "vit_base_patch16_clip_224.datacompxl",
            "vit_large_patch14_clip_224.datacompxl",
            "vit_huge_patch14_clip_224.laion2b",
            "vit_large_patch14_clip_quickgelu_224.openai",
            "vit_large_patch14_clip_quickgelu_336.openai",
            "vit_base_patch16_clip_quickgelu_224.metaclip_2pt5b",
            "vit_large_patch14_clip_quickgelu_224.metaclip_2pt5b",
            "vit_huge_patch14_clip_quickgelu_224.metaclip_2pt5b",
            "vit_huge_patch14_clip_quickgelu_224.dfn5b",
            "vit_huge_patch14_clip_quickgelu_378.dfn5b",
            "eva02_large_patch14_clip_336.merged2b",
            "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
            "eva02_small_patch14_336.mim_in22k_ft_in1k",
            "eva02_base_patch14_448.mim_in22k_ft_in1k",
            "eva02_large_patch14_448.mim_in22k_ft_in1k",
            "eva02_large_patch14_448.mim_m38m_ft_in1k",
        )
    ),
    "timm/clip,crop_pct=1.0,crop_mode=squash": dict.fromkeys(
        (
            "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
            "eva02_large_patch14_448.mim_in22k_ft_in22k_in1k",
            "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k",
        )
    ),
    "timm/augreg,crop_pct=1.0": dict.fromkeys(
        (
            "vit_large_patch14_clip_224.laion2b",
            "vit_pe_core_tiny_patch16_384.fb",
            "vit_pe_core_small_patch16_384.fb",
            "vit_pe_core_base_patch16_224.fb",
            "vit_pe_core_large_patch14_336.fb",
            "vit_pe_core_gigantic_patch14_448.fb",
        )
    ),
}
ARCHITECTURES: dict[str, ViTConfig] = _architectures()


def names() -> tuple[str, ...]:
    """List all names that `get` knows: architectures first, then weights."""
    return (*ARCHITECTURES, *(name for group in _WEIGHTS.values() for name in group))


def get(name: str) -> Model:
    """Look up an architecture or a set of weights. Raises InputError that offers the nearest names."""
    if name in ARCHITECTURES:
        return Model(name, ARCHITECTURES[name])
    for text, group in _WEIGHTS.items():
        if name in group:
            config, row = ARCHITECTURES[name.split(".")[0]], group[name]
            percent, file = row if isinstance(row, tuple) else (row, None)
            # timm keeps one file for both GELUs of a CLIP.
            source = f"hf-hub:timm/{name.replace('_quickgelu', '')}"
            if file:
                source = file if ":" in file else f"https://download.pytorch.org/models/{file}"
            crop = ",crop_pct=1" * (config.image_size == (384, 384))
            top1 = None if percent is None else round(percent / 100, 5)
            return Model(name, config, preset(text + crop, config.image_size), source, top1)
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    raise InputError(f"unknown model {name!r}" + (f"; the nearest names are {', '.join(near)}" if near else ""))
