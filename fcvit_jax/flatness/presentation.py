"""Reports and comparisons as a picture and as text."""

import math
from collections.abc import Sequence
from pathlib import Path

from fcvit_jax.files import write_whole
from fcvit_jax.flatness.comparison import Comparison, interval
from fcvit_jax.flatness.figure import plot_flatness
from fcvit_jax.flatness.flatness_report import FlatnessReport
from fcvit_jax.flatness.hessian import standard_error

FILES = ("flatness.json", "flatness_other.json", "comparison.json", "flatness.png")

_TITLES = {
    "worst": "worst case, plain",
    "worst_adaptive": "worst case, adaptive",
    "one_step": "one step of SAM, plain",
    "one_step_adaptive": "one step, adaptive",
    "keskar": "Keskar's sharpness, %",
    "average": "average case, plain",
    "average_adaptive": "average case, adaptive",
}


def present(workdir: Path, reports: Sequence[FlatnessReport], comparison: Comparison | None = None) -> str:
    """Write flatness.png of one report or two, and comparison.json beside it; returns the text to print."""
    (workdir / "comparison.json").unlink(missing_ok=True)  # of an earlier run
    lines = [format_curves(reports[0])]
    if comparison:
        comparison.write(workdir / "comparison.json")
        lines = [format_comparison(comparison), f"verdict: {comparison.verdict} ({comparison.reason})"]
    write_whole(workdir / "flatness.png", plot_flatness(reports))
    there = ", ".join(name for name in FILES if (workdir / name).exists())
    return "\n\n".join([*map(describe, reports), *lines, f"written into {workdir}: {there}"])


def format_curves(report: FlatnessReport) -> str:
    """How much the loss rises at every radius, with 95% intervals."""
    rows = [("rise of the loss", "radius", "value", "95% interval")]
    for name, curve in report.curves.items():
        for radius, samples in zip(curve.radii, curve.samples, strict=True):
            low, high = interval(samples)
            value = samples.mean()
            mark = "" if name == "keskar" or abs(value) > 10 * report.resolution else " (rounding)"
            rows.append((_TITLES[name], f"{radius:g}", f"{value:.4g}{mark}", f"{low:.4g} .. {high:.4g}"))
    return align(rows)


def format_comparison(comparison: Comparison) -> str:
    """Both values, their ratio and its interval, for each measure."""
    rows = [("rise of the loss", "radius", "first", "second", "ratio", "95% interval", "first is")]
    for row in comparison.ratios:
        title, radius = _TITLES.get(row.name, row.name), "" if math.isnan(row.radius) else f"{row.radius:g}"
        ratio, bounds = f"{row.ratio:.3g}", f"{row.low:.3g} .. {row.high:.3g}"
        if math.isnan(row.ratio):
            ratio = bounds = "-"
        rows.append((title, radius, f"{row.value:.4g}", f"{row.other:.4g}", ratio, bounds, row.reading or "?"))
    pairing = "the same batches, paired" if comparison.paired else "other batches, not paired: the intervals are wider"
    return f"{align(rows)}\n({pairing})"


def describe(report: FlatnessReport) -> str:
    """What was measured on what, and all that is not a measure at a radius; a few lines."""
    config, conditions = report.config, report.conditions
    batches = len(report.losses)
    lines = [
        f"{conditions.get('checkpoint', 'parameters')} on {conditions.get('dataset', 'given batches')}: "
        f"{batches * config.batch_size:,} images in batches of {config.batch_size}, "
        f"schedule {conditions.get('schedule', '-')}, float32",
        f"loss {report.loss:.4g}, accuracy {report.accuracies.mean():.2%}, norm of the gradient "
        f"{report.gradient_norm:.3g}, of the {report.num_params:,} weights {report.weight_norm:.4g}",
    ]
    for name, pair in report.eigenvalues.items():
        state = "" if pair.converged else ", not converged: raise --eigen_steps"
        lines.append(
            f"{name} eigenvalue of the Hessian {pair.value:.4g} (residual {pair.residual:.2g}, {pair.products} "
            f"products{state})"
        )
    error = standard_error(report.trace)
    lines.append(f"trace {report.trace.mean():.4g} (standard error {error:.2g}, {len(report.trace)} probes)")
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table: the first row is the head; the first column stands left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if not i else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
