import os
from pathlib import Path

import jax
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path, utf8_path

ADDRESSES = ("gs://bucket/run", "s3://bucket/run", "az://a/b", "file:///tmp/run", "memory://run", "hdfs://a:1/b")


def test_the_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a/b") == tmp_path / "a/b"
    assert local_path(Path("~")) == tmp_path
    assert local_path("a/~b") == Path("a/~b")
    with pytest.raises(InputError, match=r"^~nobody-of-this-name/x: there is no such user$"):
        local_path("~nobody-of-this-name/x")


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_as_text_and_as_paths(address):
    for given in (address, Path(address)):
        with pytest.raises(InputError, match=r"^(gs|s3|az|file|memory|hdfs)://.* is an address, .*mount the bucket"):
            local_path(given)


def test_a_bucket_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = fc.TrainConfig(
        train="digits:train",
        test="digits:test",
        checkpoint="packaged:digits",
        optimizer=fc.OptimizerConfig(learning_rate=1),
    )
    for call in (
        lambda: fc.convert("packaged:digits", "gs://bucket/digits"),
        lambda: fc.convert("packaged:digits", "gs://bucket/digits.safetensors", to="timm"),
        lambda: fc.export("packaged:digits", "dense", 1, "gs://bucket/served"),
        lambda: fc.evaluate("packaged:digits", "digits:test", "dense", workdir="gs://bucket/results"),
        lambda: fc.evaluate("gs://bucket/run", "digits:test", "dense"),
        lambda: fc.evaluate("packaged:digits", "folder:gs://bucket/photos", "dense"),
        lambda: fc.evaluate("packaged:digits", "tfds:photos/test@gs://bucket/tfds", "dense"),
        lambda: fc.load_checkpoint("gs://bucket/run"),
        lambda: fc.train(config, "gs://bucket/run"),
    ):
        with pytest.raises(InputError, match=r"gs://bucket/.* is an address"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_whose_name_is_not_utf8_has_another_name_for_a_while(tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9"))
    odd.mkdir()
    with utf8_path(odd) as place:
        str(place).encode()
        (place / "file").write_text("inside")
    assert (odd / "file").read_text() == "inside"
    assert not place.exists()
    with utf8_path(tmp_path) as place:
        assert place == tmp_path


def test_a_checkpoint_in_a_directory_of_any_name(tmp_path):
    digits = fc.load_checkpoint("packaged:digits")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9"))
    odd.mkdir()
    fc.save_checkpoint(odd / "saved", digits.config, digits.params, digits.preprocess)
    found = fc.load_checkpoint(odd / "saved")
    assert [path.name for path in odd.iterdir()] == ["saved"]
    jax.tree.map(np.testing.assert_array_equal, found.params, digits.params)
