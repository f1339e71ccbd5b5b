"""Backbones beyond the plain ViT through the command line, against timm and transformers.

Each case computes with the real library the features of every token and the pooled output of photos.
"""

import functools
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
import safetensors.torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fcvit_jax as fc  # noqa: E402
from backbone_files import CASES, SIZES, SMALL, create_model, hf_clip, hf_dinov3, run_timm  # noqa: E402
from fcvit_jax.errors import InputError  # noqa: E402
from real_models import TOLERANCE, convert, load_photos, random, save  # noqa: E402


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


@pytest.mark.parametrize("size", SIZES, ids=["as trained", "larger", "not square"])
@pytest.mark.parametrize("name", CASES)
def test_features_and_logits_equal_the_real_library(name, size, tmp_path, photos):
    backbone, images = CASES[name](tmp_path, size), photos(size)
    expected = theirs(backbone.run, images)
    checkpoint = convert(backbone.source, tmp_path / "out", *backbone.flags)
    for found, wanted in zip(ours(checkpoint, images), expected, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=TOLERANCE)  # random heads give logits up to 17


# ---- and back


@pytest.mark.parametrize(
    "name",
    [
        "DINOv3, timm, biases",
        "DINOv3, Hugging Face, gated",
        "SigLIP, Hugging Face",
        "CLIP, OpenAI",
        "DINOv2 giant, registers",
        "EVA-02, timm, packed",
        "EVA-02, timm, apart",
        "EVA-02 CLIP, timm",
        "PE",
    ],
)
def test_timm_loads_the_written_weights(name, tmp_path, photos, monkeypatch):
    backbone, images = CASES[name](tmp_path, SIZES[0]), photos(SIZES[0])
    expected = theirs(backbone.run, images)
    convert(backbone.source, tmp_path / "out", *backbone.flags)
    told = []
    fc.convert(tmp_path / "out", tmp_path / "back.safetensors", to="timm", report=told.append)
    names: dict[str, Any] = {"timm": timm, "torch": torch, "functools": functools, "safetensors": safetensors}
    monkeypatch.chdir(tmp_path)
    exec(told[-1].removeprefix("in PyTorch: "), names)
    for found, wanted in zip(theirs(run_timm(names["model"].eval()), images), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("DINOv3, timm, class token", "DINOv3ViTModel"),
        ("DINOv3, Hugging Face, gated", "DINOv3ViTModel"),
        ("DINOv3, Hugging Face, keys biased", "DINOv3ViTModel"),
        ("SigLIP, timm, tanh", "SiglipVisionModel"),
        ("CLIP, OpenAI", "CLIPVisionModelWithProjection"),
        ("CLIP, Hugging Face", "CLIPVisionModel"),
        ("DINOv2 giant, Hugging Face", "Dinov2Model"),
    ],
)
def test_transformers_loads_the_written_weights(name, kind, tmp_path, photos):
    backbone, images = CASES[name](tmp_path, SIZES[0]), photos(SIZES[0])
    _, expected = theirs(backbone.run, images)
    convert(backbone.source, tmp_path / "out", *backbone.flags)
    fc.convert(tmp_path / "out", tmp_path / "hf", to="hf")
    model, info = getattr(transformers, kind).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        out = model.eval()(images)
    found = out.image_embeds if kind.endswith("Projection") else out.pooler_output
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=TOLERANCE)


# ---- what would be wrong


