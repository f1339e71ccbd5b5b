import functools
import json
import os
import resource
from dataclasses import replace

import jax
import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.convert import pytorch
from fcvit_jax.convert.sidecar import read_sidecar
from fcvit_jax.convert.translation import assemble, translate
from fcvit_jax.data.preprocess import PRESETS, Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import Rotary, ViTConfig
from states import CONFIG, in_layout

SIZE = ((32, 32), 8, 128, 2, 2, 256, 5)
PLAIN = ViTConfig(*SIZE)


def params(config):
    numbers = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: numbers.standard_normal(leaf.shape, np.float32), abstract_params(config))


def test_safetensors_are_written_as_by_their_library(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    arrays = {
        "b": np.ones((2, 3), np.float32).T,
        "a": np.arange(2, dtype=np.float32),
        "empty": np.ones((0, 3), np.float32),
        "ü": np.ones(3, np.float32),
    }
    pytorch.write_safetensors(tmp_path / "ours", arrays)
    tensors = {name: torch.from_numpy(np.array(array, order="C")) for name, array in arrays.items()}
    assert (tmp_path / "ours").stat().st_mode & 0o777 == 0o644
    library.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pool": "avg"},
        {"pool": "avg", "fc_norm": True},
        {"pool": "avg", "class_token": False},
        {"fc_norm": True},
        {"dist_token": True, "pool": "dist_avg"},
        {"layer_scale": 1e-5, "no_embed_class": True, "num_registers": 3},
        {"pre_norm": True, "patch_bias": False, "gelu": "quick", "norm_eps": 1e-5},
        {"qkv_bias": False, "num_classes": 0},
        {"image_size": (32, 48), "gelu": "tanh"},
    ],
    ids=str,
)
def test_the_call_that_is_printed_builds_the_module_in_timm(changes, tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("safetensors.torch")
    config = ViTConfig(**{**dict(zip(ViTConfig.__dataclass_fields__, SIZE, strict=False)), **changes})
    told = pytorch.write_timm(tmp_path / "out.safetensors", config, params(config))
    program = told.removeprefix("in PyTorch: ")
    names = {"timm": timm, "torch": torch, "functools": functools, "safetensors": safetensors}
    monkeypatch.chdir(tmp_path)
    exec(program, names)
    model = names["model"]
    images = torch.zeros(1, 3, *config.image_size)
    assert model.eval()(images).shape[-1] == (config.num_classes or config.embed_dim)


@pytest.mark.parametrize("name", PRESETS)
def test_the_image_processor_gives_the_same_pixels(name, tmp_path):
    pixels = PRESETS[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pytorch.to_image_processor(pixels)))
    read = read_sidecar(tmp_path / "model.safetensors").preprocess
    assert read is not None
    assert read.resize_size == pixels.resize_size
    assert replace(read, crop_pct=pixels.crop_pct) == pixels


def test_pixels_that_no_processor_can_express_are_reported(tmp_path):
    for pixels in (Preprocess(crop_mode="border", image_size=(32, 32)), Preprocess(image_size=(32, 48))):
        assert pytorch.to_image_processor(pixels) is None
    told = pytorch.write_huggingface(
        tmp_path / "out", PLAIN, params(PLAIN), Preprocess((32, 32), crop_mode="border"), None
    )
    assert "no preprocessor_config.json: it cannot say bicubic" in told
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    told = pytorch.write_huggingface(tmp_path / "bare", PLAIN, params(PLAIN), None, None)
    assert "pass --preprocess for one" in told


def test_weights_alone_may_be_written_for_transformers(tmp_path):
    told = pytorch.write_huggingface(tmp_path / "vit.safetensors", PLAIN, params(PLAIN), None, None)
    assert told == "the weights of transformers.ViTForImageClassification, without its config.json"
    assert os.listdir(tmp_path) == ["vit.safetensors"]


def test_class_names_go_along(tmp_path):
    names = ("ant", "bee", "cat", "dog", "elk")
    pytorch.write_huggingface(tmp_path / "out", PLAIN, params(PLAIN), Preprocess((32, 32)), names)
    assert read_sidecar(tmp_path / "out" / "model.safetensors").class_names == names


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"pool": "avg"}, "average pooling"),
        ({"pre_norm": True}, "transformers.CLIPVisionModelWithProjection has no patch_bias True"),
        (
            {"rotary": Rotary(x_first=True), "learned_positions": False, "num_classes": 0},
            "DINOv3ViTModel has no rotary",
        ),
        (
            {"class_token": False, "pool": "map", "map_heads": 1, "num_classes": 0},
            "SiglipVisionModel has no map_heads 1",
        ),
        ({"key_bias": False}, "biases of queries and values alone"),
        ({"gated": True}, "MLP that is gated"),
        ({"patch_bias": False}, "without a bias"),
        ({"representation_size": 8}, "layer in front of the head"),
        ({"num_registers": 2, "no_embed_class": True}, "registers without LayerScale"),
        ({"num_registers": 2, "layer_scale": 1.0}, "positions for registers"),
        ({"pool": "token_avg"}, "without LayerScale"),
        ({"layer_scale": 1.0, "mlp_dim": 300}, "MLP 2.34375 times as wide"),
        ({"image_size": (32, 48)}, "not square"),
    ],
)
def test_models_that_transformers_cannot_hold_are_refused(changes, lacks, tmp_path):
    config = ViTConfig(**{**dict(zip(ViTConfig.__dataclass_fields__, SIZE, strict=False)), **changes})
    with pytest.raises(InputError, match=lacks):
        pytorch.write_huggingface(tmp_path / "out", config, params(config), None, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"representation_size": 8},
        {"pool": "token_avg"},
        {"patch_bias": False},
        {"pre_norm": True},
        {"dist_token": True},
    ],
    ids=str,
)
def test_models_that_timm_cannot_hold_are_refused(changes, tmp_path):
    config = ViTConfig(*SIZE, **changes)
    with pytest.raises(InputError, match="it cannot hold this model"):
        pytorch.write_timm(tmp_path / "out.safetensors", config, params(config))
    assert os.listdir(tmp_path) == []


def test_only_its_own_files_are_replaced(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    folder.mkdir()
    (folder / "thesis.txt").write_text("")
    file.write_bytes(b"")
    for out, to in ((folder, "hf"), (file, "timm"), (file, "hf")):
        with pytest.raises(InputError, match="exists already"):
            pytorch.check_output(str(out), to, overwrite=False)
    with pytest.raises(InputError, match=r"it contains other files \(thesis.txt\)"):
        pytorch.check_output(str(folder), "hf", overwrite=True)
    assert pytorch.check_output(str(file), "timm", overwrite=True) == file
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="thesis"):
        pytorch.check_output(str(folder), "hf", overwrite=True)
    (folder / "thesis.txt").unlink()
    assert pytorch.check_output(str(folder), "hf", overwrite=True) == folder


def test_a_file_that_does_not_fit_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(InputError, match=r"out.safetensors cannot be written \(.*File too large.*\): make room"):
            pytorch.write_timm(tmp_path / "out.safetensors", CONFIG, params(CONFIG))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_google_files_come_out_in_the_keys_of_timm():
    arrays = in_layout("Google vision_transformer", PLAIN)
    there = pytorch._invert(pytorch.TIMM, assemble(translate(arrays), PLAIN, (4, 4)).params, skip="fc_norm.")
    query = arrays["Transformer/encoderblock_1/MultiHeadDotProductAttention_1/query/kernel"]
    np.testing.assert_array_equal(there["blocks.1.attn.qkv.weight"][:128], query.reshape(128, 128).T)
