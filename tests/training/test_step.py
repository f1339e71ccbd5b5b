import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.data.preprocess import preset
from fcvit_jax.losses import cross_entropy
from fcvit_jax.models.config import Rotary, ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT
from fcvit_jax.training.optimizer import OptimizerConfig, frozen_mask, make_optimizer
from fcvit_jax.training.sam import SAMConfig, SAMState, rho_schedule
from fcvit_jax.training.step import Recipe, init_state, make_train_step, phases
from fcvit_jax.training.targets import TargetConfig, soft_targets

CONFIG = ViTConfig((16, 16), 4, 16, 1, 2, 32, num_classes=3)
DEEPER = dataclasses.replace(CONFIG, depth=2)
NEWER = dataclasses.replace(  # the parts of DINOv3, EVA-02 and SigLIP
    DEEPER, learned_positions=False, rotary=Rotary(), gated=True, key_bias=False, pool="map", map_heads=2
)
PREPROCESS = preset("timm/augreg", (16, 16))
STEPS = 40
ADAMW = OptimizerConfig(learning_rate=3e-3, weight_decay=0.01)
SGD = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", clip_norm=None)
SAM, PLAIN = SAMConfig(), TargetConfig()
MIXED = TargetConfig(label_smoothing=0.1, mixup=0.8, cutmix=1.0)


QUICKLY: dict[str, Any] = {"xla_backend_optimization_level": 0}


def batch(seed=0, rows=16):
    """Draw three kinds of images that a tiny model can tell apart: red, green, blue, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    images = rng.integers(0, 60, (rows, 16, 16, 3))
    images[np.arange(rows), :, :, labels] += 120
    return jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32), jnp.ones(rows, bool)


@functools.cache
def compiled(model, config, sam, targets, ema) -> tuple[Recipe, Any]:
    """Return the recipe and the jitted step; tests of one recipe share its compilation, most of their time."""
    shapes = abstract_params(model.config)
    optimizer, rate = make_optimizer(config, shapes, STEPS, 5 if config == ADAMW else 0)
    frozen = None if config.freeze is None else frozen_mask(shapes, config.freeze)
    recipe = Recipe(optimizer, rate, sam, rho_schedule(sam, STEPS), targets, frozen, ema)
    return recipe, jax.jit(make_train_step(model, PREPROCESS, recipe), compiler_options=QUICKLY)


def make(config=SGD, sam=SAM, targets=PLAIN, ema=0.0, params=None, vit=CONFIG, **model):
    built: Any = ViT(vit, **model)
    recipe, step = compiled(built, config, sam, targets, ema)
    return init_state(built, recipe, seed=0, params=params), step


def random_params():
    """Draw parameters away from zero: a fresh head is zero, and so is the gradient below it."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: np.float32(0.2 * rng.standard_normal(w.shape)), abstract_params(CONFIG))


PARAMS: Any = random_params()


def assert_equal(one: Any, other: Any):
    jax.tree.map(np.testing.assert_array_equal, one._replace(key=()), other._replace(key=()))


