import dataclasses
import functools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import fcvit_jax
from fcvit_jax import parallel
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT
from fcvit_jax.training import sam
from fcvit_jax.training.optimizer import OptimizerConfig, frozen_mask, make_optimizer, momentum
from fcvit_jax.training.sam import SAMConfig, SAMState, init_sam, perturb_mask, perturbation, rho_schedule, with_start

KEY = jax.random.key(7)


def mlp_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "fc1": {"kernel": jax.random.normal(keys[0], (6, 32)) / 2, "bias": jnp.linspace(-0.1, 0.1, 32)},
        "norm1": {"scale": jnp.linspace(0.9, 1.1, 32), "bias": jnp.zeros(32)},
        "head": {"kernel": jax.random.normal(keys[1], (32, 3)) / 4, "bias": jnp.zeros(3)},
    }


def mlp_batch(rows=32):
    inputs = jax.random.normal(jax.random.key(2), (rows, 6))
    return {"inputs": inputs, "targets": jnp.sin(2 * inputs[:, :3]), "weight": jnp.ones(rows)}


def mlp_loss(params, batch, key, dropout=0.0):
    """Compute the squared error of an MLP with a norm's leaves; aux: rows, a mean, and a mean per column."""
    x = jnp.tanh(batch["inputs"] @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    x = x * params["norm1"]["scale"][None] + params["norm1"]["bias"][None]
    if dropout:
        x = jnp.where(jax.random.bernoulli(key, 1 - dropout, x.shape), x / (1 - dropout), 0.0)
    outputs = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    errors = batch["weight"] * jnp.square(outputs - batch["targets"]).sum(1)
    return errors.mean(), {"rows": (outputs, errors), "loss": errors.mean(), "columns": outputs.mean(0)}


dropout_loss = partial(mlp_loss, dropout=0.5)
mlp_gradient = jax.jit(jax.grad(mlp_loss, has_aux=True))


@functools.cache
def compiled(cfg, loss_fn):
    return jax.jit(sam.sam_value_and_grad(loss_fn, cfg))


def estimate(cfg, params, batch=None, loss_fn=mlp_loss, *, key=KEY, rho=None, step=0, state=None):
    """Call it once under jit and strict promotion, with radius and step traced as in a training step."""
    rho, state = cfg.rho if rho is None else rho, init_sam(cfg, params) if state is None else state
    with jax.numpy_dtype_promotion("strict"):
        return compiled(cfg, loss_fn)(params, batch, key, jnp.float32(rho), jnp.int32(step), state)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def norm(tree):
    return float(np.linalg.norm(flat(tree)))


def error(tree, expected):
    """Return the relative error over all leaves together."""
    return np.linalg.norm(flat(tree) - flat(expected)) / norm(expected)


def across(tree, other):
    """Return the part of `tree` orthogonal to `other`, flat and in float64."""
    a, b = flat(tree), flat(other)
    return a - (a @ b) / (b @ b) * b


def counting(loss_fn):
    """Return the loss, and a list that grows by one each time it is computed."""
    calls = []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return loss_fn(*args)

    return counted, calls


# --------------------------------------------------------------------------------------------------- SAM


def test_closed_form_on_leaves_of_different_scale():
    # For f = w'Hw / 2: the gradient at w + rho g / |g| is H (w + rho H w / |H w|), one norm over both leaves.
    w = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray([[300.0]])}
    curvature = {"a": jnp.asarray([3.0, 0.5]), "b": jnp.asarray([[0.01]])}
    rho = 0.7

    def quadratic(w, batch=None, key=None):
        return 0.5 * jnp.stack([jnp.sum(curvature[name] * w[name] ** 2) for name in w]).sum(), ()

    gradient = {name: curvature[name] * w[name] for name in w}
    moved = {name: w[name] + rho * gradient[name] / norm(gradient) for name in w}
    adv_gradient = {name: curvature[name] * moved[name] for name in w}

    (loss, aux), grads, state, info = estimate(SAMConfig(rho=rho), w, None, quadratic)
    assert error(grads, adv_gradient) < 1e-6
    assert (aux, state) == ((), SAMState(()))
    np.testing.assert_allclose(loss, quadratic(w)[0], rtol=1e-6)
    np.testing.assert_allclose(info.gap, quadratic(moved)[0] - quadratic(w)[0], rtol=1e-3)
    np.testing.assert_allclose(info.grad_norm, norm(gradient), rtol=1e-6)
    np.testing.assert_allclose(info.adv_grad_norm, norm(adv_gradient), rtol=1e-6)
    np.testing.assert_allclose(
        info.cosine, flat(gradient) @ flat(adv_gradient) / norm(gradient) / norm(adv_gradient), rtol=1e-6
    )
    np.testing.assert_allclose(info.rho, rho)
    assert info.loss == loss
    assert all(x.dtype == jnp.float32 and x.shape == () for x in info)


