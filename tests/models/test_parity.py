"""Logits against timm, and against the independent PyTorch program of the merging in `reference.py`."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("safetensors")
import reference  # noqa: E402
from fcvit_jax.convert.geometry import infer_config  # noqa: E402
from fcvit_jax.convert.translation import assemble, translate  # noqa: E402
from fcvit_jax.data.preprocess import decode, preset  # noqa: E402
from fcvit_jax.models.schedule import Global, Local, MergeSchedule  # noqa: E402
from fcvit_jax.models.vit import ViT  # noqa: E402

SCHEDULES = {
    "tome_r8": [("global", 12, 8)],
    "s2dfe_r16": [("dense", 2), ("global", 10, 16)],
    "s2winc7_r16": [("dense", 1), ("local", 6, 16, (2, 2)), ("global", 5, 16)],
}


def convert(trained: Any, **asked) -> tuple[Any, Any]:
    arrays = {key: value.numpy() for key, value in trained.state_dict().items()}
    translation = translate(arrays)
    config, grid = infer_config(translation, {}, asked)
    return config, assemble(translation, config, grid).params


def run(config, params, images, schedule=None, dtype=jnp.float32):
    apply = jax.jit(ViT(config, schedule, dtype=dtype).apply)
    return apply({"params": params}, jnp.asarray(images.permute(0, 2, 3, 1).numpy()))


@pytest.fixture(scope="module")
def clothing():
    from conftest import shared

    model = reference.load_clothing(shared("weights/clothing_vits14.safetensors"))
    folder = shared("data/clothing/test")
    preprocess = preset("deit/official", (224, 224))
    paths = [sorted(place.iterdir())[0] for place in sorted(folder.iterdir())][:6]
    pixels = np.stack([preprocess(decode(path.read_bytes(), path.name)) for path in paths])
    images = torch.from_numpy(np.array(preprocess.normalize(pixels))).permute(0, 3, 1, 2)
    return model, *convert(model), images


def test_dense_logits_on_real_photos_equal_timm(clothing):
    model, config, params, images = clothing
    with torch.no_grad():
        expected = model(images).numpy()
    np.testing.assert_allclose(run(config, params, images)[0], expected, atol=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_merged_logits_on_real_photos_equal_the_reference(clothing, name):
    model, config, params, images = clothing
    expected = reference.merged_forward(deepcopy(model).double(), images, SCHEDULES[name])
    logits, out = run(config, params, images, MergeSchedule.parse(name, 12))
    assert [layer["tokens"].shape[1] for layer in out["layers"]] == expected["tokens"]
    # If two proposals are equal except for rounding, float32 may take either: only then may logits differ.
    clear = expected["margin"].numpy() > 2e-7
    assert clear.sum() >= len(images) - 1
    np.testing.assert_array_equal(out["source"][clear], expected["source"].numpy()[clear])
    np.testing.assert_array_equal(out["size"][clear], expected["sizes"].numpy()[clear])
    np.testing.assert_allclose(logits[clear], expected["logits"].numpy()[clear], atol=1e-4)
    np.testing.assert_allclose(logits, expected["logits"].numpy(), atol=0.05)


@pytest.mark.parametrize("trap", [{"swap_qk": True}, {"metric": "value"}, {"prop_attn": False}])
def test_the_comparison_can_fail(clothing, trap):
    model, config, params, images = clothing
    wrong = reference.merged_forward(model, images, SCHEDULES["tome_r8"], **trap)["logits"].numpy()
    logits = run(config, params, images, MergeSchedule.parse("tome_r8", 12))[0]
    assert np.abs(logits - wrong).max(axis=1).min() > 5e-3  # every photo is told apart


def test_proportional_attention_can_be_left_out(clothing):
    model, config, params, images = clothing
    expected = reference.merged_forward(model, images, SCHEDULES["tome_r8"], prop_attn=False)["logits"].numpy()
    config = replace(config, proportional_attention=False)
    difference = np.abs(run(config, params, images, MergeSchedule.parse("tome_r8", 12))[0] - expected).max(axis=1)
    assert (difference < 1e-4).sum() >= len(images) - 1


SMALL: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 11,
}
# name -> a model to build; registers, LayerScale, pre-norm, pooling and biases in the published combinations.
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
    "average pool": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no qkv bias": {"qkv_bias": False},
    "backbone": {"num_classes": 0},
    "clip": {"pre_norm": True, "norm_layer": "layernorm"},
    "quick": {"act_layer": "quick_gelu"},
    "tanh": {"act_layer": "gelu_tanh"},
}


def build(name):
    """Build a small timm model with random weights as large as trained ones."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    distilled = name == "distilled"
    model = VisionTransformerDistilled(**SMALL) if distilled else VisionTransformer(**(SMALL | VARIANTS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", [*VARIANTS, "distilled"])
@pytest.mark.parametrize(
    "stages", ["dense", "local:2:r12:w2x2,global:2:r7", "local:1:r16:w4x4,local:2:r8:w2x2,global:1:r5"]
)
def test_small_models_equal_timm_and_the_reference(name, stages):
    model = build(name)
    asked = {"num_heads": 3, "gelu": name if name in ("quick", "tanh") else "exact"}
    config, params = convert(model, **asked, norm_eps=model.norm_pre.eps if name == "clip" else 1e-6)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    schedule = MergeSchedule.parse(stages, 4)
    if stages == "dense":
        with torch.no_grad():
            expected = model(images).numpy()
    else:
        as_tuples = [
            ("global", stage.layers, stage.r)
            if isinstance(stage, Global)
            else ("local", stage.layers, stage.r, stage.windows)
            for stage in schedule.stages
            if isinstance(stage, Global | Local)
        ]
        expected = reference.merged_forward(model, images, as_tuples)["logits"].numpy()
    np.testing.assert_allclose(run(config, params, images, schedule)[0], expected, atol=1e-4, rtol=1e-4)
