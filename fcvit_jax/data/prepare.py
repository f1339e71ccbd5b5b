"""Write a folder of images, one folder per class, as a data set of TensorFlow Datasets: few files instead of many.

  python -m fcvit_jax.data.prepare photos/val data --name photos --split validation
  python evaluate.py --config.dataset=tfds:photos/validation@data ...

The files are copied byte for byte into ArrayRecord files, with their order and names, so results equal those of
folder:photos/val. TensorFlow is not needed. Run it again with another --split to add that split to the data set; the
class folders must be the same.
"""

import dataclasses
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fcvit_jax.data.labels import label_by_name
from fcvit_jax.data.records import Source
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors, printable
from fcvit_jax.files import local_path, one_line_file_errors, writable_directory

VERSION, FEATURES = "1.0.0", {"image", "label", "file_name"}
IMAGES_PER_FILE, MOST_FILES = 1000, 256  # readers keep all files open: beyond that, files grow


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(prog="python -m fcvit_jax.data.prepare", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="holds one folder per class, images inside it at any depth")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for data sets; created if it does not exist")
    parser.add_argument("--name", help="of the data set; default: the folder's name")
    parser.add_argument("--split", default="test", help="default: test")
    args = parser.parse_args(argv)
    with one_line_errors():
        folder = local_path(args.folder).resolve()
        name = args.name or re.sub(r"[^a-z0-9]+", "_", folder.name.lower()).strip("_")
        if not (args.name or re.match("[a-z]", name)):
            raise InputError(f"the name of {folder} cannot name a data set, which begins with a letter: pass --name")
        source = open_source(f"folder:{args.folder}")
        spec = prepare(source, local_path(args.out), name, args.split, progress=True)
        for line in source.remarks:
            print(f"warning: {line}")
        print(f"{len(source)} images of {len(source.class_names)} classes: {spec}")


def prepare(source: Source, out: Path, name: str, split: str, progress: bool = False) -> str:
    """Write the records of a source as split `split` of data set `name` in the folder `out`; return their spec.

    The split appears when it is complete; it is added to an existing data set of the same classes. Raises InputError if
    the split exists, the classes differ, a name is invalid, an image cannot be read, or `out` written.
    """
    for option, value in (("--name", name), ("--split", split)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", value) or value == "all":
            raise InputError(f"{option} {value!r} is not valid: write lower-case letters, digits and underscores")
    target = out / name / VERSION
    source = _check_target(target, source, split)
    writable_directory(out)
    with one_line_file_errors(out), tempfile.TemporaryDirectory(prefix=f".{name}-", dir=out) as staging:
        _write(Path(staging) / name / VERSION, source, name, split, progress)
        spec = f"tfds:{name}/{split}@"
        written = open_source(f"{spec}{staging}")
        if (len(written), written.class_names) != (len(source), _class_names(source)):
            raise InputError(f"{source.spec}: a class name has a line break or ends in a space: rename its folder")
        _publish(Path(staging) / name / VERSION, target)
    return f"{spec}{out}"


def _check_target(target: Path, source: Source, split: str) -> Source:
    """Check that the split may be added, before any long work; return the source with an existing data set's labels.

    Raises InputError if it has other classes, or has the split.
    """
    if not target.exists():
        return source
    try:
        info, features = (_read_json(target / f"{file}.json") for file in ("dataset_info", "features"))
        present = [known["name"] for known in info["splits"]]
        ours = info["fileFormat"] == "array_record" and set(features["featuresDict"]["features"]) == FEATURES
    except (OSError, ValueError, LookupError, TypeError):
        ours, present = False, []
    if not ours or not present:
        raise InputError(f"{target} exists and was not written by this command: choose another --name")
    if split in present:
        raise InputError(f"{target} has a split {split!r} already: choose another --split or --name")
    other = open_source(f"tfds:{target.parent.name}:{VERSION}/{present[0]}@{target.parents[1]}").class_names
    try:
        return label_by_name(dataclasses.replace(source, class_names=_class_names(source)), other, str(target))
    except InputError as error:
        why = f"{target} has other classes than {source.spec}, so no split is added: choose another --name"
        raise InputError(f"{why} ({error})") from None


def _class_names(source: Source) -> tuple[str, ...]:
    """Return the class names as they are written: TFDS takes UTF-8 alone."""
    return tuple(map(printable, source.class_names))


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(directory: Path, source: Source, name: str, split: str, progress: bool) -> None:
    """Write the data set with this one split into a new directory."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.sequential_writer import SequentialWriter

    def examples() -> Iterator[dict[str, Any]]:
        indices = range(len(source))
        for index in tqdm(indices, desc="writing", unit="img", disable=None if progress else True, leave=False):
            record = source[index]
            if not isinstance(record.image, bytes):
                raise InputError(f"{source.spec}: {record.name} is not an image file, so there are no bytes to keep")
            yield {"image": io.BytesIO(record.image), "label": record.label, "file_name": printable(record.name)}

    label = tfds.features.ClassLabel(names=_class_names(source))
    features = {"image": tfds.features.Image(), "label": label, "file_name": tfds.features.Text()}
    directory.mkdir(parents=True)
    # Not one of TFDS's builders: they shuffle, and need TensorFlow for that beyond a gigabyte.
    identity = DatasetIdentity(name=name, version=tfds.core.Version(VERSION), data_dir=str(directory), module_name="")
    writer = SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features), disable_shuffling=True),
        max_examples_per_shard=max(IMAGES_PER_FILE, math.ceil(len(source) / MOST_FILES)),
        file_format="array_record",
    )
    writer.initialize_splits([split])
    writer.add_examples({split: examples()})  # pyright: ignore[reportArgumentType]
    writer.close_all()


def _publish(staging: Path, target: Path) -> None:
    """Move a new data set into place, or its split into the existing data set."""
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        os.rename(staging, target)
        return
    info, added = (_read_json(place / "dataset_info.json") for place in (target, staging))
    info["splits"] += added["splits"]
    for file in staging.glob("*.array_record-*"):
        os.rename(file, target / file.name)
    # Last, and atomically: until then no reader sees the new files.
    (staging / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    os.replace(staging / "dataset_info.json", target / "dataset_info.json")


if __name__ == "__main__":
    main()