def assert_close(one: Any, other: Any, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


@pytest.mark.parametrize(
    ("sam", "model"),
    [
        (SAMConfig(rho=0.05, start=5, rho_final=0.02), {"dtype": jnp.bfloat16}),
        (SAMConfig(rho=0.05), {"schedule": MergeSchedule.parse("global:2:r4", 2), "remat": True}),
        (SAMConfig(rho=0.05), {"schedule": MergeSchedule.parse("global:2:r4", 2), "vit": NEWER}),
    ],
    ids=["bfloat16", "merging", "rotary, gate and probe"],
)
def test_training_learns_in_one_compilation(sam, model):
    state, step = make(ADAMW, sam, TargetConfig(label_smoothing=0.1), **({"vit": DEEPER} | model))
    history = []
    for seed in range(STEPS):
        state, metrics = step(state, batch(seed))
        history.append(jax.device_get(metrics))
    assert all(x.dtype == np.float32 and x.shape == () and np.isfinite(x) for row in history for x in row.values())
    seen = {name: np.stack([row[name] for row in history]) for name in history[0]}
    steps = jnp.arange(STEPS)
    np.testing.assert_allclose(seen["rho"], rho_schedule(sam, STEPS)(steps), rtol=1e-6)
    np.testing.assert_allclose(seen["learning_rate"], make_optimizer(ADAMW, PARAMS, STEPS, 5)[1](steps), rtol=1e-5)
    for name in ("gap", "gap_over_rho"):
        np.testing.assert_array_equal(seen[name] > 0, steps >= sam.start)
    assert seen["accuracy"][-1] == 1
    assert seen["loss"][-1] < 0.7
    assert seen["finite"].all()
    assert int(state.step) == STEPS
    assert step._cache_size() == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_the_gradient_is_plain_before_the_start_and_sams_after_it():
    late = SAMConfig(rho=0.3, rho_final=0.1, start=2.0)
    model: Any = ViT(CONFIG)
    recipe, _ = compiled(model, SGD, late, PLAIN, 0.0)
    by_step = phases(recipe)
    assert list(by_step) == [0, 2]
    steps = {first: jax.jit(make_train_step(ViT(CONFIG), PREPROCESS, each)) for first, each in by_step.items()}
    state, plain = make(SGD, SAMConfig(rho=0.0), params=PARAMS)
    expected, sharp = make(SGD, SAMConfig(rho=0.3, rho_final=0.1), params=PARAMS)
    costs = [steps[first].lower(state, batch()).compile().cost_analysis() or {} for first in (0, 2)]
    flops = [cost["flops"] for cost in costs]
    assert 1.9 < flops[1] / flops[0] < 2.1
    for seed in range(2):
        state, metrics = steps[0](state, batch(seed))
        expected, _ = plain(expected, batch(seed))
        assert (metrics["rho"], metrics["gap"]) == (0, 0)
    assert_close(state.params, expected.params, atol=1e-6)
    state, metrics = steps[2](state, batch(2))
    assert metrics["rho"] == pytest.approx(0.3)  # the schedule starts here
    assert metrics["gap"] > 0
    expected, _ = sharp(expected._replace(step=jnp.int32(0)), batch(2))  # whose schedule starts at 0
    assert_close(state.params, expected.params, atol=1e-6)
    assert list(phases(dataclasses.replace(recipe, sam=SAMConfig(rho=0.0, start=2.0)))) == [0]


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_momentum_sam_steps_from_unperturbed_parameters(config):
    still = dataclasses.replace(config, learning_rate=0.0)
    state, step = make(still, SAMConfig(rho=0.5, direction="momentum"), params=PARAMS)
    unperturbed, plain = make(still, SAMConfig(rho=0.0), params=PARAMS)
    for seed in range(3):
        state, metrics = step(state, batch(seed))
        unperturbed, expected = plain(unperturbed, batch(seed))
        assert (float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)) == (seed == 0)
        assert metrics["rho"] == 0.5
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    assert state.sam == SAMState(())


def test_remat_changes_nothing():
    results = []
    for remat in (False, True):
        state, step = make(params=PARAMS, remat=remat, dropout=0.5)
        state, metrics = step(state, batch())
        results.append((state.params, metrics))
    assert_close(*results, atol=2e-6)


LIVELY: Any = dict(targets=MIXED, drop_path=0.5, dropout=0.1, ema=0.2, sam=SAMConfig(refresh_every=2))


def test_a_resumed_run_draws_what_the_whole_run_drew():
    state, step = make(**LIVELY)
    for seed in range(6):
        if seed == 3:
            saved = state
        state, _ = step(state, batch(seed))
    for seed in range(3, 6):
        saved, _ = step(saved, batch(seed))
    assert_equal(saved, state)
    other = saved._replace(step=saved.step + 2)
    assert not np.allclose(step(saved, batch(9))[1]["loss"], step(other, batch(9))[1]["loss"])


def test_the_average_follows_its_formula():
    state, step = make(**LIVELY, params=PARAMS)
    expected = PARAMS
    for t in range(4):
        state, _ = step(state, batch(t))
        decay = min(0.2, (1 + t) / (10 + t))
        assert (decay < 0.2) == (t < 2)
        expected = jax.tree.map(lambda a, w, d=decay: d * a + (1 - d) * w, expected, state.params)
    assert_close(state.ema, expected, atol=1e-6)


