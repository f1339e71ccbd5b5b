import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.convert.layouts import TIMM
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.training.optimizer import (
    OptimizerConfig,
    decay_mask,
    frozen_mask,
    layer_scales,
    learning_rate_schedule,
    make_optimizer,
)

STEPS = 10
SHAPES = {
    "embed": {"kernel": (4, 3), "pos_embed": (1, 5, 3)},
    "blocks_0": {"mlp": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (3,)}},
    "blocks_1": {"mlp": {"kernel": (3, 4), "bias": (4,)}, "norm": {"scale": (3,)}},
    "blocks_10": {"ls": (3,)},
    "head": {"kernel": (3, 2), "bias": (2,)},
}
SHAPES: Any = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
)


def flat(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), shapes)


PARAMS = random_like(SHAPES)


def run(optimizer, params: Any = PARAMS, steps=STEPS):
    """Return the parameters after steps with different gradients."""
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = update(random_like(params, step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (
            OptimizerConfig(learning_rate=0.1, weight_decay=0.2, b1=0.8, b2=0.95),
            lambda rate: optax.adamw(rate, 0.8, 0.95, weight_decay=0.2, mask=decay_mask),
        ),
        (
            OptimizerConfig(name="sgd", learning_rate=0.1, momentum=0.7),
            lambda rate: optax.sgd(rate, 0.7),
        ),
        (
            OptimizerConfig(name="lion", learning_rate=0.1, weight_decay=0.2, b2=0.99),
            lambda rate: optax.lion(rate, 0.9, 0.99, weight_decay=0.2, mask=decay_mask),
        ),
    ],
)
def test_each_rule_is_the_one_of_optax(config, rule):
    rate: Any = optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, STEPS)
    schedule: Any
    ours, schedule = make_optimizer(config, SHAPES, STEPS, 3)
    expected = optax.chain(optax.clip_by_global_norm(1.0), rule(rate))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), run(ours), run(expected))
    np.testing.assert_allclose([schedule(i) for i in range(STEPS)], [rate(i) for i in range(STEPS)], rtol=1e-6)


def test_schedules_by_hand():
    def rates(warmup=0, **fields):
        schedule: Any = learning_rate_schedule(OptimizerConfig(learning_rate=0.8, **fields), STEPS, warmup)
        return [float(schedule(step)) for step in range(STEPS + 1)]

    np.testing.assert_allclose(rates(warmup=2, schedule="constant"), [0, 0.4] + [0.8] * 9, rtol=1e-6)
    linear = [0, 0.4, 0.8, 0.725, 0.65, 0.575, 0.5, 0.425, 0.35, 0.275, 0.2]
    np.testing.assert_allclose(rates(warmup=2, schedule="linear", final_learning_rate=0.2), linear, rtol=1e-5)
    cosine = [0.2 + 0.6 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(11)]
    np.testing.assert_allclose(rates(final_learning_rate=0.2), cosine, rtol=1e-5)
    assert rates()[0] == pytest.approx(0.8)
    assert rates()[-1] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_weight_decay_takes_the_same_from_kernels_whatever_the_rule_and_nothing_from_the_rest(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5, schedule="constant")
    optimizer, _ = make_optimizer(config, SHAPES, STEPS)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, PARAMS), optimizer.init(PARAMS), PARAMS)
    for path, update in flat(updates).items():
        expected = -0.05 * flat(PARAMS)[path] if path.endswith("/kernel") else jnp.zeros_like(update)
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=path)


def test_neither_momentum_nor_clipping_sees_the_weight_decay_of_sgd():
    config = OptimizerConfig(name="sgd", learning_rate=0.1, weight_decay=0.5, schedule="constant")
    moved = run(make_optimizer(config, SHAPES, STEPS)[0], {"kernel": jnp.full(2, 1e6)}, steps=2)
    np.testing.assert_allclose(moved["kernel"], 1e6 * 0.95**2, rtol=1e-5)