def test_five_adamw_steps_equal_optax():
    """optax.contrib.sam in its opaque mode is an independent implementation."""
    batch, start, optimizer = mlp_batch(), mlp_params(), optax.adamw(1e-2)

    params: Any = start
    state, apply = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(5):
        _, grads, _, _ = estimate(SAMConfig(rho=0.1), params, batch, step=step)
        updates, state = apply(grads, state, params)
        params = optax.apply_updates(params, updates)

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    oracle = optax.contrib.sam(optimizer, ascent, opaque_mode=True)
    expected: Any = start
    state = oracle.init(start)
    apply = jax.jit(partial(oracle.update, grad_fn=lambda params, _=0: mlp_gradient(params, batch, KEY)[0]))
    for _ in range(5):
        updates, state = apply(mlp_gradient(expected, batch, KEY)[0], state, expected)
        expected = optax.apply_updates(expected, updates)
    assert error(params, expected) < 5e-7
    assert error(params, start) > 0.02


@pytest.mark.parametrize("parts", [{}, {"microbatches": 4}, {"microbatches": 4, "scope": "microbatch"}])
def test_gap_over_rho_tends_to_the_gradient_norm_under_dropout(parts):
    # Other dropout masks, or other rows, in the second pass would change the loss by far more.
    _, _, _, info = estimate(SAMConfig(rho=1e-3, **parts), mlp_params(), mlp_batch(), dropout_loss)
    assert float(info.gap / info.rho) == pytest.approx(float(info.grad_norm), rel=0.01)


def test_rho_zero_is_the_plain_gradient_bit_for_bit():
    params, batch = mlp_params(), mlp_batch()
    value_and_grad = jax.value_and_grad(dropout_loss, has_aux=True)
    expected = jax.jit(value_and_grad)(params, batch, KEY)
    counted, calls = counting(dropout_loss)
    # 0 by configuration, or, with LookSAM, 0 by a schedule: in both cases the second pass is not run.
    for cfg in (SAMConfig(rho=0.0), SAMConfig(refresh_every=3)):
        value, grads, state, info = estimate(cfg, params, batch, counted, rho=0.0)
        jax.effects_barrier()
        assert len(calls) == 1
        calls.clear()
        jax.tree.map(np.testing.assert_array_equal, (value, grads), expected)
        jax.tree.map(np.testing.assert_array_equal, state, init_sam(cfg, params))
        assert (info.gap, info.rho, info.cosine, info.adv_grad_norm) == (0, 0, 1, info.grad_norm)
    # A radius of 0 against a configured rho above 0 costs a second pass, and gives the same.
    _, grads, _, info = estimate(SAMConfig(rho=0.1), params, batch, dropout_loss, rho=0.0)
    assert error(grads, expected[1]) < 1e-6
    assert float(info.gap) == pytest.approx(0, abs=2e-7 * float(info.loss))  # of two programs, each with its rounding


def test_a_vanishing_gradient_gives_zeros_and_no_nan():
    params = jax.tree.map(jnp.zeros_like, mlp_params())
    batch = mlp_batch() | {"targets": jnp.zeros((32, 3))}
    for cfg in (SAMConfig(), SAMConfig(adaptive=True), SAMConfig(gap_weight=1.0), SAMConfig(refresh_every=2)):
        for step in (0, 1):
            (loss, _), grads, state, info = estimate(cfg, params, batch, step=step)
            assert not flat((loss, grads, state, info.gap, info.grad_norm, info.adv_grad_norm)).any()
            assert np.isfinite(info.cosine)


