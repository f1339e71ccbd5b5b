"""Sources: which files, in which order, under which label; and one line for each thing a user may get wrong."""

import io
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data.sources import EXTENSIONS, open_source
from fcvit_jax.errors import InputError


def write(path: Path, data: bytes = b"pixels") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_unknown_forms_are_told_the_known_ones():
    for spec in ("imagenet", "s3:bucket", ""):
        with pytest.raises(InputError, match=re.escape("folder:PATH, digits:train|test, tfds:NAME/SPLIT")):
            open_source(spec)


# Folders


def test_folder_order_labels_and_names(tmp_path):
    for name in ("b/2.JPG", "b/10.png", "a/deep/er/x.webp", "a/z.jpeg", "a/notes.txt", "a/.hidden.jpg", "a/.git/y.png"):
        write(tmp_path / name, name.encode())
    write(tmp_path / ".cache" / "x.jpg")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("a", "b")
    assert [record.name for record in source] == ["a/deep/er/x.webp", "a/z.jpeg", "b/10.png", "b/2.JPG"]
    assert [record.label for record in source] == [0, 0, 1, 1]
    assert all(record.image == record.name.encode() for record in source)
    assert source.spec == f"folder:{tmp_path}"
    assert len(source) == 4
    with pytest.raises(IndexError):
        source[4]


def test_every_extension_in_any_case_is_an_image(tmp_path):
    for extension in EXTENSIONS:
        write(tmp_path / "c" / f"lower{extension}")
        write(tmp_path / "c" / f"UPPER{extension.upper()}")
    assert len(open_source(f"folder:{tmp_path}")) == 2 * len(EXTENSIONS)


def test_folders_named_by_integers_are_in_numeric_order(tmp_path):
    for name in ("0", "1", "2", "10"):
        write(tmp_path / name / "x.jpg")
    assert open_source(f"folder:{tmp_path}").class_names == ("0", "1", "2", "10")
    write(tmp_path / "zebra" / "x.jpg")
    assert open_source(f"folder:{tmp_path}").class_names == ("0", "1", "10", "2", "zebra")


def test_an_empty_class_keeps_its_label(tmp_path):
    write(tmp_path / "a" / "x.jpg")
    (tmp_path / "b").mkdir()
    write(tmp_path / "c" / "x.jpg")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ("a", "b", "c")
    assert [record.label for record in source] == [0, 2]


