"""Correct a head for one schedule in closed form, from the logits of unlabelled images with and without merging.

Part of what merging does to the logits is one linear map for all images. Ridge regression finds it, and it is folded
into the head, so that inference costs nothing more.

Shape letters: n images, c classes, k the smaller of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import log_softmax

from fcvit_jax.checkpoint import Checkpoint, recommend, save_checkpoint
from fcvit_jax.search.findings import Correction, judge

# The ridge, in units of the mean variance of a logit; infinite: the mean shift alone.
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0, math.inf)
_FOLDS = 4


class LogitMap(NamedTuple):
    """A map z -> z + (z - mean) @ left @ right + shift. mean, shift: float64 [c]; left: [c, k]; right: [k, c]."""

    mean: np.ndarray
    left: np.ndarray
    right: np.ndarray
    shift: np.ndarray

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        return logits + (logits - self.mean) @ self.left @ self.right + self.shift


def divergences(dense: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """Compute KL(dense || merged) in nats of each row of logits [n, c], float64 [n]."""
    expected = log_softmax(dense.astype(np.float64), axis=1)
    return (np.exp(expected) * (expected - log_softmax(merged.astype(np.float64), axis=1))).sum(axis=1)


def ridge_maps(dense: np.ndarray, merged: np.ndarray, strengths: Sequence[float]) -> list[LogitMap]:
    """Fit dense logits by merged ones, both [n, c], once for each strength of the ridge."""
    merged = merged.astype(np.float64)
    left = dense - merged
    mean, shift = merged.mean(axis=0), left.mean(axis=0)
    u, s, v = np.linalg.svd(merged - mean, full_matrices=False)
    explained, unit = s[:, None] * (u.T @ (left - shift)), (s**2).sum() / len(mean) or 1.0
    return [LogitMap(mean, v.T, explained / (s[:, None] ** 2 + each * unit), shift) for each in strengths]


def fit_map(dense: np.ndarray, merged: np.ndarray) -> tuple[LogitMap, float]:
    """Fit with the strength of the lowest cross-validated divergence; returns that strength too."""
    fold, found = np.arange(len(dense)) % _FOLDS, np.zeros(len(STRENGTHS))
    for each in range(_FOLDS):
        fit, out = fold != each, fold == each
        maps = ridge_maps(dense[fit], merged[fit], STRENGTHS)
        found += [divergences(dense[out], mapped(merged[out])).sum() for mapped in maps]
    best = STRENGTHS[int(found.argmin())]
    return ridge_maps(dense, merged, [best])[0], best


@dataclass(frozen=True)
class Logits:
    """Logits of the dense model and under a schedule, float32 [n, c]; the first `chosen_by` images choose."""

    dense: np.ndarray
    merged: np.ndarray
    chosen_by: int


def correct_head(
    checkpoint: Checkpoint, schedule: str, budget: str, logits: Logits, out: Path, seed: int
) -> Correction:
    """Fit on the images that choose, judge on the others; write a checkpoint if it is better beyond chance.

    schedule: the explicit form. out: a directory that does not exist.
    """
    fit, rest = slice(logits.chosen_by), slice(logits.chosen_by, None)
    mapped, strength = fit_map(logits.dense[fit], logits.merged[fit])
    dense, merged = logits.dense[rest], logits.merged[rest]
    judgement = judge(list(divergences(dense, mapped(merged))), list(divergences(dense, merged)), seed)
    written = str(out) if judgement.better else None
    if judgement.better:
        params, config = fold_map(checkpoint, mapped)
        provenance = checkpoint.meta.get("provenance", {}) | {
            "corrected_for": schedule,
            "corrected_from": str(checkpoint.path),
        }
        facts = {"class_names": checkpoint.class_names, "provenance": provenance}
        path = save_checkpoint(out, config, params, checkpoint.preprocess, **facts)
        recommend(replace(checkpoint, path=path), {budget: schedule})
    return Correction(schedule, None if math.isinf(strength) else strength, judgement, written)


def fold_map(checkpoint: Checkpoint, mapped: LogitMap) -> tuple[Any, Any]:
    """Return parameters and configuration whose head computes the mapped logits."""
    params = dict(jax.tree.map(np.asarray, checkpoint.params))
    for name in {"head", "head_dist"} & params.keys():
        kernel = params[name]["kernel"].astype(np.float64)
        bias = params[name].get("bias", np.zeros(kernel.shape[1]))
        kernel = kernel + kernel @ mapped.left @ mapped.right
        params[name] = {"kernel": kernel.astype(np.float32), "bias": mapped(bias.astype(np.float64)).astype(np.float32)}
    return params, replace(checkpoint.config, head_bias=True)