def test_the_perturbation_has_length_rho_and_the_direction_of_the_gradient():
    params = mlp_params()
    grads, _ = mlp_gradient(params, mlp_batch(), KEY)
    e = perturbation(params, grads, 0.3)
    np.testing.assert_allclose(flat(e), 0.3 * flat(grads) / norm(grads), rtol=1e-6)
    tiny = perturbation(params, jax.tree.map(lambda w: jnp.full(w.shape, 1e-4, jnp.float16), params), 0.3)
    assert norm(tiny) == pytest.approx(0.3, rel=1e-5)  # a square of 1e-4 is zero in float16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tiny))


def test_two_wells():
    # A sharp well at (0, 0), of curvature 200 across and half-width 0.07, and a wide one at (2, 0): gradient descent
    # ends in the first, on its way to the second that SAM finds.
    def loss_fn(w, batch, key):
        x, y = w
        return -jnp.exp(-((x - 2) ** 2) - y**2) - jnp.exp(-(x**2) - 100 * y**2), ()

    def descend(cfg):
        function = sam.sam_value_and_grad(loss_fn, cfg)

        def step(w, i):
            _, grads, _, _ = function(w, None, KEY, cfg.rho, i, SAMState(()))
            return w - 0.01 * grads, None

        w, _ = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(4000)))(jnp.asarray([-0.4, -0.4]))
        return w, np.linalg.eigvalsh(jax.hessian(lambda w: loss_fn(w, None, KEY)[0])(w))[-1]

    plain, sharpness = descend(SAMConfig(rho=0.0))
    np.testing.assert_allclose(plain, [0.04, 0.0], atol=0.01)
    assert sharpness == pytest.approx(200, rel=0.02)
    flat_minimum, sharpness = descend(SAMConfig(rho=0.1))
    np.testing.assert_allclose(flat_minimum, [1.96, 0.0], atol=0.05)
    assert sharpness < 10


# ------------------------------------------------------------------------------------------ micro-batches


def test_one_perturbation_for_all_micro_batches_is_that_of_the_batch():
    # Weights that average to 1 over the batch, with padding rows of weight 0, but not over each chunk.
    params, batch = mlp_params(), mlp_batch()
    weight = jnp.arange(32.0).at[-5:].set(0)
    batch["weight"] = weight / weight.mean()
    _, expected, _, expected_info = estimate(SAMConfig(rho=0.5), params, batch)
    (loss, aux), grads, _, info = estimate(SAMConfig(rho=0.5, microbatches=4), params, batch)
    assert error(grads, expected) < 1e-6
    np.testing.assert_allclose(flat(info), flat(expected_info), rtol=1e-5)
    # Loss and aux are those at the parameters; rows are returned in the batch's order, and means are averaged.
    expected = mlp_loss(params, batch, KEY)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), (loss, aux), expected)


@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_micro_batches_are_strided_and_have_keys_of_their_own(scope):
    params, batch = mlp_params(), mlp_batch()
    chunks = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    keys = jax.random.split(KEY, 4)

    def mean(values):
        return jax.tree.map(lambda *x: sum(x) / 4, *values)

    if scope == "microbatch":
        each = [
            estimate(SAMConfig(rho=0.5), params, chunk, dropout_loss, key=key)
            for chunk, key in zip(chunks, keys, strict=True)
        ]
        expected, expected_info = mean([x[1] for x in each]), mean([x[3] for x in each])
    else:
        gradient = jax.jit(jax.value_and_grad(dropout_loss, has_aux=True))
        gradients = [gradient(params, chunk, key) for chunk, key in zip(chunks, keys, strict=True)]
        clean = mean([x[1] for x in gradients])
        moved = jax.tree.map(jnp.add, params, perturbation(params, clean, 0.5))
        moved = [gradient(moved, chunk, key) for chunk, key in zip(chunks, keys, strict=True)]
        expected, expected_info = mean([x[1] for x in moved]), None
    cfg = SAMConfig(rho=0.5, microbatches=4, scope=scope)
    _, grads, _, info = estimate(cfg, params, batch, dropout_loss)
    assert error(grads, expected) < 1e-6
    if expected_info:
        np.testing.assert_allclose(flat(info), flat(expected_info), rtol=1e-5)
        # m-sharpness is another gradient, not a way to compute the same.
        _, whole, _, _ = estimate(SAMConfig(rho=0.5, microbatches=4), params, batch, dropout_loss)
        assert error(grads, whole) > 0.05


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"sam\.microbatches is 5: a batch of 32 rows does not divide by it"):
        estimate(SAMConfig(microbatches=5), mlp_params(), mlp_batch())


