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

    Args:
      spec: the text it was opened with.
      class_names: the name of each label.
      size: number of records.
      read: returns record i.
      scored: the classes among which a prediction is made; None: all. ImageNet-A's images show 200 of ImageNet's
        1,000 classes, and predictions are made among those 200.
      labels_per_image: 1, or the most that any image has; above 1, labels are tuples.
      ordered: the records are sorted by class, so the first of them are no random sample.
    """

    spec: str
    class_names: tuple[str, ...]
    size: int
    read: Callable[[int], Record] = dataclasses.field(repr=False)
    scored: tuple[int, ...] | None = None
    labels_per_image: int = 1
    ordered: bool = False

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of {self.size}")
        return self.read(index)
