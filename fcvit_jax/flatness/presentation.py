"""Reports and comparisons as a picture and as text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.figures import COLOURS, blank_figure, plain, png
from fcvit_jax.files import write_whole
from fcvit_jax.flatness.comparison import Comparison, interval
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
_AXES = {
    "worst": r"radius $\|\delta\|$",
    "worst_adaptive": r"radius $\|\delta / |w|\|$",
    "average": r"noise $\sigma$",
    "average_adaptive": r"noise $\sigma$ / |w|",
}
_STYLES = ({"color": COLOURS[0], "ls": "-"}, {"color": COLOURS[1], "ls": "--"})  # of the first report and the second


def present(workdir: Path, reports: Sequence[FlatnessReport], comparison: Comparison | None = None) -> str:
    """Write flatness.png of one report or two, and comparison.json beside it; return the text to print."""
    (workdir / "comparison.json").unlink(missing_ok=True)  # of an earlier run
    lines = [format_curves(reports[0])]
    if comparison:
        comparison.write(workdir / "comparison.json")
        lines = [format_comparison(comparison), f"verdict: {comparison.verdict} ({comparison.reason})"]
    write_whole(workdir / "flatness.png", plot_flatness(reports))
    there = ", ".join(name for name in FILES if (workdir / name).exists())
    return "\n\n".join([*map(describe_report, reports), *lines, f"written into {workdir}: {there}"])


def format_curves(report: FlatnessReport) -> str:
    """Format how much the loss rises at every radius, with 95% intervals."""
    rows = [("rise of the loss", "radius", "value", "95% interval")]
    for name, curve in report.curves.items():
        for radius, samples in zip(curve.radii, curve.samples, strict=True):
            low, high = interval(samples)
            value = samples.mean()
            mark = "" if name == "keskar" or abs(value) > 10 * report.resolution else " (rounding)"
            rows.append((_TITLES[name], f"{radius:g}", f"{value:.4g}{mark}", f"{low:.4g} .. {high:.4g}"))
    return align(rows)


def format_comparison(comparison: Comparison) -> str:
    """Format both values, their ratio and its interval, for each measure."""
    rows = [("rise of the loss", "radius", "first", "second", "ratio", "95% interval", "first is")]
    for row in comparison.ratios:
        title, radius = _TITLES.get(row.name, row.name), "" if math.isnan(row.radius) else f"{row.radius:g}"
        ratio, bounds = f"{row.ratio:.3g}", f"{row.low:.3g} .. {row.high:.3g}"
        if math.isnan(row.ratio):
            ratio = bounds = "-"
        rows.append((title, radius, f"{row.value:.4g}", f"{row.other:.4g}", ratio, bounds, row.reading or "?"))
    pairing = "the same batches, paired" if comparison.paired else "other batches, not paired: the intervals are wider"
    return f"{align(rows)}\n({pairing})"


def describe_report(report: FlatnessReport) -> str:
    """Describe the conditions, and every measure that has no radius; a few lines."""
    count, conditions = report.config.batch_size, report.conditions
    lines = [
        f"{conditions.get('checkpoint', 'parameters')} on {conditions.get('dataset', 'given batches')}: "
        f"{len(report.losses) * count:,} images in batches of {count}, "
        f"schedule {conditions.get('schedule', '-')}, float32",
        f"loss {report.loss:.4g}, accuracy {report.accuracies.mean():.2%}, norm of the gradient "
        f"{report.gradient_norm:.3g}, of the {report.num_params:,} weights {report.weight_norm:.4g}",
    ]
    for name, pair in report.eigenvalues.items():
        found = f"residual {pair.residual:.2g}, {pair.products} products"
        state = "" if pair.converged else ", not converged: raise --eigen_steps"
        lines.append(f"{name} eigenvalue of the Hessian {pair.value:.4g} ({found}{state})")
    error = standard_error(report.trace)
    lines.append(f"trace {report.trace.mean():.4g} (standard error {error:.2g}, {len(report.trace)} probes)")
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells as a table: the first row is the head; the first column is left-aligned, others right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    lines = [form.format(*row).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def plot_flatness(reports: Sequence[FlatnessReport]) -> bytes:
    """Plot one report or two as PNG: sharpness over the radius with 95% intervals, loss along a line, over a plane."""
    names = [_shorten(report.conditions.get("checkpoint", "parameters")) for report in reports]
    styled = [(report, style | {"label": name}) for report, style, name in zip(reports, _STYLES, names, strict=False)]
    figure = blank_figure(9, 11.5)
    axes = figure.subplots(3, 2)
    for place, (curve, label) in zip(axes[:2].flat, _AXES.items(), strict=True):
        for report, style in styled:
            _plot_curve(place, report, curve, style)
        place.set(title=_TITLES[curve], xlabel=label, ylabel="rise of the loss", xscale="log", yscale="log")
        radii = sorted({radius for report in reports for radius in report.curves[curve].radii})
        place.set_xticks(radii, [f"{radius:g}" for radius in radii])
        place.set_xticks([], minor=True)
        place.legend(fontsize=8)
        plain(place)
    _plot_line(axes[2, 0], styled)
    _plot_plane(axes[2, 1], reports)
    first = reports[0]
    figure.suptitle(
        f"{' and '.join(names)} on {first.conditions.get('dataset', 'given batches')}: {len(first.losses)} batches of "
        f"m = {first.config.batch_size}, loss {' and '.join(f'{report.loss:.3g}' for report in reports)}",
        fontsize=10,
    )
    return png(figure)


def _shorten(name: str, longest: int = 36) -> str:
    """Keep the end of a long path: a legend wider than its axes would leave them no room."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