@pytest.mark.devices(8)
@pytest.mark.parametrize("scope", ["batch", "microbatch"])
def test_eight_devices_equal_one_and_do_not_gather_the_batch(scope):
    cfg = SAMConfig(rho=0.3, microbatches=4, scope=scope, gap_weight=0.4, start=1)
    params, batch, mesh = mlp_params(), mlp_batch(64), parallel.data_mesh()
    assert mesh.size == 8
    expected = estimate(cfg, params, batch, dropout_loss, step=1)
    args = jax.device_put((params, KEY, jnp.float32(0.3), jnp.int32(1), SAMState(())), parallel.replicated(mesh))
    params, *rest = args
    args = (params, jax.device_put(batch, parallel.batched(mesh)), *rest)
    program = compiled(cfg, dropout_loss).lower(*args).compile()
    values = program(*args)
    assert error(values[1], expected[1]) < 1e-6
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), values, expected)
    collectives = set(re.findall(r"all-reduce|all-gather|all-to-all|collective-permute", str(program.as_text())))
    assert collectives == {"all-reduce"}


# -------------------------------------------------------------------------------------------------- masks


def test_masks_name_kernels_norms_and_what_is_trained():
    params = mlp_params()
    assert all(jax.tree.leaves(perturb_mask(params, "all")))
    assert perturb_mask(params, "kernels") == {
        "fc1": {"kernel": True, "bias": False},
        "norm1": {"scale": False, "bias": False},
        "head": {"kernel": True, "bias": False},
    }
    norms = {name: dict.fromkeys(leaves, name == "norm1") for name, leaves in params.items()}
    assert perturb_mask(params, "norms") == norms
    assert perturb_mask(params, "all", frozen=norms) == jax.tree.map(lambda x: not x, norms)
    with pytest.raises(InputError, match=r"sam\.perturb is 'norms': no trained parameter"):
        perturb_mask(params, "norms", frozen=norms)


def test_the_norms_and_kernels_of_a_vit():
    config = ViTConfig(image_size=(8, 8), patch_size=4, embed_dim=8, depth=2, num_heads=2, mlp_dim=8, num_classes=3)
    shapes = jax.eval_shape(ViT(config).init, KEY, jnp.zeros((1, 8, 8, 3)))["params"]
    assert sum(jax.tree.leaves(perturb_mask(shapes, "norms"))) == 2 * (2 * 2 + 1)  # scale and bias; two a block, a last
    assert sum(jax.tree.leaves(perturb_mask(shapes, "kernels"))) == 1 + 4 * 2 + 1  # patches; qkv, proj, fc1, fc2; head


@pytest.mark.parametrize("perturb", ["kernels", "norms"])
def test_the_whole_radius_is_spent_on_what_is_perturbed(perturb):
    params, batch = mlp_params(), mlp_batch()
    frozen = jax.tree.map_with_path(lambda path, _: path[0].key == "fc1", params)
    mask = perturb_mask(params, perturb, frozen)
    grads, _ = mlp_gradient(params, batch, KEY)
    e = perturbation(params, grads, 0.3, mask=mask)
    chosen = {"kernels": e["head"]["kernel"], "norms": e["norm1"]}[perturb]
    assert norm(chosen) == pytest.approx(0.3, rel=1e-6)
    assert np.count_nonzero(flat(e)) == np.count_nonzero(flat(chosen))  # nothing else moves
    expected, _ = mlp_gradient(jax.tree.map(jnp.add, params, e), batch, KEY)
    function = jax.jit(sam.sam_value_and_grad(mlp_loss, SAMConfig(rho=0.3), mask))
    _, grads, _, _ = function(params, batch, KEY, 0.3, 0, SAMState(()))
    assert error(grads, expected) < 1e-6
    if perturb == "norms":  # the mask that the configuration implies
        _, grads, _, _ = estimate(SAMConfig(rho=0.3, perturb=perturb), params, batch)
        assert error(grads, expected) < 1e-6


