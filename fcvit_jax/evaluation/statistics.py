"""How sure a count is: intervals, paired tests, and counts class by class."""

import math
from statistics import NormalDist

import numpy as np


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a fraction: the fractions that `correct` of `n` does not contradict.

    Unlike `p ± z·sqrt(p(1-p)/n)` it stays within 0 and 1, and is not empty where all or none are right (Wilson 1927).
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    fraction, weight = correct / n, z * z / n
    centre = (fraction + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(fraction * (1 - fraction) / n + weight / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test: the probability that a fair coin divides the changed images this unevenly, or more.

    gained, lost: images that are right under the second of two models alone, and under the first alone. Images on which
    both are right, or both wrong, tell nothing of the difference. Two-sided; 1 where nothing changed.
    """
    n, fewer = gained + lost, min(gained, lost)
    if not n:
        return 1.0
    ways = tail = 1
    for k in range(fewer):  # tail = sum of C(n, k) for k to `fewer`, in whole numbers: no rounding, no underflow
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, tail / 2 ** (n - 1))


def per_class(labels: np.ndarray, right: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class, and those of them that are right: int64 [c] both.

    labels: int [n], or [n, k] padded with -1, where an image counts in each of its classes. right: bool [n].
    """
    labels = labels.reshape(len(right), -1)
    images, correct = (
        np.bincount(of[of >= 0], minlength=num_classes) for of in (labels.ravel(), labels[right].ravel())
    )
    return images, correct


def sigmas(correct: int, n: int, expected: float) -> float:
    """How many binomial standard errors the fraction `correct / n` lies above the expected one (0 < expected < 1)."""
    return (correct / n - expected) / math.sqrt(expected * (1 - expected) / n)