def test_only_kernels_decay():
    config = ViTConfig((16, 16), 4, 16, 2, 2, 32, 3, dist_token=True, num_registers=2, layer_scale=0.1, pool="dist_avg")
    mask = flat(decay_mask(abstract_params(config)))
    layer = ("attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2")
    kernels = ["embed", "head", "head_dist", *(f"blocks_{i}/{name}" for i in range(2) for name in layer)]
    assert {path for path, decays in mask.items() if decays} == {f"{name}/kernel" for name in kernels}
    assert {"blocks_0/ls1", "embed/pos_embed", "embed/dist_token", "embed/reg_token", "norm/scale"} < mask.keys()


def test_clipping_bounds_the_step_of_sgd():
    config = OptimizerConfig(name="sgd", learning_rate=0.1, schedule="constant", momentum=0.0, clip_norm=0.5)
    gradient = jax.tree.map(lambda g: 1e3 * g, random_like(SHAPES, 1))
    optimizer, _ = make_optimizer(config, SHAPES, STEPS)
    updates, _ = optimizer.update(gradient, optimizer.init(PARAMS), PARAMS)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.05, rel=1e-5)
    small = jax.tree.map(lambda g: 1e-6 * g, gradient)
    updates, _ = optimizer.update(small, optimizer.init(PARAMS), PARAMS)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.1 * g, rtol=1e-6), updates, small)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_frozen_parameters_do_not_change_and_the_rest_move_as_if_they_were_alone(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.1, layer_decay=0.5, freeze="embed|blocks_1/")
    optimizer, _ = make_optimizer(config, SHAPES, STEPS)
    moved = run(optimizer)
    for part, leaves in PARAMS.items():
        for path, leaf in flat(leaves).items():
            assert (flat(moved[part])[path] == leaf).all() == (part in ("embed", "blocks_1")), path
    remembered = [path for path in flat(optimizer.init(PARAMS)) if "kernel" in path]
    assert remembered
    assert not [path for path in remembered if "blocks_1/" in path or "embed" in path]

    # A frozen gradient, however large, does not count in the clipped norm.
    gradient = random_like(SHAPES, 1)
    large = {part: jax.tree.map(lambda g: 1e6 * g, gradient[part]) for part in ("embed", "blocks_1")}
    update, start = jax.jit(optimizer.update), optimizer.init(PARAMS)
    one, other = (update({**gradient, **frozen}, start, PARAMS)[0] for frozen in ({}, large))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_freezing_nothing_or_everything_is_an_error():
    frozen = flat(frozen_mask(SHAPES, "blocks_1|.*/norm/|head/bias"))
    expected = {"blocks_0/norm/scale", "blocks_1/mlp/kernel", "blocks_1/mlp/bias", "blocks_1/norm/scale"}
    assert {path for path, is_frozen in frozen.items() if is_frozen} == expected | {"blocks_10/ls", "head/bias"}
    with pytest.raises(InputError, match=r"optimizer.freeze is 'kernel': it matches no path; one is blocks_0/mlp/bias"):
        make_optimizer(OptimizerConfig(learning_rate=0.1, freeze="kernel"), SHAPES, STEPS)
    with pytest.raises(InputError, match=r"optimizer.freeze is '': it matches every parameter"):
        make_optimizer(OptimizerConfig(learning_rate=0.1, freeze=""), SHAPES, STEPS)


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (ViTConfig((16, 16), 4, 16, 3, 2, 32, 3), {}),
        (ViTConfig((16, 16), 4, 16, 3, 2, 32, 3, pool="avg", fc_norm=True, layer_scale=0.1), dict(init_values=0.1)),
        (
            ViTConfig(
                (16, 16), 4, 16, 3, 2, 32, 3, pre_norm=True, patch_bias=False, num_registers=2, pool="avg", fc_norm=True
            ),
            dict(reg_tokens=2, pre_norm=True),
        ),
        (ViTConfig((16, 16), 4, 16, 3, 2, 32, 3, dist_token=True, pool="dist_avg"), {}),
        (ViTConfig((16, 16), 4, 16, 3, 2, 32, 3, class_token=False, pool="map"), dict(class_token=False)),
    ],
)
def test_layer_decay_and_weight_decay_are_those_of_timm(config, arguments):
    timm_optim, timm_vit = pytest.importorskip("timm.optim"), pytest.importorskip("timm.models.vision_transformer")
    kind = pytest.importorskip("timm.models.deit").VisionTransformerDistilled
    if not config.dist_token:
        kind, arguments = timm_vit.VisionTransformer, {**arguments, "global_pool": config.pool}
    model = kind(16, 4, num_classes=3, embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, **arguments)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = timm_optim.param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7)

    params = abstract_params(config)
    scales, decays, seen = layer_scales(params, 0.7), flat(decay_mask(params)), set()
    for group in groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            block = re.search(r"\.(\d+)\.", name)
            path = TIMM[re.sub(r"\.\d+\.", ".#.", name)][0].partition(":")[0].replace("#", block[1] if block else "")
            seen.add(path)
            # timm decays the probe, big_vision only kernels.
            assert decays[path] == (group["weight_decay"] > 0 and name != "attn_pool.latent"), name
            # timm counts the last norm to the last block, unless it follows the pooling; BEiT and MAE do not.
            expected = 1.0 if name.startswith("norm.") else group["lr_scale"]
            assert scales[path] == pytest.approx(expected), name
    assert seen == scales.keys()