def test_parameters_must_be_float32():
    params = mlp_params()
    params["head"]["kernel"] = params["head"]["kernel"].astype(jnp.bfloat16)
    with pytest.raises(InputError, match="head/kernel is bfloat16: stored parameters must be float32"):
        jax.eval_shape(sam.sam_value_and_grad(mlp_loss, SAMConfig()), params, mlp_batch(), KEY, 0.1, 0, SAMState(()))


# ----------------------------------------------------------------------------------------------- variants


def test_asam_follows_the_paper():
    params = mlp_params()
    grads, _ = mlp_gradient(params, mlp_batch(), KEY)
    t = jax.tree.map(lambda w: abs(w) + 0.02 if w.ndim > 1 else jnp.ones_like(w), params)
    scaled = flat(t) * flat(grads)
    e = perturbation(params, grads, 0.3, adaptive=True, eta=0.02)
    np.testing.assert_allclose(flat(e), 0.3 * flat(t) * scaled / np.linalg.norm(scaled), rtol=1e-5)
    expected, _ = mlp_gradient(jax.tree.map(jnp.add, params, e), mlp_batch(), KEY)
    _, grads, _, _ = estimate(SAMConfig(rho=0.3, adaptive=True, eta=0.02), params, mlp_batch())
    assert error(grads, expected) < 1e-6


def test_asam_does_not_see_a_rescaling_that_leaves_the_function_alone():
    def loss_fn(params, batch, key):
        outputs = jax.nn.relu(batch["inputs"] @ params["fc1"]) @ params["head"]
        return jnp.square(outputs - batch["targets"]).mean(), ()

    params = {name: mlp_params()[name]["kernel"] for name in ("fc1", "head")}
    rescaled = {"fc1": 7 * params["fc1"], "head": params["head"] / 7}
    change = {}
    for cfg in (SAMConfig(rho=0.5, adaptive=True, eta=0.0), SAMConfig(rho=0.5)):
        infos = [estimate(cfg, w, mlp_batch(), loss_fn)[3] for w in (params, rescaled)]
        assert float(infos[0].loss) == pytest.approx(float(infos[1].loss), rel=1e-5)
        change[cfg.adaptive] = float(infos[1].gap / infos[0].gap)
    assert change[True] == pytest.approx(1, abs=1e-3)
    assert change[False] > 2


def test_gsam_takes_off_the_part_of_the_clean_gradient_across_the_adversarial_one():
    params, batch = mlp_params(), mlp_batch()
    clean, _ = mlp_gradient(params, batch, KEY)
    _, adversarial, _, expected_info = estimate(SAMConfig(rho=0.5), params, batch)
    _, grads, _, info = estimate(SAMConfig(rho=0.5, gap_weight=0.4), params, batch)
    part = across(clean, adversarial)
    assert np.linalg.norm(part) > 0.1 * norm(clean)
    np.testing.assert_allclose(flat(grads), flat(adversarial) - 0.4 * part, atol=1e-5 * norm(adversarial))
    difference = flat(grads) - flat(adversarial)
    assert abs(difference @ flat(adversarial)) < 1e-5 * np.linalg.norm(difference) * norm(adversarial)
    np.testing.assert_allclose(flat(info), flat(expected_info), rtol=1e-5)


def test_gsam_that_takes_nothing_off_is_sam():
    # 1e-12, because a configured 0 leaves the subtraction out.
    params, batch = mlp_params(), mlp_batch()
    expected = estimate(SAMConfig(rho=0.5), params, batch)
    tiny = estimate(SAMConfig(rho=0.5, gap_weight=1e-12), params, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), tiny, expected)


