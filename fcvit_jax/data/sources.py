"""Open a data set by its spec: a folder of images, scikit-learn's digits, or one that TensorFlow Datasets prepared."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.data.prepared import open_prepared
from fcvit_jax.data.records import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMS = "folder:PATH, digits:train|test, tfds:NAME/SPLIT[@DATA_DIR]"


def open_source(spec: str) -> Source:
    """Open a data set by its spec.

    * `folder:PATH`: one folder per class, images inside it at any depth. Classes are sorted by name, or numerically if
      all are integers; a class without images keeps its label; hidden files are ignored.
    * `digits:train`, `digits:test`: scikit-learn's hand-written digits, 8x8 pixels: 1,437, and 360, 36 of each class.
    * `tfds:NAME/SPLIT[@DATA_DIR]`: a data set that TensorFlow Datasets has prepared, as ArrayRecord or TFRecord. NAME
      may be `name/config` and end in `:version`; SPLIT may be a slice such as `test[:50%]`. Nothing is downloaded.

    Raises InputError if the spec has another form, or the data do not exist.
    """
    scheme, _, rest = spec.partition(":")
    openers = {"folder": _open_folder, "digits": _open_digits, "tfds": open_prepared}
    if scheme not in openers:
        raise InputError(f"data set {spec!r} has no known form: write one of {FORMS}")
    return openers[scheme](spec, rest)


def _open_folder(spec: str, path: str) -> Source:
    root = local_path(path)
    if not path or not root.exists():
        raise InputError(f"{spec}: there is no folder {path!r}")
    if not root.is_dir():
        raise InputError(f"{spec}: {path} is a file; give the folder that holds one folder per class")
    try:
        visible = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{spec}: {path} cannot be read: {error.strerror}") from None
    classes = [entry.name for entry in visible if entry.is_dir()]
    if not classes:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in visible)
        found = f"{loose} images but no class folders" if loose else "no class folders"
        raise InputError(f"{spec}: {path} holds {found}; put the images of each class into a folder of their own")
    numeric = all(name.isdecimal() for name in classes)
    classes.sort(key=(lambda name: (int(name), name)) if numeric else None)

    found = [_images(root, folder) for folder in classes]
    names = list(itertools.chain.from_iterable(found))
    # An array: pairs of name and label would take twice the memory, 200 bytes per file.
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(some) for some in found])
    if not names:
        raise InputError(f"{spec}: no images in the class folders of {path}; accepted are {' '.join(EXTENSIONS)}")

    def read(index: int) -> Record:
        return read_record(root, names[index], int(labels[index]))

    return Source(spec, tuple(classes), len(names), read, ordered=True)


def read_record(root: Path, name: str, label: int) -> Record:
    """Read an image file below a folder. Raises InputError if that fails."""
    try:
        return Record((root / name).read_bytes(), label, name)
    except OSError as error:
        raise InputError(f"image {root / name} cannot be read: {error.strerror}") from None


def _images(root: Path, folder: str) -> list[str]:
    """The images in a class folder at any depth, sorted, as paths relative to `root` with forward slashes."""

    def unreadable(error: OSError) -> None:
        raise InputError(f"folder {error.filename} cannot be read: {error.strerror}") from None

    found, visited = [], set()
    for place, folders, names in os.walk(root / folder, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(place)) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = Path(place).relative_to(root).as_posix()  # once per folder, not per image
        shown = (name for name in names if not name.startswith("."))
        found += [f"{relative}/{name}" for name in shown if name.lower().endswith(EXTENSIONS)]
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
