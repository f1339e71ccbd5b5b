"""Where labelled images come from: `open_source("folder:…" | "digits:…" | "tfds:…")` gives random access to records.

Records carry the files' own bytes: decoding is the job of one place, `preprocess.decode`, whatever the source.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMS = "folder:PATH, digits:train|test, tfds:NAME/SPLIT[@DATA_DIR]"


class Record(NamedTuple):
    """One labelled image: an encoded file's bytes, or uint8 pixels `[h, w, 3]` or `[h, w]`."""

    image: bytes | np.ndarray
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class Source:
    """`size` records in a fixed order. `source[i]` may be called from several threads at a time.

    Args:
      spec: the text it was opened with.
      class_names: the name of each label.
      size: number of records.
      read: gives record i.
    """

    spec: str
    class_names: tuple[str, ...]
    size: int
    read: Callable[[int], Record] = dataclasses.field(repr=False)

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
    * `tfds:NAME/SPLIT[@DATA_DIR]`: a data set that TensorFlow Datasets has prepared as ArrayRecord. NAME may be
      `name/config` and end in `:version`; SPLIT may be a slice such as `test[:50%]`. Nothing is downloaded, and
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

    files = [(name, label) for label, folder in enumerate(classes) for name in _images(root, folder)]
    if not files:
        raise InputError(f"{spec}: no images in the class folders of {path}; accepted are {' '.join(EXTENSIONS)}")

    def read(index: int) -> Record:
        name, label = files[index]
        try:
            return Record((root / name).read_bytes(), label, name)
        except OSError as error:
            raise InputError(f"image {root / name} cannot be read: {error.strerror}") from None

    return Source(spec, tuple(classes), len(files), read)


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
        images = (name for name in names if not name.startswith(".") and name.lower().endswith(EXTENSIONS))
        found += [(Path(place) / name).relative_to(root).as_posix() for name in images]
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
    target, _, data_dir = rest.partition("@")
    name, slash, split = target.rpartition("/")
    if not slash or not name or not split:
        raise InputError(f"{spec}: write tfds:NAME/SPLIT[@DATA_DIR], such as tfds:imagenet2012/validation@/data/tfds")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    import tensorflow_datasets as tfds

    directory = _prepared_directory(spec, name, Path(data_dir).expanduser())
    # From its files, never by name: by name TFDS may ask the network.
    builder: Any = tfds.builder_from_directory(directory)
    formats = sorted(file_format.value for file_format in builder.info.available_file_formats())
    if "array_record" not in formats:
        raise InputError(
            f"{spec}: {name} is prepared as {' and '.join(formats)} in {directory}; random access needs array_record. "
            f"Where TensorFlow is installed, run once: tfds convert_format --dataset_version_dir={directory} "
            f"--out_file_format=array_record (or, into another folder: tfds build {name} --file_format=array_record "
            "--data_dir=FOLDER)"
        )
    features = builder.info.features
    image_key = _feature(spec, features, tfds.features.Image, "image")
    label_key = _feature(spec, features, tfds.features.ClassLabel, "label")
    # TFDS would decode with whichever of OpenCV and PIL is installed: take the files' own bytes.
    encoded: Any = tfds.decode.SkipDecoding
    skip = {key: encoded() for key, kind in features.items() if isinstance(kind, tfds.features.Image)}
    try:
        examples = builder.as_data_source(split, decoders=skip, file_format="array_record")
    except (ValueError, KeyError, NotImplementedError) as error:
        why = (str(error).splitlines() or [""])[0].strip("'\" .")
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{spec}: split {split!r} cannot be read ({why}); there are {splits}") from None

    def read(index: int) -> Record:
        example = examples[index]
        file_name = example.get("file_name", f"{split}/{index:08d}")
        file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
        label = int(example[label_key])
        if label < 0:
            raise InputError(f"{spec}: {file_name} has no label; this split cannot be scored")
        return Record(example[image_key], label, file_name)

    return Source(spec, tuple(features[label_key].names), len(examples), read)


def _prepared_directory(spec: str, name: str, data_dir: Path) -> Path:
    """The folder of the data set's version, the newest unless `name` ends in `:version`. Raises InputError."""
    path, _, version = name.partition(":")
    root = data_dir / path
    found = {folder.parent.name: folder.parent for folder in root.glob("*/features.json")}
    versions = {v: folder for v, folder in found.items() if re.fullmatch(r"\d+\.\d+\.\d+", v) and version in ("", v)}
    if versions:
        return versions[max(versions, key=lambda text: tuple(map(int, text.split("."))))]

    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # the community's list would be fetched
    data_set = path.partition("/")[0]
    configs = sorted({folder.parents[1].name for folder in root.glob("*/*/features.json")})
    if configs:
        hint = f"give one of its configs, such as tfds:{path}/{configs[0]}/SPLIT (there are {', '.join(configs)})"
    elif data_set in known or (data_dir / data_set).exists():
        hint = (
            "prepare it once, where TensorFlow is installed: "
            f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        )
    else:
        near = difflib.get_close_matches(data_set, known)
        hint = "TFDS knows no such data set" + (f"; did you mean {' or '.join(near)}?" if near else "")
    raise InputError(f"{spec}: no {root / (version or 'VERSION') / 'features.json'}; {hint}")


def _feature(spec: str, features: Mapping[str, Any], kind: type, name: str) -> str:
    """The feature called `name`, or the only one of that kind. Raises InputError if that is not to be told."""
    candidates = [key for key, feature in features.items() if isinstance(feature, kind)]
    if name in candidates:
        return name
    if len(candidates) != 1:
        count = "several" if candidates else "no"
        raise InputError(
            f"{spec}: {count} features of kind {kind.__name__} and none called {name!r} ({', '.join(features)})"
        )
    return candidates[0]
