"""The correction of a head, against scikit-learn's ridge and the model itself."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import Ridge

import fcvit_jax as fc
from fcvit_jax.data.preprocess import preset
from fcvit_jax.flatness.measurement import measure
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.search.correction import (
    STRENGTHS,
    Logits,
    correct_head,
    divergences,
    fit_map,
    fold_map,
    ridge_maps,
)

CONFIG = fc.ViTConfig((8, 8), 4, 16, 1, 2, 32, num_classes=5)
HEADS = {
    "one head": CONFIG,
    "no bias": replace(CONFIG, head_bias=False),
    "two heads": replace(CONFIG, dist_token=True, pool="dist_avg"),
    "a layer before the head": replace(CONFIG, representation_size=12),
}


def logits(images, classes=5, seed=0, noise=0.1):
    """Draw dense and merged logits: linear maps of each other, plus noise."""
    generator = np.random.default_rng(seed)
    merged = 3 * generator.normal(size=(images, classes))
    moved = merged @ (np.eye(classes) + 0.2 * generator.normal(size=(classes, classes))) + 0.3
    return moved + noise * generator.normal(size=moved.shape), merged


def checkpoint(config, seed=0):
    images = jax.random.normal(jax.random.key(seed), (3, *config.image_size, 3))
    params = fc.ViT(config).init(jax.random.key(seed + 1), images)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 2), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    preprocess = preset("timm/augreg", config.image_size)
    return fc.Checkpoint("nowhere", config, jax.tree.unflatten(tree, leaves), preprocess, {}), images  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("images", [40, 4])
def test_the_ridge_is_scikit_learns(images):
    dense, merged = logits(images)
    unit = merged.var(axis=0).sum() * images / 5
    for strength, mapped in zip((0.1, 10.0), ridge_maps(dense, merged, (0.1, 10.0)), strict=True):
        expected = Ridge(alpha=strength * unit).fit(merged, dense - merged)
        np.testing.assert_allclose(mapped(merged), merged + expected.predict(merged), atol=1e-10)
    (mean,) = ridge_maps(dense, merged, [np.inf])
    np.testing.assert_allclose(mean(merged), merged + (dense - merged).mean(axis=0), atol=1e-12)


def test_logits_that_do_not_differ_are_not_changed():
    merged = np.ones((6, 3))
    np.testing.assert_array_equal(ridge_maps(merged, merged, [1.0])[0](merged), merged)


def test_the_divergence_by_hand():
    dense, merged = logits(7)
    p, q = softmax(dense, axis=1), softmax(merged, axis=1)
    np.testing.assert_allclose(divergences(dense, merged), (p * np.log(p / q)).sum(axis=1), rtol=1e-9)


def test_a_linear_map_is_found_and_chance_is_not_fitted():
    dense, merged = logits(300)
    mapped, strength = fit_map(dense[:200], merged[:200])
    assert strength == STRENGTHS[0]
    before = divergences(dense[200:], merged[200:]).mean()
    assert divergences(dense[200:], mapped(merged[200:])).mean() < 0.1 * before
    generator = np.random.default_rng(1)
    merged = generator.normal(size=(60, 5))
    assert fit_map(merged + generator.normal(size=merged.shape), merged)[1] >= 1


@pytest.mark.parametrize("name", HEADS)
def test_the_head_computes_the_mapped_logits(name):
    opened, images = checkpoint(HEADS[name])
    before = np.asarray(fc.ViT(opened.config).apply({"params": opened.params}, images)[0], np.float64)  # pyright: ignore
    mapped = ridge_maps(*logits(30), [0.3])[0]
    params, config = fold_map(opened, mapped)
    after = fc.ViT(config).apply({"params": params}, images)[0]  # pyright: ignore[reportIndexIssue]
    np.testing.assert_allclose(after, mapped(before), atol=2e-5)
    assert np.abs(mapped(before) - before).max() > 0.1


def test_a_correction_that_is_not_better_is_not_written(tmp_path):
    opened, _ = checkpoint(CONFIG)
    generator = np.random.default_rng(0)
    merged = generator.normal(size=(128, 5))
    noise = Logits(merged + generator.normal(size=merged.shape), merged, 64)
    found = correct_head(opened, "global:1:r1", "0.6", noise, tmp_path / "out", seed=0)
    assert (found.checkpoint, found.judgement.better) == (None, False)
    few = Logits(*logits(40), 20)
    assert (
        "20 images are too few" in correct_head(opened, "global:1:r1", "0.6", few, tmp_path / "out", 0).judgement.reason
    )
    assert not (tmp_path / "out").exists()


def test_a_corrected_checkpoint_is_closer_on_other_images(tmp_path):
    small = {"limit": 256, "candidates": 1, "rules": "nearest"}
    report = fc.search("packaged:digits", "digits:train", 0.5, correct=tmp_path / "out", **small)
    assert report.correction
    assert report.correction.judgement.high < 1
    assert "corrected head: better: 0." in str(report)
    common = {"save_logits": True, "throughput_blocks": 0}
    plain = ["dense", report.recommended["0.5"]]
    rows = fc.evaluate("packaged:digits", "digits:test", plain, workdir=tmp_path / "a", **common)
    (row,) = fc.evaluate(tmp_path / "out", "digits:test", "recommended", workdir=tmp_path / "b", **common)
    assert row["stages"] == rows[1]["stages"] == report.correction.schedule
    read = [np.load(path)["logits"] for path in sorted(tmp_path.glob("[ab]/logits_*.npz"))]
    dense, before, after = read
    assert divergences(dense, after).mean() < 0.9 * divergences(dense, before).mean()


def test_a_corrected_checkpoint_is_refused_under_another_schedule(tmp_path):
    opened, out = fc.load_checkpoint("packaged:digits"), tmp_path / "out"
    form = "global:6:r9@nearest"
    found = correct_head(opened, form, "0.6", Logits(*logits(128, classes=10), 64), out, seed=0)
    assert found.checkpoint == str(out)
    copy = fc.load_checkpoint(out)
    assert copy.recommended == {"0.6": form}
    copy.check_correction([MergeSchedule.parse("recommended", 6, copy.recommended)])
    message = (
        f"out: its head is corrected for the schedule {form}, and wrong under dense:6: use the schedule `recommended`"
    )
    refused = [
        lambda: fc.evaluate(out, "digits:test", "recommended,dense"),
        lambda: fc.export(out, "dense", 1, tmp_path / "programs"),
        lambda: fc.convert(out, tmp_path / "again"),
        lambda: fc.search(out, "digits:train", 0.5),
        lambda: measure(out, "digits:train"),
    ]
    for call in refused:
        with pytest.raises(fc.InputError) as error:
            call()
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    ("budget", "config", "message"),
    [
        ("0.5,0.7", {}, "a head is corrected for one schedule: give one budget"),
        ("0.5", {"num_classes": 0}, "has no head to correct"),
    ],
)
def test_models_that_cannot_be_corrected_are_a_one_line_error(budget, config, message, tmp_path):
    opened = fc.load_checkpoint("packaged:digits")
    opened = replace(opened, config=replace(opened.config, **config))
    with pytest.raises(fc.InputError, match=message):
        fc.search(opened, "digits:train", budget, correct=tmp_path / "out", limit=8)
