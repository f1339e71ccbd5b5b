"""A parameter tree as the file that timm or transformers loads, written without PyTorch."""

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.checkpoint import flat_params
from fcvit_jax.convert.layouts import (
    HF_CLIP,
    HF_DINOV2,
    HF_DINOV3,
    HF_DINOV3_GATED,
    HF_SIGLIP,
    HF_VIT,
    PERIODS,
    TIMM,
    Arrays,
    Table,
)
from fcvit_jax.convert.sidecar import HUGGINGFACE_FIELDS, TIMM_FIELDS
from fcvit_jax.data.preprocess import INTERPOLATIONS, Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.files import check_target, local_path, staged
from fcvit_jax.models.config import Rotary, ViTConfig

# Transform of a layout -> the order of the leaf's axes in the file; other transforms leave the leaf unchanged.
_AXES = {"linear": (1, 0), "conv": (3, 2, 0, 1)}
_TIMM_GELU = {"tanh": "gelu_tanh", "quick": "quick_gelu"}
_HF_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}

HF_ENTRIES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json"})  # of transformers' directory


def check_output(out: str | Path, to: str, overwrite: bool) -> Path:
    """Return the path if it may be written, or raise InputError; call it before any long work.

    `OUT.safetensors` is a file, any other OUT a directory of transformers. Only such a file or directory is replaced.
    """
    if Path(out).suffix == ".safetensors":
        path = local_path(out).resolve()
        return check_target(path, overwrite, frozenset() if path.is_dir() else frozenset({path.name}))
    if to == "timm":
        raise InputError(f"{out}: --to timm writes one file: name it {out}.safetensors")
    return check_target(out, overwrite, HF_ENTRIES)


def write_timm(path: Path, config: ViTConfig, params: Mapping[str, Any]) -> str:
    """Write the safetensors file; returns how to load it in timm. Raises InputError if timm has no such model."""
    call, skip = timm_call(config), ["norm\\." if config.fc_norm else "fc_norm\\."]
    if _needs_eva(config):
        skip += [r"blocks\.#\.ls", *([] if config.key_bias else [r"blocks\.#\.attn\.qkv\.bias"])]
        skip += [r"blocks\.#\.attn\.qkv"] if _apart(config) else []
        skip += [r"blocks\.#\.mlp\.fc1\."] if _gate_apart(config) else []
    arrays = _invert(TIMM, params, "|".join(skip))
    if _needs_eva(config) and not _apart(config):  # the projection is packed, its biases are not
        arrays = {re.sub(r"attn\.([qv])_proj\.bias", r"attn.\1_bias", key): array for key, array in arrays.items()}
    if config.num_classes and not config.head_bias:
        arrays["head.bias"] = np.zeros(config.num_classes, np.float32)
    write_safetensors(path, arrays)
    usage = (
        f"in PyTorch: model = {call}; model.load_state_dict(safetensors.torch.load_file({path.name!r}), strict=True)"
    )
    stored = config.rotary and config.rotary.periods
    return usage + (f"; {PERIODS}" if stored else "")


def write_huggingface(
    path: Path,
    config: ViTConfig,
    params: Mapping[str, Any],
    preprocess: Preprocess | None,
    class_names: tuple[str, ...] | None,
) -> str:
    """Write model.safetensors, config.json and, if transformers can express it, preprocessor_config.json.

    `path` is the directory, or a .safetensors file that gets the weights alone. Returns how to load it.
    Raises InputError if transformers has no such model.
    """
    arrays, description = to_huggingface(config, params, class_names)
    kind = description["architectures"][0]
    if path.suffix == ".safetensors":
        write_safetensors(path, arrays)
        return f"the weights of transformers.{kind}, without its config.json"
    processor = to_image_processor(preprocess) if preprocess else None
    with staged(path) as directory:
        write_safetensors(directory / "model.safetensors", arrays)
        for name, fields in (("config.json", description), ("preprocessor_config.json", processor)):
            if fields:
                (directory / name).write_text(json.dumps(fields, indent=2) + "\n")
    usage = f"in PyTorch: transformers.{kind}.from_pretrained({path.name!r})"
    if processor:
        return usage
    why = f"it cannot say {preprocess}" if preprocess else "pass --preprocess for one"
    return f"{usage}; there is no preprocessor_config.json: {why}"


