"""ImageNet's class list and its variants' against timm's own copies."""

import importlib.util
import json
from pathlib import Path

import pytest

from fcvit_jax.data import imagenet
from fcvit_jax.errors import InputError


def timm_list(name: str) -> str:
    timm = importlib.util.find_spec("timm")  # not imported: that takes seconds
    if not timm or not timm.origin:
        pytest.skip("timm is absent: its lists are what ours are compared with")
    return (Path(timm.origin).parent / "data" / "_info" / name).read_text()


def test_synsets_are_a_thousand_sorted():
    synsets = imagenet.synsets()
    assert len(set(synsets)) == 1000
    assert list(synsets) == sorted(synsets)
    assert (synsets[0], synsets[217], synsets[999]) == ("n01440764", "n02102040", "n15075141")


def test_synsets_and_variants_are_timms():
    synsets = imagenet.synsets()
    assert list(synsets) == timm_list("imagenet_synsets.txt").split()
    for name, scored in (("a", imagenet.IMAGENET_A), ("r", imagenet.IMAGENET_R)):
        assert [*map(str, scored)] == timm_list(f"imagenet_{name}_indices.txt").split()
        assert [synsets[index] for index in scored] == timm_list(f"imagenet_{name}_synsets.txt").split()


def test_no_image_has_more_real_labels():
    assert max(map(len, json.loads(timm_list("imagenet_real_labels.json")))) == imagenet.MOST_REAL_LABELS


def test_without_the_list_the_fix_is_reported(monkeypatch):
    imagenet.synsets.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="comes with tensorflow-datasets: reinstall it"):
        imagenet.synsets()
