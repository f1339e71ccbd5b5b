"""The simulator against the real model, schedule by schedule."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.data.preprocess import decode
from fcvit_jax.data.sources import open_source
from fcvit_jax.models.config import Rotary
from fcvit_jax.models.rules import Nearest, ToMe
from fcvit_jax.models.schedule import Global, MergeSchedule
from fcvit_jax.search.simulate import Rates, SimulatedViT, rates

CONFIG = fc.ViTConfig((32, 48), 4, 32, 5, 2, 64, num_classes=7)  # a grid of 8x12
SCHEDULES = {
    "every layer its own": "global:1:r0,global:1:r3,global:1:r30,global:1:r1,global:1:r50",
    "windows, then global": "dense:1,local:2:r17:w2x2,global:2:r11",
    "windows first, and some that merge nothing": "local:1:r0:w2x2,local:2:r90:w2x2,dense:1,global:1:r5",
}
CONFIGS = {
    "class token": CONFIG,
    "distillation": replace(CONFIG, dist_token=True, pool="dist_avg"),
    "mean of the patches": replace(CONFIG, class_token=False, pool="avg", fc_norm=True, num_classes=0),
    "registers": replace(CONFIG, num_registers=3, no_embed_class=True, pool="token_avg"),
    "not proportional": replace(CONFIG, proportional_attention=False),
    "rotary": replace(CONFIG, rotary=Rotary(), gated=True, learned_positions=False),
    "more than 256 tokens": replace(CONFIG, image_size=(72, 64), depth=5),
}


def random_model(config, seed=0, images=4):
    """Draw random weights, under which no two tokens are alike, and images."""
    keys = jax.random.split(jax.random.key(seed), 3)
    pixels = jax.random.normal(keys[0], (images, *config.image_size, 3))
    params = fc.ViT(config).init(keys[1], pixels)["params"]
    leaves, tree = jax.tree.flatten(params)
    noise = jax.random.split(keys[2], len(leaves))
    leaves = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, noise, strict=True)]
    return jax.tree.unflatten(tree, leaves), pixels


def simulator(config, rule):
    """Make the program (params, images, rates) -> logits."""
    return jax.jit(
        lambda params, images, layers: SimulatedViT(config, rule=rule, rates=layers).apply({"params": params}, images)[
            0
        ]
    )


def with_rule(text, rule):
    stages = MergeSchedule.parse(text, 5).stages
    return MergeSchedule(tuple(replace(stage, rule=rule) if hasattr(stage, "r") else stage for stage in stages))


def compare(config, rule, schedules, params, images):
    """Return the largest difference of logits, relative to their spread; check that one program computed all."""
    simulate, worst = simulator(config, rule), 0.0
    for schedule in schedules:
        layers = rates(schedule, config, rule)
        assert layers is not None
        expected = jax.jit(fc.ViT(config, schedule).apply)({"params": params}, images)[0]
        found = simulate(params, images, Rates(*map(jnp.asarray, layers)))
        worst = max(worst, float(jnp.abs(found - expected).max() / jnp.std(expected)))
    assert simulate._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    return worst


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, Nearest()) for name in CONFIGS), ("class token", ToMe()), ("registers", ToMe())],
    ids=str,
)
def test_every_kind_of_schedule_equals_the_real_model(name, rule):
    config = CONFIGS[name]
    params, images = random_model(config)
    schedules = [with_rule(text, rule) for text in SCHEDULES.values()]
    assert compare(config, rule, schedules, params, images) < 1e-4


@pytest.mark.parametrize(
    "rule",
    [
        Nearest(features=0.5, checkerboard=False),
        Nearest(size=0, attention=0, keep_norm=False),
        Nearest(size=1.0, attention=1.0),
    ],
    ids=str,
)
def test_options_of_the_rule(rule):
    params, images = random_model(CONFIG, seed=1)
    schedules = [with_rule(SCHEDULES[name], rule) for name in ("every layer its own", "windows, then global")]
    assert compare(CONFIG, rule, schedules, params, images) < 1e-4


def test_rotary_keys():
    params, images = random_model(CONFIGS["rotary"], seed=2)
    for rule in (ToMe(turned=True), Nearest(turned=True)):
        schedules = [with_rule(SCHEDULES["windows, then global"], rule)]
        assert compare(CONFIGS["rotary"], rule, schedules, params, images) < 1e-4


def test_the_comparison_can_fail():
    """Another rate in one layer, or windows instead of none, gives other logits."""
    params, images = random_model(CONFIG)
    simulate = simulator(CONFIG, ToMe())
    expected = jax.jit(fc.ViT(CONFIG, with_rule("dense:1,local:2:r16:w2x2,global:2:r11", ToMe())).apply)
    expected = expected({"params": params}, images)[0]
    for removed, local in (([0, 4, 4, 12, 11], [0, 1, 1, 0, 0]), ([0, 16, 16, 11, 11], [0, 0, 0, 0, 0])):
        found = simulate(params, images, Rates(jnp.asarray(removed), jnp.asarray(local, bool)))
        assert jnp.abs(found - expected).max() / jnp.std(expected) > 1e-3


@pytest.mark.parametrize("rule", [ToMe(), Nearest()], ids=str)
def test_the_packaged_digits(rule):
    checkpoint = fc.load_checkpoint("packaged:digits")
    source = open_source("digits:test")
    pixels = np.stack([checkpoint.preprocess(decode(source[i].image, "")) for i in range(16)])
    images = checkpoint.preprocess.normalize(pixels)
    names = ("tome_r12", "s2dfe_r15", "s2winc5_r16")
    schedules = [MergeSchedule.parse(f"{name}@{rule}", checkpoint.config.depth) for name in names]
    assert compare(checkpoint.config, rule, schedules, checkpoint.params, images) < 1e-4


def test_schedules_that_do_not_fit_have_no_rates():
    assert rates(with_rule("global:5:r9", ToMe()), CONFIG, Nearest()) is None
    assert rates(MergeSchedule.parse("local:5:r9:w4x1", 5), CONFIG, ToMe()) is None
    assert rates(MergeSchedule.parse("global:5:r9", 5), replace(CONFIG, pool="map"), ToMe()) is None

    class Own(ToMe):
        pass

    assert rates(MergeSchedule((Global(5, 9, Own()),)), CONFIG, Own()) is None
    with pytest.raises(fc.InputError, match="covers 5 layers"):
        rates(MergeSchedule.parse("global:5:r9", 5), replace(CONFIG, depth=6), ToMe())
