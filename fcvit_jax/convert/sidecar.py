"""The JSON files beside a weight file: geometry that keys and shapes do not show, preprocessing, class names.

Two libraries write a `config.json` beside their weights: transformers (`save_pretrained`, with the preprocessing in
`preprocessor_config.json`) and timm (`save_for_hf`, with the preprocessing in the same file).
"""

import contextlib
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fcvit_jax.data.labels import ClassNames
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo
from fcvit_jax.models.config import Rotary, ViTConfig

# model_type -> the defaults of its class for absent keys, and its image processor.
_DINOV2 = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"}
_MODEL_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "vit": ({"layer_norm_eps": 1e-12, "hidden_act": "gelu"}, "ViT"),
    "deit": ({"layer_norm_eps": 1e-12, "hidden_act": "gelu"}, "DeiT"),
    "ijepa": ({"layer_norm_eps": 1e-12, "hidden_act": "gelu"}, "ViT"),
    "dinov2": (_DINOV2, "Bit"),
    "dinov2_with_registers": (_DINOV2, "Bit"),
    "dinov3_vit": (
        {
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "num_attention_heads": 6,
            "rope_theta": 100.0,
            "key_bias": False,
        },
        "DINOv3ViT",
    ),
    "siglip_vision_model": (
        {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "num_attention_heads": 12},
        "Siglip",
    ),
    "clip_vision_model": ({"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "num_attention_heads": 12}, "CLIP"),
    "tipsv2_vision_model": (_DINOV2 | {"num_attention_heads": 12}, "Tipsv2"),
}
# Models of images and texts: "vision_config" describes the image tower.
_TOWERS = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "tipsv2": "tipsv2_vision_model"}
_DINOV2_KEYS = "tipsv2"  # whose files have DINOv2's own keys, not those of transformers' modules
# Image processor -> default filter and centre crop; whether a size of one number, in files from before transformers
# 4.25, is a square or the shorter side.
_PROCESSORS = {
    "ViT": (2, False, True),
    "DeiT": (3, True, True),
    "Bit": (3, True, False),
    "CLIP": (3, True, False),
    "Siglip": (3, False, True),
    "DINOv3ViT": (2, False, True),
    "Tipsv2": (2, False, True),
}

# Key -> field of `ViTConfig`.
HUGGINGFACE_FIELDS = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_dim",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "gelu",
    "num_register_tokens": "num_registers",
} | {name: name for name in ("image_size", "patch_size", "qkv_bias")}
_HUGGINGFACE_SHOWN = {"use_gated_mlp": "gated", "use_swiglu_ffn": "gated", "key_bias": "key_bias"}
_SAME = ("patch_size", "embed_dim", "depth", "num_heads", "qkv_bias", "class_token", "no_embed_class", "pre_norm")
TIMM_FIELDS = {name: name for name in _SAME} | {
    "img_size": "image_size",
    "reg_tokens": "num_registers",
    "init_values": "layer_scale",
    "act_layer": "gelu",
}
# Facts that timm's names imply and its files do not state, for models that the zoo does not know: fields, or an
# unsupported part.
_TIMM_NAMES: dict[str, tuple[dict[str, Any], str | None]] = {
    r"_rope_mixed": ({}, "rotary frequencies of its own in each layer"),
    r"_rope|dinov3|eva02|_pe_|lingbot|sapiens": ({}, "rotary positions in a way that the zoo does not know"),
    r"_rpn_": ({}, "norms behind its branches"),
    r"naflex": ({}, "images of sizes of their own"),
    r"^vit_.*_clip_quickgelu_": ({"gelu": "quick", "norm_eps": 1e-5}, None),
    r"^vit_.*_clip_(?!quickgelu)": ({"gelu": "exact", "norm_eps": 1e-5}, None),
    # timm runs the other SigLIPs with the exact GELU; Google trained all with tanh.
    r"(patch32|(so400m|giantopt)_patch16)_siglip|large_patch16_siglip_(gap_)?512": ({"gelu": "tanh"}, None),
}
_GELU = {"gelu": "exact", "quick_gelu": "quick"} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_tanh"), "tanh"
)
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}

