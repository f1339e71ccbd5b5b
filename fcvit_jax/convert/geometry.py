"""The configuration of a model: inferred from the shapes of its leaves, completed by known and stated fields."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fcvit_jax.convert.translation import Translation
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo
from fcvit_jax.models.config import ViTConfig

Grid = tuple[int, int]

_SETTINGS = ("gelu", "norm_eps", "proportional_attention", "map_heads")  # no key or shape shows these


def infer_config(
    translation: Translation, sources: Mapping[str, Mapping[str, Any]], asked: Mapping[str, Any]
) -> tuple[ViTConfig, Grid | None]:
    """Infer the configuration of a file, and the grid (rows, columns) of its position embedding, None if it has none.

    sources: fields of ViTConfig by their origin, a named model or the config.json beside the file; the file must agree
    with each, and later ones override. asked: fields that a user states, which override all: num_heads, gelu, norm_eps,
    pool, image_size (height, width), patch_size, num_classes (0 drops the head), proportional_attention.
    Raises InputError if the file contradicts what is known or asked, or if a field must be stated.
    """
    layout, stated = translation.layout, {name for fields in sources.values() for name in fields}
    known = dict(layout.implies) | {name: value for fields in sources.values() for name, value in fields.items()}
    if layout.config_json == "huggingface" and not stated:
        raise InputError(
            "a Hugging Face model without config.json, which states its heads, GELU and epsilon: put that beside the "
            "file, or pass --model"
        )
    leaves = translation.leaves
    patch, _, _, width = translation.shape("embed/kernel", 4)
    tokens = [f"embed/{name}_token" for name in ("cls", "dist", "reg")]
    cls, dist, registers = (translation.shape(path, 3)[1] if path in leaves else 0 for path in tokens)
    grid, no_embed_class = _grid(translation, (cls, dist, registers), patch, known, asked)
    hidden, outer = (translation.shape(f"blocks_0/mlp/{name}/kernel", 2) for name in ("fc1", "fc2"))
    gated = hidden[1] == 2 * outer[0]
    found = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": translation.num_blocks,
        "mlp_dim": hidden[1] // (1 + gated),
        "gated": gated,
        "mlp_norm": "blocks_0/mlp/norm/scale" in leaves,
        "attn_norm": "blocks_0/attn/norm/scale" in leaves,
        "class_token": bool(cls),
        "dist_token": bool(dist),
        "num_registers": registers,
        "no_embed_class": no_embed_class,
        "patch_bias": "embed/bias" in leaves,
        "pre_norm": "embed/norm_pre/scale" in leaves,
        "qkv_bias": "blocks_0/attn/qkv/bias" in leaves,
        "learned_positions": "embed/pos_embed" in leaves or layout.sincos2d,
    }
    scaled = "blocks_0/ls1" in leaves
    rotary = known.get("rotary")
    if rotary and rotary is layout.implies.get("rotary") and grid and rotary.coordinates == "index":
        rotary = replace(rotary, reference=grid, offset=float(cls))  # PE counts its class token too
    if rotary and translation.periods:
        rotary = replace(rotary, periods=translation.periods)
    heads = (
        translation.num_heads
        or known.get("num_heads")
        or (width // (4 * len(translation.periods)) if translation.periods else None)
    )
    for origin, fields in sources.items():
        differs = {name: value for name, value in found.items() if fields.get(name, value) != value}
        if "layer_scale" in fields and scaled != (fields["layer_scale"] is not None):
            differs["layer_scale"] = scaled
        if fields.get("num_heads", heads) != heads:
            differs["num_heads"] = heads
        if differs:
            name, value = next(iter(differs.items()))
            raise InputError(f"not {origin}: {name} is {value} in the file, {fields[name]} there")
    if found["pre_norm"] and not {"gelu", "norm_eps"} <= {*known, *asked}:
        raise InputError(
            "a model with norm_pre (CLIP): GELU and epsilon cannot be inferred from the file; pass --model, or --gelu "
            "(OpenAI's weights: quick, LAION's: exact) and --norm_eps 1e-5"
        )

    if not (sources or rotary) and ((gated and not scaled) or (found["pre_norm"] and "pool/probe" in leaves)):
        raise InputError(
            "an EVA-02 or a PE, whose positions are rotary, which timm's keys do not show: pass --model with timm's "
            "name, such as eva02_base_patch14_448"
        )

    image_size = known.get("image_size", (224, 224))
    if grid and grid != (image_size[0] // patch, image_size[1] // patch):
        image_size = grid[0] * patch, grid[1] * patch
    num_classes = _num_classes(translation, asked.get("num_classes"))
    norms = [piece.key for piece in leaves.get("norm/scale", {}).values()]
    fc_norm = known.get("fc_norm", False) or any(key.startswith("fc_norm.") for key in norms)
    inferred = {
        "num_heads": heads or asked.get("num_heads") or _usual_heads(width),
        "image_size": image_size,
        "cut_off": "image_size" not in asked and any(side % patch for side in image_size),
        "num_classes": num_classes,
        "representation_size": _columns(translation, "pre_logits/kernel") if num_classes else 0,
        "layer_scale": known.get("layer_scale", 1e-5) if scaled else None,
        "pool": known.get("pool") or _pool(translation, cls, dist, fc_norm),
        "fc_norm": fc_norm,
        "rotary": rotary,
        "key_bias": _keys_biased(translation, known),
        "head_bias": known.get("head_bias", True)
        and (not num_classes or "head/bias" in leaves or layout.fills("head/bias")),
        "map_mlp_dim": pooling if (pooling := _columns(translation, "pool/mlp/fc1/kernel")) != found["mlp_dim"] else 0,
    }
    if asked.get("num_heads", heads) != heads and heads:
        origin = next((origin for origin, fields in sources.items() if "num_heads" in fields), "the file")
        raise InputError(f"{origin} has {heads} heads, you asked for {asked['num_heads']}: leave --num_heads out")
    settings = {name: known[name] for name in _SETTINGS if name in known}
    return ViTConfig(**{**settings, **found, **inferred, **asked, "num_classes": num_classes}), grid


def _grid(
    translation: Translation, prefix: tuple[int, ...], patch: int, known: Mapping[str, Any], asked: Mapping[str, Any]
) -> tuple[Grid | None, bool]:
    """Find (rows, columns) of the position embedding, and whether prefix tokens have no entries in it."""
    if "embed/pos_embed" not in translation.leaves:
        if translation.layout.sincos2d:
            return None, any(prefix)
        if known.get("rotary"):
            return None, False
        raise InputError(
            "the file holds no position embedding: it is incomplete, or its positions are rotary: pass --model with "
            "timm's name, such as vit_small_patch16_dinov3"
        )
    entries = translation.shape("embed/pos_embed", 3)[1]
    # Entries for all prefix tokens but the registers, for all, or for none: the first that leaves a grid.
    every, few = sum(prefix), prefix[0] + prefix[1]
    options = [*([few] if prefix[2] else []), every, 0]
    if "no_embed_class" in known:
        options = [each for each in options if each != every] if known["no_embed_class"] and every else [every]
    sizes = [fields.get("image_size", (0, 0)) for fields in (known, asked)]
    stated, wanted = ((height // patch, width // patch) for height, width in sizes)
    # First the known size, then the requested one if it fits exactly, then a square.
    for taken in options:
        side = math.isqrt(max(entries - taken, 0))
        for grid in (stated, wanted, (side, side)):
            if 0 < math.prod(grid) == entries - taken:
                return grid, taken < every
    raise InputError(
        f"the position embedding has {entries} entries, no square grid: pass --image_size HEIGHTxWIDTH of the weights"
    )


def _keys_biased(translation: Translation, known: Mapping[str, Any]) -> bool:
    """Return whether keys have a bias: not if only queries and values do, and the layout has none for keys."""
    parts = translation.leaves.get("blocks_0/attn/qkv/bias", {}).values()
    masked = any(part.transform == "masked" for part in parts)
    alone = {*translation.leaves.get("blocks_0/attn/qkv/bias", {})} == {"q", "v"}
    return (
        not masked
        and known.get("key_bias", True)
        and not (alone and not translation.layout.fills("blocks_#/attn/qkv/bias:k"))
    )


def _pool(translation: Translation, cls: int, dist: int, fc_norm: bool) -> str:
    leaves = translation.leaves
    if "pool/probe" in leaves:
        return "map"
    if "head_dist/kernel" in leaves or (dist and "head/kernel" not in leaves):
        return "dist_avg"
    if fc_norm or not cls:
        return "avg"
    width = translation.shape("embed/kernel", 4)[3]
    first = next((path for path in ("pre_logits/kernel", "head/kernel") if path in leaves), None)
    # Hugging Face's DINOv2 classifies the class token beside the patches' mean.
    return "token_avg" if first and translation.shape(first, 2)[0] == 2 * width else "token"


def _num_classes(translation: Translation, asked: int | None) -> int:
    """Count the classes of the file's head. Raises InputError if another number was requested."""
    there = _columns(translation, "head/kernel")
    if not there and asked != 0 and "head/bias" in translation.leaves:
        raise InputError("the head has a bias, but no weight: the file is incomplete; pass --num_classes 0 without it")
    if asked in (None, there, 0):
        return there if asked is None else asked
    if not there:
        raise InputError(f"the file has no head, you asked for {asked} classes: pass --num_classes 0 for the backbone")
    kind = {21841: " (ImageNet-21k)", 21843: " (ImageNet-21k)", 1000: " (ImageNet-1k)"}.get(there, "")
    raise InputError(
        f"the head has {there} classes{kind}, you asked for {asked}: leave --num_classes out, or 0 drops it"
    )


def _columns(translation: Translation, path: str) -> int:
    return translation.shape(path, 2)[1] if path in translation.leaves else 0


def _usual_heads(width: int) -> int:
    """Return the number of heads that all known models of this width have: packed projections do not show it."""
    usual = {config.num_heads for config in zoo.ARCHITECTURES.values() if config.embed_dim == width}
    if len(usual) == 1:
        return usual.pop()
    raise InputError(
        f"the number of heads of a {width}-wide model cannot be inferred from the file: pass --model or --num_heads"
    )
