import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError
from fcvit_jax.flatness.flatness_report import FlatnessConfig
from fcvit_jax.flatness.loss_surface import LossSurface
from fcvit_jax.flatness.measurement import (
    ClassificationLoss,
    draw_batches,
    measure,
    measure_surface,
)
from fcvit_jax.models.config import Rotary, ViTConfig
from fcvit_jax.models.vit import ViT

TINY = ViTConfig((8, 8), 4, 8, 1, 2, 16, num_classes=10, pool="avg")  # a last merge does not change the class token
PIXELS = preset("timm/augreg,crop_pct=1.0", (8, 8))
QUICK = FlatnessConfig(limit=16, batch_size=4, ascent_steps=2, draws=2, eigen_steps=3, probes=2)


@pytest.fixture(scope="module")
def digits():
    return open_source("digits:train")


@pytest.fixture(scope="module")
def params():
    params = jax.jit(ViT(TINY).init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    params["head"]["kernel"] = jax.random.normal(jax.random.key(2), (8, 10))  # it begins with zeros
    return params


def quadratic(params, batch):
    """batch * (4 a^2 + b^2) / 2, about 0; "accuracy" is the batch."""
    return batch * (4 * params["a"] ** 2 + params["b"] ** 2).sum() / 2, batch


def test_all_measures_of_a_quadratic():
    params = {"a": jnp.float32([0.0]), "b": jnp.float32([2.0])}
    batches = [jnp.float32(0.5), jnp.float32(1.5)]
    config = FlatnessConfig(rho=(1.0,), sigma=(0.1, 0.3), draws=200, ascent_steps=40, restarts=1, probes=3)
    report = measure_surface(LossSurface(quadratic, params, batches), config, {"made": "up"})

    assert report.conditions == {"made": "up"}
    assert report.config == config
    assert (report.num_params, report.weight_norm, report.gradient_norm) == (2, 2.0, 2.0)
    np.testing.assert_allclose(report.losses, [1, 3])
    np.testing.assert_allclose(report.accuracies, [0.5, 1.5])
    assert report.loss == 2
    largest, smallest = report.eigenvalues["largest"], report.eigenvalues["smallest"]
    np.testing.assert_allclose([largest.value, smallest.value], [4, 1], rtol=1e-5)
    np.testing.assert_allclose(largest.samples, [2, 6], rtol=1e-5)
    assert largest.vector is None
    np.testing.assert_allclose(report.trace, np.tile([2.5, 7.5], (3, 1)), rtol=1e-5)

    # The maximum of 4 a^2 + b^2 within 1 of (0, 2), by brute force over the circle.
    angles = np.linspace(0, 2 * np.pi, 100001)
    rise = (4 * np.cos(angles) ** 2 + (2 + np.sin(angles)) ** 2 - 4).max() / 2
    np.testing.assert_allclose(report.curves["worst"].samples, [[[0.5 * rise, 1.5 * rise]]], rtol=1e-4)
    np.testing.assert_allclose(report.curves["one_step"].samples, [[[0.5 * 2.5, 1.5 * 2.5]]], rtol=1e-5)
    # |w| does not let a move from 0; b goes from 2 to 2 (1 + rho).
    radii = np.array(config.adaptive_rho)[:, None, None]
    wanted = (4 * (1 + radii) ** 2 - 4) / 2 * np.array([0.5, 1.5])
    np.testing.assert_allclose(report.curves["worst_adaptive"].samples, wanted, rtol=1e-5)
    # In the box both go to the corner: a to epsilon (0 + 1), b to 2 + epsilon (2 + 1).
    epsilon, scale = np.array(config.epsilon)[:, None, None], np.array([0.5, 1.5])
    corner = (4 * epsilon**2 + (2 + 3 * epsilon) ** 2 - 4) / 2 * scale
    np.testing.assert_allclose(report.curves["keskar"].samples, 100 * corner / (1 + 2 * scale), rtol=2e-3)
    average = report.curves["average"]
    assert average.samples.shape == (2, 200, 2)
    np.testing.assert_allclose(average.samples.mean(axis=(1, 2)), [0.01 * 2.5, 0.09 * 2.5], rtol=0.2)
    assert report.curves["average_adaptive"].radii == config.adaptive_sigma
    assert report.line is not None
    assert report.plane is not None
    assert report.line is not None
    assert report.line.shape == (21,)
    assert report.plane.shape == (7, 7)
    np.testing.assert_allclose(report.line, 2)  # no leaf is a kernel, so that nothing moves
    assert 0 <= report.resolution < 1e-5


def test_the_line_lies_in_the_plane():
    def loss(params, batch):
        return jnp.square(params["kernel"] - batch).sum(), batch

    params = {"kernel": jnp.arange(6.0).reshape(3, 2)}
    config = dataclasses.replace(QUICK, line_points=9, plane_points=9)
    report = measure_surface(LossSurface(loss, params, [jnp.float32(1.0), jnp.float32(2.0)]), config)
    assert report.plane is not None
    assert report.line is not None
    np.testing.assert_allclose(report.plane[:, 4], report.line, rtol=1e-6)
    np.testing.assert_allclose(report.plane[4, 4], report.loss, rtol=1e-6)
    assert abs(report.plane[4] - report.line).max() > 0.1
    none = measure_surface(
        LossSurface(loss, params, [jnp.float32(1.0)]), dataclasses.replace(QUICK, line_points=0, plane_points=0)
    )
    assert none.line is None
    assert none.plane is None


def test_the_loss_is_plain_cross_entropy(params):
    rng = np.random.default_rng(0)
    images, labels = jnp.uint8(rng.integers(0, 256, (6, 8, 8, 3))), jnp.int32(rng.integers(0, 10, 6))
    model = ViT(TINY, dropout=0.5, drop_path=0.5)  # used in training only: without a key nothing may be drawn
    logits = np.asarray(jax.jit(model.apply)({"params": params}, PIXELS.normalize(images))[0], np.float64)
    own = logits[np.arange(6), labels]
    loss, accuracy = ClassificationLoss(model, PIXELS)(params, (images, labels))
    np.testing.assert_allclose(loss, np.mean(np.log(np.exp(logits).sum(1)) - own), rtol=1e-6)
    np.testing.assert_allclose(accuracy, np.mean(logits.argmax(1) == np.asarray(labels)))
    loss, _ = ClassificationLoss(model, PIXELS, "sigmoid")(params, (images, labels))
    np.testing.assert_allclose(loss, np.mean(np.log1p(np.exp(logits)).sum(1) - own), rtol=1e-6)


def test_batches_are_drawn_with_the_seed(digits):
    config = FlatnessConfig(limit=70, batch_size=16, seed=3)
    batches, fingerprint = draw_batches(digits, PIXELS, config)
    assert [images.shape for images, _ in batches] == [(16, 8, 8, 3)] * 4  # 6 of the 70 fill no batch
    assert all(images.dtype == jnp.uint8 and labels.dtype == jnp.int32 for images, labels in batches)
    order = np.random.default_rng(3).permutation(1437)
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(labels, [digits[int(i)].label for i in order[:64]])
    assert len(set(labels[:16])) > 4

    again = draw_batches(digits, PIXELS, config)
    np.testing.assert_array_equal(again[0][2][0], batches[2][0])
    assert again[1] == fingerprint
    others = dict(seed=4), dict(limit=64, batch_size=32), dict(limit=48)
    fingerprints = [draw_batches(digits, PIXELS, dataclasses.replace(config, **other))[1] for other in others]
    darker = dataclasses.replace(PIXELS, interpolation="bilinear", image_size=(16, 16))
    fingerprints.append(draw_batches(digits, darker, config)[1])
    assert fingerprint not in (fingerprints[0], fingerprints[2], fingerprints[3])
    everything, _ = draw_batches(digits, PIXELS, FlatnessConfig(limit=9999, batch_size=100))
    assert len(everything) == 14
    with pytest.raises(InputError, match="batch_size is 2000: limit is 9999 and digits:train has 1437 images"):
        draw_batches(digits, PIXELS, FlatnessConfig(limit=9999, batch_size=2000))


@pytest.fixture
def checkpoint(tmp_path, params):
    return fc.load_checkpoint(
        fc.save_checkpoint(tmp_path / "ckpt", TINY, params, PIXELS, class_names=tuple("0123456789"))
    )


def test_a_checkpoint_under_a_schedule(checkpoint, digits):
    config = dataclasses.replace(QUICK, line_points=0, plane_points=0)
    schedule = fc.MergeSchedule.parse("tome_r1", 1)
    report = measure(checkpoint, digits, config, schedule)
    batches, fingerprint = draw_batches(digits, PIXELS, config)
    loss_fn, dense = (jax.jit(ClassificationLoss(ViT(TINY, given), PIXELS)) for given in (schedule, None))
    np.testing.assert_allclose(report.losses, [loss_fn(checkpoint.params, batch)[0] for batch in batches], rtol=1e-5)
    assert abs(report.losses - [dense(checkpoint.params, batch)[0] for batch in batches]).max() > 1e-4
    conditions = report.conditions
    assert conditions["fingerprint"] == fingerprint
    assert conditions["dataset"] == "digits:train"
    assert conditions["num_images"] == 16
    assert conditions["schedule"] == str(schedule)
    assert conditions["preprocess"] == PIXELS.to_dict()
    assert conditions["versions"]["jax"] == jax.__version__
    assert len(conditions["params_sha256"]) == 64


def test_rotary_positions_a_gate_and_a_probe_are_measured(digits):
    config = dataclasses.replace(TINY, learned_positions=False, rotary=Rotary(), gated=True, pool="map")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(0.5 * rng.standard_normal(leaf.shape)), abstract_params(config))
    loss_fn, batches = ClassificationLoss(ViT(config), PIXELS), draw_batches(digits, PIXELS, QUICK)[0][:1]
    surface = LossSurface(loss_fn, params, batches)
    report = measure_surface(surface, dataclasses.replace(QUICK, line_points=0, plane_points=0))
    assert all(np.isfinite(curve.samples).all() for curve in report.curves.values())
    gradient = jax.jit(jax.grad(lambda params: loss_fn(params, batches[0])[0]))
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient(params))))
    np.testing.assert_allclose(report.gradient_norm, norm, rtol=1e-4)


