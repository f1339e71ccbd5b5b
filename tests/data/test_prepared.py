"""Prepared data sets: the files' own bytes, labels and names, of ArrayRecord and of TFRecord, without TensorFlow."""

import io
import json
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data import imagenet
from fcvit_jax.data.labels import match_head
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.errors import InputError

tfds_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def prepare(data_dir: Path, features, examples, name: str, config: str = "") -> Path:
    """Prepare a data set of `examples` ({split: [example]}) as ArrayRecord, as TFDS itself does."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    def generate(self, split):
        yield from enumerate(examples[split])

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=config)] if config else [],
        "pkg_dir_path": data_dir,
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features)),
        "_split_generators": lambda self, manager: {split: self._generate_examples(split) for split in examples},
        "_generate_examples": generate,
        "__module__": __name__,
    }
    with registered.skip_registration():  # other tests should not find it by name
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    return Path(builder.data_path)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    """`tiny_photos` (train 2, test 5, with file names) and `tiny_configs/red` (test 3, without)."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")

    def example(seed: int, label: int | str) -> dict:
        return {"image": io.BytesIO(jpeg(seed)), "label": label}

    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["hat", "shoe", "sock"])}
    named = {**features, "file_name": tfds.features.Text()}
    test = [{**example(i, ["sock", "hat", "shoe"][i % 3]), "file_name": f"photo_{i}.JPEG"} for i in range(5)]
    train = [{**example(9, "hat"), "file_name": "train.JPEG"}, {**example(8, -1), "file_name": "nobody_knows.JPEG"}]
    prepare(root, named, {"test": test, "train": train}, "TinyPhotos")
    prepare(root, features, {"test": [example(i, i) for i in range(3)]}, "TinyConfigs", "red")
    prepare(root, {"text": tfds.features.Text()}, {"test": [{"text": "no picture"}]}, "TinyTexts")
    return root


@tfds_warnings
def test_tfds_gives_the_files_own_bytes(data_dir):
    source = open_source(f"tfds:tiny_photos/test@{data_dir}")
    assert len(source) == 5
    assert source.class_names == ("hat", "shoe", "sock")
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(source.__getitem__, range(5)))
    order = [int(record.name[len("photo_")]) for record in records]  # TFDS shuffles while it prepares
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert not source.ordered
    for record, i in zip(records, order, strict=True):
        assert record.image == jpeg(i)
        assert record.label == [2, 0, 1][i % 3]
        assert record.name == f"photo_{i}.JPEG"


@tfds_warnings
def test_tfds_slices_configs_and_versions(data_dir, monkeypatch):
    whole = open_source(f"tfds:tiny_photos/test@{data_dir}")
    part = open_source(f"tfds:tiny_photos:1.0.0/test[2:]@{data_dir}")
    assert [record.name for record in part] == [record.name for record in whole][2:]
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    source = open_source("tfds:tiny_configs/red/test")
    assert [record.name for record in source] == [f"test/{i:08d}" for i in range(3)]
    assert sorted((record.label, record.image) for record in source) == [(i, jpeg(i)) for i in range(3)]


@tfds_warnings
def test_tfds_takes_the_newest_version(data_dir, tmp_path):
    for version in ("1.0.0", "2.0.0", "10.0.0"):
        shutil.copytree(data_dir / "tiny_photos" / "1.0.0", tmp_path / "tiny_photos" / version)
    for version in ("1.0.0", "2.0.0"):
        next((tmp_path / "tiny_photos" / version).glob("features.json")).write_text("not to be read")
    assert len(open_source(f"tfds:tiny_photos/test@{tmp_path}")) == 5


@tfds_warnings
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tiny_photos", "write tfds:NAME/SPLIT"),
        ("tiny_photos/validation", r"split 'validation' cannot be read \(Unknown split.*; there are test, train"),
        ("tiny_photos/test[:9]", r"split 'test\[:9\]' cannot be read \(Requested slice.*; there are test, train"),
        ("tiny_photos:3.0.0/test", r"tiny_photos has no version 3.0.0; there is 1.0.0: write tfds:tiny_photos/SPLIT"),
        (
            "imagenet2012/validation",
            r"no .*imagenet2012/VERSION/features.json; prepare it once.* tfds build imagenet2012 ",
        ),
        ("imagenet2021/test", r"TFDS knows no such data set; did you mean imagenet2012"),
        ("tiny_photos/test[2:2]", r"split 'test\[2:2\]' cannot be read \(it is empty\)"),
        ("tiny_configs/test", r"give one of its configs, such as tfds:tiny_configs/red/SPLIT \(there are red\)"),
        ("tiny_texts/test", r"no features of kind Image and none called 'image' \(text\)"),
    ],
)
def test_tfds_errors_name_the_fix(data_dir, spec, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(f"tfds:{spec}@{data_dir}")
    assert str(caught.value).startswith(f"tfds:{spec}@{data_dir}: ")
    assert "\n" not in str(caught.value)


def test_a_folder_of_data_sets_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=f"there is no folder {tmp_path}/none: name the one that holds"):
        open_source(f"tfds:photos/test@{tmp_path}/none")


