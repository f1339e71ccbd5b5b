import json

import jax
import numpy as np
import pytest

from fcvit_jax import parallel
from fcvit_jax.checkpoint import load_checkpoint, save_checkpoint
from fcvit_jax.data.preprocess import preset
from fcvit_jax.errors import InputError
from fcvit_jax.models.vit import ViT, ViTConfig

CONFIG = ViTConfig((16, 16), 8, 16, 2, 2, 32, num_classes=3)
PREPROCESS = preset("timm/augreg", (16, 16))


@pytest.fixture
def params():
    return ViT(CONFIG).init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]


@pytest.fixture
def saved(tmp_path, params):
    return save_checkpoint(
        tmp_path / "ckpt", CONFIG, params, PREPROCESS, class_names=("a", "b", "c"), provenance={"sha256": "0" * 64}
    )


def test_what_is_saved_is_loaded(saved, params):
    loaded = load_checkpoint(saved)
    assert loaded.config == CONFIG
    assert loaded.preprocess == PREPROCESS
    assert loaded.meta["class_names"] == ["a", "b", "c"]
    assert loaded.meta["provenance"] == {"sha256": "0" * 64}
    assert loaded.meta["versions"]["jax"] == jax.__version__
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["ckpt"]


def test_parameters_may_be_spread_over_the_devices(saved):
    loaded = load_checkpoint(saved, parallel.replicated(parallel.data_mesh()))
    assert loaded.params["embed"]["kernel"].sharding.is_fully_replicated
    assert len(loaded.params["embed"]["kernel"].devices()) == jax.device_count() == 8


def test_a_working_directory_of_training_is_opened_too(tmp_path, params):
    save_checkpoint(tmp_path / "run" / "checkpoint", CONFIG, params, PREPROCESS)
    assert load_checkpoint(tmp_path / "run").config == CONFIG


def test_saving_is_whole_or_not_at_all(tmp_path, params, monkeypatch):
    monkeypatch.setattr("fcvit_jax.checkpoint.versions", lambda: {}["broken"])
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS)
    monkeypatch.undo()
    monkeypatch.setattr("pathlib.Path.write_text", lambda *args, **kwargs: {}["broken"])  # after the parameters
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_is_asked_for_and_spares_what_is_no_checkpoint(saved, params, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(saved, CONFIG, params, PREPROCESS)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_checkpoint(saved, CONFIG, doubled, PREPROCESS, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(saved).params, doubled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(InputError, match="not a checkpoint: it is not overwritten"):
        save_checkpoint(tmp_path / "thesis", CONFIG, params, PREPROCESS, overwrite=True)


def edit(path, **fields):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | fields))


def test_bad_directories_are_told_in_one_line(saved, tmp_path):
    def message(path):
        with pytest.raises(InputError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such checkpoint" in message(tmp_path / "nowhere")
    assert "is a file" in message(saved / "meta.json")
    assert "has no meta.json" in message(saved / "params")
    assert "no packaged checkpoint 'packaged:mnist': there is packaged:digits" in message("packaged:mnist")

    edit(saved, config=CONFIG.to_dict() | {"depth": 3})
    assert "blocks_2/attn/proj/bias is None, its meta.json wants (16,)" in message(saved)
    edit(saved, config=CONFIG.to_dict() | {"embed_dim": 32})
    assert "blocks_0/attn/proj/bias is (16,), its meta.json wants (32,)" in message(saved)
    edit(saved, config=CONFIG.to_dict() | {"colour": 3})
    assert "colour" in message(saved)
    edit(saved, config=None)
    assert "lacks 'config'" in message(saved)
    edit(saved, format=2)
    assert "format 2 is not 1" in message(saved)
    (saved / "meta.json").write_text("{")
    assert "is damaged" in message(saved)


def test_a_damaged_parameter_file_is_told(saved):
    for path in (saved / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(saved)
