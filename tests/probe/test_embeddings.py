"""Heads of class embeddings, against the logits of transformers' models of two towers, small and random."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.probe.embeddings import CLIP_SCALE, read_embeddings

NAMES = ("shirt", "hat", "shoes")
VALUES = np.random.default_rng(0).normal(0, 1, (3, 8)).astype(np.float32)


def file(folder, **changes):
    """Write an .npz of three classes; None leaves an array out."""
    arrays = {"embeddings": VALUES, "names": np.array(NAMES), **changes}
    np.savez(folder / "classes.npz", **{name: array for name, array in arrays.items() if array is not None})
    return folder / "classes.npz"


def two_towers(kind, folder):
    """Make a model, its checkpoint, and the class embeddings from its text tower, as in docs/probing.md."""
    real = pytest.importorskip("real_models")
    import torch
    import transformers

    vision = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16
    )
    text = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=8,
    )  # fmt: skip
    towers: dict[str, Any] = dict(vision_config=vision, text_config=text)
    if kind == "CLIP":
        config = transformers.CLIPConfig(**towers, projection_dim=24)
    else:
        config = transformers.SiglipConfig(**towers)
    model = real.randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder / "source")
    real.convert(folder / "source", folder / "tower", "--preprocess", "timm/augreg")
    tokens = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 2], [10, 11, 12, 2]])
    with torch.no_grad():
        found = model.get_text_features(input_ids=tokens)
    embeddings = getattr(found, "pooler_output", found).numpy()
    arrays = {"embeddings": embeddings, "names": np.array(NAMES), "logit_scale": model.logit_scale.detach().numpy()}
    if kind == "Siglip":
        arrays["logit_bias"] = model.logit_bias.detach().numpy()
    np.savez(folder / "classes.npz", **arrays)
    run = partial(model, input_ids=tokens)
    return folder / "classes.npz", lambda images: run(pixel_values=images).logits_per_image


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_logits_are_those_of_transformers(kind, tmp_path):
    classes, logits = two_towers(kind, tmp_path)
    import real_models as real

    found = fc.zero_shot(tmp_path / "tower", classes, tmp_path / "out")
    assert found.class_names == NAMES
    assert not found.config.headless
    images = real.load_photos()((64, 64))
    expected = real.theirs(logits, images)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(real.ours(found, images), expected, atol=real.TOLERANCE)
    # With other classes the head is replaced, and the projection stays.
    again = fc.zero_shot(found, classes, tmp_path / "again")
    np.testing.assert_allclose(real.ours(again, images), expected, atol=real.TOLERANCE)


def test_both_kinds_of_file_hold_the_same(tmp_path):
    from safetensors.numpy import save_file

    there = read_embeddings(file(tmp_path, logit_scale=np.float32(2.0), logit_bias=np.array([-3.0], np.float32)))
    tensors = {
        "embeddings": VALUES,
        "logit_scale": np.array([2.0], np.float32),
        "logit_bias": np.array([-3.0], np.float32),
    }
    save_file(tensors, tmp_path / "classes.safetensors", metadata={"names": json.dumps(NAMES)})
    other = read_embeddings(tmp_path / "classes.safetensors")
    np.testing.assert_array_equal(there.embeddings, other.embeddings)
    assert there[1:] == other[1:] == (NAMES, 2.0, -3.0)
    np.testing.assert_allclose(np.linalg.norm(there.embeddings, axis=1), 1.0, atol=1e-6)
    assert read_embeddings(file(tmp_path))[2:] == (CLIP_SCALE, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": None}, r"classes.npz: the file needs embeddings \[classes, width\] and names"),
        ({"embeddings": VALUES[0]}, r"the file needs embeddings \[classes, width\]"),
        ({"names": np.array(["a", "b", "b"])}, r"3 embeddings have 2 different names: give each class its own"),
        ({"names": np.array(["a"]), "embeddings": VALUES[:1]}, r"there is one class, 'a': a head needs two or more"),
        ({"embeddings": VALUES * [[1], [0], [1]]}, r"the embedding of 'hat' is zero or not finite"),
        ({"logit_scale": np.float32(100)}, r"logit_scale is 100: give its logarithm, .* \(np.log\(100\)\)"),
        ({"logit_bias": np.zeros(3)}, r"logit_bias has the shape \(3,\): give one finite number"),
        ({"names": np.array(NAMES, object)}, r"write the names as text, not as objects"),
    ],
)
def test_bad_files_are_one_line(changes, message, tmp_path):
    with pytest.raises(fc.InputError, match=message) as caught:
        read_embeddings(file(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "classes.csv").write_text("shirt,1,2")
    for name, message in (("broken.npz", "cannot be read"), ("broken.safetensors", "cannot be read"),
                          ("classes.csv", "neither .npz nor .safetensors"), ("gone.npz", "No such file")):  # fmt: skip
        with pytest.raises(fc.InputError, match=message):
            read_embeddings(tmp_path / name)


def test_widths_that_do_not_match(tmp_path):
    with pytest.raises(fc.InputError, match=r"the embeddings are 8 wide, the image's are 64: take both towers of one"):
        fc.zero_shot("packaged:digits", file(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