@pytest.mark.parametrize("parts", [{}, {"microbatches": 4}, {"microbatches": 4, "scope": "microbatch"}])
def test_looksam_reuses_the_direction_of_its_last_refresh(parts):
    params, batch = mlp_params(), mlp_batch()
    cfg = SAMConfig(rho=0.5, start=2, refresh_every=3, reuse_scale=0.6, **parts)
    clean, _ = mlp_gradient(params, batch, KEY)
    _, expected, _, _ = estimate(dataclasses.replace(cfg, start=0, refresh_every=1), params, batch)
    part = across(expected, clean)

    _, grads, state, info = estimate(cfg, params, batch, step=2)  # the first refresh is at start
    assert error(grads, expected) < 1e-6
    np.testing.assert_allclose(flat(state), part / np.linalg.norm(part), atol=1e-5)
    assert info.rho == 0.5
    assert info.gap > 0

    other = batch | {"targets": -batch["targets"]}
    clean, _ = mlp_gradient(params, other, KEY)
    _, grads, kept, info = estimate(cfg, params, other, step=3, state=state)
    np.testing.assert_allclose(flat(grads), flat(clean) + 0.6 * norm(clean) * flat(state), atol=1e-5 * norm(clean))
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    assert (info.gap, info.rho) == (0, 0)
    # A schedule that has come down to 0 ends the reuse too.
    _, grads, _, _ = estimate(cfg, params, other, step=3, state=state, rho=0.0)
    assert error(grads, clean) < 1e-6


def test_looksam_runs_every_kth_second_pass_only():
    counted, calls = counting(mlp_loss)
    cfg = SAMConfig(rho=0.1, refresh_every=3)
    params, batch, state = mlp_params(), mlp_batch(), None
    passes = []
    for step in range(7):
        _, _, state, _ = estimate(cfg, params, batch, counted, step=step, state=state)
        jax.effects_barrier()
        passes.append(len(calls))
        calls.clear()
    assert passes == [2, 1, 1, 2, 1, 1, 2]


def test_looksam_adds_nothing_to_a_linear_loss():
    # The orthogonal part is only rounding, which must not become a direction; and steps start from the parameters.
    slope = jax.tree.map(lambda w: jnp.sin(jnp.arange(1.0, w.size + 1)).reshape(w.shape), mlp_params())

    def loss_fn(params, batch, key):
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda w, s: jnp.sum(w * s), params, slope)), ()

    params, state, cfg = mlp_params(), None, SAMConfig(rho=0.5, refresh_every=3)
    for step in range(7):
        _, grads, state, _ = estimate(cfg, params, None, loss_fn, step=step, state=state)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    moved = jax.tree.map(jnp.subtract, mlp_params(), params)
    assert error(moved, jax.tree.map(lambda s: 0.7 * s, slope)) < 1e-5


