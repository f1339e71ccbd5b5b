"""A merge rule that is written here, without registration, works everywhere."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc


@dataclasses.dataclass(frozen=True)
class AtRandom(fc.rules.Rule):
    """Merge tokens at random; with `prune`, drop them instead."""

    seed: int = 0
    prune: bool = False

    def __call__(self, attended, x, size, layer, prefix):
        metric = jax.random.normal(jax.random.key(self.seed), (*x.shape[:2], 4))
        matching = fc.match_tokens(metric, layer, prefix)
        if not self.prune:
            return matching
        assert matching.order is not None
        leaving = matching.order[:, layer.tokens_out :, None] == jnp.arange(layer.tokens_in)[None, None]
        return dataclasses.replace(matching, weight=jnp.where(leaving.any(axis=1), 0.0, size))

    def macs(self, layer, config):
        return 1000 * layer.tokens_in


@pytest.fixture(scope="module")
def digits():
    return fc.load_checkpoint("packaged:digits")


def schedule_of(depth: int, r: int = 6, **options: Any) -> fc.MergeSchedule:
    half = depth // 2
    stages = fc.Local(half, 2 * r, rule=AtRandom(**options)), fc.Global(depth - half, r, rule=AtRandom(**options))
    return fc.MergeSchedule(stages)


@pytest.fixture(scope="module")
def images(digits):
    return jax.random.normal(jax.random.key(1), (4, *digits.config.image_size, 3))


def run(digits, images, schedule):
    return jax.jit(fc.ViT(digits.config, schedule).apply)({"params": digits.params}, images)


def test_in_the_model(digits, images):
    schedule = schedule_of(digits.config.depth)
    logits, out = run(digits, images, schedule)
    assert not out["pruned"].any()
    np.testing.assert_allclose(out["size"].sum(axis=1), digits.config.num_tokens)
    assert [layer["tokens"].shape[1] for layer in out["layers"]] == list(schedule.tokens(digits.config))
    other = run(digits, images, schedule_of(digits.config.depth, seed=1))[0]
    assert np.abs(logits - other).max() > 1e-3
    nothing = run(digits, images, schedule_of(digits.config.depth, 0))[0]
    np.testing.assert_array_equal(nothing, run(digits, images, None)[0])


def test_pruned_patches_are_told_apart_and_the_source_map_stays_total(digits, images):
    config = digits.config
    schedule = schedule_of(config.depth, prune=True)
    _, out = run(digits, images, schedule)
    for layer, tokens in zip(out["layers"], schedule.tokens(config), strict=True):
        # Every patch is in one token, or dropped.
        assert (layer["pruned"].sum(axis=1) == config.num_tokens - tokens).all()
        np.testing.assert_array_equal(layer["size"], np.ones((4, tokens)))
        kept = [np.unique(row[~gone]) for row, gone in zip(layer["source"], layer["pruned"], strict=True)]
        assert all(len(row) == tokens - 1 for row in kept)
        assert 1 <= layer["source"].min() <= layer["source"].max() < tokens
    assert fc.unmerge_tokens(out["tokens"], out["source"]).shape == (4, config.num_patches, config.embed_dim)


def test_in_the_count_of_macs(digits):
    config, schedule = digits.config, schedule_of(digits.config.depth)
    stages = tuple(dataclasses.replace(stage, rule=fc.rules.ToMe()) for stage in schedule.stages)
    extra = sum(1000 * layer.tokens_in for layer in schedule.plan(config) if layer.removed)
    assert extra > 0
    found = fc.flops.gmacs(config, schedule) - fc.flops.gmacs(config, fc.MergeSchedule(stages))
    assert found * 1e9 == pytest.approx(extra)


def test_in_evaluation(digits, tmp_path):
    schedule = schedule_of(digits.config.depth)
    rows = fc.evaluate(
        digits, "digits:test", {"dense": fc.MergeSchedule.dense(digits.config.depth), "random": schedule}, limit=60
    )
    assert [row["schedule"] for row in rows] == ["dense", "random"]
    assert rows[1]["stages"] == str(schedule)
    assert "@AtRandom" in str(schedule)
    assert rows[1]["gmacs"] == pytest.approx(fc.flops.gmacs(digits.config, schedule))
    assert rows[1]["kl"] > 0
    again = fc.evaluate(digits, "digits:test", [schedule], workdir=tmp_path, limit=60)
    assert again[0]["correct"] == rows[1]["correct"]
    assert json.loads((tmp_path / "results.jsonl").read_text())["schedule"] == str(schedule)


def test_in_training(digits, tmp_path):
    schedule = schedule_of(digits.config.depth)
    config = fc.TrainConfig(
        train="digits:train",
        test="digits:test",
        checkpoint="packaged:digits",
        schedule=schedule,
        batch_size=144,
        epochs=0.2,
        optimizer=fc.OptimizerConfig(learning_rate=1e-4),
        tensorboard=False,
    )
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as for users
        result = fc.train(config, tmp_path)
    assert int(result.state.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.state.params))


def test_in_an_export(digits, images, tmp_path):
    schedule = schedule_of(digits.config.depth)
    fc.export(digits, {"random": schedule}, 4, tmp_path / "out", platforms=["cpu"])
    exported = jax.export.deserialize(bytearray((tmp_path / "out/programs/random_b4.stablehlo").read_bytes()))
    weights = dict(np.load(tmp_path / "out" / "weights.npz"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, *digits.config.image_size, 3), np.uint8)
    expected = run(digits, digits.preprocess.normalize(jnp.asarray(pixels)), schedule)[0]
    np.testing.assert_allclose(exported.call(weights, pixels), expected, atol=1e-4)


def test_under_vmap_and_grad(digits, images):
    model = fc.ViT(digits.config, schedule_of(digits.config.depth))
    apply = jax.jit(lambda params, images: model.apply({"params": params}, images)[0])
    mapped = jax.vmap(apply, (None, 0))(digits.params, images[:, None])
    single = jnp.concatenate([apply(digits.params, image[None]) for image in images[:2]])
    np.testing.assert_allclose(mapped[:2, 0], single, atol=1e-4)
    gradient = jax.grad(lambda params: apply(params, images[:2]).sum())(digits.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