@tfds_warnings
def test_a_record_without_a_label_is_not_scored(data_dir):
    source = open_source(f"tfds:tiny_photos/train@{data_dir}")
    labels = []
    with pytest.raises(InputError, match=r"nobody_knows.JPEG has no label"):
        labels = [source[i].label for i in range(2)]
    assert labels == []


@tfds_warnings
def test_another_format_is_told_apart(data_dir, tmp_path):
    directory = tmp_path / "tiny_photos" / "1.0.0"
    directory.mkdir(parents=True)
    for file in (data_dir / "tiny_photos" / "1.0.0").glob("*.json"):
        (directory / file.name).write_text(re.sub("array_record", "riegeli", file.read_text()))
    assert json.loads((directory / "dataset_info.json").read_text())["fileFormat"] == "riegeli"
    with pytest.raises(InputError, match=r"prepared as riegeli; array_record and tfrecord can be read.*tfds convert"):
        open_source(f"tfds:tiny_photos/test@{tmp_path}")


def test_neither_tensorflow_nor_the_network_is_used(data_dir):
    """In its own process: other tests may have imported the modules that must not be imported here."""
    program = f"""
import socket, sys
import fcvit_jax.data.sources as sources
assert not {{"tensorflow_datasets", "sklearn"}} & set(sys.modules), "imported before it is needed"

def refuse(*args):
    print("asks the network")
    raise OSError("refused")
socket.socket.connect = socket.getaddrinfo = refuse

source = sources.open_source("tfds:tiny_photos/test@{data_dir}")
print(len([source[i] for i in range(5)]))
try:
    sources.open_source("tfds:no_such_set/test@{data_dir}")
except sources.InputError:
    print("tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "5\nFalse\n", done.stdout + done.stderr
    assert done.stderr == ""  # without TensorFlow, TFDS would print a long warning when it tries to import it


# ImageNet's variants


@tfds_warnings
def test_imagenets_variants_are_scored_as_intended(tmp_path):
    import tensorflow_datasets as tfds

    synsets = imagenet.synsets()
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=synsets)}
    example = {"image": io.BytesIO(jpeg(1)), "label": "n01498041"}  # the first of A's classes, a stingray
    prepare(tmp_path, features, {"test": [example]}, "ImagenetA")
    prepare(tmp_path, features, {"test": [example]}, "ImagenetR")
    variants = [f"imagenet_v2/{config}" for config in ("matched-frequency", "threshold-0.7", "topimages")]
    for variant in variants:
        prepare(tmp_path, features, {"test": [example]}, "ImagenetV2", variant.partition("/")[2])
    for name, scored in (
        ("imagenet_a", imagenet.IMAGENET_A),
        ("imagenet_r", imagenet.IMAGENET_R),
        *((variant, None) for variant in variants),
    ):
        source = match_head(open_source(f"tfds:{name}/test@{tmp_path}"), 1000, None, "a model")
        assert source.scored == scored
        assert source.class_names == synsets
        assert source[0].label == 6


@tfds_warnings
@pytest.mark.parametrize(
    ("name", "number", "file"),
    [("cifar10", 10, "test/00000000"), ("cifar100", 100, "test/00000000"), ("oxford_iiit_pet", 37, "a photo.jpg")],
)
def test_the_image_and_its_class_are_taken_among_several_pictures_and_labels(tmp_path, name, number, file):
    """With TFDS's features of these data sets: a coarse label, a species, a mask beside the image."""
    import tensorflow_datasets as tfds

    picture, mask = jpeg(3), io.BytesIO()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(mask, "PNG")
    small = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(small, "PNG")
    if name.startswith("cifar"):
        picture = small.getvalue()  # its features require 32x32 pixels, as PNG
    known: Any = {
        "image": io.BytesIO(picture),
        "label": number - 1,
        "coarse_label": 4,
        "species": 1,
        "file_name": "a photo.jpg",
        "id": "a photo",
        "segmentation_mask": mask,
        "head_bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
    }
    features: Any = tfds.builder(name, data_dir=tmp_path / "none").info.features
    body = "".join(part.capitalize() for part in name.split("_"))
    prepare(tmp_path, dict(features), {"test": [{key: known[key] for key in features}]}, body)
    source = open_source(f"tfds:{name}/test@{tmp_path}")
    assert len(source.class_names) == number
    assert [source[i] for i in range(len(source))] == [Record(picture, number - 1, file)]


