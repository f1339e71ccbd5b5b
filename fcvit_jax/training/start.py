"""What a run starts from: fresh parameters, or a checkpoint made to fit the data set and the image size."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fcvit_jax.checkpoint import flat_params, load_checkpoint
from fcvit_jax.convert.geometry import infer_config
from fcvit_jax.convert.translation import assemble, translate
from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.models.vit import ViTConfig


@dataclass(frozen=True)
class Start:
    """params: float32 tree, or None for fresh ones. remarks: what was changed, a line each, to be said aloud."""

    config: ViTConfig
    preprocess: Preprocess
    params: Any
    provenance: dict[str, Any] | None
    remarks: tuple[str, ...]


def from_scratch(model: dict[str, Any], preprocess: str, num_classes: int) -> Start:
    """model: fields of ViTConfig. preprocess: a preset. Raises InputError where they make no sense."""
    config = ViTConfig(num_classes=num_classes, **model)
    return Start(config, preset(preprocess, config.image_size), None, None, ())


def from_checkpoint(
    path: str | Path, class_names: tuple[str, ...], image_size: tuple[int, int] | None, preprocess: str | None
) -> Start:
    """A checkpoint, with a new head (zeros) where its classes are not these, and resampled to another image size.

    preprocess: a preset in place of the checkpoint's own. Raises InputError where the checkpoint cannot be read.
    """
    checkpoint = load_checkpoint(path)
    config, params, pixels, remarks = checkpoint.config, checkpoint.params, checkpoint.preprocess, []
    if image_size and image_size != config.image_size:
        translation = translate(flat_params(params))
        config, grid = infer_config(translation, {str(path): asdict(config)}, {"image_size": image_size})
        converted = assemble(translation, config, grid)
        params, remarks = converted.params, [*converted.remarks]
        pixels = replace(pixels, image_size=image_size)
    if preprocess:
        pixels = preset(preprocess, config.image_size)
    names, there = checkpoint.meta["class_names"], config.num_classes
    if there != len(class_names) or (names and tuple(names) != class_names):
        why = f"{there} classes, the data set {len(class_names)}" if there != len(class_names) else "other classes"
        remarks.append(f"{path} has {why}: its head is replaced by zeros")
        params, config = _new_head(params, config, len(class_names))
    return Start(config, pixels, params, checkpoint.meta["provenance"], tuple(remarks))


def _new_head(params: Any, config: ViTConfig, num_classes: int) -> tuple[Any, ViTConfig]:
    params = {name: leaf for name, leaf in params.items() if name not in ("head", "head_dist", "pre_logits")}
    config = replace(config, num_classes=num_classes, representation_size=0)
    width = config.embed_dim * (2 if config.pool == "token_avg" else 1)
    for name in ("head", "head_dist") if config.pool == "dist_avg" else ("head",):
        params[name] = {"kernel": jnp.zeros((width, num_classes)), "bias": jnp.zeros(num_classes)}
    return params, config
