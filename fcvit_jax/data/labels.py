"""Labels that mean what a head's outputs mean: ImageNet's, those of its variants, and ReaL's, several an image."""

import dataclasses
import json
import re
from pathlib import Path

from fcvit_jax.data import imagenet
from fcvit_jax.data.records import Record, Source
from fcvit_jax.errors import InputError


def match_head(source: Source, num_classes: int, class_names: list[str] | None, where: str) -> Source:
    """The source with labels that index the head's outputs, and the head's class names.

    * Classes of the same names, in the same order, are taken as they are; so are as many classes as the head has
      outputs, where the head has no names.
    * A head of 1000 outputs, without names, named by ImageNet's synsets or in words, takes classes that are named by
      synsets: all 1,000 in any order, or some of them, and then a prediction is made among those alone (`scored`), as
      ImageNet-A and ImageNet-R want it. Classes named `0` to `999` are in the head's order (ImageNet-V2).

    Args:
      num_classes: the head's outputs.
      class_names: what the head's outputs are called, if that is known.
      where: the checkpoint, for messages.

    Raises:
      InputError: the labels mean something else.
    """
    if not num_classes:
        raise InputError(f"{where} has no head: it gives features, not classes")
    ours = list(source.class_names)
    if class_names == ours:
        return source
    if num_classes == imagenet.NUM_CLASSES and _in_imagenets_order(class_names):
        outputs = {name: index for index, name in enumerate(imagenet.synsets())}
        names = tuple(class_names or outputs)
        if all(name.isdecimal() for name in ours) and list(map(int, ours)) == list(range(num_classes)):
            return dataclasses.replace(source, class_names=names)
        if strangers := [name for name in ours if name not in outputs]:
            if len(strangers) < len(ours):
                raise InputError(
                    f"{source.spec} has class {strangers[0]!r} beside ImageNet's: it is none of the 1,000 synsets; "
                    "take it away, or give it its right name"
                )
        else:
            return _relabelled(source, tuple(outputs[name] for name in ours), names)
    if len(ours) != num_classes:
        raise InputError(f"{source.spec} has {len(ours)} classes, the head of {where} has {num_classes}")
    if class_names:
        known, found = next(pair for pair in zip(class_names, ours, strict=True) if pair[0] != pair[1])
        raise InputError(
            f"{source.spec} has class {found!r} where {where} has {known!r}: its labels mean other classes"
        )
    return source


def real_labels(source: Source, path: str | Path) -> Source:
    """ImageNet's validation images under the labels of "Are we done with ImageNet?" (arXiv 2006.07159).

    Any arrangement of the images will do: they are known by their file names, `ILSVRC2012_val_00000001.JPEG` and so on.

    Args:
      path: Google's real.json: for each validation image, in order, a list of the outputs that are right. An image
        without any is not counted.

    Raises:
      InputError: the file is not that, or the first image has another name; when read, for any other image.
    """
    try:
        labels = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"ReaL labels {path} cannot be read: {error.strerror}") from None
    except ValueError:
        labels = None
    outputs = range(imagenet.NUM_CLASSES)
    whole = isinstance(labels, list) and all(isinstance(row, list) for row in labels)
    if not labels or not whole or not all(type(label) is int and label in outputs for row in labels for label in row):
        raise InputError(f"{path} is not ReaL's real.json: a list of lists of integers from 0 to 999")

    def read(index: int) -> Record:
        record = source.read(index)
        match = re.search(r"ILSVRC2012_val_(\d{8})\.[A-Za-z]+$", record.name)
        if not match or not 1 <= int(match[1]) <= len(labels):
            raise InputError(
                f"{source.spec}: image {record.name} is none of the {len(labels)} of {path}, which are named "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(labels):08d}.JPEG"
            )
        return record._replace(label=tuple(labels[int(match[1]) - 1]))

    relabelled = dataclasses.replace(
        source,
        class_names=imagenet.synsets(),
        read=read,
        scored=None,
        labels_per_image=max(2, *map(len, labels)),  # a tuple, even if no image has more than one
    )
    relabelled[0]
    return relabelled


def _in_imagenets_order(class_names: list[str] | None) -> bool:
    """Whether 1,000 outputs so called are ImageNet's: they have no names, its synsets, or names in words."""
    return not class_names or not re.fullmatch(r"n\d{8}", class_names[0]) or tuple(class_names) == imagenet.synsets()


def _relabelled(source: Source, table: tuple[int, ...], class_names: tuple[str, ...]) -> Source:
    """The source with label `table[i]` for its label i."""

    def read(index: int) -> Record:
        record = source.read(index)
        label = record.label
        return record._replace(label=tuple(table[i] for i in label) if isinstance(label, tuple) else table[label])

    if source.scored is not None:
        scored = tuple(sorted(table[i] for i in source.scored))
    else:
        scored = tuple(sorted(table)) if len(table) < len(class_names) else None
    return dataclasses.replace(source, class_names=class_names, read=read, scored=scored)
