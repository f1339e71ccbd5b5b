"""Where labelled images come from: `open_source("folder:…" | "digits:…" | "tfds:…")` gives random access to records.

Records carry the files' own bytes: decoding is the job of one place, `preprocess.decode`, whatever the source.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMS = "folder:PATH, digits:train|test, tfds:NAME/SPLIT[@DATA_DIR]"


class Record(NamedTuple):
    """One labelled image: an encoded file's bytes, or uint8 pixels `[h, w, 3]` or `[h, w]`.

    label: an index into the source's class names; where an image may have several labels a tuple of them, of which
    any is right. An image whose tuple is empty is not counted.
    """

    image: bytes | np.ndarray
    label: int | tuple[int, ...]
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """`size` records in a fixed order. `source[i]` may be called from several threads at a time.

    Args:
      spec: the text it was opened with.
      class_names: the name of each label.
      size: number of records.
      read: gives record i.
      scored: the classes among which a prediction is made; None: all. ImageNet-A's images show 200 of ImageNet's
        1,000 classes, and a model is asked which of the 200.
      labels_per_image: 1, or the most that any image has; above 1, labels are tuples.
      ordered: the records stand class by class: the first of them are no sample.
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


def open_source(spec: str) -> Source:
    """Open a data set by its spec.

    * `folder:PATH`: one folder a class, images inside it at any depth. Classes are sorted by name, or numerically if
      all are integers; a class without images keeps its label; hidden files are ignored.
    * `digits:train`, `digits:test`: scikit-learn's 1,797 hand-written digits, 8x8 pixels. Test is 36 of each class,
      360 in all; train is the 1,437 left (142, 146, 141, 147, 145, 146, 145, 143, 138 and 144 of class 0 to 9).
    * `tfds:NAME/SPLIT[@DATA_DIR]`: a data set that TensorFlow Datasets has prepared, as ArrayRecord or TFRecord. NAME
      may be `name/config` and end in `:version`; SPLIT may be a slice such as `test[:50%]`. Nothing is downloaded, and
      TensorFlow is not needed.

    Raises:
      InputError: the spec has another form, or the data are not there as it says; the message tells the mend.
    """
    scheme, colon, rest = spec.partition(":")
    openers = {"folder": _open_folder, "digits": _open_digits, "tfds": _open_tfds}
    if not colon or scheme not in openers:
        raise InputError(f"data set {spec!r} is of no known form; write one of {FORMS}")
    return openers[scheme](spec, rest)


def _open_folder(spec: str, path: str) -> Source:
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise InputError(f"{spec}: there is no folder {path!r}")
    if not root.is_dir():
        raise InputError(f"{spec}: {path} is a file; give the folder that holds one folder a class")
    try:
        visible = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{spec}: {path} cannot be read: {error.strerror}") from None
    classes = [entry.name for entry in visible if entry.is_dir()]
    if not classes:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in visible)
        found = f"{loose} images but no class folders" if loose else "no class folders"
        raise InputError(f"{spec}: {path} holds {found}; put the images of each class in a folder of its own in it")
    numeric = all(name.isdecimal() for name in classes)
    classes.sort(key=(lambda name: (int(name), name)) if numeric else None)

    found = [_images(root, folder) for folder in classes]
    names = list(itertools.chain.from_iterable(found))
    # An array: pairs of name and label would take twice the memory, 200 bytes a file.
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(some) for some in found])
    if not names:
        raise InputError(f"{spec}: no images in the class folders of {path}; accepted are {' '.join(EXTENSIONS)}")

    def read(index: int) -> Record:
        try:
            return Record((root / names[index]).read_bytes(), int(labels[index]), names[index])
        except OSError as error:
            raise InputError(f"image {root / names[index]} cannot be read: {error.strerror}") from None

    return Source(spec, tuple(classes), len(names), read, ordered=True)


def _images(root: Path, folder: str) -> list[str]:
    """The images in a class folder at any depth, sorted, as paths relative to `root` with forward slashes."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from None

    found, visited = [], set()
    for place, folders, names in os.walk(root / folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(place).relative_to(root).as_posix()  # once a folder, not once an image
        images = (name for name in names if not name.startswith(".") and name.lower().endswith(EXTENSIONS))
        found += [f"{relative}/{name}" for name in images]
    return sorted(found)


def _open_digits(spec: str, split: str) -> Source:
    if split not in ("train", "test"):
        raise InputError(f"{spec}: no split {split!r}; there are digits:train and digits:test")
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the values are 0 to 16
    labels = digits.target
    # Our own split, so that a new scikit-learn cannot move a digit from train to test.
    generator = np.random.default_rng(0)
    test = np.concatenate([generator.permutation(np.flatnonzero(labels == digit))[:36] for digit in range(10)])
    chosen = np.flatnonzero(np.isin(np.arange(len(labels)), test) == (split == "test"))

    def read(index: int) -> Record:
        i = chosen[index]
        return Record(np.repeat(grey[i, :, :, None], 3, axis=-1), int(labels[i]), f"digits/{i:04d}")

    return Source(spec, tuple("0123456789"), len(chosen), read)


def _open_tfds(spec: str, rest: str) -> Source:
    from fcvit_jax.data.prepared import open_prepared

    return open_prepared(spec, rest)
