"""When a checkpoint's head is kept or replaced, by the names of its classes and the data sets'."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params, save_checkpoint
from fcvit_jax.data import imagenet
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.training.starting_point import from_checkpoint, from_scratch

CONFIG = ViTConfig((8, 8), 4, 8, 1, 2, 8)
SYNSETS = imagenet.synsets()
WORDS = tuple(f"word {index}" for index in range(1000))
NUMBERS = tuple(map(str, range(1000)))


def params_of(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), abstract_params(config))


def source(*names, spec="folder:train"):
    """Make a source with one record per class."""
    return Source(spec, names, len(names), lambda index: Record(np.zeros((8, 8, 3), np.uint8), index, str(index)))


@pytest.fixture
def saved(tmp_path):
    def save(class_names, config=CONFIG):
        place = tmp_path / "checkpoint"
        pixels = preset("timm/augreg", config.image_size)
        return save_checkpoint(
            place, config, params_of(config), pixels, class_names=class_names or None, overwrite=True
        )

    return save


@pytest.mark.parametrize("head", [(), SYNSETS, WORDS], ids=["no names", "synsets", "words"])
@pytest.mark.parametrize("folder", [SYNSETS, NUMBERS, SYNSETS[::-1]], ids=["synsets", "numbers", "another order"])
def test_imagenets_head_stays_whatever_its_classes_are_called(saved, head, folder):
    train, test = source(*folder), source(*SYNSETS[5:10][::-1], spec="folder:test")
    start, params = from_checkpoint(saved(head), train, test)
    assert start.remarks == ()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))  # on no device
    jax.tree.map(np.testing.assert_array_equal, params, params_of(CONFIG))
    assert start.config == CONFIG
    outputs = range(1000)[::-1] if folder == SYNSETS[::-1] else range(1000)
    assert [start.train_set[index].label for index in (0, 7, 999)] == [outputs[index] for index in (0, 7, 999)]
    assert start.train_set.class_names == (head or SYNSETS)
    # A test set with some of its classes is scored among those alone, as ImageNet-A requires.
    assert [start.test_set[index].label for index in range(5)] == [9, 8, 7, 6, 5]
    assert start.test_set.scored == (5, 6, 7, 8, 9)


def test_a_test_set_of_numbered_folders_goes_with_imagenets_head(saved):
    start, _ = from_checkpoint(saved(WORDS), source(*SYNSETS), source(*NUMBERS, spec="folder:v2"))
    assert start.test_set[3].label == 3
    assert start.test_set.scored is None


@pytest.mark.parametrize("head", [(), WORDS], ids=["no names", "words"])
def test_a_training_set_of_some_classes_gets_a_head_of_its_own(saved, head):
    few = SYNSETS[100:110]
    path = saved(head)
    start, params = from_checkpoint(path, source(*few), source(*few, spec="folder:test"))
    assert start.remarks == (f"{path} has 1000 classes, the data set 10: its head is replaced by zeros",)
    assert start.config == dataclasses.replace(CONFIG, num_classes=10)
    assert start.train_set.class_names == few
    assert [start.test_set[index].label for index in (0, 9)] == [0, 9]
    assert start.test_set.scored is None
    assert params["head"]["kernel"].shape == (8, 10)
    assert not params["head"]["kernel"].any()
    del params["head"]
    expected: Any = params_of(CONFIG)
    jax.tree.map(np.testing.assert_array_equal, params, {name: x for name, x in expected.items() if name != "head"})


def test_as_many_other_classes_get_a_new_head_where_names_are_known(saved):
    config = dataclasses.replace(CONFIG, num_classes=2)
    cats = source("cat", "dog")
    start, params = from_checkpoint(saved(("cat", "dog"), config), cats, cats)
    assert params["head"]["kernel"].any()
    start, params = from_checkpoint(saved((), config), cats, cats)  # nothing contradicts it
    assert params["head"]["kernel"].any()
    assert start.train_set.class_names == ("cat", "dog")
    assert any("no class names: its 2 outputs are assumed to be" in line for line in start.train_set.remarks)
    path = saved(("dog", "cat"), config)  # in another order: each keeps its output
    start, params = from_checkpoint(path, cats, cats)
    assert params["head"]["kernel"].any()
    assert start.train_set.class_names == ("dog", "cat")
    assert [start.train_set[index].label for index in (0, 1)] == [1, 0]
    assert [start.test_set[index].label for index in (0, 1)] == [1, 0]
    path = saved(("cat", "cow"), config)
    start, params = from_checkpoint(path, cats, cats)
    (remark,) = start.remarks
    assert remark == (
        f"{path} has other classes: its head is replaced by zeros (only the data set has dog; only the head has cow)"
    )
    assert not params["head"]["kernel"].any()
    path = saved((), dataclasses.replace(CONFIG, num_classes=0))
    start, params = from_checkpoint(path, cats, cats)
    assert start.remarks == (f"{path} has 0 classes, the data set 2: its head is replaced by zeros",)
    assert params["head"]["kernel"].shape == (8, 2)


def test_a_test_set_of_other_classes_is_refused(saved):
    pets, other = source("cat", "dog"), source("cat", "cow", spec="folder:test")
    told = "folder:test has class 'cow' where a model trained on folder:train has 'dog': its labels mean other classes"
    with pytest.raises(InputError, match=told):
        from_checkpoint(saved(WORDS), pets, other)
    with pytest.raises(InputError, match=told):
        from_scratch(CONFIG, "timm/augreg", pets, other)
    with pytest.raises(
        InputError, match=r"folder:test has 2 classes, the head of .* has 1000 .only the data set has cat, cow"
    ):
        from_checkpoint(saved(WORDS), source(*SYNSETS), other)


def test_the_order_of_a_head_without_names_must_be_known(saved):
    config = dataclasses.replace(CONFIG, num_classes=3)
    train, test = source("c1", "c10", "c2"), source("c1", "c10", "c2", spec="folder:test")
    path = saved((), config)
    with pytest.raises(InputError, match=r"imagefolder: .* for a new head, convert with --num_classes 0"):
        from_checkpoint(path, train, test)
    for given, written in (("timm", ()), (None, "timm"), ("timm", "imagefolder")):
        start, params = from_checkpoint(saved(written, config), train, test, class_names=given)
        assert params["head"]["kernel"].any()
        assert start.train_set.class_names == ("c1", "c2", "c10")
        for each in (start.train_set, start.test_set):
            assert [each[index].label for index in range(3)] == [0, 2, 1]
    with pytest.raises(InputError, match="are not named as ImageNet's"):
        from_checkpoint(saved(()), source(*WORDS), source(*WORDS))


def test_an_empty_folder_is_a_class_of_the_test_set_if_training_has_it(saved):
    train = source("cat", "dog", "eel")
    test = dataclasses.replace(source("cat", "eel", spec="folder:test"), empty=("dog", "junk"))
    start, _ = from_checkpoint(saved(WORDS), train, test)
    assert [start.test_set[index].label for index in (0, 1)] == [0, 2]
    assert start.test_set.scored is None


def test_a_checkpoint_that_says_nothing_of_its_classes_is_read(saved):
    path = saved(())
    meta = json.loads((path / "meta.json").read_text())
    del meta["class_names"]
    (path / "meta.json").write_text(json.dumps(meta))
    start, _ = from_checkpoint(path, source(*SYNSETS), source(*SYNSETS))
    assert start.remarks == ()
