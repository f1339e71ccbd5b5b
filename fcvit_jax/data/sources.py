"""Open a data set by its spec: a folder of images, scikit-learn's digits, or one that TensorFlow Datasets prepared."""

import contextlib
import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.data.listing import BESIDE, EXTENSIONS, list_below, list_images
from fcvit_jax.data.prepared import open_prepared
from fcvit_jax.data.records import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path

FORMS = "folder:PATH, digits:train|test, tfds:NAME/SPLIT[@DATA_DIR]"


def open_source(spec: str) -> Source:
    """Open a data set by its spec.

    * `folder:PATH`: one folder per class, images inside it at any depth. Classes are sorted by name, or numerically if
      all are integers. A folder without images is not a class; hidden files are ignored; each file counts once.
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


def open_images(path: str) -> Source:
    """Open a file, the images of a folder at any depth in the order of their names, or a data set by its spec.

    Raises InputError if nothing exists there, or it holds no image.
    """
    root = Path(os.path.expanduser(path))
    if not os.path.exists(root):
        if ":" in path:
            return open_source(path)
        raise InputError(f"images {path!r}: there is no such file or folder; give one, or a data set: {FORMS}")
    if root.is_file():
        root, names, remarks = root.parent, [root.name], ()
    else:
        listing = list_below(root)
        names, remarks = listing.names, tuple(f"{path}: {line}" for line in listing.remarks)
    if not names:
        raise InputError(f"images {path!r}: none in this folder; accepted are {' '.join(EXTENSIONS)}")

    return Source(path, (), len(names), lambda index: read_record(root, names[index], 0), remarks=remarks)


def open_labelled_or_not(spec: str) -> Source:
    """Open a data set by its spec, or a folder without class folders as images without labels.

    Raises InputError as `open_source` does.
    """
    try:
        return open_source(spec)
    except InputError:
        if not spec.startswith("folder:"):
            raise
        with contextlib.suppress(InputError):
            return dataclasses.replace(open_images(spec.removeprefix("folder:")), spec=spec)
        raise


def _open_folder(spec: str, path: str) -> Source:
    root = local_path(path)
    if not path or not root.exists():
        raise InputError(f"{spec}: there is no folder {path!r}")
    if not root.is_dir():
        raise InputError(f"{spec}: {path} is a file; give the folder that holds one folder per class")
    listing = list_images(root)
    names, classes = listing.names, tuple(listing.counts)
    if not names:
        there = [*classes, *listing.empty]
        loose = {what.split()[0]: count for what, count in listing.left_out.items() if what.endswith(BESIDE)}
        if not there:
            found = f"{sum(loose.values())} images but no class folders" if loose else "no class folders"
            raise InputError(f"{spec}: {path} holds {found}; put the images of each class into a folder of their own")
        found = f" (left out: {', '.join(listing.left_out)})" if listing.left_out else ""
        accepted = f"accepted are {' '.join(EXTENSIONS)}"
        raise InputError(f"{spec}: no images in the class folders of {path}{found}; {accepted}")
    # An array: pairs of name and label would take twice the memory, 200 bytes per file.
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [*listing.counts.values()])

    def read(index: int) -> Record:
        return read_record(root, names[index], int(labels[index]))

    remarks = tuple(f"{spec}: {line}" for line in listing.remarks)
    return Source(spec, classes, len(names), read, ordered=True, empty=listing.empty, remarks=remarks)


def read_record(root: Path, name: str, label: int) -> Record:
    """Read an image file below a folder. Raises InputError if that fails."""
    try:
        return Record((root / name).read_bytes(), label, name)
    except OSError as error:
        raise InputError(f"image {root / name} cannot be read: {error.strerror}") from None


def _open_digits(spec: str, split: str) -> Source:
    if split not in ("train", "test"):
        raise InputError(f"{spec}: no split {split!r}; there are digits:train and digits:test")
    # The file of sklearn.datasets.load_digits, without importing scikit-learn, which takes one to two seconds.
    package: Any = importlib.util.find_spec("sklearn")
    rows = np.loadtxt(Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz", np.int64, delimiter=",")
    grey, labels = np.round(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), rows[:, 64]  # 0 to 16
    # Our own split, so that a new scikit-learn cannot move a digit from train to test.
    generator = np.random.default_rng(0)
    test = np.concatenate([generator.permutation(np.flatnonzero(labels == digit))[:36] for digit in range(10)])
    chosen = np.flatnonzero(np.isin(np.arange(len(labels)), test) == (split == "test"))

    def read(index: int) -> Record:
        i = chosen[index]
        return Record(np.repeat(grey[i, :, :, None], 3, axis=-1), int(labels[i]), f"digits/{i:04d}")

    return Source(spec, tuple("0123456789"), len(chosen), read)
