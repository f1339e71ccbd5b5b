"""Whether one minimum is flatter than another: ratios with bootstrap intervals, and a verdict.

Intervals are percentiles of a bootstrap over the batches and, if there is noise, over its draws too (arXiv 0712.1111).
Reports on the same batches are paired: every replicate draws the same batches of both. The intervals are about *these
two* sets of parameters, not about other seeds of training.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.files import write_whole
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport

JUDGED = ("worst", "worst_adaptive", "average", "average_adaptive")
FEWEST_BATCHES = 8  # a bootstrap over fewer gives too narrow intervals
REPLICATES = 2000
TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One measure of both, and their ratio with its 95% interval: nan if the other's value may be 0."""

    name: str
    radius: float  # nan for the trace and the eigenvalue
    value: float
    other: float
    ratio: float
    low: float
    high: float
    # "lower" or "higher" if the difference has one sign in 97.5% of the replicates and exceeds float32's rounding.
    reading: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A verdict on the first report: "flatter", "not flatter" or "inconclusive"; reason: why, in one line."""

    ratios: tuple[Ratio, ...]
    paired: bool
    verdict: str
    reason: str

    def write(self, path: Path) -> None:
        """Write it as JSON; nan becomes null."""
        fields = dataclasses.asdict(self)
        for row in fields["ratios"]:
            row |= {key: None for key, value in row.items() if value != value}
        write_whole(path, (json.dumps(fields, indent=2, allow_nan=False) + "\n").encode())


def compare(report: FlatnessReport, other: FlatnessReport, loss_tolerance: float = 0.25) -> Comparison:
    """Compare two reports, at the radii they have in common.

    The verdict counts four measures: the worst case and the average case, each with plain and with adaptive
    perturbations. With plain ones alone, larger weights look flatter; eigenvalue and trace vanish with the loss.

    - "inconclusive" if the larger loss is more than 1 + loss_tolerance times the smaller, or with fewer than 8 batches.
    - "flatter": each of the four is lower at two radii or more, and none is higher at any.
    - "not flatter": one of the four is higher at two radii or more.
    - "inconclusive" otherwise: intervals include 1, or the measures contradict each other.

    Raises InputError as `check_comparable` does.
    """
    check_comparable(report.config, other.config, loss_tolerance)
    fingerprint = report.conditions.get("fingerprint")
    paired = fingerprint is not None and fingerprint == other.conditions.get("fingerprint")
    floor = 10 * max(report.resolution, other.resolution)

    ratios = []
    for name in (name for name in report.curves if name in other.curves):
        ours, theirs = report.curves[name], other.curves[name]
        for i, radius in enumerate(ours.radii):
            if radius in theirs.radii:
                samples = ours.samples[i], theirs.samples[theirs.radii.index(radius)]
                ratios.append(_ratio(name, radius, *samples, paired, 0.0 if name == "keskar" else floor))
    ratios.append(_ratio("trace", math.nan, report.trace, other.trace, paired, 0.0))
    if "largest" in report.eigenvalues.keys() & other.eigenvalues.keys():
        ours, theirs = (each.eigenvalues["largest"].samples[None] for each in (report, other))
        ratios.append(_ratio("largest eigenvalue", math.nan, ours, theirs, paired, 0.0))
    verdict, reason = _judge(report, other, ratios, loss_tolerance)
    return Comparison(tuple(ratios), paired, verdict, reason)


def check_comparable(config: FlatnessConfig, other: FlatnessConfig, loss_tolerance: float) -> None:
    """Raise InputError if two reports measure different things (m, loss, ascent), or the tolerance is invalid."""
    if not 0 <= loss_tolerance < math.inf:
        raise InputError(f"loss_tolerance is {loss_tolerance}: it must be a number, 0 or more")
    for name in ("batch_size", "loss", "ascent_steps", "restarts"):
        here, there = getattr(config, name), getattr(other, name)
        if here != there:
            raise InputError(f"{name} is {here} here and {there} in the other report: pass --{name} {there}")


def interval(samples: np.ndarray) -> tuple[float, float]:
    """Compute the 95% interval of the mean of [draws, batches]."""
    low, high = np.quantile(_replicates(samples, 0), TAILS)
    return float(low), float(high)


def _replicates(samples: np.ndarray, seed: int) -> np.ndarray:
    """Average [draws, batches] with both resampled; the same seed and shape give the same rows and columns."""
    generator = np.random.default_rng(seed)
    draws, batches = samples.shape
    # The batches first, so that different numbers of draws do not undo the pairing.
    columns = generator.multinomial(batches, np.full(batches, 1 / batches), REPLICATES)
    rows = generator.multinomial(draws, np.full(draws, 1 / draws), REPLICATES)
    return np.einsum("nd,db,nb->n", rows, samples, columns, optimize=True) / samples.size


def _ratio(name: str, radius: float, ours: np.ndarray, theirs: np.ndarray, paired: bool, floor: float) -> Ratio:
    value, other = float(ours.mean()), float(theirs.mean())
    a, b = _replicates(ours, 0), _replicates(theirs, 0 if paired else 1)
    least, most = np.quantile(a - b, TAILS)
    reading = "" if abs(value - other) <= floor else "lower" if most < 0 else "higher" if least > 0 else ""
    if other <= floor or np.quantile(b, TAILS[0]) <= 0:
        return Ratio(name, radius, value, other, math.nan, math.nan, math.nan, reading)
    low, high = np.quantile(np.divide(a, b, out=np.full_like(a, np.inf), where=b > 0), TAILS)
    return Ratio(name, radius, value, other, value / other, float(low), float(high), reading)


def _judge(
    report: FlatnessReport, other: FlatnessReport, ratios: list[Ratio], loss_tolerance: float
) -> tuple[str, str]:
    smaller, larger = sorted((report.loss, other.loss))
    if larger > (1 + loss_tolerance) * smaller:
        return "inconclusive", (
            f"the losses do not match: {report.loss:.4g} and {other.loss:.4g} are over {loss_tolerance:.0%} apart: "
            "train both to the same loss, or set --loss_tolerance"
        )
    if (batches := min(len(report.losses), len(other.losses))) < FEWEST_BATCHES:
        return "inconclusive", f"{batches} batches are too few for intervals: take {FEWEST_BATCHES} or more"
    count = {
        name: [sum(row.reading == reading for row in ratios if row.name == name) for reading in ("lower", "higher")]
        for name in JUDGED
    }
    counted = ", ".join(f"{name} {lower} and {higher}" for name, (lower, higher) in count.items())
    counted = f"radii at which it is lower, and higher: {counted}"
    if all(lower >= 2 and not higher for lower, higher in count.values()):
        return "flatter", counted
    if any(higher >= 2 for _, higher in count.values()):
        return "not flatter", counted
    return "inconclusive", counted
