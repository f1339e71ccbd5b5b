"""Key layouts of published ViT weights, and the strict translation of a file into a configuration and a parameter tree.

A layout is one table: source key -> (path in the parameter tree, transform). Every source key is used or dropped for a
reason, every leaf of the tree is filled once, every shape is checked. What shapes do not tell is asked for.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import traverse_util

from fcvit_jax.checkpoint import abstract_params, leaf_shapes
from fcvit_jax.convert.posembed import resample_timm
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo
from fcvit_jax.models.vit import ViTConfig

# "#" stands for the index of a block. Transforms: "copy" as it is; "linear" [out, in] -> [in, out]; "conv"
# [d, 3, p, p] -> [p, p, 3, d]; "grid" a position embedding, resampled where the grids differ.
TIMM: dict[str, tuple[str, str]] = {
    "cls_token": ("embed/cls_token", "copy"),
    "dist_token": ("embed/dist_token", "copy"),
    "reg_token": ("embed/reg_token", "copy"),
    "pos_embed": ("embed/pos_embed", "grid"),
    "patch_embed.proj.weight": ("embed/kernel", "conv"),
    "patch_embed.proj.bias": ("embed/bias", "copy"),
    "norm_pre.weight": ("embed/norm_pre/scale", "copy"),
    "norm_pre.bias": ("embed/norm_pre/bias", "copy"),
    "blocks.#.norm1.weight": ("blocks_#/norm1/scale", "copy"),
    "blocks.#.norm1.bias": ("blocks_#/norm1/bias", "copy"),
    "blocks.#.attn.qkv.weight": ("blocks_#/attn/qkv/kernel", "linear"),
    "blocks.#.attn.qkv.bias": ("blocks_#/attn/qkv/bias", "copy"),
    "blocks.#.attn.proj.weight": ("blocks_#/attn/proj/kernel", "linear"),
    "blocks.#.attn.proj.bias": ("blocks_#/attn/proj/bias", "copy"),
    "blocks.#.ls1.gamma": ("blocks_#/ls1", "copy"),
    "blocks.#.gamma_1": ("blocks_#/ls1", "copy"),  # DeiT-III, as published
    "blocks.#.norm2.weight": ("blocks_#/norm2/scale", "copy"),
    "blocks.#.norm2.bias": ("blocks_#/norm2/bias", "copy"),
    "blocks.#.mlp.fc1.weight": ("blocks_#/mlp/fc1/kernel", "linear"),
    "blocks.#.mlp.fc1.bias": ("blocks_#/mlp/fc1/bias", "copy"),
    "blocks.#.mlp.fc2.weight": ("blocks_#/mlp/fc2/kernel", "linear"),
    "blocks.#.mlp.fc2.bias": ("blocks_#/mlp/fc2/bias", "copy"),
    "blocks.#.ls2.gamma": ("blocks_#/ls2", "copy"),
    "blocks.#.gamma_2": ("blocks_#/ls2", "copy"),
    "norm.weight": ("norm/scale", "copy"),
    "norm.bias": ("norm/bias", "copy"),
    "fc_norm.weight": ("norm/scale", "copy"),
    "fc_norm.bias": ("norm/bias", "copy"),
    "head.weight": ("head/kernel", "linear"),
    "head.bias": ("head/bias", "copy"),
    "head_dist.weight": ("head_dist/kernel", "linear"),
    "head_dist.bias": ("head_dist/bias", "copy"),
}
_HEAD = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
DROPPED = {"mask_token": "used in pre-training only"}

# Keys that tell of a family with another architecture, or of a layout that is not read.
_FOREIGN = {
    r"relative_position_bias_table|blocks\.0\.attn\.q_bias$": "BEiT or Swin, whose attention has other terms",
    r"attn_pool\.": "a model with an attention-pooling head (SigLIP)",
    r"blocks\.0\.mlp\.w12\.|blocks\.0\.mlp\.fc1_g\.|blocks\.0\.mlp\.swiglu": "a SwiGLU model (DINOv2 giant, EVA-02)",
    r"blocks\.0\.attn\.(q|k)_norm\.": "a model that normalises queries and keys",
    r"encoder\.layer\.0\.|layernorm_before": "a Hugging Face model, a layout that is not read yet",
    r"encoder\.layers\.encoder_layer_0": "a torchvision model, a layout that is not read yet",
    r"resblocks\.0\.": "a CLIP model in OpenAI's layout, which is not read yet",
    r"^(params/)?(Transformer|embedding)/": "a Google vision_transformer model, a layout that is not read yet",
}

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Converted:
    """config, the parameter tree as numpy float32, and what to tell: dropped {key: reason} and remarks, a line each."""

    config: ViTConfig
    params: dict[str, Any]
    dropped: dict[str, str]
    remarks: tuple[str, ...]


def detect_layout(arrays: Arrays) -> str:
    """The name of the layout ("timm"). Raises InputError naming the family it is taken for, or the nearest layout."""
    for pattern, family in _FOREIGN.items():
        if found := next((key for key in arrays if re.search(pattern, key)), None):
            raise InputError(f"{found!r} tells of {family}; supported is timm's ViT and DeiT layout")
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in arrays]:
        first = ", ".join(list(arrays)[:3])
        raise InputError(
            f"unknown layout (first keys: {first}); the nearest is timm's ViT, which has {missing[0]!r} too"
        )
    return "timm"


def infer_config(
    arrays: Arrays,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
    pool: str | None = None,
) -> ViTConfig:
    """Read the geometry off the shapes of a file in timm's layout.

    model: a name of the zoo; it gives what shapes do not tell (heads, GELU, epsilon), and the file must fit it.
    num_classes: what the head must have; 0 drops it. image_size: (height, width) in pixels; by default that of the
    position embedding. num_heads: for models without a name whose heads are not 64 wide. pool: "token" or "avg", for a
    model that pools otherwise than its keys tell: by the class token if there is one, unless there is an fc_norm.
    Raises InputError where the file contradicts what is asked, or something has to be asked for.
    """
    width, _, patch, _ = _shape(arrays, "patch_embed.proj.weight", 4)
    prefix = [
        _shape(arrays, f"{name}_token", 3)[1] if f"{name}_token" in arrays else 0 for name in ("cls", "dist", "reg")
    ]
    entries = _shape(arrays, "pos_embed", 3)[1]
    asked = math.prod(image_size) // patch**2 if image_size else 0
    # Entries for the prefix tokens or not: whichever leaves what was asked for, or a square grid.
    for taken in (sum(prefix), 0):
        patches = entries - taken
        if patches == asked or _is_square(patches):
            break
    else:
        raise InputError(
            f"pos_embed has {entries} entries, no square grid: pass --image_size HEIGHTxWIDTH of the weights"
        )
    no_embed_class = taken == 0 and sum(prefix) > 0
    side = math.isqrt(patches) * patch
    fc_norm = "fc_norm.weight" in arrays
    pool = pool or ("dist_avg" if prefix[1] else "avg" if fc_norm or not prefix[0] else "token")
    blocks = {int(key.split(".")[1]) for key in arrays if re.match(r"blocks\.\d{1,4}\.", key)}
    if blocks != set(range(len(blocks))):
        raise InputError(
            f"blocks are numbered {min(blocks)} to {max(blocks)}, and there are {len(blocks)}: some are missing"
        )
    found = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": len(blocks),
        "mlp_dim": _shape(arrays, "blocks.0.mlp.fc1.weight", 2)[0],
        "class_token": bool(prefix[0]),
        "dist_token": bool(prefix[1]),
        "num_registers": prefix[2],
        "no_embed_class": no_embed_class,
        "patch_bias": "patch_embed.proj.bias" in arrays,
        "pre_norm": "norm_pre.weight" in arrays,
        "qkv_bias": "blocks.0.attn.qkv.bias" in arrays,
    }
    scaled = any(re.match(r"blocks\.0\.(ls1\.gamma|gamma_1)$", key) for key in arrays)
    if model is None:
        if found["pre_norm"]:
            raise InputError(
                "a model with norm_pre (CLIP): the kind of GELU cannot be told from the file; pass --model"
            )
        heads = _usual_heads(width) if num_heads is None else num_heads
        config = ViTConfig((side, side), num_heads=heads, layer_scale=1e-5 if scaled else None, pool=pool, **found)
    else:
        config = zoo.get(model).config
        if num_heads not in (None, config.num_heads):
            raise InputError(f"{model} has {config.num_heads} heads, you asked for {num_heads}: leave --num_heads out")
        odd = {name: value for name, value in found.items() if getattr(config, name) != value}
        if scaled != (config.layer_scale is not None):
            odd["layer_scale"] = scaled
        if odd:
            name, value = next(iter(odd.items()))
            raise InputError(f"not a {model}: {name} is {value} in the file, {getattr(config, name)} in that model")
    classes = _check_head(arrays, num_classes)
    return replace(config, image_size=image_size or (side, side), num_classes=classes, pool=pool, fc_norm=fc_norm)


def convert_arrays(arrays: Arrays, config: ViTConfig) -> Converted:
    """Translate a file in timm's layout into the parameter tree of a configuration, strictly.

    Raises InputError naming the first key that is unknown, has another shape, holds no finite numbers or fills a leaf
    twice, or the first leaves that nothing fills.
    """
    leaves = leaf_shapes(abstract_params(config))
    filled: dict[str, np.ndarray] = {}
    dropped, remarks = {}, []
    for key, array in arrays.items():
        index = re.match(r"blocks\.(\d+)\.", key)
        general = re.sub(r"^blocks\.\d+\.", "blocks.#.", key)
        if general in DROPPED or (key in _HEAD and not config.num_classes and "head.weight" in arrays):
            dropped[key] = DROPPED.get(general, "the head was not asked for")
            continue
        if general not in TIMM:
            raise InputError(f"{key!r} is no key of timm's ViT layout: this is another architecture, or a damaged file")
        path, transform = TIMM[general]
        path = path.replace("#", index[1]) if index else path
        if path not in leaves:
            raise InputError(f"{key!r} has no place in a {config.depth}-layer model with {config.pool} pooling")
        if path in filled:
            raise InputError(f"{key!r} fills {path} a second time: the file holds two versions of one tensor")
        value, remark = _transform(key, array, transform, config)
        if value.shape != leaves[path]:
            raise InputError(f"{key!r} is {array.shape} in the file; the model's {path} is {leaves[path]}")
        filled[path] = value
        remarks += [remark] if remark else []
    if missing := [path for path in leaves if path not in filled]:
        raise InputError(f"nothing in the file fills {', '.join(missing[:3])}: it is incomplete, or not this model's")
    return Converted(config, traverse_util.unflatten_dict(filled, sep="/"), dropped, tuple(remarks))


def _transform(key: str, array: np.ndarray, kind: str, config: ViTConfig) -> tuple[np.ndarray, str | None]:
    if array.dtype.kind not in "fV" and "float" not in array.dtype.name:
        raise InputError(f"{key!r} holds {array.dtype.name}, not floating-point weights: quantised files are not read")
    value = array.astype(np.float32)
    if not np.isfinite(value).all():
        raise InputError(f"{key!r} holds values that are not finite: the file is damaged")
    if kind == "linear" and value.ndim == 2:
        return value.T, None
    if kind == "conv" and value.ndim == 4:
        return value.transpose(2, 3, 1, 0), None
    if kind == "grid" and value.ndim == 3:
        prefix = 0 if config.no_embed_class else config.num_prefix_tokens
        patches = value.shape[1] - prefix
        if patches != config.num_patches and _is_square(patches):
            old = (math.isqrt(patches), math.isqrt(patches))
            remark = (
                f"the position embedding is {old[0]}x{old[1]}, the model's grid {config.grid[0]}x{config.grid[1]}: "
                f"resampled (bicubic, antialiased, as timm). Weights lose accuracy away from their own size, "
                f"{old[0] * config.patch_size} pixels"
            )
            return resample_timm(value, prefix, old, config.grid), remark
    return value, None


def _check_head(arrays: Arrays, asked: int | None) -> int:
    """The number of classes of the head in the file, if it is what was asked for."""
    if "head.weight" not in arrays:
        if asked:
            raise InputError(
                f"the file has no head, you asked for {asked} classes: pass --num_classes 0 for the backbone"
            )
        return 0
    there = _shape(arrays, "head.weight", 2)[0]
    if asked is None or asked == there:
        return there
    if asked == 0:
        return 0
    kind = {21843: " (ImageNet-21k)", 1000: " (ImageNet-1k)"}.get(there, "")
    raise InputError(
        f"the head has {there} classes{kind}, you asked for {asked}: leave --num_classes out, or 0 drops it"
    )


def _usual_heads(width: int) -> int:
    """Heads are 64 wide in the usual ViTs; packed projections do not tell, so that other widths are asked for."""
    if any(config.embed_dim == width == 64 * config.num_heads for config in zoo.ARCHITECTURES.values()):
        return width // 64
    raise InputError(
        f"the number of heads of a {width}-wide model cannot be told from the file: pass --model or --num_heads"
    )


def _shape(arrays: Arrays, key: str, rank: int) -> tuple[int, ...]:
    shape = arrays[key].shape
    if len(shape) != rank or not all(shape):
        raise InputError(f"{key!r} is {shape} in the file: expected {rank} dimensions, none of them empty")
    return shape


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
