"""One labelled image, and a data set as a sequence of them. Records carry the files' own bytes, not yet decoded."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    """One labelled image: an encoded file's bytes, or uint8 pixels `[h, w, 3]` or `[h, w]`.

    label: an index into the source's class names. If images may have several labels, a tuple of them: any is right,
    and an image whose tuple is empty is not counted.
    """

    image: bytes | np.ndarray
    label: int | tuple[int, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """`size` records in a fixed order. Several threads may call `source[i]` at once.

    scored: the classes among which a prediction is made, such as the 200 of ImageNet-A; None: all.
    empty: names of classes without a record, beside `class_names`. remarks: notes for the user, one line each.
    """

    spec: str  # the text it was opened with
    class_names: tuple[str, ...]  # of each label
    size: int
    read: Callable[[int], Record] = dataclasses.field(repr=False)
    scored: tuple[int, ...] | None = None
    labels_per_image: int = 1  # the most that any image has; above 1, labels are tuples
    ordered: bool = False  # by class: the first records are not a random sample
    empty: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of {self.size}")
        return self.read(index)


def sample(source: Source, limit: int | None) -> Source:
    """Take `limit` records: the first, or if a source is ordered by class, evenly spread ones."""
    size = len(source)
    if limit is None or limit >= size:
        return source
    if not source.ordered:
        return dataclasses.replace(source, size=limit)
    line = f"{source.spec}: sorted by class, so the limit takes {limit:,} images spread evenly over all {size:,}"
    read, remarks = source.read, (*source.remarks, line)
    return dataclasses.replace(
        source, size=limit, read=lambda index: read((2 * index + 1) * size // (2 * limit)), remarks=remarks
    )
