from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from fcvit_jax.training.optimizer import adamw, decay_mask
from fcvit_jax.training.sam import perturbation, sam_value_and_grad

W = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([[300.0]])}
CURVATURE = {"a": jnp.asarray([3.0, 0.5]), "b": jnp.asarray([[0.01]])}


def quadratic(w):
    return 0.5 * jnp.stack([jnp.sum(CURVATURE[name] * w[name] ** 2) for name in w]).sum(), "aux"


def test_closed_form_on_leaves_of_different_scale():
    # For f = w'Hw / 2: the gradient at w + rho g / |g| is H (w + rho H w / |H w|), one norm over both leaves.
    rho = 0.7
    gradient = {name: CURVATURE[name] * W[name] for name in W}
    norm = np.sqrt(sum(float((gradient[name] ** 2).sum()) for name in W))
    (loss, aux), grads, info = sam_value_and_grad(quadratic, rho)(W)
    for name in W:
        expected = CURVATURE[name] * (W[name] + rho * gradient[name] / norm)
        np.testing.assert_allclose(grads[name], expected, rtol=1e-5)
    moved = {name: W[name] + rho * gradient[name] / norm for name in W}
    assert aux == "aux"
    np.testing.assert_allclose(loss, quadratic(W)[0], rtol=1e-6)
    np.testing.assert_allclose(info.gap, quadratic(moved)[0] - quadratic(W)[0], rtol=1e-3)
    np.testing.assert_allclose(info.grad_norm, norm, rtol=1e-6)


def test_rho_zero_is_the_plain_gradient_bit_for_bit():
    _, grads, info = sam_value_and_grad(quadratic, 0.0)(W)
    expected = jax.grad(lambda w: quadratic(w)[0])(W)
    jax.tree.map(np.testing.assert_array_equal, grads, expected)
    assert info.gap == 0


def test_the_perturbation_has_length_rho_and_vanishes_with_the_gradient():
    e = perturbation(W, 0.3)
    assert float(optax.tree.norm(e)) == pytest.approx(0.3, rel=1e-6)
    still = perturbation(jax.tree.map(jnp.zeros_like, W), 0.3)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(still))
    tiny = perturbation({"a": jnp.full(4, 1e-4, jnp.float16)}, 0.3)  # its square is zero in float16
    assert float(optax.tree.norm(tiny)) == pytest.approx(0.3, rel=1e-3)


def test_gap_over_rho_tends_to_the_gradient_norm():
    _, _, info = sam_value_and_grad(quadratic, 1e-2)(W)
    assert float(info.gap) / 1e-2 == pytest.approx(float(info.grad_norm), rel=0.05)


def test_five_adamw_steps_equal_optax():
    """optax.contrib.sam in its opaque mode is an independent implementation."""
    inputs = jax.random.normal(jax.random.key(0), (16, 4))
    targets = jnp.sin(inputs).sum(1, keepdims=True)
    keys = jax.random.split(jax.random.key(1), 2)
    start = {"hidden": jax.random.normal(keys[0], (4, 8)), "out": jax.random.normal(keys[1], (8, 1))}

    def loss_fn(params):
        return jnp.mean((jnp.tanh(inputs @ params["hidden"]) @ params["out"] - targets) ** 2), None

    params: Any = start
    optimizer = optax.adamw(1e-2)
    state = optimizer.init(params)
    for _ in range(5):
        _, grads, _ = sam_value_and_grad(loss_fn, 0.1)(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    oracle = optax.contrib.sam(optax.adamw(1e-2), ascent, opaque_mode=True)
    expected: Any = start
    state = oracle.init(start)
    gradient = jax.grad(lambda params: loss_fn(params)[0])
    for _ in range(5):
        updates, state = oracle.update(gradient(expected), state, expected, grad_fn=lambda params, _: gradient(params))
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)
    assert not np.allclose(params["hidden"], start["hidden"], atol=1e-3)


def test_only_kernels_decay():
    params = {"norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)}, "embed": {"pos_embed": jnp.ones((1, 2, 3))}}
    params["mlp"] = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    mask = decay_mask(params)
    assert mask["mlp"] == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves([mask["norm"], mask["embed"]]))
    optimizer = adamw(1e-1, steps=10, warmup_steps=0, weight_decay=0.5, clip_norm=1.0)
    updates: Any = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.05, rtol=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves([updates["norm"], updates["embed"]]))
