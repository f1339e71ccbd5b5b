"""One self-contained page of results: an interactive trade-off, a sortable table, classes, pictures, conditions.

`page.html`, beside this file, is its Jinja template: markup, style and script. The page includes every picture and
plotly.js, and requests nothing from a server. plotly.js is the basic bundle, unchanged from the npm package
plotly.js-basic-dist-min 4.1.1 (MIT).
"""

import base64
import gzip
import itertools
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment

from fcvit_jax.evaluation import plot, table
from fcvit_jax.evaluation.accuracy import DISTANCES
from fcvit_jax.evaluation.runs import MEASURED, ResultRow, Run, differences, titled
from fcvit_jax.figures import GREY

GALLERY_BYTES = 48 << 20  # of pictures: a page much larger than that is slow to open

_AXES = {
    "x": {
        "gmacs": "GMACs an image (fewer is cheaper)",
        "images_per_second": "images/s (model alone)",
        "speedup": "speed-up over dense",
        "tokens_out": "tokens after the last layer",
    },
    "y": plot.MEASURES | {"drop": "points of top-1 lost"},
}


def render_page(runs: Sequence[Run]) -> str:
    """Render the page's text."""
    lines = [_line(line, runs) for line in plot.lines(runs)]
    measured = {key for line in lines for point in line["points"] for key in point if point[key] is not None}
    data = {
        **{axis: [[key, name] for key, name in names.items() if key in measured] for axis, names in _AXES.items()},
        "lines": [*lines, *_published_lines(runs)],
        "budgets": [100 * run.dense["top1"] - 1 for run in runs if run.dense and run.dense.get("top1") is not None],
        "classes": [entry for run in runs for entry in _classes(run, runs)],
    }
    warnings, introduction = differences(runs), []
    for run in runs:
        found, (what, where) = table.findings(run), plot.model_and_conditions(run)
        warnings += [text.removeprefix("warning: ") for text in found if text.startswith("warning: ")]
        warnings += [titled(run, f"{text}.", runs) for text in run.rows[0].get("remarks") or ()]
        where = f"{run.name}: {what}, {where}" if len(runs) > 1 else where
        introduction.append((where, [text for text in found if not text.startswith("warning: ")]))
    columns = [(run, table.columns(run, runs)) for run in runs]
    pictures = [(titled(run, path.stem, runs), path) for run in runs for path in run.gallery]
    sizes = itertools.accumulate(path.stat().st_size for _, path in pictures)
    shown = [picture for picture, size in zip(pictures, sizes, strict=True) if size <= GALLERY_BYTES]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.from_string(Path(__file__).with_name("page.html").read_text()).render(
        several=len(runs) > 1,
        title=f"{len(runs)} evaluations compared" if len(runs) > 1 else plot.model_and_conditions(runs[0])[0],
        warnings=warnings,
        introduction=introduction,
        titles=[column.title for column in columns[0][1]],
        rows=[
            (run.name, row["schedule"], [(column.value(row), column.text(row)) for column in shown_columns])
            for run, shown_columns in columns
            for row in run.rows
        ],
        meanings=list(dict.fromkeys(itertools.chain(*map(table.meanings, runs)))),
        pictures=[(title, base64.b64encode(path.read_bytes()).decode()) for title, path in shown],
        left=len(pictures) - len(shown),
        names=[run.name for run in runs],
        conditions=list(_conditions(runs)),
        data=data,
        plotly=gzip.decompress(Path(__file__).with_name("plotly-basic.min.js.gz").read_bytes()).decode(),
    )


def _line(line: plot.Line, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "name": escape(line.name),
        "colour": line.colour,
        "marker": line.marker,
        "dash": line.dash,
        "dense": line.family == "dense",
        "points": [_point(line.run, row, runs) for row in line.rows],
    }


def _point(run: Run, row: ResultRow, runs: Sequence[Run]) -> dict[str, Any]:
    """Convert a row to the units of the axes, and to the text that hovering shows: the row of the table."""
    plain = "gmacs", "images_per_second", "speedup", "tokens_out", "kl", *DISTANCES
    point = {key: row.get(key) for key in plain}
    for key in ("top1", "top1_low", "top1_high", "top5", "agreement"):
        point[key] = None if row.get(key) is None else 100 * row[key]
    change = run.change(row)
    point["drop"] = None if change is None else -change
    title = f"<b>{escape(titled(run, row['schedule'], runs))}</b>"
    cells = [escape(f"{column.title}: {column.text(row)}") for column in table.columns(run)]
    return {**point, "text": "<br>".join((title, *cells))}


def _published_lines(runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    """Make thin lines of the published curves, in the colours of ours; the legend has one line per source."""
    colours = {line.family: line.colour for line in plot.lines(runs)}
    for label, curves in plot.published_curves(runs).items():
        for index, curve in enumerate(curves):
            yield {
                "name": label,
                "colour": colours.get(curve.family, GREY),
                "published": True,
                "legend": index == 0,
                "points": [
                    {
                        "gmacs": (gmacs := curve.gmacs(point)),
                        "top1": point.top1,
                        "text": f"<b>{point.schedule or point.family}</b><br>{label}<br>"
                        f"top-1 %: {point.top1:.2f}<br>GMACs: {gmacs:.2f}",
                    }
                    for point in curve.points
                    if point.top1 is not None
                ],
            }


def _classes(run: Run, runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    """List the counts per class of a run with dense among its schedules; losses are against dense."""
    if run.per_class and "dense" in run.per_class["correct"]:
        correct = dict(run.per_class["correct"])
        yield {
            "classes": run.per_class["classes"],
            "images": run.per_class["images"],
            "dense": correct.pop("dense"),
            "schedules": [[titled(run, name, runs), counts] for name, counts in correct.items()],
        }


def _conditions(runs: Sequence[Run]) -> Iterable[tuple[str, list[str]]]:
    """List the conditions: all fields of the rows except the measured ones, with the text for each run."""
    measured = {"schedule", "stages", "remarks", *MEASURED}
    for field in dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in measured):
        texts = ["; ".join(dict.fromkeys(_in_words(row.get(field)) for row in run.rows)) for run in runs]
        yield field.replace("_", " "), texts


def _in_words(value: object) -> str:
    """Put a JSON value into words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
