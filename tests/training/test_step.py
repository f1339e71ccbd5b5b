from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.data.preprocess import preset
from fcvit_jax.models.vit import ViT, ViTConfig
from fcvit_jax.training.optimizer import adamw
from fcvit_jax.training.step import init_state, train_step

CONFIG = ViTConfig((16, 16), 4, 16, 2, 2, 32, num_classes=3)
PREPROCESS = preset("timm/augreg", (16, 16))


def batch(seed=0):
    """Three kinds of images that a tiny model tells apart: red, green, blue, with noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 16)
    images = rng.integers(0, 60, (16, 16, 16, 3))
    images[np.arange(16), :, :, labels] += 120
    return jnp.asarray(images, jnp.uint8), jnp.asarray(labels, jnp.int32)


def make(rho=0.05, drop_path=0.0):
    model = ViT(CONFIG, drop_path=drop_path)
    optimizer = adamw(3e-3, steps=60, warmup_steps=5, weight_decay=0.01, clip_norm=1.0)
    step = jax.jit(partial(train_step, model, PREPROCESS, optimizer, rho, 0.1))
    return init_state(model, optimizer, seed=0), step


def test_training_learns_with_and_without_sam():
    for rho in (0.0, 0.05):
        state, step = make(rho)
        for seed in range(40):
            state, metrics = step(state, *batch(seed))
        assert metrics["accuracy"] == 1.0
        assert metrics["loss"] < 0.7
        assert (metrics["gap"] > 0) == (rho > 0)
        assert int(state.step) == 40


def test_a_resumed_run_draws_what_the_whole_run_drew():
    state, step = make(drop_path=0.5)
    for seed in range(6):
        if seed == 3:
            saved = jax.tree.map(lambda x: x, state)
        state, _ = step(state, *batch(seed))
    for seed in range(3, 6):
        saved, _ = step(saved, *batch(seed))
    jax.tree.map(np.testing.assert_array_equal, saved.params, state.params)
    other = saved._replace(step=saved.step + 1)
    assert not np.allclose(step(saved, *batch(9))[1]["loss"], step(other, *batch(9))[1]["loss"])


def test_one_device_equals_eight():
    mesh = parallel.data_mesh()
    results = []
    for spread in (False, True):
        state, step = make()
        images, labels = batch()
        if spread:
            state = jax.device_put(state, parallel.replicated(mesh))
            images, labels = jax.device_put((images, labels), parallel.batched(mesh))
        for _ in range(3):
            state, metrics = step(state, images, labels)
        results.append((state.params, metrics["loss"]))
    # Adam divides by the gradient's own size: where that is rounding alone, a step may point anywhere.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *results)
