"""Neighbours' votes against scikit-learn."""

from typing import Any

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from fcvit_jax.evaluation import features
from fcvit_jax.evaluation.features import Features
from fcvit_jax.evaluation.neighbours import TEMPERATURE, K, rank_labels, vote

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 6, 150).astype(np.int32)
CENTRES = RNG.normal(0, 1, (6, 8))
VALUES = (CENTRES[LABELS] + RNG.normal(0, 1.5, (150, 8))).astype(np.float32)
QUERIES = (CENTRES[RNG.integers(0, 6, 70)] + RNG.normal(0, 1.5, (70, 8))).astype(np.float32)
LEFT_OUT = np.arange(150) % 11 == 0
HELD = np.arange(150) % 5 == 0
TABLE = Features(VALUES, np.where(LEFT_OUT, -1, LABELS))


def expected(rows):
    """Compute by scikit-learn the share of each class in the votes of the nearest."""
    near: dict[str, Any] = dict(
        metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    )
    model = KNeighborsClassifier(min(K, rows.sum()), **near).fit(VALUES[rows].astype(np.float64), LABELS[rows])
    return model.predict_proba(QUERIES.astype(np.float64)), model.predict(QUERIES.astype(np.float64))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_votes_equal_scikit_learn(devices, held, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4 * 8 * 13)  # fewer rows on a device than neighbours
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    votes = vote(TABLE.chunks(mesh, HELD), QUERIES, 6, mesh, held=held)
    shares, predictions = expected(~LEFT_OUT & (held | ~HELD))
    np.testing.assert_allclose(votes / votes.sum(axis=1, keepdims=True), shares, atol=1e-5)
    np.testing.assert_array_equal(votes.argmax(axis=1), predictions)


def test_fewer_images_than_neighbours():
    few = Features(VALUES[:5], LABELS[:5])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    votes = vote(few.chunks(mesh), QUERIES, 6, mesh)
    shares, _ = expected(np.arange(150) < 5)
    there = np.unique(LABELS[:5])
    np.testing.assert_allclose((votes / votes.sum(axis=1, keepdims=True))[:, there], shares, atol=1e-5)


def test_ranks_with_ties_and_several_labels():
    votes = np.array([[0.0, 3.0, 0.0, 3.0], [1.0, 0.0, 0.0, 0.0]])
    assert rank_labels(votes, np.array([3, 2])).tolist() == [1, 2]
    assert rank_labels(votes, np.array([[3, 1], [2, -1]])).tolist() == [0, 2]