def timm_call(config: ViTConfig) -> str:
    """Write the expression that builds the module in timm. Raises InputError if timm has no such module."""
    eva = _needs_eva(config)
    pooling = config.pool == "map" and (config.map_heads or config.map_mlp_dim)
    lacking = {
        "layer in front of the head": config.representation_size > 0,
        "head for class embeddings": config.projection_dim > 0 or config.unit_features,
        "head on the class token and the patches' mean": config.pool == "token_avg",
        "patch embedding with this bias but without this norm after it": config.patch_bias == config.pre_norm,
        "distilled model that pools otherwise": config.dist_token and (eva or config.pool != "dist_avg"),
        "attention pooling with heads or an MLP of its own": pooling and not eva,
        f"GELU {config.gelu} beside rotary positions": eva and config.gelu != "exact" and not config.gated,
        "image that leaves a part of a patch over": config.cut_off,
        "half rotation of a grid's indices": eva and config.rotary and config.rotary.coordinates == "index"
        and config.rotary.rotation == "half",
    }  # fmt: skip
    if what := next((what for what, there in lacking.items() if there), None):
        raise InputError(f"--to timm: timm's ViT has no {what}: it cannot hold this model")
    usual, (height, width) = ViTConfig(), config.image_size
    arguments: dict[str, Any] = dict(
        img_size=height if height == width else config.image_size,
        mlp_ratio=_ratio(config.embed_dim, config.mlp_dim * (2 if config.gated and not eva else 1)),
        num_classes=config.num_classes,
    )
    for key, field in TIMM_FIELDS.items():
        value = getattr(config, field)
        if key in ("patch_size", "embed_dim", "depth", "num_heads") or value != getattr(usual, field):
            arguments.setdefault(key, _TIMM_GELU[value] if field == "gelu" else value)
    if eva:
        arguments = _eva_arguments(config, arguments)
    elif config.pool in ("avg", "map") or config.fc_norm:
        arguments |= dict(global_pool=config.pool, fc_norm=config.fc_norm)
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if config.gated and not eva:
        text += ", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU"
    if config.norm_eps != usual.norm_eps:
        text += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_eps})"
    if eva:
        return f"timm.models.eva.Eva({text})"
    name = "deit.VisionTransformerDistilled" if config.dist_token else "vision_transformer.VisionTransformer"
    return f"timm.models.{name}({text})"


def _needs_eva(config: ViTConfig) -> bool:
    """Return whether timm's ViT lacks what its EVA has."""
    return bool(config.rotary) or not config.key_bias or config.attn_norm or config.mlp_norm


def _apart(config: ViTConfig) -> bool:
    """Return whether queries, keys and values are projected apart, as in EVA-02 base and larger."""
    return config.mlp_norm and not (config.qkv_bias and config.key_bias)


def _gate_apart(config: ViTConfig) -> bool:
    """Return whether the gate is a layer of its own, as in EVA-02 base and larger, and in DINOv3."""
    return config.gated and (config.mlp_norm or bool(config.rotary and config.rotary.coordinates == "centred"))


