"""Match a data set's labels to a head's outputs: ImageNet's, those of its variants, and ReaL's, several per image."""

import dataclasses
import json
import re
from pathlib import Path

from fcvit_jax.data import imagenet
from fcvit_jax.data.records import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path


def match_head(source: Source, num_classes: int, class_names: list[str] | None, where: str) -> Source:
    """Return the source with labels that index the head's outputs, and with the head's class names.

    * Classes with the head's names, in its order, stay unchanged. If the head has no names, so do as many classes as
      it has outputs.
    * An ImageNet head (1000 outputs without names, named by synsets or in words) takes classes named by synsets: all
      1,000 in any order, or some of them; then predictions are made among those alone (`scored`), as in ImageNet-A and
      ImageNet-R. Classes named `0` to `999` are in the head's order (ImageNet-V2).

    num_classes, class_names: of the head; names may be None. where: the checkpoint, for messages. Raises InputError if
    the labels mean something else.
    """
    if not num_classes:
        raise InputError(f"{where} has no head: it gives features, not classes")
    ours = list(source.class_names)
    if class_names == ours:
        return source
    if num_classes == imagenet.NUM_CLASSES and _in_imagenets_order(class_names):
        outputs = {name: index for index, name in enumerate(imagenet.synsets())}
        names = tuple(class_names or outputs)
        numbered = all(name.isdecimal() for name in ours) and list(map(int, ours)) == list(range(num_classes))
        if numbered or ours == list(outputs):
            return dataclasses.replace(source, class_names=names)
        strangers = [name for name in ours if name not in outputs]
        if not strangers:
            return _relabelled(source, [outputs[name] for name in ours], names)
        if len(strangers) < len(ours):
            hint = "it is none of the 1,000 synsets; remove or rename it"
            raise InputError(f"{source.spec} has class {strangers[0]!r} beside ImageNet's: {hint}")
    if len(ours) != num_classes:
        raise InputError(f"{source.spec} has {len(ours)} classes, the head of {where} has {num_classes}")
    if class_names:
        known, found = next(pair for pair in zip(class_names, ours, strict=True) if pair[0] != pair[1])
        difference = f"has class {found!r} where {where} has {known!r}"
        raise InputError(f"{source.spec} {difference}: its labels mean other classes")
    return source


def real_labels(source: Source, path: str | Path) -> Source:
    """Give ImageNet's validation images the labels of "Are we done with ImageNet?" (arXiv 2006.07159).

    path: Google's real.json: for each validation image, in order, a list of the right outputs. Images are identified
    by their file names, `ILSVRC2012_val_00000001.JPEG` and so on; those without labels are not counted. Raises
    InputError if the file has another form, or an image another name: for the first at once, for others when read.
    """
    try:
        labels = json.loads(local_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"ReaL labels {path} cannot be read: {error.strerror}") from None
    except ValueError:
        labels = None
    rows = labels if isinstance(labels, list) else []
    flat = [label for row in rows for label in (row if isinstance(row, list) else [None])]
    if not rows or not all(type(label) is int and 0 <= label < imagenet.NUM_CLASSES for label in flat):
        raise InputError(f"{path} is not ReaL's real.json: a list of lists of integers from 0 to 999")

    def read(index: int) -> Record:
        record = source.read(index)
        match = re.search(r"ILSVRC2012_val_(\d{8})\.[A-Za-z]+$", record.name)
        if not match or not 1 <= int(match[1]) <= len(rows):
            names = f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(rows):08d}.JPEG"
            what = f"{source.spec}: image {record.name} is none of the {len(rows)} of {path}"
            raise InputError(f"{what}, which are named {names}")
        return record._replace(label=tuple(rows[int(match[1]) - 1]))

    most = max(2, *map(len, rows))  # labels are tuples even if no image has more than one
    relabelled = dataclasses.replace(
        source, class_names=imagenet.synsets(), read=read, scored=None, labels_per_image=most
    )
    relabelled[0]
    return relabelled


def _in_imagenets_order(class_names: list[str] | None) -> bool:
    """Whether 1,000 outputs of these names are ImageNet's: no names, its synsets in order, or words."""
    return not class_names or not re.fullmatch(r"n\d{8}", class_names[0]) or tuple(class_names) == imagenet.synsets()


def _relabelled(source: Source, table: list[int], class_names: tuple[str, ...]) -> Source:
    """Replace label i by `table[i]`."""

    def read(index: int) -> Record:
        record = source.read(index)
        label = record.label
        return record._replace(label=tuple(table[i] for i in label) if isinstance(label, tuple) else table[label])

    scored = tuple(sorted(table if source.scored is None else (table[i] for i in source.scored)))
    scored = scored if len(scored) < len(class_names) else None
    return dataclasses.replace(source, class_names=class_names, read=read, scored=scored)
