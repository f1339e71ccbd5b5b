"""What a run starts from: fresh parameters, or a checkpoint made to fit the data sets and the image size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcvit_jax.checkpoint import abstract_params, flat_params, load_checkpoint, without_head
from fcvit_jax.convert.geometry import infer_config
from fcvit_jax.convert.translation import assemble, translate
from fcvit_jax.data.labels import UnknownOrder, class_differences, match_head, read_class_names
from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig


@dataclass(frozen=True)
class StartingPoint:
    """The model, and the data sets with labels that index its outputs."""

    config: ViTConfig
    preprocess: Preprocess
    train_set: Source
    test_set: Source
    provenance: dict[str, Any] | None = None  # the checkpoint's
    remarks: tuple[str, ...] = ()  # lines to print: what was changed in it
    recommended: Mapping[str, str] = field(default_factory=dict)  # its schedules, by budget


def from_scratch(model: ViTConfig, preprocess: str, train_set: Source, test_set: Source) -> StartingPoint:
    """Start from a fresh model with a head for the training set's classes. preprocess: a preset."""
    config = replace(model, num_classes=len(train_set.class_names))
    return StartingPoint(config, preset(preprocess, config.image_size), train_set, _like(train_set, test_set))


def from_checkpoint(
    path: str | Path,
    train_set: Source,
    test_set: Source,
    image_size: tuple[int, int] | None = None,
    preprocess: str | None = None,
    class_names: str | None = None,
) -> tuple[StartingPoint, Any]:
    """Start from a checkpoint; returns its parameters too (float32 NumPy arrays, on no device yet).

    The head stays if the training set has all of its classes, under any names that `match_head` knows. Otherwise it is
    replaced by zeros for the training set's classes. preprocess: a preset instead of the checkpoint's own. class_names:
    of the head, or their order, instead of the checkpoint's. Raises InputError if the test set has other classes, or if
    the classes of the head could be the training set's in several orders.
    """
    checkpoint = load_checkpoint(path)
    config, pixels, remarks = checkpoint.config, checkpoint.preprocess, []
    params: Any = checkpoint.params
    if image_size and image_size != config.image_size:
        translation = translate(flat_params(params))
        config, grid = infer_config(translation, {str(path): vars(config)}, {"image_size": image_size})
        converted = assemble(translation, config, grid)
        params, remarks = converted.params, [*converted.remarks]
        pixels = replace(pixels, image_size=image_size)
    if preprocess:
        pixels = preset(preprocess, config.image_size)
    params = jax.tree.map(np.asarray, params)
    names = read_class_names(class_names, config.num_classes) if class_names else checkpoint.class_names
    head = config.num_classes, names, str(path)
    try:
        kept = match_head(train_set, *head)
    except UnknownOrder as error:
        raise InputError(f"{error}; for a new head, convert with --num_classes 0") from None
    except InputError:
        kept = None
    if kept and kept.scored is None:
        train_set, test_set = kept, match_head(test_set, *head)
    else:
        there, wanted = config.num_classes, len(train_set.class_names)
        why = f"{there} classes, the data set {wanted}" if there != wanted else "other classes"
        which = ""
        if there and not kept and names and not isinstance(names, str):
            which = f" ({class_differences(train_set, names)})"
        remarks.append(f"{path} has {why}: its head is replaced by zeros{which}")
        params, config = _new_head(params, config, wanted)
        test_set = _like(train_set, test_set)
    origin = checkpoint.meta["provenance"], tuple(remarks), checkpoint.recommended
    return StartingPoint(config, pixels, train_set, test_set, *origin), params


def _like(train_set: Source, test_set: Source) -> Source:
    """Relabel the test set, so that its labels index the outputs of a head for the training set's classes."""
    names = list(train_set.class_names)
    return match_head(test_set, len(names), names, f"a model trained on {train_set.spec}")


def _new_head(params: Any, config: ViTConfig, num_classes: int) -> tuple[Any, ViTConfig]:
    config, body = without_head(config, params)
    config = replace(config, num_classes=num_classes)
    heads = {name: leaf for name, leaf in abstract_params(config).items() if name in ("head", "head_dist")}
    return body | jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), heads), config
