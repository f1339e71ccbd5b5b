"""A parameter tree as the file that timm or transformers loads, written without PyTorch."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.checkpoint import flat_params
from fcvit_jax.convert.layouts import HF_DINOV2, HF_VIT, TIMM, Arrays, Table
from fcvit_jax.convert.sidecar import HUGGINGFACE_FIELDS, TIMM_FIELDS
from fcvit_jax.data.preprocess import INTERPOLATIONS, Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.files import check_target, local_path, staged
from fcvit_jax.models.config import ViTConfig

# Transform of a layout -> the order of the leaf's axes in the file; other transforms leave the leaf unchanged.
_AXES = {"linear": (1, 0), "conv": (3, 2, 0, 1)}
_TIMM_GELU = {"tanh": "gelu_tanh", "quick": "quick_gelu"}
_HF_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}

HF_ENTRIES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json"})  # of transformers' directory


def check_output(out: str | Path, to: str, overwrite: bool) -> Path:
    """Return the path if it may be written, or raise InputError; to be called before any long work.

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
    call = timm_call(config)
    write_safetensors(path, _invert(TIMM, params, skip="norm." if config.fc_norm else "fc_norm."))
    return f"in PyTorch: model = {call}; model.load_state_dict(safetensors.torch.load_file({path.name!r}), strict=True)"


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
    """The expression that builds the module in timm. Raises InputError if timm has no such module."""
    lacking = {
        "layer in front of the head": config.representation_size > 0,
        "head on the class token and the patches' mean": config.pool == "token_avg",
        "patch embedding with this bias but without this norm after it": config.patch_bias == config.pre_norm,
        "distilled model that pools otherwise": config.dist_token and config.pool != "dist_avg",
    }
    if what := next((what for what, there in lacking.items() if there), None):
        raise InputError(f"--to timm: timm's ViT has no {what}: it cannot hold this model")
    usual, height, width = ViTConfig(), *config.image_size
    arguments: dict[str, Any] = dict(
        img_size=height if height == width else config.image_size,
        mlp_ratio=config.mlp_dim / config.embed_dim,
        num_classes=config.num_classes,
    )
    for key, field in TIMM_FIELDS.items():
        value = getattr(config, field)
        if key in ("patch_size", "embed_dim", "depth", "num_heads") or value != getattr(usual, field):
            arguments.setdefault(key, _TIMM_GELU[value] if field == "gelu" else value)
    if config.pool == "avg" or config.fc_norm:
        arguments |= dict(global_pool=config.pool, fc_norm=config.fc_norm)
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    if config.norm_eps != usual.norm_eps:
        text += f", norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_eps})"
    name = "deit.VisionTransformerDistilled" if config.dist_token else "vision_transformer.VisionTransformer"
    return f"timm.models.{name}({text})"


def to_huggingface(
    config: ViTConfig, params: Mapping[str, Any], class_names: tuple[str, ...] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict and the config.json of transformers' ViT, DeiT or DINOv2, whichever holds this model.

    A model with LayerScale, registers or `token_avg` pooling becomes a DINOv2, whose head sees the class token and the
    patches' mean: a head on the class token gets zeros for the other half. Raises InputError if none can hold it.
    """
    dinov2 = config.layer_scale is not None
    problems = {
        "average pooling without the class token": config.pool == "avg",
        "norm after the pooling": config.fc_norm,
        "norm in front of the blocks": config.pre_norm,
        "patch embedding without a bias": not config.patch_bias,
        "layer in front of the head": config.representation_size > 0,
        "distillation token beside LayerScale": dinov2 and config.dist_token,
        "positions for registers": config.num_registers > 0 and not config.no_embed_class,
        "registers without LayerScale": not dinov2 and config.num_registers > 0,
        "head on the class token and the patches' mean without LayerScale": not dinov2 and config.pool == "token_avg",
        f"MLP {config.mlp_dim / config.embed_dim} times as wide": dinov2 and config.mlp_dim % config.embed_dim > 0,
        "image that is not square": config.image_size[0] != config.image_size[1],
    }
    if problem := next((problem for problem, there in problems.items() if there), None):
        raise InputError(f"--to hf: transformers' ViT, DeiT and DINOv2 have no {problem}: they cannot hold this model")
    if dinov2:
        kind, name = ("dinov2_with_registers", "Dinov2WithRegisters") if config.num_registers else ("dinov2", "Dinov2")
    else:
        kind, name = ("deit", "DeiT") if config.dist_token else ("vit", "ViT")
    both_heads = config.pool == "dist_avg" and config.num_classes > 0
    arrays = _invert(HF_DINOV2 if dinov2 else HF_VIT, params, skip="classifier." if both_heads else "cls_classifier.")
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
        ratio = config.mlp_dim // width
        description |= {"mlp_ratio": ratio, "layerscale_value": config.layer_scale, "use_mask_token": False}
    if not config.num_registers:
        del description["num_register_tokens"]
    return arrays, description


def to_image_processor(preprocess: Preprocess) -> dict[str, Any] | None:
    """The preprocessor_config.json of the same preprocessing, or None if no processor of transformers can do it."""
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
    """Write float32 arrays as a safetensors file that is whole or not there, with the metadata that transformers needs.

    Raises InputError if the place cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # The library writes an array's memory, whatever its strides.
    contiguous = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as folder:
            file = Path(folder, path.name)
            save_file(contiguous, file, metadata={"format": "pt"})
            file.chmod(0o644)  # the library's is the owner's alone
            os.replace(file, path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({why}): make room, and run it again") from None


def _invert(table: Table, params: Mapping[str, Any], skip: str) -> dict[str, np.ndarray]:
    """The leaves under the keys of a table; of two keys for a leaf the first, but for those that start with `skip`."""
    leaves = flat_params(params)
    blocks = sum(path.endswith("/norm1/scale") for path in leaves)
    arrays, filled = {}, set()
    for pattern, (target, transform) in table.items():
        for number in range(blocks) if "#" in pattern else [0]:
            path, _, part = target.replace("#", str(number)).partition(":")
            if path not in leaves or (path, part) in filled or pattern.startswith(skip):
                continue
            value = leaves[path]
            if part:
                value = np.split(value, 3, axis=-1)["qkv".index(part)]
            arrays[pattern.replace("#", str(number))] = (
                value.transpose(_AXES[transform]) if transform in _AXES else value
            )
            filled.add((path, part))
    return arrays
