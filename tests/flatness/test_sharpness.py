import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.flatness import sharpness
from fcvit_jax.flatness.loss_surface import LossSurface
from fcvit_jax.flatness.sharpness import ADAPTIVE, BOX, PLAIN, average_case, resolution, worst_case
from fcvit_jax.training.sam import perturbation
from fcvit_jax.trees import random_like

KEY = jax.random.key(5)
NONE = jnp.float32(0)


def compiled(function: Any) -> int:
    return function._cache_size()


def quadratic(params, batch):
    """(w - centre)'H(w - centre) / 2 + slope'w over two leaves."""
    matrix, centre, slope = batch
    w = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * (w - centre) @ matrix @ (w - centre) + slope @ w, NONE


PARAMS = {"a": jnp.float32([1.0, -2.0]), "b": jnp.float32([0.5])}
W = np.array([1.0, -2.0, 0.5])
HESSIAN = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 2.0]])


def batch(matrix=HESSIAN, centre=W, slope=(0.0, 0.0, 0.0)):
    return tuple(jnp.float32(x) for x in (matrix, centre, slope))


def relu_loss(params, batch):
    inputs, labels = batch
    hidden = jax.nn.relu(inputs @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    logits = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
    losses = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 3), axis=1)
    return losses.mean(), NONE


