"""The trade-off as a picture: top-1 over multiply-accumulates and over images a second."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import published
from fcvit_jax.evaluation.families import family, point_label
from fcvit_jax.evaluation.runs import ResultRow, Run, titled
from fcvit_jax.figures import COLOURS, GREY, HEIGHT, WIDTH, blank_figure, plain, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPXh<"  # 9 markers and 8 colours: no two of 72 families look alike
_DASHES = ("-", "-.", ":")
_THIN: dict[str, Any] = dict(linewidth=0.9, linestyle="--", marker="x", markersize=4, alpha=0.65)  # published curves
# Fields of a row that can be drawn over the cost; by default the first that was measured.
MEASURES = {
    "top1": "top-1 (%)",
    "cosine": "cosine of the features with dense's",
    "top5": "top-5 (%)",
    "agreement": "first guesses as dense (%)",
    "kl": "KL divergence from dense (nats)",
    "distance": "distance of the features from dense's",
    "patch_cosine": "cosine of the patches' features with dense's",
    "patch_distance": "distance of the patches' features from dense's",
}


class Line(NamedTuple):
    """The rows of one family of schedules in one run. marker, dash: indices, in addition to colour.

    measure: the one of `MEASURES` that is drawn.
    """

    name: str
    family: str
    run: Run
    rows: tuple[ResultRow, ...]
    colour: str
    marker: int
    dash: int
    measure: str = "top1"

    def height(self, row: ResultRow) -> float:
        """Return the height at which to draw a row."""
        return row[self.measure] * (100 if "%" in MEASURES[self.measure] else 1)

    def rows_with(self, key: str) -> list[ResultRow]:
        """Return the rows that have a field, in its order."""
        return sorted((row for row in self.rows if row.get(key)), key=lambda row: row[key])


def lines(runs: Sequence[Run], measure: str = "") -> list[Line]:
    """Make the lines of a plot, with dense models: one colour per family, and one marker and dash per run.

    measure: one of `MEASURES`; by default the first that was measured. Raises InputError if it was not.
    """
    there = [name for name in MEASURES if any(row.get(name) is not None for run in runs for row in run.rows)]
    measure = measure or (there or ["top1"])[0]
    if there and measure not in there:
        raise InputError(f"axis {measure!r} was not measured: choose one of {', '.join(there)}")
    families = dict.fromkeys(family(row["schedule"]) for run in runs for row in run.rows)
    order = [name for name in families if name != "dense"]
    found = []
    for number, run in enumerate(runs):
        drawn = [row for row in run.rows if row.get(measure) is not None]
        for name in dict.fromkeys(family(row["schedule"]) for row in drawn):
            rows = tuple(row for row in drawn if family(row["schedule"]) == name)
            index = -1 if name == "dense" else order.index(name)
            colour = "#000000" if name == "dense" else COLOURS[index % len(COLOURS)]
            marker = number if len(runs) > 1 else index
            found.append(Line(titled(run, name, runs), name, run, rows, colour, marker, number, measure))
    return found


def published_curves(runs: Sequence[Run]) -> dict[str, list[published.Curve]]:
    """Find published curves of the runs' weights, by the legend's text; none if the runs used other images."""
    seen = [row for run in runs for row in run.rows if row.get("reference_top1") is not None]
    curves: dict[str, list[published.Curve]] = {}
    for model in dict.fromkeys(row.get("model") for row in seen):
        for curve in published.curves(model or ""):
            curves.setdefault(f"published ({curve.source.label})", []).append(curve)
    return curves


def plot_pareto(runs: Sequence[Run], measure: str = "") -> bytes:
    """Draw the figure of `draw_pareto` as PNG."""
    return png(draw_pareto(runs, measure))


def draw_pareto(runs: Sequence[Run], measure: str = "") -> "Figure":
    """Draw top-1 with its interval, or another measure, over GMACs and, if timed, over images/s.

    Each family of schedules is a line. Published curves of the same weights are thin lines behind them, over GMACs
    alone, since their images/s are another machine's. At least one row must have been measured. measure: as `lines`
    takes it.
    """
    from matplotlib.lines import Line2D

    drawn = lines(runs, measure)
    measure = drawn[0].measure
    curves = published_curves(runs) if measure == "top1" else {}
    panels = [
        ("gmacs", "GMACs an image (fewer is cheaper)"),
        ("images_per_second", "images/s, model alone (more is faster)"),
    ]
    panels = [(key, label) for key, label in panels if any(line.rows_with(key) for line in drawn)]
    figure = blank_figure(WIDTH, HEIGHT * len(panels) + 0.8)
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (key, label) in zip(grid, panels, strict=True):
        if key == "gmacs":
            colours = {line.family: line.colour for line in drawn}
            for curve in itertools.chain(*curves.values()):
                points = sorted((curve.gmacs(point), point.top1) for point in curve.points if point.top1 is not None)
                axes.plot(*zip(*points, strict=True), color=colours.get(curve.family, GREY), zorder=1.5, **_THIN)
        for line in drawn:
            _draw_line(axes, line, key)
        for run in runs:
            if measure == "top1" and run.dense and run.dense.get("top1") is not None:
                style = dict(color="#999999", linestyle=":", linewidth=1, zorder=0)
                text = "dense - 1 point" if run is runs[0] else None
                axes.axhline(100 * run.dense["top1"] - 1, label=text, **style)
        axes.set_xlabel(label)
        axes.set_ylabel(MEASURES[measure])
        axes.margins(0.07)
        plain(axes)
    handles, labels = grid[0].get_legend_handles_labels()
    for label in curves:
        handles.append(Line2D([], [], color=GREY, **_THIN))
        labels.append(label)
    legend = None
    for columns in range(min(4, len(labels)), 0, -1):  # as many as fit
        if legend is not None:
            legend.remove()
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
        if legend.get_window_extent().width <= figure.bbox.width:
            break
    assert legend is not None
    titles = [titled(run, ", ".join(model_and_conditions(run)), runs) for run in runs]
    for text in (figure.suptitle("\n".join(titles), fontsize=9), *legend.get_texts()):
        text.set_parse_math(False)  # a path may hold a dollar sign
    figure.draw_without_rendering()  # places the axes, which the labels need to know, and must not move again
    figure.set_layout_engine("none")
    for axes, (key, _) in zip(grid, panels, strict=True):
        _label_rates(axes, drawn, key)
    return figure


def model_and_conditions(run: Run) -> tuple[str, str]:
    """Describe the weights and the data; and the number of images, the precision and the device."""
    row = run.rows[0]
    parts = [f"{row['num_images']:,} images"] if row.get("num_images") else []
    parts += [str(row[key]) for key in ("dtype", "device") if row.get(key)]
    return f"{row.get('checkpoint')} on {row.get('dataset')}", ", ".join(parts)


def _draw_line(axes: Any, line: Line, key: str) -> None:
    rows = line.rows_with(key)
    if not rows:
        return
    x, y = [row[key] for row in rows], [line.height(row) for row in rows]
    dense = line.family == "dense"
    marker, size = ("*", 13) if dense else (_MARKERS[line.marker % len(_MARKERS)], 5)
    style = dict(marker=marker, markersize=size, linestyle=_DASHES[line.dash % len(_DASHES)])
    axes.plot(x, y, color=line.colour, label=line.name, linewidth=1.6, markeredgecolor="white", **style)
    bounds = [(row[key], row.get("top1_low"), row.get("top1_high")) for row in rows if line.measure == "top1"]
    bounds = [(place, 100 * low, 100 * high) for place, low, high in bounds if low is not None and high is not None]
    if bounds:
        axes.vlines(*zip(*bounds, strict=True), color=line.colour, alpha=0.3, linewidth=1.2)


def _label_rates(axes: Any, drawn: Sequence[Line], key: str) -> None:
    """Write the rates beside the points, the ends of each line first, without covering a point or another label."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    renderer, size = axes.figure.canvas.get_renderer(), 6 * axes.figure.dpi / 72
    spots, taken = [], []
    for line in drawn:
        rows = line.rows_with(key)
        for index, row in enumerate(rows):
            spot, inner = (row[key], line.height(row)), min(index, len(rows) - 1 - index)
            x, y = axes.transData.transform(spot)
            taken.append(Bbox.from_bounds(x - size / 2, y - size / 2, size, size))
            if text := point_label(row["schedule"]):
                spots.append(((inner > 0, inner % 2), text, spot, line.colour))
    halo = [withStroke(linewidth=2, foreground="white")]
    for _, text, spot, colour in sorted(spots, key=lambda spot: spot[0]):
        for right, above in ((1, 1), (-1, -1), (1, -1), (-1, 1)):
            sides = dict(ha="left" if right > 0 else "right", va="bottom" if above > 0 else "top")
            label = axes.annotate(text, spot, (4 * right, 4 * above), textcoords="offset points", **sides)
            label.set(fontsize=8, color=colour, path_effects=halo, zorder=4)
            box = label.get_window_extent(renderer)
            if not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()
