"""Against the dense Hessian, in float64, of a small MLP and of a ViT of two blocks."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.flatness import hessian
from fcvit_jax.flatness.hessian import (
    hessian_product,
    lanczos,
    standard_error,
    trace_samples,
)
from fcvit_jax.flatness.loss_surface import LossSurface
from fcvit_jax.flatness.measurement import ClassificationLoss
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT
from fcvit_jax.trees import random_like

KEY = jax.random.key(3)
TINY = ViTConfig((8, 8), 4, 4, 2, 2, 8, num_classes=3)


def compiled(function: Any) -> int:
    return function._cache_size()


def mlp_loss(params, batch):
    inputs, targets = batch
    hidden = jnp.tanh(inputs @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    outputs = hidden @ params["head"]["kernel"] + params["head"]["bias"][None]
    return jnp.square(outputs - targets).sum(1).mean(), jnp.float32(0)


def quadratic(params, batch):
    """w'diag(batch)w / 2 over one leaf."""
    return 0.5 * jnp.sum(batch * jnp.square(params["w"])), jnp.float32(0)


@functools.cache
def problem(name) -> Any:
    """Loss, parameters, three batches, and the dense Hessians of each batch, float64 [3, p, p]."""
    rng = np.random.default_rng(0)
    if name == "mlp":
        loss_fn: Any = mlp_loss
        shapes = {"fc1": {"kernel": (6, 12), "bias": (12,)}, "head": {"kernel": (12, 3), "bias": (3,)}}
        params = jax.tree.map(
            lambda shape: jnp.float32(rng.normal(0, 0.5, shape)), shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
        inputs = [rng.normal(size=(8, 6)) for _ in range(3)]
        batches = [(jnp.float32(x), jnp.float32(np.sin(2 * x[:, :3]))) for x in inputs]
    else:
        pixels = Preprocess((8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        loss_fn = ClassificationLoss(ViT(TINY), pixels)
        params = jax.jit(ViT(TINY).init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
        batches = [(jnp.uint8(rng.integers(0, 256, (4, 8, 8, 3))), jnp.int32(rng.integers(0, 3, 4))) for _ in range(3)]
        params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (4, 3))  # it begins with zeros
    flat, unravel = ravel_pytree(params)
    dense = jax.jit(jax.hessian(lambda w, batch: loss_fn(unravel(w), batch)[0]))
    return loss_fn, params, batches, np.stack([np.float64(dense(flat, batch)) for batch in batches])


def flat(tree):
    return np.float64(ravel_pytree(tree)[0])


@pytest.mark.parametrize("name", ["mlp", "vit"])
class TestAgainstTheDenseHessian:
    def test_the_product_and_the_curvature_of_each_batch(self, name):
        loss_fn, params, batches, dense = problem(name)
        vector = random_like(params, KEY)
        product, samples = hessian_product(LossSurface(loss_fn, params, batches), vector)
        wanted = dense.mean(0) @ flat(vector)
        assert np.linalg.norm(flat(product) - wanted) < 1e-5 * np.linalg.norm(wanted)
        np.testing.assert_allclose(samples, [flat(vector) @ h @ flat(vector) for h in dense], rtol=1e-4, atol=1e-3)

    def test_both_ends_by_lanczos(self, name):
        loss_fn, params, batches, dense = problem(name)
        values = np.linalg.eigvalsh(dense.mean(0))
        assert values[0] < 0 < values[-1]
        for pair, value in zip(
            lanczos(LossSurface(loss_fn, params, batches), KEY, 60, 1e-3), values[[-1, 0]], strict=True
        ):
            assert pair.converged
            assert abs(pair.value - value) < 1e-4 * abs(value)
            v = flat(pair.vector)
            assert abs(np.linalg.norm(v) - 1) < 1e-5
            residual = np.linalg.norm(dense.mean(0) @ v - pair.value * v)
            np.testing.assert_allclose(pair.residual, residual, rtol=0.02, atol=5e-6 * values[-1])
            np.testing.assert_allclose(pair.samples.mean(), pair.value, rtol=1e-6)

    def test_the_trace_within_three_standard_errors(self, name):
        loss_fn, params, batches, dense = problem(name)
        samples = trace_samples(LossSurface(loss_fn, params, batches), KEY, 100)
        assert samples.shape == (100, 3)
        error, trace = standard_error(samples), np.trace(dense.mean(0))
        assert abs(samples.mean() - trace) < 3 * error
        # The variance of Rademacher probes is twice the squares off the diagonal (Hutchinson's equation).
        off = dense.mean(0) - np.diag(np.diag(dense.mean(0)))
        np.testing.assert_allclose(error, np.sqrt(2 * np.sum(off**2) / 100), rtol=0.3)


def spectrum(*values):
    return {"w": jnp.ones(len(values))}, [jnp.float32(values)]


def test_negative_curvature_keeps_its_sign():
    params, batches = spectrum(-5.0, 2.0, 1.0, -0.5)
    largest, smallest = lanczos(LossSurface(quadratic, params, batches), KEY, 10, 1e-6)
    assert abs(largest.value - 2) < 1e-5
    assert abs(smallest.value + 5) < 1e-5


def test_an_eigenvalue_that_was_not_found_is_flagged():
    params, batches = spectrum(*np.linspace(0.9, 1.0, 100))
    largest, smallest = lanczos(LossSurface(quadratic, params, batches), KEY, 3, 1e-3)
    assert not largest.converged
    assert not smallest.converged
    assert largest.residual > 1e-3


def test_lanczos_stays_orthogonal():
    # A distant end converges in a few steps. Without orthogonalisation it would return as copies, and the recurrence
    # would not notice that twelve dimensions are exhausted after twelve products.
    values = [1000.0, *np.linspace(0.5, 1.5, 11)]
    params, batches = spectrum(*values)
    largest, smallest = lanczos(LossSurface(quadratic, params, batches), KEY, 100, 1e-9)
    assert largest.products == smallest.products == 12 + 2
    assert abs(largest.value - 1000) < 1e-3
    assert abs(smallest.value - 0.5) < 1e-3


def test_lanczos_stops_when_both_ends_are_found():
    params, batches = spectrum(1000.0, -800.0, *np.linspace(0.5, 1.5, 50))
    largest, smallest = lanczos(LossSurface(quadratic, params, batches), KEY, 50, 1e-2)
    assert largest.products < 10
    np.testing.assert_allclose([largest.value, smallest.value], [1000, -800], rtol=1e-4)


def test_the_bulk_near_zero_is_not_taken_for_the_smallest():
    # Trained networks have nearly all their eigenvalues near 0, and a vector of these has next to no residual.
    params, batches = spectrum(100.0, 30.0, *np.linspace(0, 1e-3, 300), -0.5)
    largest, smallest = lanczos(LossSurface(quadratic, params, batches), KEY, 40, 0.02)
    assert largest.converged
    assert smallest.converged
    np.testing.assert_allclose([largest.value, smallest.value], [100, -0.5], rtol=1e-3)


def test_no_curvature_at_all():
    def linear(params, batch):
        return jnp.sum(batch * params["w"]), jnp.float32(0)

    params, batches = spectrum(1.0, 2.0)
    for pair in lanczos(LossSurface(linear, params, batches), KEY, 5, 1e-2):
        assert pair.converged
        assert (pair.value, pair.residual) == (0, 0)


def test_samples_are_those_of_the_batches():
    params, batches = {"w": jnp.ones(2)}, [jnp.float32([4.0, 0.0]), jnp.float32([2.0, 1.0])]
    largest, _ = lanczos(LossSurface(quadratic, params, batches), KEY, 5, 1e-6)
    np.testing.assert_allclose(largest.samples, [4, 2], rtol=1e-5)
    assert abs(largest.value - 3) < 1e-5


def test_the_trace_of_a_diagonal_needs_one_probe():
    params, batches = spectrum(-5.0, 2.0, 1.0)
    samples = trace_samples(LossSurface(quadratic, params, batches), KEY, 4)
    np.testing.assert_allclose(samples, -2.0, rtol=1e-6)
    assert standard_error(samples) < 1e-6
    assert np.isnan(standard_error(samples[:1]))


def test_standard_error_by_hand():
    assert standard_error(np.array([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])) == pytest.approx(2 / np.sqrt(3))


def test_random_leaves_depend_on_their_path_alone():
    shape = jnp.zeros(50)
    one = random_like({"a": {"kernel": shape}, "b": {"kernel": shape}}, KEY)
    two = random_like({"z": shape, "b": {"kernel": shape}, "a": {"kernel": shape}}, KEY)
    for name in ("a", "b"):
        np.testing.assert_array_equal(one[name]["kernel"], two[name]["kernel"])
    assert abs(np.corrcoef(one["a"]["kernel"], one["b"]["kernel"])[0, 1]) < 0.5


def test_other_parameters_of_an_equal_loss_compile_nothing_new():
    loss_fn, params, batches, _ = problem("vit")
    hessian_product(LossSurface(loss_fn, params, batches), params)
    before = compiled(hessian._add_product)
    equal = ClassificationLoss(ViT(TINY), loss_fn.preprocess)
    assert equal is not loss_fn
    hessian_product(LossSurface(equal, jax.tree.map(lambda w: 2 * w, params), batches), params)
    assert compiled(hessian._add_product) == before