@tfds_warnings
def test_real_has_several_labels_or_none(tmp_path):
    import tensorflow_datasets as tfds

    label = tfds.features.ClassLabel(names=imagenet.synsets())
    features = {
        "image": tfds.features.Image(),
        "original_label": label,
        "real_label": tfds.features.Sequence(label),
        "file_name": tfds.features.Text(),
    }
    labels = {"a": [970, 795], "b": [], "c": [3]}
    examples = [
        {"image": io.BytesIO(jpeg(i)), "original_label": 0, "real_label": real, "file_name": name}
        for i, (name, real) in enumerate(labels.items())
    ]
    prepare(tmp_path, features, {"validation": examples}, "Imagenet2012Real")
    source = match_head(open_source(f"tfds:imagenet2012_real/validation@{tmp_path}"), 1000, None, "a model")
    assert source.labels_per_image == 9
    assert {record.name: record.label for record in source} == {"a": (970, 795), "b": (), "c": (3,)}
    examples[0]["real_label"] = [*range(10)]
    prepare(tmp_path / "more", features, {"validation": examples[:1]}, "Imagenet2012Real")
    with pytest.raises(InputError, match="a has 10 labels; at most 9 are expected"):
        open_source(f"tfds:imagenet2012_real/validation@{tmp_path / 'more'}")[0]


# TFRecord


def as_tfrecord(directory: Path, target: Path, shards: dict[str, list[int]]) -> Path:
    """Write the same examples as TFRecord files by hand; `shards`: the numbers of records by split."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.decode import DeserializeMethod

    builder: Any = tfds.builder_from_directory(directory)
    target.mkdir(parents=True)
    for file in (*directory.glob("*.json"), *directory.glob("*.txt")):
        (target / file.name).write_text(re.sub("array_record", "tfrecord", file.read_text()))
    info = json.loads((target / "dataset_info.json").read_text())
    for split in info["splits"]:
        lengths = shards[split["name"]]
        split["shardLengths"] = list(map(str, lengths))
        raw = iter(builder.as_data_source(split["name"], deserialize_method=DeserializeMethod.RAW_BYTES))
        for shard, length in enumerate(lengths):
            path = target / f"{info['name']}-{split['name']}.tfrecord-{shard:05d}-of-{len(lengths):05d}"
            path.write_bytes(b"".join(framed(bytes(next(raw))) for _ in range(length)))
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target


def framed(data: bytes) -> bytes:
    """Frame a TFRecord: the length and the bytes, each followed by its checksum."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data: bytes) -> int:
    """Compute CRC-32C bit by bit, by its definition, masked as TensorFlow does."""
    crc = 2**32 - 1
    for bit in (byte >> place & 1 for byte in data for place in range(8)):
        crc = crc >> 1 ^ (0x82F63B78 if (crc ^ bit) & 1 else 0)
    crc ^= 2**32 - 1
    return ((crc >> 15 | crc << 17) % 2**32 + 0xA282EAD8) % 2**32


@pytest.fixture(scope="module")
def tfrecord_dir(data_dir, tmp_path_factory) -> Path:
    """`tiny_photos` as TFRecord, its test split in files of 2, 0 and 3 records."""
    root = tmp_path_factory.mktemp("tfrecord")
    version = Path("tiny_photos") / "1.0.0"
    as_tfrecord(data_dir / version, root / version, {"test": [2, 0, 3], "train": [2]})
    return root


def assert_same(ours: Source, theirs: Source) -> None:
    assert len(ours) == len(theirs)
    assert ours.class_names == theirs.class_names
    with ThreadPoolExecutor(8) as pool:
        order = [*range(len(ours))] * 5
        assert list(pool.map(ours.__getitem__, order)) == list(map(theirs.__getitem__, order))


@tfds_warnings
@pytest.mark.parametrize("part", ["", "[1:4]", "[:40%]", "[60%:]", "[-1:]"])
def test_tfrecord_gives_the_records_of_array_record(data_dir, tfrecord_dir, part):
    assert_same(
        open_source(f"tfds:tiny_photos/test{part}@{tfrecord_dir}"),
        open_source(f"tfds:tiny_photos/test{part}@{data_dir}"),
    )


@tfds_warnings
def test_array_record_is_preferred_to_tfrecord(data_dir, tmp_path):
    directory = tmp_path / "tiny_photos" / "1.0.0"
    shutil.copytree(data_dir / "tiny_photos" / "1.0.0", directory)
    info = json.loads((directory / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    assert_same(open_source(f"tfds:tiny_photos/test@{tmp_path}"), open_source(f"tfds:tiny_photos/test@{data_dir}"))


@tfds_warnings
@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "taken away", "overwritten"])
def test_damaged_files_are_reported_in_one_line(data_dir, tfrecord_dir, tmp_path, kind, damage):
    directory = tmp_path / "tiny_photos" / "1.0.0"
    shutil.copytree((data_dir if kind == "array_record" else tfrecord_dir) / "tiny_photos" / "1.0.0", directory)
    file = min(directory.glob(f"tiny_photos-test.{kind}-*"))
    whole = file.read_bytes()
    if damage == "taken away":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[: len(whole) // 2], "emptied": b"", "overwritten": bytes(len(whole))}[damage])
    source = open_source(f"tfds:tiny_photos/test@{tmp_path}")
    with pytest.raises(InputError) as caught:
        source[0]
    assert "\n" not in str(caught.value)
    assert re.search("again|No such file", str(caught.value))
    assert str(directory) in str(caught.value)