def test_a_wrong_reading_is_told_apart(photos, tmp_path):
    """Another layout of the rotation, the axes exchanged, the gate exchanged, rounded periods ignored."""
    backbone, images = CASES["DINOv3, gated"](tmp_path, SIZES[0]), photos(SIZES[0])
    checkpoint = convert(backbone.source, tmp_path / "out", *backbone.flags)
    config, expected = checkpoint.config, theirs(backbone.run, images)[1]
    rotary, params = config.rotary, checkpoint.params
    assert rotary is not None
    exchanged = jax.tree.map(lambda leaf: leaf, params)
    for block in ("blocks_0", "blocks_1"):
        exchanged[block]["mlp"]["fc1"] = {
            name: np.concatenate(np.split(np.asarray(leaf), 2, -1)[::-1], -1)
            for name, leaf in params[block]["mlp"]["fc1"].items()
        }
    for wrong, weights in (
        (replace(config, rotary=replace(rotary, rotation="interleaved")), params),
        (replace(config, rotary=replace(rotary, x_first=True)), params),
        (replace(config, rotary=replace(rotary, periods=None)), params),
        (config, exchanged),
    ):
        logits = np.asarray(apply(wrong, weights, images.permute(0, 2, 3, 1).numpy())[1])
        assert np.abs(logits - expected).max() > 3 * TOLERANCE


def test_the_key_bias_counts(tmp_path, photos):
    backbone, images = CASES["DINOv3, Hugging Face, keys biased"](tmp_path, SIZES[0]), photos(SIZES[0])
    checkpoint = convert(backbone.source, tmp_path / "out", *backbone.flags)
    params = jax.tree.map(np.array, checkpoint.params)
    for block in ("blocks_0", "blocks_1"):
        params[block]["attn"]["qkv"]["bias"][64:128] = 0
    logits = np.asarray(apply(checkpoint.config, params, images.permute(0, 2, 3, 1).numpy())[1])
    assert np.abs(logits - theirs(backbone.run, images)[1]).max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "eva02_tiny_patch14_224",
        "eva02_base_patch14_224",
        "eva02_base_patch16_clip_224",
        "vit_pe_core_base_patch16_224",
    ],
)
def test_a_file_of_rotary_positions_alone_requires_the_name(name, tmp_path):
    model = create_model(name, **(SMALL | dict(embed_dim=128)))
    source = save(tmp_path / "weights.safetensors", model.state_dict())
    with pytest.raises(InputError, match=r"positions are rotary.*pass --model"):
        fc.convert(source, tmp_path / "out", preprocess="timm/clip", num_heads=4, gelu="exact", norm_eps=1e-5)


def test_a_classifier_beside_a_backbone_without_one_is_found_and_one_beside_clip_is_refused(tmp_path, photos):
    images, head = photos(SIZES[0]), {"classifier.weight": random(7, 64), "classifier.bias": random(7)}
    backbone = hf_dinov3(tmp_path / "dinov3", SIZES[0])
    save(backbone.source / "model.safetensors", load_file(backbone.source / "model.safetensors") | head)
    checkpoint = convert(backbone.source, tmp_path / "out", *backbone.flags)
    expected = theirs(backbone.run, images)[1] @ head["classifier.weight"].numpy().T + head["classifier.bias"].numpy()
    np.testing.assert_allclose(ours(checkpoint, images)[1], expected, rtol=0, atol=TOLERANCE)
    backbone = hf_clip(tmp_path / "clip", SIZES[0])  # whose classifier takes the mean of patches without a norm
    save(backbone.source / "model.safetensors", load_file(backbone.source / "model.safetensors") | head)
    with pytest.raises(InputError, match=r"'classifier\.\w+' is not a key of the Hugging Face CLIP layout"):
        fc.convert(backbone.source, tmp_path / "clip_out", preprocess="timm/clip")


def test_a_file_that_lacks_a_key_bias_is_incomplete(tmp_path):
    incomplete = hf_dinov3(tmp_path / "hf", SIZES[0], key_bias=True)
    state = load_file(incomplete.source / "model.safetensors")
    del state["layer.1.attention.k_proj.bias"]
    save(incomplete.source / "model.safetensors", state)
    with pytest.raises(InputError, match="nothing in the file fills blocks_1/attn/qkv/bias:k"):
        fc.convert(incomplete.source, tmp_path / "out", preprocess="timm/dinov2")