def _eva_arguments(config: ViTConfig, arguments: dict[str, Any]) -> dict[str, Any]:
    names = {"reg_tokens": "num_reg_tokens", "pre_norm": "use_pre_transformer_norm", "act_layer": None}
    changed = {names.get(key, key): value for key, value in arguments.items() if names.get(key, key)}
    changed |= dict(
        global_pool=config.pool,
        use_fc_norm=config.fc_norm,
        qkv_fused=not _apart(config),
        attn_type="rope" if config.qkv_bias and config.key_bias else "eva",
        swiglu_mlp=config.gated,
        scale_mlp=config.mlp_norm,
        scale_attn_inner=config.attn_norm,
        use_abs_pos_emb=config.learned_positions,
        use_rot_pos_emb=config.rotary is not None,
    )
    if _gate_apart(config) and not config.mlp_norm:
        changed["swiglu_align_to"] = 1
    if config.pool == "map":
        pooling = config.map_mlp_dim or config.mlp_dim
        changed |= dict(attn_pool_num_heads=config.map_heads or config.num_heads)
        changed |= dict(attn_pool_mlp_ratio=_ratio(config.embed_dim, pooling))
    if rotary := config.rotary:
        changed |= dict(
            rope_type="dinov3" if rotary.coordinates == "centred" else "cat",
            rope_rotate_half=rotary.rotation == "half",
            rope_temperature=rotary.theta,
            rope_grid_offset=rotary.offset,
            rope_grid_indexing="xy" if rotary.x_first else "ij",
        )
        if rotary.reference:
            changed["ref_feat_shape"] = rotary.reference
    return changed


def _ratio(width: int, hidden: int) -> float:
    """Find the ratio from which timm makes exactly this hidden width, rounding down."""
    return next(x for x in (hidden / width, math.nextafter(hidden / width, math.inf)) if int(width * x) == hidden)


