"""The plots of the study, made from its stored rows."""

import io
from typing import Any

import numpy as np

from fcvit_jax.evaluation.families import family
from fcvit_jax.figures import COLOURS
from study_tables import TITLES, Rows, by_arm, divergence, measures, worst_case


def blank(width: float, height: float) -> Any:
    """Make a figure, sized in inches, that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def plot(rows: Rows) -> bytes:
    """Plot top-1 and KL over GMACs, means over the seeds, and KL over sharpness, one point per run; PNG."""
    figure = blank(15, 4.8)
    accuracy, kl, scatter = figure.subplots(1, 3)
    names = [each["schedule"] for each in rows[0]["schedules"]]
    groups = dict.fromkeys(family(name) for name in names[1:])
    sharpest = worst_case(rows[0])
    for colour, (arm, members) in zip(COLOURS, by_arm(rows).items(), strict=False):
        for style, group in zip(("-", "--", ":"), groups, strict=False):
            shown = [i for i, name in enumerate(names) if family(name) == group]
            x = [rows[0]["schedules"][i]["gmacs"] for i in shown]
            for axes, key, scale in ((accuracy, "top1", 100), (kl, "kl", 1)):
                values = scale * np.array([[row["schedules"][i][key] for i in shown] for row in members])
                label = TITLES[arm] if style == "-" else None
                axes.plot(x, values.mean(axis=0), style, color=colour, marker="o", markersize=4, label=label)
                axes.vlines(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.3)
        scatter.plot(
            [measures(row)[sharpest] for row in members],
            [divergence(row) for row in members],
            "o",
            color=colour,
            label=TITLES[arm],
        )
    lines = ", ".join(f"{style} {group}" for style, group in zip(("solid", "dashed", "dotted"), groups, strict=False))
    accuracy.set(xlabel=f"GMACs ({lines})", ylabel="top-1, %; bars: all seeds", title="accuracy")
    kl.set(
        xlabel="GMACs", ylabel="KL to the dense model, nats", yscale="log", title="how far merging moves predictions"
    )
    scatter.set(xlabel=sharpest, ylabel="mean KL to the dense model", xscale="log", yscale="log", title="a point a run")
    for axes in (accuracy, kl, scatter):
        axes.grid(alpha=0.3)
    accuracy.legend(fontsize=8)
    return png(figure)


def plot_ablation(rows: Rows) -> bytes:
    """Plot top-1 and KL over GMACs, one line per family; PNG."""
    figure = blank(12, 5.2)
    accuracy, kl = figure.subplots(1, 2)
    dense = next(row for row in rows if row["schedule"] == "dense")
    for index, name in enumerate(dict.fromkeys(family(row["schedule"]) for row in rows if row is not dense)):
        points = sorted((row["gmacs"], 100 * row["top1"], row["kl"]) for row in rows if family(row["schedule"]) == name)
        gmacs, top1, divergences = zip(*points, strict=True)
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": "-" if index < len(COLOURS) else "--"}
        accuracy.plot(gmacs, top1, marker="o", markersize=4, label=name, **style)
        kl.plot(gmacs, divergences, marker="o", markersize=4, **style)
    accuracy.axhline(100 * dense["top1"], color="black", linewidth=1, label="dense")
    accuracy.axhspan(100 * dense["top1_low"], 100 * dense["top1_high"], color="black", alpha=0.06)
    accuracy.set(xlabel="GMACs", ylabel="top-1, %; grey: dense's 95 % interval", title="accuracy")
    title = "how far merging moves predictions"
    kl.set(xlabel="GMACs", ylabel="KL to the dense model, nats", yscale="log", title=title)
    for axes in (accuracy, kl):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return png(figure)
