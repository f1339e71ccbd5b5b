"""One self-contained page of results: the trade-off to point at, the table to sort, classes, pictures, conditions.

`page.html`, beside this file, is its frame: markup, style and script, with {{names}} for what is filled in here. The
page holds plotly.js and every picture, and asks nothing of a server.
"""

import base64
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import plot, table
from fcvit_jax.evaluation.rows import RESULTS, Row, Run, differences

GALLERY_BYTES = 48 << 20  # of pictures: a page much larger than that is slow to open

_AXES = {
    "x": {
        "gmacs": "GMACs an image (fewer is cheaper)",
        "images_per_second": "images/s (model alone)",
        "speedup": "speed-up over dense",
        "tokens_out": "tokens after the last layer",
    },
    "y": {
        "top1": "top-1 (%)",
        "top5": "top-5 (%)",
        "drop": "points of top-1 lost",
        "agreement": "first guesses as dense (%)",
        "kl": "KL divergence from dense (nats)",
    },
}


def render_page(runs: Sequence[Run]) -> str:
    """The page's text. Raises InputError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("the HTML report needs plotly: pip install plotly") from None
    lines = [_line(line) for line in plot.lines(runs)]
    measured = {key for line in lines for point in line["points"] for key in point if point[key] is not None}
    data = {
        **{axis: [[key, name] for key, name in names.items() if key in measured] for axis, names in _AXES.items()},
        "lines": [*lines, *_published_lines(runs)],
        "budgets": [100 * run.dense["top1"] - 1 for run in runs if run.dense and run.dense.get("top1") is not None],
        "classes": [entry for run in runs for entry in _classes(run, len(runs) > 1)],
    }
    fields = {
        "title": escape(f"{len(runs)} evaluations compared" if len(runs) > 1 else plot.describe(runs[0])[0]),
        "introduction": "\n".join(_introduction(runs)),
        "table": _table(runs),
        "meanings": "".join(
            f"<br>{escape(text)}" for text in dict.fromkeys(itertools.chain(*map(table.meanings, runs)))
        ),
        "gallery": _gallery(runs),
        "conditions": _conditions(runs),
        "data": _as_json(data),
        "plotly": get_plotlyjs(),
    }
    frame = Path(__file__).with_name("page.html").read_text()
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fields[found[1]], frame)


def _as_json(data: object) -> str:
    """JSON that cannot end the script element that holds it."""
    return json.dumps(data, allow_nan=False).replace("<", r"\u003c")


def _introduction(runs: Sequence[Run]) -> Iterable[str]:
    for difference in differences(runs):
        yield f'<p class="warning">Warning: {escape(difference)}</p>'
    for run in runs:
        what, where = plot.describe(run)
        told = f"{run.name}: {what}, {where}" if len(runs) > 1 else where
        findings = table.findings(run)
        warnings = [sentence for sentence in findings if sentence.startswith("warning: ")]
        for warning in warnings:
            yield f'<p class="warning">{escape(warning.replace("w", "W", 1))}</p>'
        others = " ".join(sentence for sentence in findings if sentence not in warnings)
        yield f'<p><span class="soft">{escape(told)}</span><br>{escape(others)}</p>'


def _line(line: plot.Line) -> dict[str, Any]:
    return {
        "name": escape(line.name),
        "colour": line.colour,
        "marker": line.marker,
        "dash": line.dash,
        "dense": line.family == "dense",
        "points": [_point(line, row) for row in line.rows],
    }


def _point(line: plot.Line, row: Row) -> dict[str, Any]:
    """A row's numbers in the units of the axes, and the text that pointing at it shows: the row of the table."""
    point = {key: row.get(key) for key in ("gmacs", "images_per_second", "speedup", "tokens_out", "kl")}
    for key in ("top1", "top1_low", "top1_high", "top5", "agreement"):
        point[key] = None if row.get(key) is None else 100 * row[key]
    change = line.run.change(row)
    point["drop"] = None if change is None else -change
    title = f"{line.run.name}: {row['schedule']}" if line.name != line.family else row["schedule"]
    cells = [f"{column.title}: {column.text(row)}" for column in table.columns(line.run)]
    return {**point, "text": "<br>".join((f"<b>{escape(title)}</b>", *map(escape, cells)))}


