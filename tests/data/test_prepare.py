"""A folder written as a prepared data set gives the same records, pixels and logits, or a one-line error."""

import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from configs import eval_digits
from configs.training import defaults
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.data import imagenet, prepare
from fcvit_jax.data.batches import eval_batches
from fcvit_jax.data.labels import match_head
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLASSES = {"cat": ("b.png", "a.png"), "dog": ("c.png",), "eel": ("deep/d.png", "z.png")}


@pytest.fixture
def folder(tmp_path) -> Path:
    for shade, (name, files) in enumerate(CLASSES.items()):
        for number, file in enumerate(files):
            path = tmp_path / "My photos" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (80 * shade, 90 * number, 30)).save(path)
    return tmp_path / "My photos"


def records(source: Source) -> list[Record]:
    return [source[index] for index in range(len(source))]


def assert_same(ours: Source, theirs: Source) -> None:
    assert ours.class_names == theirs.class_names
    assert records(ours) == records(theirs)  # bytes, labels and names, in their order


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "data"
    prepare.main([str(folder), str(out)])
    assert capsys.readouterr().out == f"5 images of 3 classes: tfds:my_photos/test@{out}\n"
    assert_same(open_source(f"tfds:my_photos/test@{out}"), open_source(f"folder:{folder}"))
    assert open_source(f"tfds:my_photos/test@{out}").ordered
    assert open_source(f"folder:{folder}").ordered
    assert [path.name for path in out.iterdir()] == ["my_photos"]
    # A second split of the same classes goes into the same data set.
    shutil.rmtree(folder / "dog")
    (folder / "dog").mkdir()
    prepare.main([str(folder), str(out), "--split", "train"])
    assert [len(open_source(f"tfds:my_photos/{split}@{out}")) for split in ("test", "train", "test+train")] == [5, 4, 9]
    assert "folders without an image are classes only if the head names them: dog" in capsys.readouterr().out
    assert open_source(f"tfds:my_photos/train@{out}").class_names == tuple(CLASSES)
    assert [record.label for record in open_source(f"tfds:my_photos/train@{out}")] == [0, 0, 2, 2]


