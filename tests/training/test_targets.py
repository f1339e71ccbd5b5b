import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fcvit_jax import parallel
from fcvit_jax.errors import InputError
from fcvit_jax.losses import cross_entropy
from fcvit_jax.training.targets import (
    TargetConfig,
    cutmix_share,
    mix,
    row_weights,
    soft_targets,
)

RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RNG.standard_normal((6, 5)), jnp.float32)
LABELS = jnp.asarray([0, 4, 2, 2, 1, 3], jnp.int32)
IMAGES = jnp.asarray(RNG.standard_normal((6, 8, 12, 3)), jnp.float32)
TARGETS = soft_targets(LABELS, 5, 0.1)
ALL = jnp.ones(6, bool)
BOTH = TargetConfig(mixup=0.4, cutmix=1.0)
mixed = jax.jit(mix, static_argnums=4)


def test_soft_targets_by_hand():
    np.testing.assert_allclose(soft_targets(LABELS[:1], 5, 0.1), [[0.92, 0.02, 0.02, 0.02, 0.02]], rtol=1e-6)
    np.testing.assert_array_equal(soft_targets(LABELS[:1], 5, 0.0), [[1, 0, 0, 0, 0]])


def test_losses_are_those_of_timm():
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm.loss")
    logits, labels, targets = (torch.from_numpy(np.array(x)) for x in (LOGITS, LABELS, TARGETS))
    softmax = cross_entropy(LOGITS, TARGETS, "softmax").mean()
    assert float(softmax) == pytest.approx(timm.LabelSmoothingCrossEntropy(0.1)(logits, labels.long()).item(), rel=1e-5)
    assert float(softmax) == pytest.approx(timm.SoftTargetCrossEntropy()(logits, targets).item(), rel=1e-5)
    summed = timm.BinaryCrossEntropy(smoothing=0.1, sum_classes=True)(logits, labels).item()
    assert float(cross_entropy(LOGITS, TARGETS, "sigmoid").mean()) == pytest.approx(summed, rel=1e-5)


def test_losses_by_hand():
    for loss, expected in (
        ("softmax", -np.log(np.exp(2) / (np.exp(2) + 1))),
        ("sigmoid", -np.log(1 / (1 + np.exp(-2))) - np.log(1 / 2)),
    ):
        losses = cross_entropy(jnp.asarray([[2.0, 0.0]]), jnp.asarray([[1.0, 0.0]]), loss)
        np.testing.assert_allclose(losses, [expected], rtol=1e-6)


def test_padding_weighs_nothing():
    mask = jnp.asarray([True, False, True, True, False, True])
    losses = jnp.arange(6.0)
    weights = row_weights(mask)
    np.testing.assert_allclose(weights, [1.5, 0, 1.5, 1.5, 0, 1.5])
    assert float(jnp.mean(weights * losses)) == (0 + 2 + 3 + 5) / 4
    parts = [float(jnp.mean(weights[i::3] * losses[i::3])) for i in range(3)]
    assert np.mean(parts) == (0 + 2 + 3 + 5) / 4  # wherever the padding is
    assert (row_weights(ALL) == 1).all()
    assert (row_weights(~ALL) == 0).all()


def test_mixup_is_the_numpy_computation():
    config, key = TargetConfig(mixup=0.8), jax.random.key(3)
    images, targets = mixed(key, IMAGES, TARGETS, ALL, config)
    lam = float(jax.random.beta(jax.random.split(key, 3)[1], 0.8, 0.8))
    assert 0.05 < lam < 0.95
    for row in range(6):
        for result, rows in ((images, IMAGES), (targets, TARGETS)):
            np.testing.assert_allclose(result[row], lam * rows[row] + (1 - lam) * rows[row - 1], atol=1e-6)


def test_cutmix_pastes_a_box_and_weighs_targets_by_its_real_area():
    config = TargetConfig(cutmix=1.0)
    drawn = set()
    for seed in range(20):
        images, targets = mixed(jax.random.key(seed), IMAGES, TARGETS, ALL, config)
        for row in range(6):
            pasted = np.asarray((images[row] == IMAGES[row - 1]).all(-1))
            np.testing.assert_array_equal(images[row], np.where(pasted[..., None], IMAGES[row - 1], IMAGES[row]))
            down, across = (np.flatnonzero(pasted.any(axis)) for axis in (1, 0))
            area = pasted.mean()
            if area:
                assert pasted[down[0] : down[-1] + 1, across[0] : across[-1] + 1].all()  # a box, without holes
            np.testing.assert_allclose(targets[row], (1 - area) * TARGETS[row] + area * TARGETS[row - 1], atol=1e-6)
        drawn.add(float(area))
    assert len(drawn) > 10