@pytest.mark.devices(8)
def test_one_device_equals_eight():
    mesh = parallel.data_mesh()
    assert mesh.size == 8
    results = []
    for spread in (False, True):
        state, step = make(sam=SAMConfig(microbatches=2), targets=MIXED, params=PARAMS, ema=0.9, dropout=0.1)
        images, labels, mask = batch()
        rows = images, labels, mask.at[3].set(False)
        if spread:
            state, rows = jax.device_put(state, parallel.replicated(mesh)), jax.device_put(rows, parallel.batched(mesh))
        step = step.lower(state, rows).compile()  # refuses any other shape or sharding
        moves = set(re.findall(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", step.as_text()))
        assert moves == ({"all-reduce", "collective-permute"} if spread else set())  # the batch is gathered nowhere
        for _ in range(3):
            state, metrics = step(state, rows)
        results.append((state._replace(key=()), metrics))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert_close(*results, atol=2e-5)


def test_a_learning_rate_of_zero_leaves_the_parameters_unchanged():
    state, step = make(dataclasses.replace(SGD, learning_rate=0.0, weight_decay=0.1), params=PARAMS)
    for seed in range(10):
        state, metrics = step(state, batch(seed))
        assert metrics["update_norm"] == 0
        assert metrics["gap"] > 0
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)


def test_clipping_bounds_the_step_and_leaves_the_perturbation_alone():
    free, clipped = (dataclasses.replace(SGD, clip_norm=norm) for norm in (None, 1e-3))
    seen = []
    for config in (free, clipped):
        state, step = make(config, SAMConfig(rho=0.3), params=PARAMS)
        seen.append(jax.device_get(step(state, batch())[1]))
    for name in ("gap", "grad_norm", "rho", "loss"):
        assert seen[1][name] == pytest.approx(seen[0][name], rel=1e-5)
    assert seen[0]["gap"] > 0.01
    assert seen[0]["update_norm"] > 1e-2
    assert seen[1]["update_norm"] == pytest.approx(0.1 * 1e-3, rel=1e-4)


def test_four_microbatches_take_less_than_a_third_of_the_memory():
    """Memory that grows with the batch: that of twice the batch less that of the batch."""
    needed = {}
    for parts in (1, 4):
        state, step = make(sam=SAMConfig(microbatches=parts), vit=ViTConfig((16, 16), 4, 64, 1, 2, 256, num_classes=3))
        sizes = [
            step.lower(state, batch(rows=rows)).compile().memory_analysis().temp_size_in_bytes for rows in (64, 128)
        ]
        needed[parts] = sizes[1] - sizes[0]
    assert needed[1] > 3e6
    assert needed[4] < needed[1] / 3


def test_weight_decay_takes_from_the_parameters_not_from_the_perturbed_ones():
    moved = []
    for weight_decay in (0.0, 0.5):
        state, step = make(dataclasses.replace(SGD, weight_decay=weight_decay), SAMConfig(rho=0.3), params=PARAMS)
        moved.append(step(state, batch())[0].params)
    without, decayed = moved
    for path, kernel in jax.tree.leaves_with_path(PARAMS):
        expected = 0.05 * kernel if path[-1].key == "kernel" else 0 * kernel
        leaf, other = (next(x for p, x in jax.tree.leaves_with_path(tree) if p == path) for tree in (without, decayed))
        np.testing.assert_allclose(leaf - other, expected, atol=1e-6, err_msg=str(path))


def test_frozen_parameters_neither_change_nor_are_perturbed_nor_count():
    config, rho = dataclasses.replace(SGD, weight_decay=0.5, freeze="embed|blocks_|norm"), 0.5
    start, step = make(config, SAMConfig(rho=rho), params=PARAMS)
    images, labels, mask = batch()
    state, metrics = step(start, (images, labels, mask))

    @jax.jit
    def loss(head):
        logits, _ = ViT(CONFIG).apply({"params": {**PARAMS, "head": head}}, PREPROCESS.normalize(images))
        return cross_entropy(logits, soft_targets(labels, 3, 0.0), "softmax").mean()

    head = PARAMS["head"]
    gradient = jax.grad(loss)(head)
    norm = optax.tree.norm(gradient)
    perturbed = jax.tree.map(lambda w, g: w + rho * g / norm, head, gradient)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)
    assert float(metrics["gap"]) == pytest.approx(float(loss(perturbed) - loss(head)), rel=1e-3)
    for part in PARAMS.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, state.params[part], PARAMS[part])
    expected = jax.grad(loss)(perturbed)
    np.testing.assert_allclose(state.params["head"]["bias"], head["bias"] - 0.1 * expected["bias"], atol=1e-5)