Stated = Mapping[str, Any]


@dataclass(frozen=True)
class Sidecar:
    """Facts from the JSON files. kind: "huggingface" or "timm", by config.json; "fcvit_jax" for our checkpoints.

    files: names of the files read. fields: of `ViTConfig`, stated in config.json. architecture: timm's name, whether or
    not the zoo knows it. resampling: of positions, if not the layout's. provenance: that of our checkpoint. None if
    something is not stated.
    """

    kind: str | None = None
    files: tuple[str, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    preprocess: Preprocess | None = None
    class_names: ClassNames | None = None
    architecture: str | None = None
    resampling: str | None = None
    provenance: dict[str, Any] | None = None


def read_sidecar(weights: Path, kinds: tuple[str, ...] = ("timm", "huggingface"), pixels: bool = True) -> Sidecar:
    """Read the JSON files in the folder of a weight file, which may itself be a link into a cache.

    kinds: whose files may belong to it; others, such as those of another model in a folder of downloads, are ignored.
    pixels: False skips the preprocessing. Raises InputError that names the file if it is damaged, if its model is not
    supported, or if `Preprocess` cannot express its preprocessing.
    """
    if not kinds:
        return Sidecar()
    path, sidecar = weights.parent / "config.json", Sidecar()
    config = _load(path) or {}
    with _naming(path):
        if "timm" in kinds and "architecture" in config and {"pretrained_cfg", "input_size"} & config.keys():
            sidecar = _read_timm(config)
        elif "model_type" in config and ("huggingface" in kinds or str(config["model_type"]).startswith(_DINOV2_KEYS)):
            sidecar = _read_huggingface(config)
    if pixels and sidecar.kind == "timm":
        with _naming(path, fix=": pass --preprocess"):
            return replace(sidecar, preprocess=_read_timm_pixels(_pretrained_cfg(config)))
    path = path.with_name("preprocessor_config.json")
    if pixels and "huggingface" in (*kinds, sidecar.kind) and (stated := _load(path)) is not None:
        with _naming(path, fix=": pass --preprocess"):
            preprocess = _read_huggingface_pixels(stated, config.get("model_type"))
        return replace(sidecar, files=(*sidecar.files, path.name), preprocess=preprocess)
    return sidecar


def _read_huggingface(config: Stated) -> Sidecar:
    kind, stated = config["model_type"], _known(config)
    tower = _TOWERS.get(kind) if isinstance(kind, str) else None
    if tower:
        kind, stated = tower, _known(_take({"vision_config": {}} | stated, "vision_config", dict))
    if not isinstance(kind, str) or kind not in _MODEL_TYPES:
        raise InputError(f"model_type {reprlib.repr(kind)}, supported are {', '.join((*_MODEL_TYPES, *_TOWERS))}")
    stated = _MODEL_TYPES[kind][0] | stated
    gated = [key for key in ("use_gated_mlp", "use_swiglu_ffn") if stated.get(key)]
    if gated and stated.pop("hidden_act") != "silu" and gated == ["use_gated_mlp"]:
        raise InputError("use_gated_mlp with a hidden_act other than silu, supported is SwiGLU")
    found = _fields(stated, HUGGINGFACE_FIELDS | _HUGGINGFACE_SHOWN)
    if "embed_dim" in found and "mlp_ratio" in stated and not gated:
        found.setdefault("mlp_dim", int(found["embed_dim"] * _take(stated, "mlp_ratio", int, float)))
    if "rope_theta" in stated:
        found["rotary"] = Rotary(_take(stated, "rope_theta", int, float))
        found["pool"] = "token"
    if config.get("architectures") == ["SiglipForImageClassification"]:
        found["pool"] = "avg"  # it leaves the attention pooling out
    names = _names("id2label", config.get("id2label"))
    if names and all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = None  # placeholders
    resampling = "bilinear" if kind == "tipsv2_vision_model" else None
    return Sidecar("huggingface", ("config.json",), found, class_names=names, resampling=resampling)


def _read_timm(config: Stated) -> Sidecar:
    name, pixels = _take(config, "architecture", str), _pretrained_cfg(config)
    stated = {"img_size": pixels.get("input_size"), "global_pool": config.get("global_pool")}
    stated = _known(stated | _take({"model_args": {}} | _known(config), "model_args", dict))
    found = _fields(stated, TIMM_FIELDS | {"attn_pool_num_heads": "map_heads"})
    if (named := zoo.ARCHITECTURES.get(name)) and named.rotary:
        found["rotary"] = _timm_rotary(stated, named.rotary)
    for pattern, (implied, problem) in _TIMM_NAMES.items():
        if re.search(pattern, name) and not (named and problem):
            if problem:
                raise InputError(f"architecture {name!r}, which has {problem}: it is not supported")
            found = implied | found
    pool = stated.get("global_pool")
    if pool not in (None, "", "token", "avg", "map") or stated.get("pool_include_prefix"):
        raise InputError(f"global_pool {pool!r} or pool_include_prefix, supported are token and avg of the patches")
    # A distilled model averages its two heads whatever it says, and "map" shows in the keys.
    if pool in ("token", "avg") and "distilled" not in name:
        found["pool"] = pool
    labels = config.get("label_names") or pixels.get("label_names") or pixels.get("labels")
    return Sidecar("timm", ("config.json",), found, class_names=_names("label_names", labels), architecture=name)


def _timm_rotary(stated: Stated, usual: Rotary) -> Rotary:
    """Adapt the rotary positions that a model's name implies to its arguments."""
    changes = {}
    for key, name in {"rope_temperature": "theta", "rope_grid_offset": "offset"}.items():
        if key in stated:
            changes[name] = _take(stated, key, int, float)
    if "ref_feat_shape" in stated:
        changes["reference"] = _size("ref_feat_shape", stated["ref_feat_shape"])
    return replace(usual, **changes)


def _fields(stated: Stated, table: Mapping[str, str]) -> dict[str, Any]:
    found, types = {}, {field.name: field.type for field in fields(ViTConfig)}
    for key, name in table.items():
        if key not in stated:
            continue
        if name == "gelu":
            found[name] = _choose(stated, key, _GELU)
        elif name == "image_size":
            found[name] = _size(key, stated[key])
        elif name == "patch_size":
            found[name], width = _size(key, stated[key])
            if width != found[name]:
                raise InputError(f"{key} {reprlib.repr(stated[key])}, supported are squares")
        else:
            found[name] = _take(stated, key, *((types[name],) if types[name] in (int, bool) else (int, float)))
    return found


def _pretrained_cfg(config: Stated) -> Stated:
    return _take({"pretrained_cfg": config} | _known(config), "pretrained_cfg", dict)  # old files have one level


def _read_timm_pixels(pixels: Stated) -> Preprocess:
    """Read pixels as timm's `resolve_data_config`, at the size of training: absence, null and 0 mean the default."""
    names = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    stated = {name: pixels[name] for name in names if pixels.get(name)}
    return Preprocess(_size("input_size", pixels.get("input_size") or 224), **stated)


def _read_huggingface_pixels(stated: Stated, model_type: str | None) -> Preprocess:
    """Read pixels as the image processor that the file names, or that of the model type."""
    stated = _known(stated)
    name = stated.get("image_processor_type", stated.get("feature_extractor_type"))
    family = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", str(name))
    if name is None and model_type:
        family = _MODEL_TYPES[_TOWERS.get(model_type, model_type)][1]
    if family not in _PROCESSORS:
        raise InputError(f"image_processor_type {reprlib.repr(name)}, supported are {', '.join(_PROCESSORS)}")
    resample, crops, square = _PROCESSORS[family]
    only = {"do_resize": True, "do_rescale": True, "do_pad": False}
    defaults = {
        "resample": resample,
        "do_center_crop": crops,
        "do_normalize": family != "Tipsv2",
        "rescale_factor": 1 / 255,
    }
    stated = only | defaults | stated
    for key, value in only.items():
        if stated[key] is not value:
            raise InputError(f"{key} {reprlib.repr(stated[key])}, supported is {value}")
    if not math.isclose(_take(stated, "rescale_factor", float, int), 1 / 255, rel_tol=1e-6):
        raise InputError(f"rescale_factor {stated['rescale_factor']}, supported is 1/255")

    size = stated.get("size")
    if isinstance(size, dict):
        square = "shortest_edge" not in size
        size = size["shortest_edge"] if size.keys() == {"shortest_edge"} else size
    image = resized = _size("size", size)
    if _take(stated, "do_center_crop", bool):
        image = _size("crop_size", stated.get("crop_size"))
    elif not square:
        raise InputError("shortest_edge without do_center_crop, which leaves images of any size")
    if not square and image[0] != image[1]:
        raise InputError(f"shortest_edge with crop_size {image}, supported are squares")
    normalize = _take(stated, "do_normalize", bool)
    return Preprocess(
        image_size=image,
        crop_pct=_crop_pct(image, resized),
        crop_mode="squash" if square else "center",
        interpolation=_choose(stated, "resample", _RESAMPLE),
        mean=_take(stated, "image_mean", list) if normalize else (0, 0, 0),
        std=_take(stated, "image_std", list) if normalize else (1, 1, 1),
    )


def _crop_pct(image: tuple[int, int], resized: tuple[int, int]) -> float:
    """Find the share for which `Preprocess.resize_size` is exactly `resized`."""
    share = min(side / whole for side, whole in zip(image, resized, strict=True))
    for pct in (share, math.nextafter(share, 0)):  # the quotient may have been rounded up
        if tuple(math.floor(side / pct) for side in image) == resized:
            return pct
    raise InputError(f"crop_size {image}, another share of size {resized} in height than in width")


def _load(path: Path) -> dict[str, Any] | None:
    """Read the JSON object of a file; None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object: download it again")
    return content


@contextlib.contextmanager
def _naming(path: Path, fix: str = "") -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} says {error}{fix}") from error


def _known(stated: Stated) -> dict[str, Any]:
    """Drop the nulls, which mean the default, as absence does."""
    return {key: value for key, value in stated.items() if value is not None}


def _take(stated: Stated, key: str, *kinds: Any) -> Any:
    """Return the value of a key; InputError if it is absent or of another kind."""
    value = stated.get(key)
    if type(value) not in kinds:
        raise InputError(f"{key} {reprlib.repr(value)}, expected {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _choose(stated: Stated, key: str, known: Mapping[Any, str]) -> str:
    value = _take(stated, key, *{type(choice) for choice in known})
    if value not in known:
        raise InputError(f"{key} {reprlib.repr(value)}, supported are {', '.join(map(str, known))}")
    return known[value]


def _size(key: str, value: Any) -> tuple[int, int]:
    """Read (height, width) from a number, from [height, width], perhaps after channels, or {"height", "width"}."""
    if isinstance(value, dict) and value.keys() == {"height", "width"}:
        value = [value["height"], value["width"]]
    sides: list[Any] = value[-2:] if isinstance(value, list) and len(value) in (2, 3) else [value, value]
    if any(type(side) is not int or side < 1 for side in sides):
        raise InputError(f"{key} {reprlib.repr(value)}, expected a size in pixels")
    return sides[0], sides[1]


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    """Read the names in a list or in {"0": name}; None if there are none, or not one for each index."""
    if isinstance(value, dict):
        order = [str(index) for index in range(len(value))]
        value = [value[index] for index in order] if value.keys() == {*order} else None
    if value and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise InputError(f"{key} {reprlib.repr(value)}, expected names")
    return tuple(value) if value else None
