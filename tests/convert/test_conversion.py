import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fcvit_jax as fc
from fcvit_jax.convert import convert, inspect
from fcvit_jax.convert.__main__ import main
from states import state_dict

NAMES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture
def weights(tmp_path):
    save_file(state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_checkpoint_returned_is_the_one_written(weights, tmp_path, capsys):
    made = convert(weights, tmp_path / "out", num_heads=2, preprocess="timm/deit", image_size=48, class_names=NAMES)
    read = fc.load_checkpoint(tmp_path / "out")
    assert made.config.image_size == (48, 48)
    assert (made.path, made.config, made.preprocess, made.meta) == (read.path, read.config, read.preprocess, read.meta)
    jax.tree.map(np.testing.assert_array_equal, made.params, read.params)
    assert made.meta["class_names"] == list(NAMES)
    assert "position embedding 4x4, the model's grid 6x6" in made.meta["provenance"]["remarks"][0]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("order", ["timm", "imagefolder", "numeric"])
def test_an_order_of_classes_is_kept_through_another_conversion(order, weights, tmp_path):
    made = convert(weights, tmp_path / "one", num_heads=2, preprocess="timm/deit", class_names=order)
    again = convert(tmp_path / "one", tmp_path / "two")
    for checkpoint in (made, again, fc.load_checkpoint(tmp_path / "two")):
        assert checkpoint.class_names == order
        assert checkpoint.meta["class_names"] is None
    named = convert(tmp_path / "two", tmp_path / "three", class_names=NAMES)
    assert (named.class_names, named.meta.get("class_order")) == (NAMES, None)
    folder = convert(tmp_path / "one", tmp_path / "hf", to="hf")
    assert "LABEL_4" in (folder / "config.json").read_text()
    (tmp_path / "one" / "meta.json").write_text(json.dumps(made.meta | {"class_order": "random"}))
    with pytest.raises(fc.InputError, match="class_order is 'random': expected one of timm, imagefolder, numeric"):
        fc.load_checkpoint(tmp_path / "one")


def test_the_grid_that_is_assumed_is_reported(tmp_path):
    """2x8 patches, as many as 4x4."""
    arrays = state_dict(fc.ViTConfig((16, 64), 8, 128, 2, 2, 256, num_classes=5))
    save_file(arrays, tmp_path / "wide.safetensors")

    def made(source, name, **options):
        lines = []
        checkpoint = convert(source, tmp_path / name, preprocess="timm/deit", report=lines.append, **options)
        return checkpoint, [line for line in lines if "is assumed to be of a" in line]

    wide, (line,) = made(tmp_path / "wide.safetensors", "wide", num_heads=2, image_size=(16, 64))
    np.testing.assert_array_equal(wide.params["embed"]["pos_embed"], arrays["pos_embed"])
    assert "assumed to be of a 2x8 grid, which fits --image_size exactly; if it is of 4x4, convert without" in line
    # To choose another grid: convert to a square first.
    square, lines = made(tmp_path / "wide.safetensors", "square", num_heads=2)
    assert (square.config.grid, lines) == ((4, 4), [])
    resampled, lines = made(tmp_path / "square", "resampled", image_size=(16, 64))
    assert (resampled.config.grid, lines) == ((2, 8), [])
    assert np.abs(np.asarray(resampled.params["embed"]["pos_embed"]) - arrays["pos_embed"]).max() > 0.1
    _, (line,) = made(tmp_path / "wide.safetensors", "wider", num_heads=2, image_size=(32, 128))
    assert "assumed to be of a square grid; if it is not, pass the --image_size of the weights" in line


def test_a_conversion_to_pytorch_returns_the_path(weights, tmp_path):
    lines = []
    out = convert(str(weights), tmp_path / "timm.safetensors", to="timm", num_heads=2, report=lines.append)
    assert out == (tmp_path / "timm.safetensors").resolve()
    written, arrays = load_file(out), state_dict()
    assert written.keys() == arrays.keys()
    assert all(np.array_equal(written[name], arrays[name]) for name in arrays)
    assert lines[-1].startswith("in PyTorch: model = timm.models.vision_transformer.VisionTransformer(img_size=32, ")
    folder = convert(weights, tmp_path / "hf", to="hf", num_heads=2, preprocess="timm/deit")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_an_inspection_is_a_value(weights, tmp_path, capsys):
    found = inspect(weights, num_heads=2, image_size=(48, 64))
    assert found.problem is None
    assert found.config is not None
    assert found.config.grid == (6, 8)
    assert found.converted is not None
    assert {mapped.key for mapped in found.converted.keys} == state_dict().keys()
    main(["--inspect", str(weights), "--num_heads", "2", "--image_size", "48x64"])
    assert capsys.readouterr().out == f"{found}\n"
    unknown = inspect(weights)
    assert (unknown.config, unknown.converted) == (None, None)
    assert "pass --model or --num_heads" in str(unknown.problem)
    save_file({"conv1.weight": np.zeros((3, 3), np.float32)}, tmp_path / "other.safetensors")
    other = inspect(tmp_path / "other.safetensors")
    assert other.source is None
    assert str(other).endswith("conv1.weight  3x3")
    assert "unknown layout" in str(other.problem)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": "224"}, "image_size is '224'"),
        ({"image_size": (32, 32, 3)}, "image_size is (32, 32, 3)"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_classes": -1}, "num_classes is -1: it must be a whole number, 0 or more, or none"),
        ({"gelu": "relu"}, "gelu is 'relu': choose one of exact"),
        ({"class_names": ["ant"]}, "class_names has 1 different names"),
        ({"sha256": "0123"}, "'0123' is not a sha256"),
        ({"model": "vit_smal_patch16_224"}, "the nearest names are vit_small_patch16_224"),
        ({"pos_embed": "spline", "image_size": 64}, "unknown resampling 'spline'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, says, weights, tmp_path):
    chosen: dict[str, Any] = {"num_heads": 2, "preprocess": "timm/deit"} | options
    with pytest.raises(fc.InputError) as raised:
        convert(weights, tmp_path / "out", **chosen)
    assert says in str(raised.value)
    assert str(raised.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_unknown_options_are_refused(weights, tmp_path):
    wrong: dict[str, Any] = {"image_sise": 224}
    with pytest.raises(TypeError, match="image_sise"):
        convert(weights, tmp_path / "out", **wrong)
    with pytest.raises(TypeError, match="image_sise"):
        inspect(weights, **wrong)