def _plot_curve(axes: Any, report: FlatnessReport, name: str, style: dict[str, Any]) -> None:
    curve = report.curves[name]
    values = curve.samples.mean(axis=(1, 2))
    low, high = np.array([interval(samples) for samples in curve.samples]).T
    shown = values > 0  # others have no logarithm
    bars = np.maximum(np.stack([values - low, high - values]), 0.0)[:, shown]
    axes.errorbar(np.array(curve.radii)[shown], values[shown], bars, marker="o", capsize=3, **style)
    if name.startswith("worst"):
        one_step = report.curves[name.replace("worst", "one_step")]
        heights = one_step.samples.mean(axis=(1, 2))
        thin = style | {"ls": ":", "lw": 1, "label": f"{style['label']}, one step"}
        axes.plot(np.array(one_step.radii)[heights > 0], heights[heights > 0], **thin)


def _plot_line(axes: Any, styled: Sequence[tuple[FlatnessReport, dict[str, Any]]]) -> None:
    for report, style in styled:
        if report.line is not None:
            axes.plot(np.linspace(-1, 1, len(report.line)), report.line, **style)
            axes.legend(fontsize=8)
    axes.set(title="random line, filter-normalised", xlabel="filter norms", ylabel="loss")
    plain(axes)


def _plot_plane(axes: Any, reports: Sequence[FlatnessReport]) -> None:
    planes = [report.plane for report in reports if report.plane is not None]
    axes.set(title="random plane: lines of equal loss", xlabel="filter norms", ylabel="filter norms")
    if not planes:
        return
    lowest, highest = min(plane.min() for plane in planes), max(plane.max() for plane in planes)
    levels = lowest + (highest - lowest) * np.array([0.03, 0.1, 0.25, 0.5, 0.8])
    for plane, style in zip(planes, _STYLES, strict=False):
        side = np.linspace(-1, 1, len(plane))
        lines = axes.contour(side, side, plane.T, levels=levels, colors=style["color"], linestyles=style["ls"])
        axes.clabel(lines, fontsize=7, fmt="%.2g")
    axes.plot(0, 0, color="black", marker="+")
