"""Data sets prepared by TensorFlow Datasets (TFDS), read from their files without TensorFlow or network."""

import difflib
import os
import re
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.data import imagenet
from fcvit_jax.data.records import Record, Source
from fcvit_jax.data.tfrecord import TFRecords
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path


def open_prepared(spec: str, rest: str) -> Source:
    """Open `tfds:REST`, REST being `NAME/SPLIT[@DATA_DIR]`; see `open_source`. Raises InputError."""
    target, _, data_dir = rest.partition("@")
    name, slash, split = target.rpartition("/")
    if not slash or not name or not split:
        raise InputError(f"{spec}: write tfds:NAME/SPLIT[@DATA_DIR], such as tfds:imagenet2012/validation@/data/tfds")
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    import tensorflow_datasets as tfds

    directory = _prepared_directory(spec, name, local_path(data_dir))
    # From its files, never by name: by name TFDS may ask the network.
    builder: Any = tfds.builder_from_directory(directory)
    features, records = builder.info.features, _records(spec, builder, split, directory)
    image_key = _feature(spec, features, tfds.features.Image, "image")
    if (kind := np.dtype(features[image_key].np_dtype)) not in (np.uint8, np.uint16):
        raise InputError(
            f"{spec}: its images are {kind.name}, which have no defined range; images are read of 8 or 16 bits"
        )
    # ReaL's data set has the original labels too; its own are lists.
    several = "real_label" in features and isinstance(features["real_label"], tfds.features.Sequence)
    label_key = "real_label" if several else _feature(spec, features, tfds.features.ClassLabel, "label")
    class_names = (features[label_key].feature if several else features[label_key]).names
    most_labels = imagenet.MOST_REAL_LABELS if several else 1
    # TFDS would decode with OpenCV or PIL, whichever is installed: take the files' own bytes.
    encoded: Any = tfds.decode.SkipDecoding
    skip = {key: encoded() for key, kind in features.items() if isinstance(kind, tfds.features.Image)}

    def read(index: int) -> Record:
        try:
            data = records[index]
            example = features.deserialize_example_np(data, decoders=skip) if data else {}
            image, labels = example[image_key], np.atleast_1d(example[label_key])
        except InputError:
            raise
        except Exception as error:  # from the reader (C++), protobuf or TFDS
            what = f"{spec}: record {index} in {directory} cannot be read ({_first_line(error)})"
            raise InputError(f"{what}; if a file is damaged, copy or prepare it again") from None
        file_name = example.get("file_name", f"{split}/{index:08d}")
        file_name = file_name.decode() if isinstance(file_name, bytes) else str(file_name)
        if labels.size and labels.min() < 0:
            raise InputError(f"{spec}: {file_name} has no label; this split cannot be scored")
        if labels.size > most_labels:
            raise InputError(f"{spec}: {file_name} has {labels.size} labels; at most {most_labels} are expected")
        return Record(image, tuple(map(int, labels)) if several else int(labels[0]), file_name)

    # TFDS names all 1,000 classes in these; if prepared from their folders, they name only their own 200.
    variants = {"imagenet_a": imagenet.IMAGENET_A, "imagenet_r": imagenet.IMAGENET_R}
    scored = variants.get(builder.info.name) if len(class_names) == imagenet.NUM_CLASSES else None
    ordered = builder.info.disable_shuffling  # our own command keeps a folder's order; TFDS shuffles
    part = f"{spec}: sorted by class, so a slice has the first classes alone; config.limit takes some of all"
    remarks = (part,) if ordered and "[" in split else ()
    return Source(spec, tuple(class_names), len(records), read, scored, most_labels, ordered, remarks=remarks)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip("'\" .")


def _records(spec: str, builder: Any, split: str, directory: Path) -> TFRecords | Sequence[bytes]:
    """Open the serialised examples of a split, in ArrayRecord if the data set has both formats. Raises InputError."""
    from tensorflow_datasets.core.decode import DeserializeMethod

    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    kind = next((kind for kind in ("array_record", "tfrecord") if kind in formats), None)
    if not kind:
        fix = f"tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record"
        what = f"{directory} is prepared as {' and '.join(sorted(formats))}; array_record and tfrecord can be read"
        raise InputError(f"{spec}: {what}. Where TensorFlow is installed, run once: {fix}")
    builder.info.set_file_format(kind, override=True, override_if_initialized=True)
    try:
        files = builder.info.splits[split].file_instructions
        if not files:
            raise ValueError("it is empty")
    except (ValueError, KeyError) as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"{spec}: split {split!r} cannot be read ({_first_line(error)}); there are {splits}") from None
    if kind == "tfrecord":
        return TFRecords(files)
    _allow_open_files(len(files))
    return builder.as_data_source(split, file_format=kind, deserialize_method=DeserializeMethod.RAW_BYTES)


def _allow_open_files(count: int) -> None:
    """Raise the limit if need be: ArrayRecord keeps every file open, and ImageNet's training split has 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = count + 512 if hard == unlimited else min(count + 512, hard)
    if soft != unlimited and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepared_directory(spec: str, name: str, data_dir: Path) -> Path:
    """Find the folder of the data set's version, the newest unless `name` ends in `:version`. Raises InputError."""
    path, _, version = name.partition(":")
    root = data_dir / path
    found = {folder.parent.name: folder.parent for folder in root.glob("*/features.json")}
    versions = {v: folder for v, folder in found.items() if re.fullmatch(r"\d+\.\d+\.\d+", v) and version in ("", v)}
    if versions:
        return versions[max(versions, key=lambda text: tuple(map(int, text.split("."))))]

    if not data_dir.is_dir():
        raise InputError(f"{spec}: there is no folder {data_dir}: name the one that holds the data sets, after the @")
    if found and version:
        listed = ", ".join(sorted(found))
        raise InputError(f"{spec}: {root} has no version {version}; there is {listed}: write tfds:{path}/SPLIT")

    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)  # the community's list would be fetched
    data_set = path.partition("/")[0]
    configs = sorted({folder.parents[1].name for folder in root.glob("*/*/features.json")})
    if configs:
        hint = f"give one of its configs, such as tfds:{path}/{configs[0]}/SPLIT (there are {', '.join(configs)})"
    elif data_set in known or (data_dir / data_set).exists():
        command = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
        hint = f"prepare it once, where TensorFlow is installed: {command}"
    else:
        near = difflib.get_close_matches(data_set, known)
        hint = "TFDS knows no such data set" + (f"; did you mean {' or '.join(near)}?" if near else "")
    raise InputError(f"{spec}: no {root / (version or 'VERSION') / 'features.json'}; {hint}")


def _feature(spec: str, features: Mapping[str, Any], kind: type, name: str) -> str:
    """Find the feature called `name`, or the only one of that kind. Raises InputError for none or several."""
    candidates = [key for key, feature in features.items() if isinstance(feature, kind)]
    if name in candidates:
        return name
    if len(candidates) != 1:
        count = f"{'several' if candidates else 'no'} features of kind {kind.__name__}"
        raise InputError(f"{spec}: {count} and none called {name!r} ({', '.join(features)})")
    return candidates[0]
