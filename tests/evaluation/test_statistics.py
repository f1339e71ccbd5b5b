import itertools
import math

import numpy as np
import pytest

from fcvit_jax.evaluation.outcomes import Outcomes
from fcvit_jax.evaluation.result_rows import class_table
from fcvit_jax.evaluation.statistics import mcnemar, sigmas, wilson


def test_wilson_is_where_the_score_test_turns():
    # The definition: the observed fraction is z standard errors of each end away from that end.
    for correct, n, z in (
        (81, 263, 1.959963984540054),
        (3, 10, 1.959963984540054),
        (40_701, 50_000, 1.959963984540054),
    ):
        for end in wilson(correct, n):
            assert abs(sigmas(correct, n, end)) == pytest.approx(z, rel=1e-9)
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20) == (0.0, pytest.approx(0.1611, abs=5e-5))  # from the same table
    assert wilson(20, 20) == (pytest.approx(1 - 0.1611, abs=5e-5), 1.0)


def test_wilson_is_that_of_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for (correct, n), confidence in itertools.product(((0, 7), (5, 7), (7, 7), (307, 372)), (0.9, 0.95, 0.99)):
        interval = binomtest(correct, n).proportion_ci(confidence, method="wilson")
        assert wilson(correct, n, confidence) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(1, 0) == 1.0
    assert mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar(5, 1) == mcnemar(1, 5)
    assert mcnemar(3, 3) == 1.0  # both tails hold the middle
    assert mcnemar(0, 3000) == 0.0  # below what a float holds


def test_mcnemar_is_scipys_binomial_test():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for gained, lost in ((2, 9), (6, 10), (40, 41), (500, 620), (1200, 1201)):
        assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue, rel=1e-9)


def test_mcnemar_keeps_its_level():
    # At 0.05, at most 5 % of pairs from a fair coin count as different; a test that is too liberal finds more.
    n = 40
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    assert sum(p for k, p in enumerate(chance) if mcnemar(k, n - k) < 0.05) <= 0.05


@pytest.mark.parametrize(
    ("labels", "right", "images", "correct"),
    [
        ([2, 0, 2, 2], [True, False, False, True], [1, 3], [0, 2]),
        ([[1, 3], [3, -1], [0, -1]], [True, False, True], [1, 1, 2], [1, 1, 1]),
    ],
)
def test_counts_by_class(labels, right, images, correct):
    names, rank = np.arange(len(right)).astype(str), np.where(right, 0, 7)[None]
    outcomes = Outcomes(names, np.array(labels), rank, rank, rank.astype(float), np.zeros((1, 3, 0)), np.zeros(3, int))
    table = class_table(outcomes, ["dense"], tuple("abcd"))
    there = ["abcd"[label] for label in sorted({*np.ravel(labels)} - {-1})]
    assert table == {"classes": there, "images": images, "correct": {"dense": correct}}


def test_sigmas():
    assert sigmas(75, 100, 0.8) == pytest.approx(-0.05 / 0.04)
