"""Heads against scikit-learn, on features that are drawn here."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from fcvit_jax.evaluation import features
from fcvit_jax.evaluation.features import Chunks, Features
from fcvit_jax.probe import heads

CLASSES, WIDTH, ROWS = 4, 12, 203
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, CLASSES, ROWS).astype(np.int32)
# With different scales, far from zero, and one of them constant, as trained features may be.
VALUES = RNG.normal(0, 1, (CLASSES, WIDTH))[LABELS] + RNG.normal(0, 1.5, (ROWS, WIDTH))
VALUES = (VALUES * np.geomspace(0.1, 10, WIDTH) + np.linspace(-50, 50, WIDTH)).astype(np.float32)
VALUES[:, 3] = 7.0
HELD = RNG.random(ROWS) < 0.2
GONE = np.arange(ROWS) % 17 == 0  # padding, whose features must not count
TABLE = Features(np.where(GONE[:, None], np.float32(1e6), VALUES), np.where(GONE, -1, LABELS))
FIT, REST = ~HELD & ~GONE, HELD & ~GONE


def chunks(devices=2):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    return Chunks(TABLE, mesh, HELD)


def logits(head, x):
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if head.unit else x
    return x.astype(np.float64) @ head.kernel + head.bias


def centred(x):
    return x - x.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("strength", [1.0, 1e-3])
def test_logistic_regression_equals_scikit_learn(strength):
    head = heads.logistic(chunks(), CLASSES)("fit", strength)
    scaler = StandardScaler().fit(VALUES[FIT].astype(np.float64))
    other = LogisticRegression(C=1 / (FIT.sum() * strength), tol=1e-8, max_iter=10_000)
    other.fit(scaler.transform(VALUES[FIT]), LABELS[FIT])
    expected = other.decision_function(scaler.transform(VALUES))
    np.testing.assert_allclose(centred(logits(head, VALUES)), expected, atol=5e-3 * np.abs(expected).max())
    found = heads.score(head, chunks(), "held")
    assert (found.correct, found.count) == ((expected.argmax(1) == LABELS)[REST].sum(), REST.sum())
    probabilities = other.predict_proba(scaler.transform(VALUES[REST]))
    loss = -np.log(probabilities[np.arange(REST.sum()), LABELS[REST]]).mean()
    assert found.loss == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("rows", ["fit", "all"])
def test_ridge_regression_equals_scikit_learn(rows):
    chosen = {"fit": FIT, "all": ~GONE}[rows]
    head = heads.ridge(chunks(), CLASSES)(rows, 0.1)
    scaler = StandardScaler().fit(VALUES[chosen].astype(np.float64))
    other = Ridge(alpha=0.1 * chosen.sum()).fit(scaler.transform(VALUES[chosen]), np.eye(CLASSES)[LABELS[chosen]])
    np.testing.assert_allclose(logits(head, VALUES), other.predict(scaler.transform(VALUES)), atol=1e-4)


def test_class_means_by_hand():
    head = heads.class_means(chunks(), CLASSES)("fit", 0.0)
    unit = VALUES / np.linalg.norm(VALUES, axis=1, keepdims=True)
    means = np.stack([unit[FIT & (label == LABELS)].mean(axis=0) for label in range(CLASSES)])
    expected = unit @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    np.testing.assert_allclose(logits(head, VALUES), expected, atol=1e-5)


def test_the_factor_on_the_logits_is_the_best():
    head = heads.ridge(chunks(), CLASSES)("fit", 0.1)
    factor = heads.calibrate(head, chunks())
    loss = {times: heads.score(heads.scaled(head, times * factor), chunks(), "held").loss for times in (0.8, 1, 1.25)}
    assert loss[1] == min(loss.values())
    assert heads.calibrate(heads.scaled(head, 3.0), chunks()) == pytest.approx(factor / 3, rel=0.03)


@pytest.mark.parametrize("name", ["logistic", "ridge", "class_means"])
def test_devices_and_chunks_do_not_matter(name, monkeypatch):
    one = getattr(heads, name)(chunks(1), CLASSES)("all", 0.1)
    monkeypatch.setattr(features, "CHUNK", 4 * WIDTH * 7)  # 14 rows at a time, read again for each pass
    monkeypatch.setattr(features, "RESIDENT", 0)
    pieces = chunks(2)
    assert len([*pieces]) == 15
    many = getattr(heads, name)(pieces, CLASSES)("all", 0.1)
    expected = logits(one, VALUES)
    np.testing.assert_allclose(logits(many, VALUES), expected, atol=3e-4 * np.abs(expected).max())