def momentum_sam(w, curvature, rho, name, steps=6, rate=0.1):
    """Run MSAM on w'Hw / 2 in float64: every gradient is H (w - rho m / |m|), and updates the momentum m."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, steps + 1):
        g = curvature * (w - rho * m / (np.linalg.norm(m) or 1.0))
        if name == "sgd":
            m = 0.9 * m + g
            w = w - rate * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            w = w - rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.05 * w)
    return w


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("freeze", [None, "b"])
def test_momentum_sam_in_closed_form(name, freeze):
    params: Any = {"a": {"kernel": jnp.asarray([[1.0, -2.0]])}, "b": {"kernel": jnp.asarray([[3.0]])}}
    curvature = {"a": {"kernel": jnp.asarray([[3.0, 0.5]])}, "b": {"kernel": jnp.asarray([[1.0]])}}

    def quadratic(w, batch, key):
        return 0.5 * jnp.asarray(optax.tree.sum(jax.tree.map(lambda h, x: jnp.sum(h * x**2), curvature, w))), ()

    decay = 0.05 if name == "adamw" else 0.0
    config = OptimizerConfig(
        name=name, learning_rate=0.1, schedule="constant", b2=0.99, weight_decay=decay, clip_norm=None, freeze=freeze
    )
    optimizer, _ = make_optimizer(config, params, 10)
    cfg = SAMConfig(rho=0.7, direction="momentum")
    mask = None if freeze is None else perturb_mask(params, "all", frozen_mask(params, freeze))
    function = jax.jit(sam.sam_value_and_grad(quadratic, cfg, mask))
    start, state = params, optimizer.init(params)
    for step in range(6):
        along = momentum(state, params)
        (loss, _), grads, left, info = function(params, None, KEY, cfg.rho, step, SAMState(along))
        # One pass, at the perturbed parameters: the first has no momentum yet.
        there = optax.tree.add_scale(params, -0.7 / (norm(along) or 1.0), along)
        assert float(loss) == pytest.approx(float(quadratic(there, None, None)[0]), rel=1e-5)
        assert (left, float(info.gap), float(info.rho)) == (SAMState(()), 0.0, pytest.approx(0.7))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    trained = 2 if freeze else 3
    expected = momentum_sam(flat(start)[:trained], flat(curvature)[:trained], 0.7, name)
    np.testing.assert_allclose(flat(params), [*expected, *flat(start)[trained:]], rtol=1e-5)
    plain = momentum_sam(flat(start)[:trained], flat(curvature)[:trained], 0.0, name)
    assert np.abs(plain - expected).max() > 0.01


# ---------------------------------------------------------------------------- configuration and schedule


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rho", -1, "it must be a number, 0 or more"),
        ("rho", float("nan"), "it must be a number"),
        ("rho", True, "it must be a number"),
        ("rho_final", -0.1, "it must be a number, 0 or more, or none"),
        ("start", -1, "it must be a number, 0 or more"),
        ("start", 1.5, "a share of the run is below 1, and a step a whole number"),
        ("direction", "velocity", "choose one of gradient, momentum"),
        ("adaptive", 1, "it must be true or false"),
        ("eta", -0.1, "it must be a number, 0 or more"),
        ("gap_weight", -0.1, "it must be a number, 0 or more"),
        ("refresh_every", 0, "it must be a whole number, 1 or more"),
        ("reuse_scale", "a", "it must be a number"),
        ("microbatches", 0, "it must be a whole number, 1 or more"),
        ("scope", "chunk", "choose one of batch, microbatch"),
        ("perturb", "norm", "choose one of all, kernels, norms"),
    ],
)
def test_a_bad_field_is_named(field, value, reason):
    with pytest.raises(InputError, match=re.escape(f"sam.{field} is {value!r}: {reason}")):
        SAMConfig(**{field: value})


def test_contradictions_are_refused_and_doubtful_choices_reported():
    with pytest.raises(InputError, match=r"sam\.rho_final is 0\.1: it requires a rho above 0"):
        SAMConfig(rho=0.0, rho_final=0.1)
    mistakes: list[dict[str, Any]] = [{"gap_weight": 0.4}, {"refresh_every": 5}, {"scope": "microbatch"}]
    for mistake in mistakes:
        ((name, value),) = mistake.items()
        with pytest.raises(InputError, match=rf"sam\.{name} is {value}: it requires the gradient at the parameters"):
            SAMConfig(direction="momentum", **mistake)
    assert sam.warnings(SAMConfig()) == ()
    (line,) = sam.warnings(SAMConfig(perturb="norms"))
    assert "may raise sharpness" in line
    (line,) = sam.warnings(SAMConfig(scope="microbatch"))
    assert "sam.microbatches is 1" in line
    assert sam.warnings(SAMConfig(rho=0.0, scope="microbatch", perturb="norms")) == ()


def test_the_schedule_starts_late_and_is_never_negative():
    steps = jnp.arange(120)
    for final in (None, 0.0, 0.05, 0.4):
        cfg = SAMConfig(rho=0.2, rho_final=final, start=20)
        rho = np.asarray(jax.vmap(rho_schedule(cfg, 100))(steps))
        last = 0.2 if final is None else final
        assert rho.dtype == np.float32
        assert not rho[:20].any()
        assert (rho >= 0).all()
        np.testing.assert_allclose(rho[[20, 60, 100, 119]], [0.2, (0.2 + last) / 2, last, last], rtol=1e-5)
        np.testing.assert_allclose(rho[40], last + (0.2 - last) * (1 + np.cos(np.pi / 4)) / 2, rtol=1e-5)
    for start in (100, 0.996):
        with pytest.raises(InputError, match=rf"sam\.start is {start}: the run ends after 100 steps"):
            rho_schedule(SAMConfig(start=start), 100)
    assert rho_schedule(SAMConfig(rho=0.0, start=100), 100)(100) == 0


def test_the_start_is_a_share_or_a_step():
    starts = {0: 0, 0.25: 30, 0.9: 108, 1: 1, 30: 30}
    assert {start: with_start(SAMConfig(start=start), 120).start for start in starts} == starts
    assert with_start(SAMConfig(start=0.25), 120, earliest=40).start == 40
    share, step = (jax.vmap(rho_schedule(SAMConfig(rho_final=0.01, start=s), 120))(jnp.arange(120)) for s in (0.25, 30))
    np.testing.assert_array_equal(share, step)
    with pytest.raises(InputError, match=r"sam\.start is 0\.25, a share of the run: replace it by a step"):
        sam.sam_value_and_grad(mlp_loss, SAMConfig(start=0.25))


# ------------------------------------------------------------------------------------- in a training step


@pytest.mark.parametrize("refresh_every", [1, 3])
def test_a_step_compiles_once_donates_its_state_and_moves_nothing_at_rate_zero(refresh_every):
    cfg = SAMConfig(rho=0.3, rho_final=0.1, start=2, refresh_every=refresh_every, gap_weight=0.2)
    schedule, function = rho_schedule(cfg, 10), sam.sam_value_and_grad(dropout_loss, cfg)
    optimizer = optax.adamw(0.0, weight_decay=0.5)

    @partial(jax.jit, donate_argnums=0)
    def train_step(carry, batch):
        step, params, opt_state, state = carry
        key = jax.random.fold_in(KEY, step)
        _, grads, state, info = function(params, batch, key, schedule(step), step, state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (step + 1, optax.apply_updates(params, updates), opt_state, state), info

    params = mlp_params()
    carry = (jnp.int32(0), params, optimizer.init(params), init_sam(cfg, params))
    radii = []
    for _ in range(10):
        donated, (carry, info) = carry, train_step(carry, mlp_batch())
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        radii.append(float(info.rho))
    counter: Any = train_step
    assert counter._cache_size() == 1
    expected = [schedule(i) if i >= 2 and (i - 2) % refresh_every == 0 else jnp.float32(0) for i in range(10)]
    np.testing.assert_allclose(radii, np.stack(expected), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, carry[1], mlp_params())


def test_the_second_pass_costs_one_more_and_micro_batches_save_memory():
    def cost(function, *args, conditional=False):
        program: Any = jax.jit(function).lower(*args).compile()
        assert (" conditional(" in program.as_text()) == conditional
        return program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes

    params, value_and_grad = mlp_params(), jax.value_and_grad(mlp_loss, has_aux=True)
    plain, memory = cost(value_and_grad, params, mlp_batch(4096), KEY)
    chunk, _ = cost(value_and_grad, params, mlp_batch(1024), KEY)
    ratios = {}
    for name, cfg in {
        "rho 0": SAMConfig(rho=0.0),
        "sam": SAMConfig(),
        "msam": SAMConfig(direction="momentum"),
        "all": SAMConfig(adaptive=True, gap_weight=0.4, refresh_every=5, start=5),
        "chunks": SAMConfig(microbatches=4),
    }.items():
        state = SAMState(params) if cfg.direction == "momentum" else init_sam(cfg, params)
        traced = jnp.float32(0.1), jnp.int32(0), state
        flops, temporary = cost(
            sam.sam_value_and_grad(mlp_loss, cfg), params, mlp_batch(4096), KEY, *traced, conditional=name == "all"
        )
        ratios[name] = flops / plain, temporary / memory
    assert ratios["rho 0"][0] == pytest.approx(1, abs=0.01)
    assert ratios["msam"][0] == pytest.approx(1, abs=0.02)
    assert 1.95 < ratios["sam"][0] < 2.05
    assert 1.95 < ratios["all"][0] < 2.05  # the more expensive branch of a conditional counts
    assert ratios["sam"][1] < 1.2  # the passes run one after the other: activations are not stored twice
    # XLA counts the body of a loop once: two passes over a chunk.
    assert 1.95 < ratios["chunks"][0] * plain / chunk < 2.05
    assert ratios["chunks"][1] < 0.5


def test_names_for_a_custom_loop_are_public():
    for name in ("SAMConfig", "sam_value_and_grad"):
        assert getattr(fcvit_jax, name) is getattr(sam, name)