def test_data_that_do_not_fit_are_refused(checkpoint, digits):
    with pytest.raises(InputError, match=r"made up has 2 classes, the head of .*ckpt has 10"):
        measure(checkpoint, dataclasses.replace(digits, spec="made up", class_names=("a", "b")), QUICK)
    with pytest.raises(InputError, match=r"digits:train has class 'a' where .*ckpt has '0'"):
        measure(checkpoint, dataclasses.replace(digits, class_names=tuple("abcdefghij")), QUICK)
    with pytest.raises(InputError, match="layers"):
        measure(checkpoint, digits, QUICK, fc.MergeSchedule.dense(3))


def test_parameters_must_be_float32():
    params = {"a": jnp.float32([0.0]), "b": {"kernel": jnp.bfloat16([2.0])}}
    with pytest.raises(InputError, match="b/kernel is bfloat16: flatness is measured on float32 parameters"):
        measure_surface(LossSurface(quadratic, params, [jnp.float32(1)]), QUICK)


def test_a_measure_that_is_not_finite_is_named():
    params = {"a": jnp.float32([0.0]), "b": jnp.float32([2.0])}
    with pytest.raises(InputError, match="the loss at the parameters is not finite"):
        measure_surface(LossSurface(quadratic, params, [jnp.float32(np.nan)]), QUICK)

    def brittle(params, batch):
        loss, accuracy = quadratic(params, batch)
        return jnp.where(jnp.abs(params["b"] - 2).sum() > 0.4, jnp.inf, loss), accuracy

    with pytest.raises(InputError, match=r"worst at 0\.5 is not finite"):
        measure_surface(LossSurface(brittle, params, [jnp.float32(1)]), QUICK)
