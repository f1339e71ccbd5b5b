"""Result rows as a table: its columns, and the text for a terminal, at most 100 columns wide."""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fcvit_jax.evaluation.families import family
from fcvit_jax.evaluation.runs import ResultRow, Run, devices

WIDTH = 100
_NAME_WIDTH = 24  # longer names of schedules get their own line


class Column(NamedTuple):
    """A column. value: rows are sorted by it; None if not measured. form: the text of a cell, from value and row.

    wide: left out of the terminal's table to save room.
    """

    title: str
    value: Callable[[ResultRow], float | None]
    form: Callable[[float, ResultRow], str]
    wide: bool = False

    def text(self, row: ResultRow) -> str:
        value = self.value(row)
        return "-" if value is None else self.form(value, row)


def columns(run: Run, runs: Sequence[Run] = ()) -> list[Column]:
    """List the columns after the schedule's name for which any row of the run, or of all `runs`, has a value."""
    measured = {
        column.title
        for other in runs or (run,)
        for column in _columns(other)
        if any(column.value(row) is not None for row in other.rows)
    }
    return [column for column in _columns(run) if column.title in measured]


def _columns(run: Run) -> list[Column]:
    dense = (run.dense or {}).get("gmacs")

    def saved(row: ResultRow) -> float | None:
        return dense / row["gmacs"] if dense and row.get("gmacs") else None

    return [
        _field("top-1 %", "top1", "{:.2f}", 100),
        Column("95 % interval", _get("top1_low"), lambda low, row: f"{100 * low:.2f}-{100 * row['top1_high']:.2f}"),
        Column("change", run.change, lambda points, row: f"{points:+.2f}{'*' if differs(row) else ''}"),
        _field("top-5 %", "top5", "{:.2f}", 100, wide=True),
        _field("agree %", "agreement", "{:.1f}", 100),
        _field("KL", "kl", "{:.4f}", wide=True),
        _field("cosine", "cosine", "{:.4f}"),
        _field("5th pct.", "cosine_p5", "{:.4f}"),
        _field("distance", "distance", "{:.4f}", wide=True),
        _field("patches", "patch_cosine", "{:.4f}"),
        _field("5th pct. of patches", "patch_cosine_p5", "{:.4f}", wide=True),
        _field("distance of patches", "patch_distance", "{:.4f}", wide=True),
        _field("images", "num_images", "{:,}"),
        _field("tokens", "tokens_out", "{}", wide=True),
        Column("GMACs", _get("gmacs"), lambda value, _: f"{value:#.3g}" if value < 1 else f"{value:.2f}"),
        Column("saved", saved, lambda value, _: f"{value:.2f}x", wide=True),
        _field("GMACs, published", "published_gmacs", "{:.2f}", wide=True),
        _field("published", "published_top1", "{:.2f}", 100),
        Column("images/s", _get("images_per_second"), lambda v, _: f"{v:.1f}" if v < 100 else f"{v:,.0f}"),
        _field("speed-up", "speedup", "{:.2f}x"),
    ]


def _get(field: str, scale: float = 1) -> Callable[[ResultRow], float | None]:
    return lambda row: None if row.get(field) is None else scale * row[field]


def _field(title: str, field: str, form: str, scale: float = 1, wide: bool = False) -> Column:
    return Column(title, _get(field, scale), lambda value, _: form.format(value), wide)


def format_table(rows: Sequence[ResultRow]) -> str:
    """Format the rows as aligned text, followed by the meaning of the columns and the common conditions."""
    run, first = Run("", tuple(rows)), rows[0]
    shown = [column for column in columns(run) if not (run.evaluated and column.wide)]
    remarks = [f"{first.get('checkpoint')}: nothing was evaluated."]
    if run.evaluated:
        remarks = [
            f"{first.get('checkpoint')} on {first.get('dataset')}; pixels: {first.get('preprocess')}",
            f"{first.get('dtype')}, batch {first.get('batch_size')}, {devices(first)}",
            *findings(run),
        ]
    return "\n".join([*_align(shown, rows), "", *_wrap([*remarks, *meanings(run, shown)])])