def test_layer_decay_scales_the_whole_step_and_one_leaves_it():
    def step(layer_decay):
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, layer_decay=layer_decay, schedule="constant")
        return flat(run(make_optimizer(config, SHAPES, STEPS)[0], steps=1))

    plain, same, decayed, start = step(None), step(1.0), step(0.5), flat(PARAMS)
    layers = {"embed": 0, "blocks_0": 1, "blocks_1": 2, "blocks_10": 11, "head": 12}
    for path in start:
        np.testing.assert_array_equal(plain[path], same[path])
        expected = 0.5 ** (12 - layers[path.partition("/")[0]]) * (plain[path] - start[path])
        np.testing.assert_allclose(decayed[path] - start[path], expected, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("name", "adam", "optimizer.name is 'adam': choose one of adamw, sgd, lion"),
        ("schedule", "step", "optimizer.schedule is 'step': choose one of cosine, linear, constant"),
        ("learning_rate", -1.0, "optimizer.learning_rate is -1.0: it must be a number, 0 or more"),
        ("learning_rate", "1e-3", "optimizer.learning_rate is '1e-3': it must be a number"),
        ("learning_rate", None, "optimizer.learning_rate is None"),
        ("final_learning_rate", math.inf, "optimizer.final_learning_rate is inf"),
        ("weight_decay", math.nan, "optimizer.weight_decay is nan"),
        ("b1", 1.0, "optimizer.b1 is 1.0: it must be a number, 0 or more and below 1"),
        ("b2", True, "optimizer.b2 is True"),
        ("momentum", -0.1, "optimizer.momentum is -0.1"),
        ("clip_norm", 0, "optimizer.clip_norm is 0: it must be a number, above 0, or none"),
        ("layer_decay", 1.1, "optimizer.layer_decay is 1.1: it must be a number, above 0 and 1 or less, or none"),
        ("final_learning_rate", 0.2, "optimizer.final_learning_rate is 0.2: it must not be above learning_rate, 0.1"),
        ("freeze", "blocks_(", r"optimizer.freeze is 'blocks_(': no regular expression (missing ), unterminated"),
        ("freeze", 3, "optimizer.freeze is 3: it must be text, or none"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field, value, told):
    with pytest.raises(InputError, match=re.escape(told)):
        OptimizerConfig(**{"learning_rate": 0.1, field: value})


def test_a_warmup_longer_than_the_run_is_an_error():
    with pytest.raises(InputError, match="a warm-up of 10 steps does not fit into the 10 steps of the run"):
        make_optimizer(OptimizerConfig(learning_rate=0.1), SHAPES, 10, 10)