def test_both_passes_see_the_same_images_and_the_same_dropout():
    state, step = make(sam=SAMConfig(rho=1e-3), targets=MIXED, params=PARAMS, dropout=0.5, drop_path=0.3)
    _, metrics = step(state, batch())
    assert float(metrics["gap_over_rho"]) == pytest.approx(float(metrics["grad_norm"]), rel=0.02)
    assert metrics["grad_norm"] > 0.1


def test_padding_changes_nothing():
    targets = dataclasses.replace(MIXED, cutmix=0.0)
    state, step = make(sam=SAMConfig(microbatches=4), targets=targets, params=PARAMS, dropout=0.1)
    images, labels, mask = batch()
    mask = mask.at[jnp.asarray([0, 1, 4, 15])].set(False)
    other = jnp.where(mask[:, None, None, None], images, 255), jnp.where(mask, labels, 7), mask
    one, metrics = step(state, (images, labels, mask))
    two, same = step(state, other)
    assert_equal(one, two)
    assert metrics == same
    assert metrics["grad_norm"] > 0.1

    nothing, metrics = step(state, (images, labels, jnp.zeros_like(mask)))
    jax.tree.map(np.testing.assert_array_equal, nothing.params, state.params)
    assert {float(metrics[name]) for name in ("loss", "accuracy", "gap", "grad_norm", "gap_over_rho")} == {0}
    assert metrics["finite"] == 1


def test_the_loss_is_the_mean_over_rows_however_padding_lies_in_the_microbatches():
    images, labels, mask = batch()
    rows = images, labels, mask.at[jnp.asarray([0, 4, 8, 1])].set(False)
    logits, _ = jax.jit(ViT(CONFIG).apply)({"params": PARAMS}, PREPROCESS.normalize(images))
    kept = np.flatnonzero(rows[2])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels)[kept].mean()
    accuracy = (np.argmax(logits, -1) == labels)[kept].mean()
    results = []
    for microbatches in (1, 4):
        state, step = make(sam=SAMConfig(rho=0.3, microbatches=microbatches), params=PARAMS)
        state, metrics = step(state, rows)
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
        assert float(metrics["accuracy"]) == pytest.approx(float(accuracy))
        results.append(state.params)
    assert_close(*results, atol=1e-5)


def test_the_state_can_be_donated_and_the_callers_parameters_outlive_it():
    params = jax.tree.map(jnp.copy, PARAMS)
    state, step = make(params=params, ema=0.9)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state._replace(key=()), params))]
    assert len({*buffers}) == len(buffers)
    donating = jax.jit(step.__wrapped__, donate_argnums=0, compiler_options=QUICKLY)
    before = state
    for seed in range(2):
        state, _ = donating(state, batch(seed))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.ema, before.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_step_that_is_not_finite_leaves_the_state_unchanged():
    optimizer, rate = make_optimizer(SGD, PARAMS, STEPS)
    sam = SAMConfig()
    rho = lambda step: jnp.where(step == 1, jnp.inf, 0.05)  # noqa: E731
    recipe = Recipe(optimizer, rate, sam, rho, TargetConfig(), ema_decay=0.9)
    start = init_state(ViT(CONFIG), recipe, 0, PARAMS)
    step = jax.jit(make_train_step(ViT(CONFIG), PREPROCESS, recipe), compiler_options=QUICKLY)
    good, metrics = step(start, batch())
    assert metrics["finite"] == 1
    kept, metrics = step(good, batch(1))  # the loss is finite, the gradient is not
    assert metrics["finite"] == 0
    assert jnp.isfinite(metrics["loss"])
    assert not kept.finite
    assert_equal(kept, good._replace(finite=kept.finite))
    # No later step changes it either, even a finite one: the loop may check at any time.
    later = kept._replace(step=jnp.int32(2))
    assert step(later._replace(finite=good.finite), batch(2))[1]["finite"] == 1
    still, metrics = step(later, batch(2))
    assert metrics["finite"] == 0
    assert jnp.isfinite(metrics["loss"])
    assert_equal(still, later)

    far = good._replace(step=jnp.int32(2), params=jax.tree.map(lambda w: 1e30 * w, good.params))
    kept, metrics = step(far, batch(1))
    assert not jnp.isfinite(metrics["loss"])
    assert metrics["finite"] == 0
    assert_equal(kept, far._replace(finite=kept.finite))