def to_huggingface(
    config: ViTConfig, params: Mapping[str, Any], class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make the state dict and config.json of transformers' ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP.

    A model with LayerScale, registers or `token_avg` pooling becomes a DINOv2, whose head sees the class token and the
    patches' mean: a head on the class token gets zeros for the other half. Raises InputError if no class fits.
    """
    if config.rotary or config.pre_norm or config.pool == "map":
        return _to_tower(config, params)
    dinov2 = config.layer_scale is not None
    problems = {
        "average pooling without the class token": config.pool == "avg",
        "norm after the pooling": config.fc_norm,
        "norm in front of the blocks": config.pre_norm,
        "patch embedding without a bias": not config.patch_bias,
        "layer in front of the head": config.representation_size > 0,
        "head for class embeddings": config.projection_dim > 0 or config.unit_features,
        "distillation token beside LayerScale": dinov2 and config.dist_token,
        "positions for registers": config.num_registers > 0 and not config.no_embed_class,
        "registers without LayerScale": not dinov2 and config.num_registers > 0,
        "head on the class token and the patches' mean without LayerScale": not dinov2 and config.pool == "token_avg",
        "MLP that is gated": config.gated and not dinov2,
        "biases of queries and values alone": config.qkv_bias and not config.key_bias,
        "head without a bias": config.num_classes > 0 and not config.head_bias,
        "image that leaves a part of a patch over": config.cut_off,
        f"MLP {config.mlp_dim / config.embed_dim} times as wide": dinov2 and _mlp_ratio(config) is None,
        "image that is not square": config.image_size[0] != config.image_size[1],
    }
    if problem := next((problem for problem, there in problems.items() if there), None):
        raise InputError(f"--to hf: transformers' ViT, DeiT and DINOv2 have no {problem}: they cannot hold this model")
    if dinov2:
        kind, name = ("dinov2_with_registers", "Dinov2WithRegisters") if config.num_registers else ("dinov2", "Dinov2")
    else:
        kind, name = ("deit", "DeiT") if config.dist_token else ("vit", "ViT")
    both_heads = config.pool == "dist_avg" and config.num_classes > 0
    skip = "classifier" if both_heads else "cls_classifier"
    if config.gated:  # the saved names, which differ from those in memory
        skip += r"|encoder\.layer\.#\.mlp\.(fc|gate|up|down)"
    arrays = _invert(HF_DINOV2 if dinov2 else HF_VIT, params, skip)
    positions, width = arrays["embeddings.position_embeddings"], config.embed_dim
    if config.no_embed_class:
        nothing = np.zeros((1, config.class_token + config.dist_token, width), np.float32)
        arrays["embeddings.position_embeddings"] = np.concatenate([nothing, positions], axis=1)
    if kind == "dinov2_with_registers":
        arrays["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    if dinov2 and config.num_classes and config.pool == "token":
        weight = arrays["classifier.weight"]
        arrays["classifier.weight"] = np.concatenate([weight, np.zeros_like(weight)], axis=1)
    suffix = "Model" if not config.num_classes else "ForImageClassification"
    if config.num_classes:  # the base model is an attribute of that name; the heads are beside it
        arrays = {key if "classifier." in key else f"{kind}.{key}": array for key, array in arrays.items()}
    labels = class_names or [f"LABEL_{index}" for index in range(config.num_classes)]
    description = {key: getattr(config, field) for key, field in HUGGINGFACE_FIELDS.items()} | {
        "architectures": [name + suffix + ("WithTeacher" if both_heads else "")],
        "model_type": kind,
        "hidden_act": _HF_GELU[config.gelu],
        "image_size": config.image_size[0],
        "num_channels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "dtype": "float32",
    }
    if dinov2:
        del description["intermediate_size"]
        description |= {"mlp_ratio": _mlp_ratio(config), "use_swiglu_ffn": config.gated}
        description |= {"layerscale_value": config.layer_scale, "use_mask_token": False}
    if not config.num_registers:
        del description["num_register_tokens"]
    return arrays, description


def _mlp_ratio(config: ViTConfig) -> int | None:
    """Find the whole ratio from which DINOv2 makes this hidden width; None if there is none."""

    def hidden(ratio: int) -> int:
        wide = ratio * config.embed_dim
        return (wide * 2 // 3 + 7) // 8 * 8 if config.gated else wide

    return next((ratio for ratio in range(1, 9) if hidden(ratio) == config.mlp_dim), None)


def _to_tower(config: ViTConfig, params: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Make the same as `to_huggingface` for DINOv3, and for the image towers of CLIP and SigLIP."""
    usual: dict[str, Any] = dict(pool="token", num_classes=0)
    if rotary := config.rotary:
        table, kind, name = HF_DINOV3_GATED if config.gated else HF_DINOV3, "dinov3_vit", "DINOv3ViTModel"
        usual |= dict(rotary=Rotary(rotary.theta, periods=rotary.periods), learned_positions=False)
    elif config.pool == "map":
        table, kind, name = HF_SIGLIP, "siglip_vision_model", "SiglipVisionModel"
        usual |= dict(pool="map", class_token=False)
    else:
        table, kind, name = HF_CLIP, "clip_vision_model", "CLIPVisionModel"
        usual |= dict(pre_norm=True, patch_bias=False)
        if config.num_classes:
            name += "WithProjection"
            usual |= dict(head_bias=False, num_classes=config.num_classes)
    same = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_dim", "norm_eps", "gelu", "qkv_bias")
    same += ("proportional_attention",)
    if kind == "dinov3_vit":
        same += ("num_registers", "layer_scale", "key_bias", "gated")
    expected = ViTConfig(**usual | {field: getattr(config, field) for field in same})
    if odd := [field for field, value in vars(expected).items() if getattr(config, field) != value]:
        raise InputError(
            f"--to hf: transformers.{name} has no {odd[0]} {getattr(config, odd[0])}: it cannot hold this model"
        )
    if config.image_size[0] != config.image_size[1]:
        raise InputError(f"--to hf: transformers.{name} takes square images: it cannot hold this model")
    arrays = _invert(table, params, skip="classifier")
    if "embeddings.position_embedding.weight" in arrays:
        arrays["embeddings.position_embedding.weight"] = arrays["embeddings.position_embedding.weight"][0]
    if "embeddings.class_embedding" in arrays:
        arrays["embeddings.class_embedding"] = arrays["embeddings.class_embedding"].reshape(-1)
    if "WithProjection" in name:
        arrays = {key if key.startswith("visual") else f"vision_model.{key}": array for key, array in arrays.items()}
    description = {key: getattr(config, HUGGINGFACE_FIELDS[key]) for key in HUGGINGFACE_FIELDS if key != "qkv_bias"} | {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu" if config.gated else _HF_GELU[config.gelu],
        "image_size": config.image_size[0],
        "num_channels": 3,
        "dtype": "float32",
    }
    if rotary:
        arrays["embeddings.mask_token"] = np.zeros((1, 1, config.embed_dim), np.float32)
        biases = {f"{part}_bias": config.qkv_bias for part in ("query", "value")}
        description |= biases | {"key_bias": config.qkv_bias and config.key_bias, "use_gated_mlp": config.gated}
        description |= {"rope_theta": rotary.theta, "layerscale_value": config.layer_scale}
    else:
        del description["num_register_tokens"]
    if config.num_classes:
        description["projection_dim"] = config.num_classes
    return arrays, description


def to_image_processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """Make the preprocessor_config.json of a preprocessing; None if no processor of transformers can do it."""
    (resize_height, resize_width), (height, width) = preprocess.resize_size, preprocess.image_size
    mode, cropped = preprocess.crop_mode, preprocess.resize_size != preprocess.image_size
    if mode == "border" or (mode == "center" and height != width):
        return None
    kind, size = "BitImageProcessor", {"shortest_edge": resize_height}
    if mode == "squash":
        kind, size = f"{'DeiT' if cropped else 'ViT'}ImageProcessor", {"height": resize_height, "width": resize_width}
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {
        "do_resize": True,
        "resample": int(INTERPOLATIONS[preprocess.interpolation]),
        "image_processor_type": kind,
        "size": size,
        **(crop if cropped or mode == "center" else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def write_safetensors(path: Path, arrays: Arrays) -> None:
    """Write float32 arrays as a safetensors file, whole or not at all, with the metadata that transformers needs.

    Raises InputError if the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # The library writes an array's memory and ignores its strides.
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
            file = Path(folder, path.name)
            save_file(contiguous, file, metadata={"format": "pt"})
            file.chmod(0o644)  # the library makes it readable by the owner alone
            os.replace(file, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({why}): make room, and run it again") from None


def _invert(table: Table, params: Mapping[str, Any], skip: str) -> dict[str, np.ndarray]:
    """Return the leaves under the keys of a table, without the keys that match `skip`.

    A leaf with several spellings, whole or in parts, is written once, under the first. Raises InputError if a leaf has
    no key.
    """
    leaves = flat_params(params)
    blocks = sum(path.endswith("/norm1/scale") for path in leaves)
    arrays: dict[str, np.ndarray] = {}
    filled: dict[str, set[str]] = {}  # path -> its parts ("" for the whole leaf)
    for pattern, (target, transform) in table.items():
        for number in range(blocks) if "#" in pattern else [0]:
            path, _, part = target.replace("#", str(number)).partition(":")
            parts = filled.get(path, set())
            if path not in leaves or part in parts or "" in parts or (parts and not part) or re.match(skip, pattern):
                continue
            value = leaves[path]
            if part:
                narrow = value.shape[-1] < leaves[path.replace("bias", "kernel")].shape[-1]  # without the keys' biases
                if narrow and part == "k":
                    continue
                value = _part(value, part, narrow)
            arrays[pattern.replace("#", str(number))] = (
                value.transpose(_AXES[transform]) if transform in _AXES else value
            )
            filled.setdefault(path, set()).add(part)
    if left := sorted(leaves.keys() - filled.keys()):
        raise InputError(f"no key there has a place for {left[0]}: it cannot hold this model")
    return arrays


def _part(value: np.ndarray, part: str, narrow: bool) -> np.ndarray:
    """Take a part of a packed leaf, by its letters; narrow: it has no part for the keys."""
    letters = "gx" if part in "gx" else "qv" if narrow else "qkv"
    width = value.shape[-1] // len(letters)
    start = letters.index(part[0])
    return value[..., start * width : (start + len(part)) * width]
