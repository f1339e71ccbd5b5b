import json
import os
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fcvit_jax import parallel
from fcvit_jax.checkpoint import load_checkpoint, save_checkpoint
from fcvit_jax.data.preprocess import preset
from fcvit_jax.errors import InputError
from fcvit_jax.files import sweep
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT

CONFIG = ViTConfig((16, 16), 8, 16, 2, 2, 32, num_classes=3)
PREPROCESS = preset("timm/augreg", (16, 16))


@pytest.fixture
def params():
    return jax.jit(ViT(CONFIG).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]


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
    assert len(loaded.params["embed"]["kernel"].devices()) == jax.device_count() > 1


def test_a_working_directory_of_training_is_opened_too(tmp_path, params):
    save_checkpoint(tmp_path / "run" / "checkpoint", CONFIG, params, PREPROCESS)
    assert load_checkpoint(tmp_path / "run").config == CONFIG


def test_saving_is_whole_or_not_at_all(tmp_path, params, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", lambda *args, **kwargs: {}["broken"])  # after the parameters
    with pytest.raises(KeyError):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: No space left")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, params, monkeypatch, error):
    """The operating system and TensorStore report it in two forms."""

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", full)
    with pytest.raises(InputError, match=r"ckpt cannot be written \(the disk is full\): make room"):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"the disk is full: 0\.0 MiB are needed, 0\.0 MiB free"):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_requires_an_option_and_spares_other_directories(saved, params, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(saved, CONFIG, params, PREPROCESS)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    save_checkpoint(saved, CONFIG, doubled, PREPROCESS, overwrite=True)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(saved).params, doubled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    with pytest.raises(InputError, match="it contains other files"):
        save_checkpoint(tmp_path / "thesis", CONFIG, params, PREPROCESS, overwrite=True)


def edit(path, **fields):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | fields))


def test_bad_directories_are_reported_in_one_line(saved, tmp_path):
    def message(path):
        with pytest.raises(InputError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no such checkpoint" in message(tmp_path / "nowhere")
    assert "is a file" in message(saved / "meta.json")
    assert "has no meta.json" in message(saved / "params")
    assert "no packaged checkpoint 'packaged:mnist': choose one of packaged:digits" in message("packaged:mnist")

    edit(saved, config=CONFIG.to_dict() | {"depth": 3})
    assert "blocks_2/attn/proj/bias is None, its configuration requires (16,)" in message(saved)
    edit(saved, config=CONFIG.to_dict() | {"embed_dim": 32})
    assert "blocks_0/attn/proj/bias is (16,), its configuration requires (32,)" in message(saved)
    for name, value, told in [
        ("image_size", 16, "image_size is 16"),
        ("image_size", [16, 16, 16], "image_size is [16, 16, 16]"),
        ("depth", "2", "depth is '2': it must be a whole number"),
        ("depth", 2.0, "depth is 2.0"),
        ("num_classes", -1, "num_classes is -1: it must be a whole number, 0 or more"),
        ("norm_eps", "1e-6", "norm_eps is '1e-6'"),
        ("qkv_bias", 1, "qkv_bias is 1"),
        ("image_size", [32, 32], "the preprocessing gives (16, 16), the model takes (32, 32)"),
    ]:
        edit(saved, config=CONFIG.to_dict() | {name: value})
        assert told in message(saved)
    edit(saved, config=CONFIG.to_dict(), class_names=["a", "b"])
    assert "expected the names of 3 classes" in message(saved)
    edit(saved, class_names=None, provenance="unknown")
    assert "lacks 'provenance'" in message(saved)
    edit(saved, provenance={})
    load_checkpoint(saved)
    edit(saved, config=CONFIG.to_dict() | {"colour": 3})
    assert "colour" in message(saved)
    edit(saved, config=None)
    assert "lacks 'config'" in message(saved)
    edit(saved, format=2)
    assert "format 2 is not 1" in message(saved)
    (saved / "meta.json").write_text("{")
    assert "is damaged" in message(saved)


@pytest.mark.parametrize("harm", ["cut", "overwrite", "remove"])
def test_a_damaged_parameter_file_is_reported(saved, harm):
    files = [path for path in (saved / "params").rglob("*") if path.is_file() and path.name != ".DS_Store"]
    (saved / "params" / ".DS_Store").write_bytes(b"a guest does no harm")
    load_checkpoint(saved)
    for path in files:
        content = path.read_bytes()
        middle = len(content) // 2
        changed = {"cut": content[:middle], "overwrite": content[:middle] + b"~" + content[middle + 1 :]}
        path.unlink() if harm == "remove" else path.write_bytes(changed[harm])
        with pytest.raises(InputError, match=f"{path.name} is missing or damaged"):
            load_checkpoint(saved)
        path.write_bytes(content)


def test_parts_that_do_not_fit_are_not_saved(tmp_path, params):
    other = {name: value for name, value in params.items() if name != "blocks_1"}
    with pytest.raises(InputError, match="blocks_1/attn/proj/bias is None"):
        save_checkpoint(tmp_path / "ckpt", CONFIG, other, PREPROCESS)
    with pytest.raises(InputError, match="image_size"):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, preset("timm/augreg", (32, 32)))
    with pytest.raises(InputError, match="names of 3 classes"):
        save_checkpoint(tmp_path / "ckpt", CONFIG, params, PREPROCESS, class_names=("a", "b"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_checkpoint(tmp_path / "file" / "ckpt", CONFIG, params, PREPROCESS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_overwrite_keeps_what_was_there(saved, params, monkeypatch):
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(InputError, match=r"ckpt cannot be written \(disk full\)"):
        save_checkpoint(saved, CONFIG, jax.tree.map(lambda x: 2 * x, params), PREPROCESS, overwrite=True)
    monkeypatch.undo()
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(saved).params, params)
    assert [path.name for path in saved.parent.iterdir()] == ["ckpt"]


def test_leftovers_of_a_killed_writer_are_deleted_and_the_old_checkpoint_is_restored(saved, params, monkeypatch):
    class Killed(BaseException):
        pass

    replace, calls = os.replace, []

    def killed_at(count):
        def call(source, target):
            calls.append(source)
            if len(calls) >= count:
                raise Killed  # and no cleanup is possible: the calls that would repair it fail too
            replace(source, target)

        return call

    doubled = jax.tree.map(lambda x: 2 * x, params)
    for count in (1, 2):
        calls.clear()
        monkeypatch.setattr("os.replace", killed_at(count))
        monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            save_checkpoint(saved, CONFIG, doubled, PREPROCESS, overwrite=True)
        monkeypatch.undo()
        assert saved.exists() == (count == 1)
        (saved.parent / ".ckpt.partial-mine").mkdir(exist_ok=True)  # not a name that a writer makes
        assert len(list(saved.parent.iterdir())) == 3 + (count == 1)
        sweep(saved)
        assert sorted(path.name for path in saved.parent.iterdir()) == [".ckpt.partial-mine", "ckpt"]
        jax.tree.map(np.testing.assert_array_equal, load_checkpoint(saved).params, params)