def test_cutmix_draws_boxes_as_timm_does():
    mixup = pytest.importorskip("timm.data.mixup")
    size, draws = (10, 16), 4000
    lam = np.random.default_rng(0).beta(0.7, 0.7, draws).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    ours = 1 - np.asarray(jax.jit(jax.vmap(lambda key, lam: cutmix_share(key, lam, size)))(keys, lam))
    np.random.seed(0)  # noqa: NPY002, timm draws from the global state
    theirs = np.zeros((draws, *size))
    for box, one in zip(theirs, lam, strict=True):
        (yl, yh, xl, xh), kept = mixup.cutmix_bbox_and_lam((3, *size), one)
        box[yl:yh, xl:xh] = 1
        assert kept == pytest.approx(1 - box.mean())
    assert {*np.unique(ours)} == {0, 1}
    np.testing.assert_allclose(ours.mean((1, 2)).mean(), theirs.mean((1, 2)).mean(), atol=0.02)
    np.testing.assert_allclose(ours.mean((1, 2)).std(), theirs.mean((1, 2)).std(), atol=0.02)
    np.testing.assert_allclose(ours.mean(0), theirs.mean(0), atol=0.05)  # how often each pixel is pasted


def test_lambda_is_beta_distributed_and_both_kinds_take_turns():
    images = jnp.asarray([1.0, 0.0])[:, None, None, None] * jnp.ones((2, 4, 4, 3))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.jit(jax.vmap(lambda key: mix(key, images, TARGETS[:2], ALL[:2], BOTH)[0][0, :, :, 0]))
    shares = np.asarray(draw(keys))
    by_mixup = shares[:, 0, 0] % 1 > 0
    assert by_mixup.mean() == pytest.approx(0.5, abs=0.03)
    lam = shares[by_mixup, 0, 0]
    assert lam.mean() == pytest.approx(0.5, abs=0.03)
    assert lam.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), abs=0.01)


@pytest.mark.parametrize("config", [TargetConfig(mixup=0.4), TargetConfig(cutmix=1.0)])
def test_padding_is_mixed_with_nothing(config):
    mask = jnp.asarray([True, True, False, True, True, False])
    images, targets = mixed(jax.random.key(1), IMAGES, TARGETS, mask, config)
    np.testing.assert_array_equal(images[jnp.asarray([0, 2, 3, 5])], IMAGES[jnp.asarray([0, 2, 3, 5])])
    np.testing.assert_array_equal(targets[jnp.asarray([0, 2, 3, 5])], TARGETS[jnp.asarray([0, 2, 3, 5])])
    assert (images[jnp.asarray([1, 4])] != IMAGES[jnp.asarray([1, 4])]).any((1, 2, 3)).all()


def test_mixing_is_off_by_default():
    images, targets = mix(jax.random.key(0), IMAGES, TARGETS, ALL, TargetConfig())
    assert images is IMAGES
    assert targets is TARGETS


@pytest.mark.parametrize("rows", [2, 6])  # one row a device, three rows a device
def test_mixing_moves_one_row_between_devices(rows):
    mesh = parallel.data_mesh()
    spread = parallel.batched(mesh)
    images = jax.device_put(jnp.ones((rows, 8, 12, 3)) * jnp.arange(float(rows))[:, None, None, None], spread)
    targets = jax.device_put(jax.nn.one_hot(jnp.arange(rows) % 5, 5), spread)
    mask = jax.device_put(jnp.ones(rows, bool), spread)
    arguments = (jax.random.key(0), images, targets, mask)
    compiled = mixed.lower(*arguments, BOTH).compile()
    moves = re.findall(r"= \w+\[([\d,]*)\]\S* (all-\w+|collective-\w+)\(", str(compiled.as_text()))
    assert {kind for _, kind in moves} == {"collective-permute"}
    assert max(math.prod(map(int, shape.split(","))) for shape, _ in moves) == 8 * 12 * 3
    alone = mixed(*jax.device_put(arguments, jax.devices()[0]), BOTH)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), compiled(*arguments), alone)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("loss", "hinge", "targets.loss is 'hinge': choose one of softmax, sigmoid"),
        ("label_smoothing", 1.0, "targets.label_smoothing is 1.0: it must be a number, 0 or more and below 1"),
        ("mixup", -0.1, "targets.mixup is -0.1: it must be a number, 0 or more"),
        ("cutmix", True, "targets.cutmix is True"),
        ("cutmix", None, "targets.cutmix is None"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(field, value, told):
    with pytest.raises(InputError, match=re.escape(told)):
        TargetConfig(**{field: value})


def test_optax_agrees_on_hard_labels():
    hard = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(cross_entropy(LOGITS, soft_targets(LABELS, 5, 0.0), "softmax"), hard, rtol=1e-5)