def findings(run: Run) -> list[str]:
    """List remarkable findings, one sentence each; a possible problem begins with "warning: "."""
    found, dense = [], run.dense or {}
    if dense.get("reference_top1") is not None and dense.get("top1") is not None:
        apart = dense.get("reference_sigmas")
        text = f"dense has {100 * dense['top1']:.2f} %, published is {100 * dense['reference_top1']:.2f} %"
        text += "" if apart is None else f", {abs(apart):.1f} standard errors apart"
        found.append(f"warning: {text} (pixels: {dense.get('preprocess')})." if abs(apart or 0) > 3 else f"{text}.")
    # The cheapest and the fastest schedule that lose at most a point of top-1.
    merged = [row for row in run.rows if row["schedule"] != "dense" and row.get("gmacs")]
    if near := [row for row in merged if (change := run.change(row)) is not None and change >= -1 - 1e-9]:
        least = min(near, key=lambda row: row["gmacs"])
        saved = dense["gmacs"] / least["gmacs"]
        text = f"Within a point of dense on these images: {least['schedule']} has the fewest GMACs ({saved:.2f}x fewer)"
        if timed := [row for row in near if row.get("speedup")]:
            fastest = max(timed, key=lambda row: row["speedup"])
            name = "it" if fastest is least else fastest["schedule"]
            text += f", {name} is the fastest ({fastest['speedup']:.2f}x)"
        found.append(f"{text}.")
    if excluded := max(row.get("images_excluded") or 0 for row in run.rows):
        found.append(f"{excluded:,} images are left out of all counts.")
    if skipped := max(row.get("images_skipped") or 0 for row in run.rows):
        found.append(f"warning: {skipped:,} images were skipped, which could not be read: no count has them.")
    if (spread := max(row.get("images_per_second_spread") or 0 for row in run.rows)) > 0.25:
        found.append(f"note: timed blocks differed by up to {spread:.0%}: was the machine busy with something else?")
    return found


def meanings(run: Run, shown: Sequence[Column] = ()) -> list[str]:
    """Explain columns, by default all of the run, one sentence each."""
    words = {
        "change": "points of top-1 against dense",
        "agree %": "predictions equal to dense's",
        "cosine": "of the features and dense's",
        "5th pct.": "of the images, 5 % are below",
        "distance": "the difference over dense's length",
        "patches": "the cosine of the patches' features",
        "GMACs": "1e9 multiply-accumulates of one image",
        "saved": "GMACs of dense over these",
        "tokens": "left after the last layer",
    }
    titles = {column.title for column in shown or columns(run)}
    found = ["; ".join(f"{title}: {text}" for title, text in words.items() if title in titles) + "."]
    if near := next((row["neighbours"] for row in run.rows if row.get("neighbours")), None):
        found.append(f"top-1: by the nearest neighbours, {near}.")
    if any(map(differs, run.rows)):
        found.append("* more than chance: McNemar's test on the same images, p < 0.05, each row by itself.")
    if "published" in titles:
        found.append("published: top-1 % as others report it for these weights; see docs/published.md.")
    if "images/s" in titles:
        found.append("images/s: the model alone, compiled and warm, the median of blocks; no decoding, no transfer.")
    return found


def differs(row: ResultRow) -> bool:
    """Return whether the images classified correctly differ from the dense model's, by McNemar's test at 5 %."""
    return row.get("mcnemar_p") is not None and row["mcnemar_p"] < 0.05


def _align(table: Sequence[Column], rows: Sequence[ResultRow]) -> list[str]:
    """Format header, rule and rows; many rows are grouped by family."""
    cells = [[column.title, *map(column.text, rows)] for column in table]
    for column in cells:
        if any(cell.endswith("*") for cell in column):  # pad the others to align the digits
            column[:] = [cell if cell.endswith("*") else f"{cell} " for cell in column]
    widths = [max(map(len, column)) for column in cells]
    names = ["schedule", *(row["schedule"] for row in rows)]
    first = max(len(name) for name in names if len(name) <= _NAME_WIDTH)
    lines = []
    for name, *values in zip(names, *cells, strict=True):
        numbers = "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
        lines.append(f"{name:<{first}}{numbers}" if len(name) <= first else f"{name}\n{'':<{first}}{numbers}")
    if len(rows) > 10:
        families = ["dense", "dense", *(family(row["schedule"]) for row in rows)]
        new = (group not in ("dense", before) for before, group in itertools.pairwise(families))
        lines = [f"\n{line}" if begins else line for line, begins in zip(lines, new, strict=True)]
    return [lines[0], "-" * (first + sum(widths) + 2 * len(widths)), *lines[1:]]


def _wrap(sentences: Sequence[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line for sentence in sentences for line in wrapper.wrap(sentence)]
