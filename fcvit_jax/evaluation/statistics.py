"""The certainty of counts: intervals and paired tests."""

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

_DRAWS = 10_000


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of the fraction `correct / n` (Wilson 1927).

    Unlike `p ± z·sqrt(p(1-p)/n)` it stays within 0 and 1, and has a width even if all or none are correct.
    """
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), correct / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1))
    return low if correct else 0.0, high if correct < n else 1.0


def mcnemar(gained: int, lost: int) -> float:
    """Compute McNemar's exact test, two-sided: the probability that a fair coin splits changed images this unevenly.

    gained, lost: images that only the second of two models classifies correctly, and only the first. Images on which
    both are right, or both wrong, carry no information. 1 if nothing changed.
    """
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(itertools.accumulate(range(fewer), lambda ways, k: ways * (n - k) // (k + 1), initial=1))
    return min(1.0, 2 * tail / 2**n)


def sigmas(correct: int, n: int, expected: float) -> float:
    """Count the binomial standard errors by which `correct / n` exceeds the expected fraction (0 < expected < 1)."""
    return (correct / n - expected) / math.sqrt(expected * (1 - expected) / n)


def ratio_of_means(mine: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Compute mean(mine) / mean(other), and the ends of its 95 % interval by a paired bootstrap over images.

    mine, other: a number per image, 0 or more, in the same order. Two means of 0 are equal.
    """
    pairs = np.stack([np.asarray(mine), np.asarray(other)], axis=1)
    generator, count = np.random.default_rng(seed), len(pairs)
    rows = max(1, 1_000_000 // count)  # at a time: memory does not grow with the images
    sizes = [min(rows, _DRAWS - done) for done in range(0, _DRAWS, rows)]
    means = np.concatenate([pairs[generator.integers(count, size=(size, count))].mean(axis=1) for size in sizes])
    low, high = np.quantile(_ratio(means[:, 0], means[:, 1]), (0.025, 0.975))
    return float(_ratio(*pairs.mean(axis=0))), float(low), float(high)


def _ratio(mine: Any, other: Any) -> Any:
    tiny = 1e-12  # both zero: equal
    return (mine + tiny) / (other + tiny)
