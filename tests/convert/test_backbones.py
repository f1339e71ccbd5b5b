"""Backbones beyond the plain ViT through the command line, against timm and transformers.

Each case writes a small random model as its users find it, and says what the real library makes of photos: features of
every token, and what comes of the pooling. Files in Meta's, OpenAI's and Google's keys are timm's, renamed by the
tables here.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
import timm.models  # noqa: E402
from timm.models import eva, vision_transformer  # noqa: E402

import fcvit_jax as fc  # noqa: E402
from real_models import (  # noqa: E402
    TOLERANCE,
    State,
    convert,
    load,
    load_photos,
    random,
    randomise,
    rename,
    save,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL: dict[str, Any] = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4)
SIZES = ((64, 64), (96, 96), (48, 80))
PIXELS = ("--preprocess", "timm/augreg")


class Backbone(NamedTuple):
    """SRC, what its user has to say of it, and a function of images: features of all tokens, normed, and logits."""

    source: Path
    flags: tuple[str, ...]
    run: Callable[[Any], tuple[Any, Any]]


Case = Callable[[Path, tuple[int, int]], Backbone]
CASES: dict[str, Case] = {}


@pytest.fixture(scope="module")
def photos():
    return load_photos()


@partial(jax.jit, static_argnums=0)
def apply(config, params, images):
    logits, out = fc.ViT(config).apply({"params": params}, images)
    return out["tokens"], logits


def ours(checkpoint, images):
    images = images.permute(0, 2, 3, 1).numpy()
    return [np.asarray(array) for array in apply(checkpoint.config, checkpoint.params, images)]


def theirs(run, images):
    with torch.no_grad():
        return [array.numpy() for array in run(images)]


def resized(size):
    return () if size == SIZES[0] else ("--image_size", f"{size[0]}x{size[1]}")


# ---- timm


def run_timm(model):
    def run(images):
        features = model.forward_features(images)
        return features, model.forward_head(features)

    return run


def of_timm(folder, size, name, suffix=None, flags=(), **changes):
    """A model of timm by its name: saved for the hub, or as a state dict alone, whose user names the model."""
    changes = SMALL | changes
    model = randomise(timm.create_model(name, **changes))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    source = folder / "model.safetensors"
    if suffix:
        (folder / "config.json").unlink()
        source = save(folder / f"weights{suffix}", model.state_dict())
    if size != SIZES[0]:
        filtering: Any = eva if isinstance(model, eva.Eva) else vision_transformer
        other = timm.create_model(name, **(changes | dict(img_size=size)))
        model = load(other, filtering.checkpoint_filter_fn(model.state_dict(), other))
    return Backbone(source, (*PIXELS, *flags, *resized(size)), run_timm(model))


CASES |= {
    "DINOv3, timm": partial(of_timm, name="vit_small_patch16_dinov3"),
    "DINOv3, timm, biases": partial(of_timm, name="vit_small_patch16_dinov3_qkvb", num_classes=5),
    "DINOv3, timm, gated": partial(of_timm, name="vit_small_plus_patch16_dinov3_qkvb"),
    "DINOv3, timm, class token": partial(of_timm, name="vit_small_patch16_dinov3", global_pool="token"),
}


# ---- DINOv3


def dinov3(folder, size, gated=False, rounded=True):
    """Meta's keys: a bias with its mask instead of two, `storage_tokens`, periods in bfloat16."""
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    model = randomise(timm.create_model(name, **SMALL, dynamic_img_size=True, global_pool="token"))
    periods = 100 ** (torch.arange(4) / 4)
    state: State = {"mask_token": random(1, 64), "rope_embed.periods": periods.bfloat16()}
    for key, value in model.state_dict().items():
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            block = key.removesuffix("q_bias")
            bias = torch.cat([value, random(64), model.state_dict()[f"{block}v_bias"]])
            state |= {f"{block}qkv.bias": bias, f"{block}qkv.bias_mask": torch.ones(192)}
            state[f"{block}qkv.bias_mask"][64:128] = 0
        else:
            state[key] = value
    table = (("reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    gates = ((r"fc1_g", "w1"), (r"fc1_x", "w2"), (r"mlp\.fc2", "mlp.w3")) if gated else ()
    source = save(folder / "dinov3_vits16.pth", rename(state, *table, *gates))
    if rounded:
        model.rope.periods.copy_(periods.bfloat16())
        model.rope.feat_shape, model.rope.pos_embed_cached = None, None  # or it would keep what it has computed
    return Backbone(source, (*PIXELS, "--image_size", f"{size[0]}x{size[1]}"), run_timm(model))


def run_hf(model, norm=None):
    """norm: the last one, if the model gives tokens out before it."""

    def run(images):
        out = model(images)
        return norm(out.last_hidden_state) if norm else out.last_hidden_state, out.pooler_output

    return run


HF_SMALL: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, intermediate_size=128
)


def hf_dinov3(folder, size, **changes):
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF_SMALL, num_register_tokens=4, **changes))
    randomise(model).save_pretrained(folder)
    return Backbone(folder, (*PIXELS, *resized(size)), run_hf(model))


CASES |= {
    "DINOv3": dinov3,
    "DINOv3, gated": partial(dinov3, gated=True),
    "DINOv3, Hugging Face": hf_dinov3,
    "DINOv3, Hugging Face, gated": partial(hf_dinov3, use_gated_mlp=True, hidden_act="silu"),
    "DINOv3, Hugging Face, keys biased": partial(hf_dinov3, key_bias=True, rope_theta=50.0),
}


# ---- the tests


@pytest.mark.parametrize("size", SIZES, ids=["as trained", "larger", "not square"])
@pytest.mark.parametrize("name", CASES)
def test_features_and_logits_are_those_of_the_real_library(name, size, tmp_path, photos):
    backbone, images = CASES[name](tmp_path, size), photos(size)
    expected = theirs(backbone.run, images)
    checkpoint = convert(backbone.source, tmp_path / "out", *backbone.flags)
    for found, wanted in zip(ours(checkpoint, images), expected, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