def relu_problem():
    rng = np.random.default_rng(0)
    shapes = {"fc1": {"kernel": (5, 16), "bias": (16,)}, "fc2": {"kernel": (16, 3), "bias": (3,)}}
    params = jax.tree.map(
        lambda shape: jnp.float32(rng.normal(0, 0.4, shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    batches = [(jnp.float32(rng.normal(size=(8, 5))), jnp.int32(rng.integers(0, 3, 8))) for _ in range(3)]
    return params, batches


# ------------------------------------------------------------------------------------------- worst case


def test_at_a_minimum_it_is_half_the_eigenvalue_times_the_radius_squared():
    # The gradient is 0 there, so that only the ascent from a random point finds a rise.
    worst = worst_case(LossSurface(quadratic, PARAMS, [batch()]), PLAIN, (0.1, 0.5), KEY, 60, restarts=1)
    eigenvalue = np.linalg.eigvalsh(HESSIAN)[-1]
    np.testing.assert_allclose(worst.found[:, 0], [0.1**2 * eigenvalue / 2, 0.5**2 * eigenvalue / 2], rtol=1e-4)
    np.testing.assert_array_equal(worst.one_step, 0)
    assert worst.losses.shape == (1,)


def test_adaptive_at_a_minimum_it_is_that_of_the_scaled_hessian():
    worst = worst_case(LossSurface(quadratic, PARAMS, [batch()]), ADAPTIVE, (0.3,), KEY, 60, restarts=1)
    eigenvalue = np.linalg.eigvalsh(np.diag(abs(W)) @ HESSIAN @ np.diag(abs(W)))[-1]
    np.testing.assert_allclose(worst.found[0, 0], 0.3**2 * eigenvalue / 2, rtol=1e-4)


def test_ascent_finds_the_maximum_of_a_tilted_quadratic():
    # By brute force over the circle; the first step, along the gradient, misses it.
    matrix, slope = np.diag([0.0, 9.0, 0.0]), np.array([0.5, 0.4, 0.0])
    angles = np.linspace(0, 2 * np.pi, 100001)
    points = 0.5 * np.stack([np.cos(angles), np.sin(angles)])
    maximum = (9 * points[1] ** 2 / 2 + slope[:2] @ points).max()
    worst = worst_case(LossSurface(quadratic, PARAMS, [batch(matrix, W, slope)]), PLAIN, (0.5,), KEY, 40)
    np.testing.assert_allclose(worst.found[0, 0], maximum, rtol=1e-4)
    assert worst.one_step[0, 0] < 0.8 * maximum


def test_the_first_step_is_that_of_sam():
    params, batches = relu_problem()
    worst = worst_case(LossSurface(relu_loss, params, batches), PLAIN, (0.05, 0.3), KEY, 1)
    for b, each in enumerate(batches):
        loss, grads = jax.value_and_grad(lambda w, each=each: relu_loss(w, each)[0])(params)
        for r, rho in enumerate((0.05, 0.3)):
            moved = jax.tree.map(jnp.add, params, perturbation(params, grads, rho))
            np.testing.assert_allclose(worst.one_step[r, b], relu_loss(moved, each)[0] - loss, rtol=1e-4)
    np.testing.assert_array_equal(worst.found, worst.one_step)


def test_more_points_and_more_ascents_find_no_less():
    params, batches = relu_problem()
    found = [
        worst_case(LossSurface(relu_loss, params, batches), PLAIN, (0.5, 2.0), KEY, steps, restarts).found
        for steps, restarts in ((1, 0), (2, 0), (8, 0), (8, 2))
    ]
    for less, more in itertools.pairwise(found):
        assert (more >= less).all()
    assert (found[2] > 1.05 * found[0]).any()


def test_every_batch_climbs_alone():
    # Two batches that pull in opposite directions: their mean is flat, each is not (m-sharpness).
    slope = np.array([3.0, 0.0, 4.0])
    batches = [batch(0 * HESSIAN, W, sign * slope) for sign in (1, -1)]
    worst = worst_case(LossSurface(quadratic, PARAMS, batches), PLAIN, (0.2,), KEY, 3)
    np.testing.assert_allclose(worst.found, [[1.0, 1.0]], rtol=1e-5)
    # The second batch alone, ten times as steep, is in its own column.
    worst = worst_case(
        LossSurface(quadratic, PARAMS, [batches[0], batch(0 * HESSIAN, W, 10 * slope)]), PLAIN, (0.2,), KEY, 3
    )
    np.testing.assert_allclose(worst.found, [[1.0, 10.0]], rtol=1e-5)


def test_a_maximum_is_not_negative_sharpness():
    worst = worst_case(LossSurface(quadratic, PARAMS, [batch(-HESSIAN)]), PLAIN, (0.5,), KEY, 5, restarts=1)
    np.testing.assert_array_equal(worst.found, 0)


def test_keskar_by_hand():
    # On a linear loss the box's corner is the maximum: epsilon sum |g| (|w| + 1) = 0.1 (3 * 2 + 1 * 3 + 2 * 1.5) = 1.2.
    slope = np.array([3.0, -1.0, 2.0])
    worst = worst_case(LossSurface(quadratic, PARAMS, [batch(0 * HESSIAN, W, slope)]), BOX, (0.1,), KEY, 2)
    np.testing.assert_allclose(worst.found, [[1.2]], rtol=1e-5)
    loss = slope @ W
    np.testing.assert_allclose(worst.losses, [loss], rtol=1e-6)
    np.testing.assert_allclose(worst.keskar_percent, [[100 * 1.2 / (1 + loss)]], rtol=1e-5)


# ----------------------------------------------------------------------------------------- average case


def test_on_average_it_is_half_the_trace_times_the_variance():
    samples = average_case(LossSurface(quadratic, PARAMS, [batch()]), PLAIN, (0.1, 0.4), KEY, 400)
    assert samples.shape == (2, 400, 1)
    for sigma, draws in zip((0.1, 0.4), samples[:, :, 0], strict=True):
        wanted, error = sigma**2 * np.trace(HESSIAN) / 2, draws.std(ddof=1) / 20
        assert abs(draws.mean() - wanted) < 3 * error
        assert error < 0.1 * wanted
    noise = np.concatenate([*random_like(PARAMS, jax.random.fold_in(KEY, 7)).values()])
    np.testing.assert_allclose(samples[1, 7, 0], 0.4**2 * noise @ HESSIAN @ noise / 2, rtol=1e-4)


def test_adaptive_noise_is_in_proportion_to_the_weights():
    samples = average_case(LossSurface(quadratic, PARAMS, [batch()]), ADAPTIVE, (0.2,), KEY, 3)
    noise = np.concatenate([*random_like(PARAMS, jax.random.fold_in(KEY, 2)).values()]) * abs(W)
    np.testing.assert_allclose(samples[0, 2, 0], 0.2**2 * noise @ HESSIAN @ noise / 2, rtol=1e-4)


def test_the_slope_cancels_on_average():
    flat = average_case(LossSurface(quadratic, PARAMS, [batch()]), PLAIN, (0.4,), KEY, 5)
    tilted = average_case(LossSurface(quadratic, PARAMS, [batch(slope=(30.0, -20.0, 10.0))]), PLAIN, (0.4,), KEY, 5)
    np.testing.assert_allclose(tilted, flat, atol=2e-5)


def test_a_draw_is_the_same_noise_for_every_batch():
    samples = average_case(LossSurface(quadratic, PARAMS, [batch(), batch(2 * HESSIAN)]), PLAIN, (0.4,), KEY, 4)
    np.testing.assert_allclose(samples[:, :, 1], 2 * samples[:, :, 0], rtol=1e-3)
    assert samples[0, :, 0].std() > 0.1 * samples[0, :, 0].mean()


# ------------------------------------------------------------------------------------- scale, rounding


@pytest.mark.parametrize("measure", ["worst", "average"])
def test_rescaled_weights_of_the_same_function(measure):
    params, batches = relu_problem()
    rescaled = {
        "fc1": jax.tree.map(lambda w: 7 * w, params["fc1"]),
        "fc2": {"kernel": params["fc2"]["kernel"] / 7, "bias": params["fc2"]["bias"]},
    }
    np.testing.assert_allclose(relu_loss(params, batches[0])[0], relu_loss(rescaled, batches[0])[0], rtol=1e-5)

    def value(ball, w):
        if measure == "worst":
            return worst_case(LossSurface(relu_loss, w, batches), ball, (0.4,), KEY, 5).found.mean()
        return average_case(LossSurface(relu_loss, w, batches), ball, (0.2,), KEY, 4).mean()

    np.testing.assert_allclose(value(ADAPTIVE, rescaled), value(ADAPTIVE, params), rtol=1e-4)
    assert value(PLAIN, rescaled) > 2 * value(PLAIN, params)


def test_resolution_is_that_of_float32():
    def loss(params, batch):
        return jnp.square(params["w"]).mean() + batch, NONE

    params = {"w": jnp.linspace(0.5, 1.5, 1000)}
    small, large = (resolution(LossSurface(loss, params, [jnp.float32(c)] * 8), KEY) for c in (0.0, 1000.0))
    assert small < 1e-6
    # At 1000, float32 numbers are 6e-5 apart: the loss either does not change, or by that.
    assert large == 0 or 1e-5 < large < 1e-4


def test_radii_and_balls_share_one_compilation():
    params, batches = relu_problem()
    worst_case(LossSurface(relu_loss, params, batches), PLAIN, (0.1,), KEY, 4)
    average_case(LossSurface(relu_loss, params, batches), PLAIN, (0.1,), KEY, 1)
    before = [compiled(f) for f in (sharpness.uphill, sharpness._step, sharpness.loss_at)]
    for ball in (PLAIN, ADAPTIVE, BOX):
        worst_case(LossSurface(relu_loss, params, batches), ball, (0.2, 0.3), KEY, 4, restarts=1)
        average_case(LossSurface(relu_loss, params, batches), ball, (0.2, 0.3), KEY, 2)
    assert [compiled(f) for f in (sharpness.uphill, sharpness._step, sharpness.loss_at)] == before
