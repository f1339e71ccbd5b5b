"""Sources: which files, in which order, under which label; and a one-line error for each mistake of a user."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcvit_jax.data.listing import EXTENSIONS
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError


def write(path: Path, data: bytes = b"pixels") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_an_unknown_form_is_reported_with_the_known_ones():
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


def test_folder_errors_name_the_folder_and_the_fix(tmp_path):
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
        (
            tmp_path / "texts",
            r"no images in the class folders .*texts \(left out: .txt\); accepted are .jpg .jpeg .png",
        ),
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
