"""Reports of flatness as one picture: sharpness over the radius, and the loss along a line and over a plane."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit_jax.flatness.comparison import interval
from fcvit_jax.flatness.flatness_report import FlatnessReport

PANELS = (
    ("worst", "worst case, plain", r"radius $\|\delta\|$"),
    ("worst_adaptive", "worst case, adaptive", r"radius $\|\delta / |w|\|$"),
    ("average", "average case, plain", r"noise $\sigma$"),
    ("average_adaptive", "average case, adaptive", r"noise $\sigma$ / |w|"),
)


STYLES = ({"color": "C0", "ls": "-"}, {"color": "C1", "ls": "--"})  # of the first report and the second


def plot_flatness(reports: Sequence[FlatnessReport]) -> bytes:
    """PNG of one report or two; bars are 95% intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [report.conditions.get("checkpoint", "parameters") for report in reports]
    styled = [{**style, "label": name} for style, name in zip(STYLES, names, strict=False)]
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for place, (curve, title, label) in zip(axes[:, :2].flat, PANELS, strict=True):
        for report, style in zip(reports, styled, strict=True):
            _plot_curve(place, report, curve, style)
        place.set(title=title, xlabel=label, ylabel="rise of the loss", xscale="log", yscale="log")
        radii = sorted({radius for report in reports for radius in report.curves[curve].radii})
        place.set_xticks(radii, [f"{radius:g}" for radius in radii])
        place.set_xticks([], minor=True)
        place.legend(fontsize=8)
        place.grid(alpha=0.3)
    _plot_line(axes[0, 2], reports, styled)
    _plot_plane(axes[1, 2], reports)
    first = reports[0]
    figure.suptitle(
        f"{' and '.join(names)} on {first.conditions.get('dataset', 'given batches')}: {len(first.losses)} batches of "
        f"m = {first.config.batch_size}, loss {' and '.join(f'{report.loss:.3g}' for report in reports)}",
        fontsize=10,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    return picture.getvalue()


def _plot_curve(axes: Any, report: FlatnessReport, name: str, style: dict[str, Any]) -> None:
    curve = report.curves[name]
    values = curve.samples.mean(axis=(1, 2))
    low, high = np.array([interval(samples) for samples in curve.samples]).T
    shown = values > 0  # the rest has no logarithm
    bars = np.maximum(np.stack([values - low, high - values]), 0.0)[:, shown]
    axes.errorbar(np.array(curve.radii)[shown], values[shown], bars, marker="o", capsize=3, **style)
    if name.startswith("worst"):
        one_step = report.curves[name.replace("worst", "one_step")]
        heights = one_step.samples.mean(axis=(1, 2))
        thin = style | {"ls": ":", "lw": 1, "label": f"{style['label']}, one step"}
        axes.plot(np.array(one_step.radii)[heights > 0], heights[heights > 0], **thin)


def _plot_line(axes: Any, reports: Sequence[FlatnessReport], styled: Sequence[dict[str, Any]]) -> None:
    for report, style in zip(reports, styled, strict=True):
        if report.line is not None:
            axes.plot(np.linspace(-1, 1, len(report.line)), report.line, **style)
            axes.legend(fontsize=8)
    axes.set(title="random line, filter-normalised", xlabel="filter norms", ylabel="loss")
    axes.grid(alpha=0.3)


def _plot_plane(axes: Any, reports: Sequence[FlatnessReport]) -> None:
    planes = [report.plane for report in reports if report.plane is not None]
    axes.set(title="random plane: lines of equal loss", xlabel="filter norms", ylabel="filter norms")
    if not planes:
        return
    lowest, highest = min(plane.min() for plane in planes), max(plane.max() for plane in planes)
    levels = lowest + (highest - lowest) * np.array([0.03, 0.1, 0.25, 0.5, 0.8])
    for plane, style in zip(planes, STYLES, strict=False):
        side = np.linspace(-1, 1, len(plane))
        lines = axes.contour(side, side, plane.T, levels=levels, colors=style["color"], linestyles=style["ls"])
        axes.clabel(lines, fontsize=7, fmt="%.2g")
    axes.plot(0, 0, color="black", marker="+")