def test_folder_errors_name_the_folder_and_the_mend(tmp_path):
    file = write(tmp_path / "file.jpg")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "loose" / "x.jpg")
    write(tmp_path / "texts" / "a" / "x.txt")
    for path, message in (
        (tmp_path / "absent", "there is no folder"),
        ("", "there is no folder ''"),
        (file, "is a file; give the folder"),
        (tmp_path / "empty", "holds no class folders"),
        (tmp_path / "loose", "holds 1 images but no class folders; put the images of each class"),
        (tmp_path / "texts", r"no images in the class folders .*texts; accepted are .jpg .jpeg .png"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            open_source(f"folder:{path}")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_an_input_error(tmp_path):
    path = write(tmp_path / "a" / "x.jpg")
    source = open_source(f"folder:{tmp_path}")
    path.unlink()
    with pytest.raises(InputError, match=r"a/x\.jpg cannot be read: No such file"):
        source[0]


def test_folder_of_real_photos(clothing_test):
    source = open_source(f"folder:{clothing_test}")
    assert len(source) == 372
    assert source.class_names[0] == "dress"
    assert source.class_names[9] == "t-shirt"
    record = source[371]
    assert record.image == (clothing_test / record.name).read_bytes()
    assert record.label == 9


# Digits


def test_digits_split_counts_and_balance():
    train, test = open_source("digits:train"), open_source("digits:test")
    assert (len(train), len(test)) == (1437, 360)
    counts = [np.bincount([record.label for record in split]).tolist() for split in (train, test)]
    assert counts == [[142, 146, 141, 147, 145, 146, 145, 143, 138, 144], [36] * 10]
    names = [[record.name for record in split] for split in (train, test)]
    assert sorted(names[0] + names[1]) == [f"digits/{i:04d}" for i in range(1797)]
    assert names[1] == sorted(names[1])
    assert names[1][:5] == ["digits/0005", "digits/0009", "digits/0012", "digits/0014", "digits/0016"]
    assert test.class_names == tuple("0123456789")


def test_digits_pixels():
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for record in (open_source("digits:train")[0], open_source("digits:test")[359]):
        index = int(record.name[-4:])
        assert isinstance(record.image, np.ndarray)
        assert record.image.dtype == np.uint8
        assert record.image.shape == (8, 8, 3)
        for channel in range(3):
            np.testing.assert_allclose(record.image[:, :, channel], digits.images[index] / 16 * 255, atol=0.5)
        assert record.label == digits.target[index]


def test_digits_has_two_splits():
    with pytest.raises(InputError, match="no split 'validation'; there are digits:train and digits:test"):
        open_source("digits:validation")


# TensorFlow Datasets

tfds_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def prepare(data_dir: Path, features, examples, name: str, config: str = "") -> Path:
    """Prepare a data set of `examples` ({split: [example]}) as ArrayRecord, the way TFDS itself does."""
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
        ("tiny_photos:3.0.0/test", r"no .*tiny_photos/3.0.0/features.json; prepare it once"),
        (
            "imagenet2012/validation",
            r"no .*imagenet2012/VERSION/features.json; prepare it once.* tfds build imagenet2012 ",
        ),
        ("imagenet2021/test", r"TFDS knows no such data set; did you mean imagenet2012"),
        ("tiny_configs/test", r"give one of its configs, such as tfds:tiny_configs/red/SPLIT \(there are red\)"),
        ("tiny_texts/test", r"no features of kind Image and none called 'image' \(text\)"),
    ],
)
def test_tfds_errors_name_the_mend(data_dir, spec, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(f"tfds:{spec}@{data_dir}")
    assert str(caught.value).startswith(f"tfds:{spec}@{data_dir}: ")
    assert "\n" not in str(caught.value)


@tfds_warnings
def test_a_record_without_a_label_is_not_scored(data_dir):
    source = open_source(f"tfds:tiny_photos/train@{data_dir}")
    labels = []
    with pytest.raises(InputError, match=r"nobody_knows.JPEG has no label"):
        labels = [source[i].label for i in range(2)]
    assert labels == []


@tfds_warnings
def test_tfrecord_is_told_apart(data_dir, tmp_path):
    directory = tmp_path / "tiny_photos" / "1.0.0"
    directory.mkdir(parents=True)
    for file in (data_dir / "tiny_photos" / "1.0.0").glob("*.json"):
        (directory / file.name).write_text(re.sub("array_record", "tfrecord", file.read_text()))
    assert json.loads((directory / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"
    with pytest.raises(InputError, match=r"prepared as tfrecord in .*random access needs array_record.*tfds convert"):
        open_source(f"tfds:tiny_photos/test@{tmp_path}")


def test_tensorflow_and_the_network_stay_out(data_dir):
    """In a process of its own: other tests may have imported what must not be imported here."""
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
    assert done.stderr == ""  # where TensorFlow is absent, TFDS would say so at length on trying to import it


def test_a_link_that_leads_back_counts_no_image_twice(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "one.png")
    (tmp_path / "a" / "loop").symlink_to(".")
    (tmp_path / "a" / "up").symlink_to("..")
    assert [record.name for record in open_source(f"folder:{tmp_path}")][:1] == ["a/one.png"]
    assert sum(record.label == 0 for record in open_source(f"folder:{tmp_path}")) <= 2


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "one.png")

    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(top)))
        return iter(())

    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(InputError, match="a cannot be read: Permission denied"):
        open_source(f"folder:{tmp_path}")
