"""Verdicts on reports made up for the purpose."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.flatness.comparison import check_comparable, compare, interval
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport, RadiusCurve
from fcvit_jax.flatness.hessian import Eigenpair

GATES = ("worst", "worst_adaptive", "average", "average_adaptive")


def chosen(name, scale) -> Any:
    return {name: scale}


def made_up(scale=1.0, loss=0.2, batches=16, fingerprint="a", noise=0.05, seed=0, **scales: Any):
    """Make a report with rises of 0.1, 0.4 and 0.9 at three radii, times `scale` (or that of their name), and noise."""
    rng = np.random.default_rng(seed)
    common = 1 + 0.8 * np.random.default_rng(100).uniform(-1, 1, batches)  # how sharp each batch is, for all reports

    def samples(name, draws):
        rises = np.array([0.1, 0.4, 0.9])[:, None, None] * np.broadcast_to(scales.get(name, scale), 3)[:, None, None]
        return rises * common * (1 + noise * rng.normal(size=(3, draws, batches)))

    names = {"worst": 1, "worst_adaptive": 1, "one_step": 1, "keskar": 1, "average": 8, "average_adaptive": 8}
    return FlatnessReport(
        conditions={"fingerprint": fingerprint},
        config=FlatnessConfig(),
        num_params=10,
        weight_norm=1.0,
        gradient_norm=0.1,
        resolution=1e-6,
        losses=np.full(batches, loss),
        accuracies=np.ones(batches),
        eigenvalues={"largest": Eigenpair(5.0 * scale, 0.1, True, 9, 5.0 * scale * common, None)},
        trace=50 * scale * common[None] * (1 + noise * rng.normal(size=(4, batches))),
        curves={name: RadiusCurve((0.1, 0.2, 0.3), samples(name, draws)) for name, draws in names.items()},
        line=None,
        plane=None,
    )


def test_half_as_sharp_is_flatter_and_the_other_way_round_not():
    flat, sharp = made_up(0.5), made_up(1.0, seed=1)
    comparison = compare(flat, sharp)
    assert comparison.verdict == "flatter"
    assert comparison.paired
    assert len(comparison.ratios) == 6 * 3 + 2
    for row in comparison.ratios:
        assert row.reading == "lower"
        assert row.low <= row.ratio <= row.high < 1
        assert row.low < row.high or row.name == "largest eigenvalue"  # the only one without noise
        assert row.ratio == pytest.approx(0.5, rel=0.1)
    back = compare(sharp, flat)
    assert back.verdict == "not flatter"
    assert {row.reading for row in back.ratios} == {"higher"}


def test_alike_is_inconclusive():
    comparison = compare(made_up(seed=1), made_up(seed=2))
    assert comparison.verdict == "inconclusive"
    assert "higher: worst 0 and 0, worst_adaptive 0 and 0, " in comparison.reason
    assert sum(row.low < 1 < row.high for row in comparison.ratios) >= 15
    same = compare(made_up(), made_up())
    assert same.verdict == "inconclusive"
    assert all(row.low == row.ratio == row.high == 1 and row.reading == "" for row in same.ratios)


def test_losses_that_do_not_match_give_no_verdict():
    flat, sharp = made_up(0.5, loss=0.26), made_up(1.0, loss=0.2, seed=1)
    comparison = compare(flat, sharp)
    assert comparison.verdict == "inconclusive"
    assert comparison.reason.startswith("the losses do not match: 0.26 and 0.2 are over 25% apart")
    assert compare(sharp, flat).verdict == "inconclusive"
    assert compare(flat, sharp, loss_tolerance=0.31).verdict == "flatter"
    assert compare(made_up(0.5, loss=0.2499), sharp).verdict == "flatter"
    assert compare(made_up(0.5, loss=0.0), made_up(1.0, loss=0.0, seed=1)).verdict == "flatter"


@pytest.mark.parametrize("gate", GATES)
def test_each_of_the_four_measures_counts(gate):
    sharp = made_up(1.0, seed=1)
    # Lower at two radii is enough, at one not.
    assert compare(made_up(0.5, **chosen(gate, [0.5, 0.5, 1.0])), made_up(1.0, noise=0.2, seed=1)).verdict == "flatter"
    one = compare(made_up(0.5, **chosen(gate, [0.5, 1.0, 1.0]), noise=0.0), made_up(1.0, noise=0.0))
    assert one.verdict == "inconclusive"
    assert f" {gate} 1 and 0" in one.reason
    # Higher at one radius is a contradiction, at two the answer.
    assert compare(made_up(0.5, **chosen(gate, [0.5, 0.5, 2.0])), sharp).verdict == "inconclusive"
    assert compare(made_up(0.5, **chosen(gate, [0.5, 2.0, 2.0])), sharp).verdict == "not flatter"


@pytest.mark.parametrize("other", ["one_step", "keskar"])
def test_the_other_measures_do_not_count(other):
    assert compare(made_up(0.5, **chosen(other, 2.0)), made_up(1.0, seed=1)).verdict == "flatter"


def test_pairing_narrows_the_intervals():
    # Batches differ by up to 80% in sharpness, the reports by 10%: this shows only batch by batch.
    paired = compare(made_up(0.9), made_up(1.0, seed=1))
    apart = compare(made_up(0.9, fingerprint="b"), made_up(1.0, seed=1))
    assert paired.verdict == "flatter"
    assert (apart.paired, apart.verdict) == (False, "inconclusive")
    for close, wide in zip(paired.ratios, apart.ratios, strict=True):
        assert close.ratio == wide.ratio
        assert wide.high - wide.low > 2 * (close.high - close.low)
    unknown = made_up(0.9), made_up(1.0)
    for report in unknown:
        report.conditions.clear()
    assert not compare(*unknown).paired


def test_few_batches_give_no_verdict():
    assert compare(made_up(0.5, batches=8), made_up(1.0, batches=8)).verdict == "flatter"
    comparison = compare(made_up(0.5, batches=7), made_up(1.0, batches=7))
    assert comparison.verdict == "inconclusive"
    assert "7 batches are too few" in comparison.reason


def test_rises_within_rounding_are_not_read():
    flat, sharp = (replace(made_up(scale), resolution=0.03) for scale in (0.5, 1.0))
    readings = {(row.name, row.radius): row.reading for row in compare(flat, sharp).ratios}
    # The difference must be over ten times 0.03: about 0.06 and 0.23 are not, 0.5 is.
    assert [readings["worst", radius] for radius in (0.1, 0.2, 0.3)] == ["", "", "lower"]
    assert readings["keskar", 0.1] == "lower"


def test_no_ratio_to_a_value_that_may_be_zero(tmp_path):
    nothing = made_up(1.0, average=0.0)
    nothing.curves["average"].samples[:] = np.random.default_rng(0).normal(0, 0.1, (3, 8, 16))
    comparison = compare(made_up(1.0), nothing)
    rows = [row for row in comparison.ratios if row.name == "average"]
    assert all(np.isnan([row.ratio, row.low, row.high]).all() for row in rows)
    assert rows[2].reading == "higher"
    comparison.write(tmp_path / "comparison.json")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["verdict"] == comparison.verdict
    (row,) = (row for row in written["ratios"] if (row["name"], row["radius"]) == ("average", 0.3))
    assert row["ratio"] is None
    assert row["value"] == rows[2].value
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.json"]


def test_radii_in_common_are_compared():
    report, other = made_up(0.5), made_up(1.0, seed=1)
    other.curves["worst"] = RadiusCurve((0.2, 0.3, 0.4), other.curves["worst"].samples)
    rows = [row for row in compare(report, other).ratios if row.name == "worst"]
    assert [row.radius for row in rows] == [0.2, 0.3]
    assert rows[0].value == pytest.approx(report.curves["worst"].samples[1].mean())
    assert rows[0].other == pytest.approx(other.curves["worst"].samples[0].mean())


def test_the_interval_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    rows, wide = rng.normal(5, 2, (1, 400)), rng.normal(5, 2, (30, 1)) + rng.normal(0, 0.01, (30, 400))
    low, high = interval(rows)
    assert low == pytest.approx(rows.mean() - 1.96 * 2 / 20, abs=0.05)
    assert high == pytest.approx(rows.mean() + 1.96 * 2 / 20, abs=0.05)
    # Draws differ alike for all batches: there are 30 draws, not 12,000 samples.
    low, high = interval(wide)
    assert high - low == pytest.approx(2 * 1.96 * wide.mean(axis=1).std() / np.sqrt(30), rel=0.1)
    assert interval(np.full((1, 1), 3.0)) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("field", "value"), [("batch_size", 32), ("loss", "sigmoid"), ("ascent_steps", 9), ("restarts", 1)]
)
def test_other_measures_are_not_compared(field, value):
    other = replace(made_up(), config=FlatnessConfig(**{field: value}))
    with pytest.raises(
        InputError, match=rf"{field} is .* here and {value} in the other report: pass --{field} {value}"
    ):
        compare(made_up(), other)


def test_a_tolerance_must_be_finite_and_not_negative():
    for tolerance in (-0.1, np.nan, np.inf):
        with pytest.raises(InputError, match="loss_tolerance is"):
            check_comparable(FlatnessConfig(), FlatnessConfig(), tolerance)