def test_many_files_keep_the_order_and_are_all_read(folder, tmp_path, monkeypatch):
    """More files than the limit of open files: ArrayRecord's readers keep each open."""
    monkeypatch.setattr(prepare, "IMAGES_PER_FILE", 1)
    one = records(open_source(f"folder:{folder}"))
    source = Source("test:60", tuple(CLASSES), 60, lambda i: one[i % 5]._replace(name=f"{i}.png"))
    spec = prepare.prepare(source, tmp_path / "data", "many", "test")
    assert len(list((tmp_path / "data" / "many" / "1.0.0").glob("*.array_record-*"))) == 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
        assert_same(open_source(spec), source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [record.name for record in open_source(spec.replace("/test@", "/test[9:12]@"))] == [
        "9.png",
        "10.png",
        "11.png",
    ]


def test_real_photos_give_the_logits_of_their_folder(clothing_test, tmp_path):
    """The files of three classes, unchanged JPEGs, through a small ViT."""
    for name in ("dress", "hat", "t-shirt"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for photo in sorted((clothing_test / name).iterdir())[:4]:
            shutil.copy(photo, tmp_path / "photos" / name)
    folder = open_source(f"folder:{tmp_path / 'photos'}")
    prepared = open_source(prepare.prepare(folder, tmp_path / "data", "photos", "test"))

    config = ViTConfig(image_size=(64, 64), patch_size=16, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    rng, preprocess = np.random.default_rng(0), Preprocess((64, 64))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(config))
    model = jax.jit(lambda images: ViT(config).apply({"params": params}, preprocess.normalize(images))[0])
    logits, labels, names = [], [], []
    for source in (folder, prepared):
        batches = list(eval_batches(source, preprocess, 4))
        logits.append(np.concatenate([np.asarray(model(batch.images)) for batch in batches]))
        labels.append(np.concatenate([np.asarray(batch.labels) for batch in batches]).tolist())
        names.append([name for batch in batches for name in batch.names])
    assert np.ptp(logits[0], axis=0).min() > 0.1  # the photos differ
    np.testing.assert_array_equal(logits[0], logits[1])
    assert labels[0] == labels[1] == [0] * 4 + [1] * 4 + [2] * 4
    assert names[0] == names[1]


def test_existing_data_sets_stay(folder, tmp_path):
    out = tmp_path / "data"
    source = open_source(f"folder:{folder}")
    prepare.prepare(source, out, "photos", "test")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(message: str, source: Source = source, name: str = "photos", split: str = "test") -> None:
        with pytest.raises(InputError, match=message) as caught:
            prepare.prepare(source, out, name, split)
        assert "\n" not in str(caught.value)

    refused("1.0.0 has a split 'test' already: choose another --split or --name")
    (folder / "fox").mkdir()
    (folder / "fox" / "1.png").write_bytes(b"pixels")
    other = open_source(f"folder:{folder}")
    refused("1.0.0 has other classes than folder:.*: choose another --name", other, split="train")
    (out / "occupied" / "1.0.0").mkdir(parents=True)
    shutil.copytree(out / "photos", out / "foreign")
    features = out / "foreign" / "1.0.0" / "features.json"
    features.write_text(features.read_text().replace('"file_name"', '"id"'))
    refused(
        "foreign/1.0.0 exists and was not written by this command: choose another --name", name="foreign", split="x"
    )
    shutil.rmtree(out / "foreign")
    refused("occupied/1.0.0 exists and was not written by this command: choose another --name", name="occupied")
    for name in ("Photos", "a/b", "", "1st"):
        refused(f"--name {name!r} is not valid: write lower-case letters", name=name)
    refused("--split 'all' is not valid", split="all")
    # A failure half-way leaves nothing behind.
    (folder / "cat" / "a.png").unlink()
    refused("a.png cannot be read: No such file", split="train")
    refused("a.png cannot be read: No such file", name="another")
    array = Source("digits:x", ("a",), 1, lambda i: Record(np.zeros((8, 8, 3), np.uint8), 0, "x"))
    refused("digits:x: x is not an image file, so there are no bytes to keep", array, name="another")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in out.iterdir()) == ["occupied", "photos"]


def test_a_folder_name_that_no_data_set_can_have_is_reported(folder, tmp_path, capsys):
    (renamed := tmp_path / "2024").mkdir()
    folder.rename(renamed / "2024")
    with pytest.raises(SystemExit):
        prepare.main([str(renamed / "2024"), str(tmp_path / "out")])
    assert capsys.readouterr().err == (
        f"error: the name of {renamed}/2024 cannot name a data set, which begins with a letter: pass --name\n"
    )
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8_are_escaped(folder, tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    (folder / "cat" / "a.png").rename(folder / "cat" / f"{odd}.png")
    (folder / "dog").rename(folder / f"dog {odd}")
    source = open_source(f"folder:{folder}")
    spec = prepare.prepare(source, tmp_path / "out", "photos", "test")
    written = open_source(spec)
    assert written.class_names == ("cat", "dog caf\\udce9", "eel")
    records = [source[index] for index in range(len(source))]
    assert [written[index].name for index in range(5)] == [each.name.replace(odd, "caf\\udce9") for each in records]
    assert [written[index].image for index in range(5)] == [each.image for each in records]
    prepare.prepare(source, tmp_path / "out", "photos", "more")  # the same classes


@pytest.mark.parametrize(("name", "scored"), [("imagenet_a", imagenet.IMAGENET_A), ("imagenet_r", imagenet.IMAGENET_R)])
def test_some_of_imagenets_classes_are_scored_as_their_folder_is(tmp_path, name, scored):
    """The folder has the name of TFDS's data set, which names all 1,000 classes, while this one names 200."""
    for index in scored:
        path = tmp_path / name / imagenet.synsets()[index] / "x.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(path)
    prepare.main([str(tmp_path / name), str(tmp_path / "data")])
    for spec in (f"tfds:{name}/test@{tmp_path / 'data'}", f"folder:{tmp_path / name}"):
        source = match_head(open_source(spec), 1000, None, "a model")
        assert source.scored == scored
        assert source.class_names == imagenet.synsets()
        assert [record.label for record in source] == list(scored)


def test_class_names_that_a_list_cannot_hold_are_refused(tmp_path):
    source = Source("set:x", ("a", "b\nc"), 1, lambda i: Record(b"x", 0, "x"))
    with pytest.raises(InputError, match="a class name has a line break or ends in a space: rename its folder"):
        prepare.prepare(source, tmp_path, "odd", "test")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_reported(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([folder, tmp_path / "file"], "file cannot be written: File exists"),
        ([folder], "the following arguments are required: OUT (see --help)"),
        ([tmp_path / "absent", tmp_path / "data"], "there is no folder"),
    ):
        with pytest.raises(SystemExit, match="2"):
            prepare.main([*map(str, arguments)])
        said = capsys.readouterr().err
        assert message in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1


def test_the_written_files_are_those_that_tfds_expects(folder, tmp_path):
    import tensorflow_datasets as tfds

    prepare.prepare(open_source(f"folder:{folder}"), tmp_path / "data", "photos", "test")
    directory = tmp_path / "data" / "photos" / "1.0.0"
    builder: Any = tfds.builder_from_directory(directory)
    assert (builder.info.name, str(builder.info.version)) == ("photos", "1.0.0")
    assert builder.info.splits["test"].num_examples == 5
    examples = builder.as_data_source("test")
    assert [example["label"] for example in examples] == [0, 0, 1, 2, 2]
    np.testing.assert_array_equal(examples[3]["image"][0, 0], [160, 0, 30])
    assert json.loads((directory / "dataset_info.json").read_text())["disableShuffling"] is True


def test_the_commands_of_the_documentation(folder, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    fields = set(re.findall(r"--config\.(\w+)", text)) - {"FIELD"}
    assert fields <= {*eval_digits.get_config(), *defaults()}
    assert {"dataset", "real_labels", "train", "test"} <= fields
    # TFDS knows these names.
    for spec in re.findall(r"--config\.dataset=(tfds:(?!photos)[^` ]+)", text):
        with pytest.raises(InputError, match="prepare it once, where TensorFlow is installed"):
            open_source(f"{spec}@{tmp_path}")
    (command,) = re.findall(r"python -m fcvit_jax\.data\.prepare (.*)", text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    folder.rename(tmp_path / "photos" / "test")
    prepare.main(command.split())
    assert_same(open_source("tfds:photos/test@data"), open_source("folder:photos/test"))
