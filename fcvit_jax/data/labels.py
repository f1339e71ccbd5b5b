"""Match a data set's labels to a head's outputs: ImageNet's, those of its variants, and ReaL's, several per image."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from fcvit_jax.data import imagenet
from fcvit_jax.data.records import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path

ORDERS = ("timm", "imagefolder", "numeric", "dataset")  # in which class folders become the outputs of a head
ClassNames = Sequence[str] | str  # in a head's order; or one of ORDERS, in which it has the names of a data set


class UnknownOrder(InputError):
    """A head without class names could have the classes of a data set in several orders."""


def match_head(source: Source, num_classes: int, class_names: ClassNames | None, where: str) -> Source:
    """Return the source with labels that index the head's outputs, and with the head's class names.

    * Classes with the head's names are matched by name. Names without an image in the source must be among its empty
      folders.
    * An ImageNet head (1000 outputs without names, named by synsets or in words) takes classes named by synsets: all
      1,000 in any order, or some of them; then predictions are made among those alone (`scored`), as in ImageNet-A and
      ImageNet-R. Classes named `0` to `999` are in the head's order (ImageNet-V2).
    * A head without names takes as many classes as it has outputs, in the order of `ORDERS` that `class_names` is. If
      that is None, the usual orders must agree, and a remark says that the order was assumed.

    num_classes, class_names: of the head. where: the checkpoint, for messages. Raises InputError if the labels mean
    something else, `UnknownOrder` if the order must be stated.
    """
    if not num_classes:
        raise InputError(f"{where} has no head: it gives features, not classes; python -m fcvit_jax.probe fits one")
    if isinstance(class_names, str) and len(source.class_names) == num_classes:
        return label_by_name(source, class_order(source, class_names), where)
    names = None if isinstance(class_names, str) else class_names
    if names and tuple(names) == source.class_names:
        return source
    if num_classes == imagenet.NUM_CLASSES and _in_imagenets_order(names):
        outputs = {name: index for index, name in enumerate(imagenet.synsets())}
        names = tuple(names or outputs)
        every = [*source.class_names, *source.empty]
        if all(name.isdecimal() for name in every) and sorted(map(int, every)) == list(range(num_classes)):
            return _relabelled(source, [*map(int, source.class_names)], names, None)
        strangers = [name for name in source.class_names if name not in outputs]
        if not strangers:
            table = [outputs[name] for name in source.class_names]
            scored = [*table, *(outputs[name] for name in source.empty if name in outputs)]
            return _relabelled(source, table, names, scored if len(scored) < num_classes else None)
        if len(strangers) < len(source.class_names):
            hint = "it is none of the 1,000 synsets; remove or rename it"
            raise InputError(f"{source.spec} has class {strangers[0]!r} beside ImageNet's: {hint}")
    if class_names and not isinstance(class_names, str):
        return label_by_name(source, class_names, where)
    ours = len(source.class_names)
    if ours != num_classes:
        empty = f" with images, beside empty folders ({_some(source.empty)})" if source.empty else ""
        raise InputError(
            f"{source.spec} has {ours} classes{empty}, the head of {where} has {num_classes} "
            f"outputs; the first classes are {_some(source.class_names)}"
        )
    return _in_assumed_order(source, where)


def class_order(source: Source, order: str) -> tuple[str, ...]:
    """Sort the classes of a source in one of `ORDERS`. Raises InputError for `numeric` if names are not numbers."""
    orders = _orders(source)
    if order not in orders:
        text = next(name for name in source.class_names if not _NUMBER.fullmatch(name))
        raise InputError(
            f"{source.spec}: class_names is numeric, and class {text!r} is not a number; timm's order counts the "
            "numbers inside names too"
        )
    return orders[order]


def read_class_names(asked: str | Path | Sequence[str], num_classes: int) -> ClassNames:
    """Read the names that a user states: a sequence of them, a text file with one a line, or one of `ORDERS`.

    Raises InputError if there is not one for each class.
    """
    origin = "class_names"
    if isinstance(asked, str | Path):
        if str(asked) in ORDERS:
            return str(asked)
        origin = f"class_names {asked}"
        try:
            asked = local_path(asked).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = f"cannot be read as text: {error}"
            raise InputError(f"{origin} {why}; it is a file, or one of {', '.join(ORDERS)}") from None
    names = tuple(filter(None, map(str.strip, asked)))
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise InputError(f"{origin} has {len(set(names))} different names, one a line; the head has {num_classes}")
    return names


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


def _in_imagenets_order(class_names: Sequence[str] | None) -> bool:
    """Return whether 1,000 outputs of these names are ImageNet's: no names, its synsets in order, or words."""
    return not class_names or not re.fullmatch(r"n\d{8}", class_names[0]) or tuple(class_names) == imagenet.synsets()