def _published_lines(runs: Sequence[Run]) -> Iterable[dict[str, Any]]:
    """Thin lines of the published curves, in the colours of ours; one of each source stands in the legend."""
    colours = {line.family: line.colour for line in plot.lines(runs)}
    for label, curves in plot.published_curves(runs).items():
        for index, curve in enumerate(curves):
            points = [point for point in curve.points if point.top1 is not None]
            yield {
                "name": label,
                "colour": colours.get(curve.family, plot.GREY),
                "published": True,
                "legend": index == 0,
                "points": [
                    {
                        "gmacs": (gmacs := curve.gmacs(point)),
                        "top1": point.top1,
                        "text": f"<b>{point.schedule or point.family}</b><br>{label}<br>"
                        f"top-1 %: {point.top1:.2f}<br>GMACs: {gmacs:.2f}",
                    }
                    for point in points
                ],
            }


def _table(runs: Sequence[Run]) -> str:
    """All rows, those of several runs one below the other; a cell's data-value is what it is sorted by."""
    columns = {run.name: table.columns(run, runs) for run in runs}
    several = len(runs) > 1
    heads = [f'<th class="name"><button>{name}</button></th>' for name in ["run"] * several + ["schedule"]]
    heads += [f"<th><button>{escape(column.title)}</button></th>" for column in columns[runs[0].name]]
    lines = []
    for run in runs:
        for row in run.rows:
            names = (escape(name) for name in [run.name] * several + [row["schedule"]])
            cells = [f'<td class="name" data-value="{name}">{name}</td>' for name in names]
            for column in columns[run.name]:
                value = "" if column.value(row) is None else column.value(row)
                cells.append(f'<td data-value="{value}">{escape(column.text(row))}</td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _classes(run: Run, several: bool) -> Iterable[dict[str, Any]]:
    """The counts of a run's classes, if dense is among its schedules: what a class loses is lost against dense."""
    if not run.per_class or "dense" not in run.per_class["correct"]:
        return
    correct = dict(run.per_class["correct"])
    dense = correct.pop("dense")
    names = {name: f"{run.name}: {name}" if several else name for name in correct}
    schedules = [[names[name], counts] for name, counts in correct.items()]
    yield {
        "classes": run.per_class["classes"],
        "images": run.per_class["images"],
        "dense": dense,
        "schedules": schedules,
    }


def _gallery(runs: Sequence[Run]) -> str:
    """The pictures as data URIs, as many as a page can bear."""
    paths = [(run, path) for run in runs for path in run.gallery]
    figures, size = [], 0
    for run, path in paths:
        picture = path.read_bytes()
        size += len(picture)
        if size > GALLERY_BYTES:
            break
        uri = "data:image/png;base64," + base64.b64encode(picture).decode()
        name = escape(f"{run.name}: {path.stem}" if len(runs) > 1 else path.stem)
        image = f'<img src="{uri}" alt="{name}">'
        figures.append(f'<figure><div class="box">{image}</div><figcaption>{name}</figcaption></figure>')
    if not paths:
        return ""
    left = len(paths) - len(figures)
    more = f'<p class="soft">{left} more in the folder gallery.</p>' if left else ""
    told = (
        "Patches that became one token have their mean colour, and outlines of one colour wherever they lie. "
        "Click a picture for its full size."
    )
    return f'<h2>Pictures</h2><p class="soft">{told}</p><div class="gallery">{"".join(figures)}</div>{more}'


def _conditions(runs: Sequence[Run]) -> str:
    """Whatever a row says beside its results, a column a run: under which conditions it was measured."""
    fields = dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in RESULTS)
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    lines = [f"<thead><tr><th></th>{heads}</tr></thead>"] if len(runs) > 1 else []
    for field in fields:
        values = [dict.fromkeys(_told(row.get(field)) for row in run.rows) for run in runs]
        cells = "".join(f"<td>{escape('; '.join(value))}</td>" for value in values)
        lines.append(f"<tr><th>{escape(field.replace('_', ' '))}</th>{cells}</tr>")
    return f'<table class="words">{"".join(lines)}</table>'


def _told(value: object) -> str:
    """A JSON value in words."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_told, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