def _relabelled(source: Source, table: list[int], class_names: Sequence[str], scored: list[int] | None) -> Source:
    """Replace label i by `table[i]`. scored: the new labels to predict among, unless the source has its own."""

    def read(index: int) -> Record:
        record = source.read(index)
        label = record.label
        return record._replace(label=tuple(table[i] for i in label) if isinstance(label, tuple) else table[label])

    if source.scored is not None:
        scored = [table[i] for i in source.scored]
    among = None if scored is None else tuple(sorted(scored))
    return dataclasses.replace(source, class_names=tuple(class_names), read=read, scored=among)


def label_by_name(source: Source, class_names: Sequence[str], where: str) -> Source:
    """Label classes by the outputs of their names. Raises InputError that names classes of only one side."""
    if tuple(class_names) == source.class_names:
        return source
    if differing := class_differences(source, class_names):
        there, ours = {*source.class_names, *source.empty}, len(source.class_names)
        stranger = next((name for name in source.class_names if name not in class_names), None)
        lacking = next((name for name in class_names if name not in there), None)
        what = f"has {ours} classes, the head of {where} has {len(class_names)}"
        if ours == len(class_names) and stranger and lacking:
            what = f"has class {stranger!r} where {where} has {lacking!r}: its labels mean other classes"
        raise InputError(f"{source.spec} {what} ({differing}; a class without images needs an empty folder)")
    outputs = {name: index for index, name in enumerate(class_names)}
    return _relabelled(source, [outputs[name] for name in source.class_names], class_names, None)


def class_differences(source: Source, class_names: Sequence[str]) -> str:
    """Describe the classes that only a data set or only a head has; empty if each class has one output."""
    there, count = {*source.class_names, *source.empty}, Counter(class_names)
    sides = {
        "only the data set has": [name for name in source.class_names if not count[name]],
        "only the head has": [name for name in class_names if name not in there],
        "two outputs are": [name for name in source.class_names if count[name] > 1],
    }
    return "; ".join(f"{what} {_some(names)}" for what, names in sides.items() if names)


_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")


def _orders(source: Source) -> dict[str, tuple[str, ...]]:
    """Sort the classes of a source in each of `ORDERS`; numeric only if all are numbers."""

    def natural(name: str) -> list[int | str]:  # timm's natural_key
        return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name.lower()))]

    plain = sorted(source.class_names)
    orders = {"timm": sorted(plain, key=natural), "imagefolder": plain}
    if all(map(_NUMBER.fullmatch, plain)):
        orders["numeric"] = sorted(plain, key=Decimal)
    return {name: tuple(order) for name, order in orders.items()} | {"dataset": source.class_names}


def _in_assumed_order(source: Source, where: str) -> Source:
    """Match a source to a head without names and with as many outputs. Raises `UnknownOrder` if orders differ."""
    orders, count = _orders(source), len(source.class_names)
    several = len(set(orders.values())) > 1
    if not several and count != imagenet.NUM_CLASSES:
        remark = (
            f"the head of {where} has no class names: its {count} outputs are assumed to be the classes of "
            f"{source.spec} in sorted order; state them with class_names"
        )
        return dataclasses.replace(source, remarks=(*source.remarks, remark))
    if orders["dataset"] in [order for name, order in orders.items() if name != "dataset"]:
        del orders["dataset"]  # a folder has no order of its own
    whys = []
    if count == imagenet.NUM_CLASSES:
        whys.append(f"the classes of {source.spec} are not named as ImageNet's ({_some(source.class_names)})")
    if several:
        named: dict[tuple[str, ...], list[str]] = {}
        for name, order in orders.items():
            named.setdefault(order, []).append(name)
        first = next(place for place in range(count) if len({order[place] for order in named}) > 1)
        start = max(0, first - 1)
        shown = [
            f"{' and '.join(names)}: {'..., ' * (start > 0)}{', '.join(order[start : first + 3])}, ..."
            for order, names in named.items()
        ]
        whys.append(f"the usual orders of the classes of {source.spec} differ ({'; '.join(shown)})")
    raise UnknownOrder(
        f"the head of {where} has {count} outputs without names, and {', and '.join(whys)}: pass class_names "
        f"(evaluate.py and train_sam.py: --config.class_names, conversion: --class_names): {', '.join(orders)}, or a "
        "file with one name a line in the head's order"
    )


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + f", ... ({len(names):,})" * (len(names) > most)
