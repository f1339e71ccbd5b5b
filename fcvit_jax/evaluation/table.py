"""Result rows as a table: its columns, and the text for a terminal, at most 100 columns wide."""

import itertools
import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fcvit_jax.evaluation.rows import Row, Run, devices, family

WIDTH = 100
_NAME_WIDTH = 24  # longer names of schedules, the explicit forms, stand on a line of their own


class Column(NamedTuple):
    """text: of a row's cell, "-" where it was not measured; value: what the row is sorted by, None there.

    wide: left out of the terminal's table, for which it is too much.
    """

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], float | None]
    wide: bool = False


def columns(run: Run, runs: Sequence[Run] = ()) -> list[Column]:
    """The columns behind the schedule's name, less those that no row of the run has a value for, or of all `runs`."""
    measured = {
        column.title
        for other in runs or (run,)
        for column in _columns(other)
        if any(column.value(row) is not None for row in other.rows)
    }
    return [column for column in _columns(run) if column.title in measured]


def _columns(run: Run) -> list[Column]:
    dense = run.dense

    def saved(row: Row) -> float | None:
        return dense["gmacs"] / row["gmacs"] if dense and dense.get("gmacs") and row.get("gmacs") else None

    return [
        _column("top-1 %", "top1", "{:.2f}", 100),
        Column("95 % interval", _interval, lambda row: row.get("top1_low")),
        Column("change", lambda row: _change(run, row), run.change),
        _column("top-5 %", "top5", "{:.2f}", 100, wide=True),
        _column("agree %", "agreement", "{:.1f}", 100),
        _column("KL", "kl", "{:.4f}", wide=True),
        _column("images", "num_images", "{:,}"),
        _column("tokens", "tokens_out", "{}", wide=True),
        Column("GMACs", lambda row: _gmacs(row.get("gmacs")), lambda row: row.get("gmacs")),
        _derived("saved", saved, "{:.2f}x", wide=True),
        _column("GMACs, published", "published_gmacs", "{:.2f}", wide=True),
        _column("published", "published_top1", "{:.2f}", 100),
        Column("images/s", _images_per_second, lambda row: row.get("images_per_second")),
        _column("speed-up", "speedup", "{:.2f}x"),
    ]


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with what the columns mean and the common conditions below."""
    run, first = Run("", tuple(rows)), rows[0]
    shown = [column for column in columns(run) if not (run.evaluated and column.wide)]
    if run.evaluated:
        told = [
            f"{first.get('checkpoint')} on {first.get('dataset')}; pixels: {first.get('preprocess')}",
            f"{first.get('dtype')}, batch {first.get('batch_size')}, {devices(first)}",
            *findings(run),
        ]
    else:
        told = [f"{first.get('checkpoint')}: nothing was evaluated."]
    return "\n".join([*_align(shown, rows), "", *_wrap([*told, *meanings(run, shown)])])


def findings(run: Run) -> list[str]:
    """What stands out, a sentence each; what should be looked into begins with "warning: "."""
    told = [_against_reported(run.dense), _within_a_point(run)]
    if excluded := max(row.get("images_excluded") or 0 for row in run.rows):
        told.append(f"{excluded:,} images are left out of all counts.")
    if (spread := max(row.get("images_per_second_spread") or 0 for row in run.rows)) > 0.25:
        told.append(f"note: timed blocks differed by up to {spread:.0%}: was the machine busy with something else?")
    return [sentence for sentence in told if sentence]


def meanings(run: Run, shown: Sequence[Column] = ()) -> list[str]:
    """What the columns mean, by default all that the run has, a sentence each."""
    words = {
        "change": "points of top-1 against dense",
        "agree %": "first guesses equal to dense's",
        "GMACs": "1e9 multiply-accumulates of one image",
        "saved": "those of dense over these",
        "tokens": "left after the last layer",
    }
    titles = {column.title for column in shown or columns(run)}
    told = ["; ".join(f"{title}: {text}" for title, text in words.items() if title in titles) + "."]
    if any(map(differs, run.rows)):
        told.append("* more than chance: McNemar's test on the same images, p < 0.05, each row by itself.")
    if "published" in titles:
        told.append(
            "published: others' top-1 % with these weights, most of it read off figures; see docs/published.md."
        )
    if "images/s" in titles:
        told.append("images/s: the model alone, compiled and warm, the median of blocks; no decoding, no transfer.")
    return told


def differs(row: Row) -> bool:
    """Whether other images are right than under the dense model, by McNemar's test at 5 %."""
    return row.get("mcnemar_p") is not None and row["mcnemar_p"] < 0.05


def _against_reported(dense: Row | None) -> str:
    """How far the dense model is from what is reported of its weights; a warning beyond three standard errors."""
    if not dense or dense.get("reference_top1") is None or dense.get("top1") is None:
        return ""
    told = f"dense has {100 * dense['top1']:.2f} %, published is {100 * dense['reference_top1']:.2f} %"
    apart = dense.get("reference_sigmas")
    told += "" if apart is None else f", {abs(apart):.1f} standard errors apart"
    return f"warning: {told} (pixels: {dense.get('preprocess')})." if abs(apart or 0) > 3 else f"{told}."


def _within_a_point(run: Run) -> str:
    """The cheapest and the fastest schedule that costs no more than a point of top-1."""
    dense = run.dense
    rows = [row for row in run.rows if row is not dense and (run.change(row) or 0) >= -1 and row.get("gmacs")]
    if not dense or not rows or run.change(dense) is None:
        return ""
    least = min(rows, key=lambda row: row["gmacs"])
    saved = dense["gmacs"] / least["gmacs"]
    told = f"Within a point of dense: {least['schedule']} has the fewest GMACs ({saved:.2f}x fewer)"
    timed = [row for row in rows if row.get("speedup")]
    if timed:
        fastest = max(timed, key=lambda row: row["speedup"])
        name = "it" if fastest is least else fastest["schedule"]
        told += f", {name} is the fastest ({fastest['speedup']:.2f}x)"
    return told + "."


def _column(title: str, field: str, form: str, scale: float = 1, wide: bool = False) -> Column:
    def value(row: Row) -> float | None:
        return None if row.get(field) is None else scale * row[field]

    return _derived(title, value, form, wide)


def _derived(title: str, value: Callable[[Row], float | None], form: str, wide: bool = False) -> Column:
    def text(row: Row) -> str:
        found = value(row)
        return "-" if found is None else form.format(found)

    return Column(title, text, value, wide)


def _interval(row: Row) -> str:
    low, high = row.get("top1_low"), row.get("top1_high")
    return "-" if low is None or high is None else f"{100 * low:.2f}-{100 * high:.2f}"


def _change(run: Run, row: Row) -> str:
    points = run.change(row)
    return "-" if points is None else f"{points:+.2f}{'*' if differs(row) else ''}"


def _gmacs(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}" if value < 1 else f"{value:.2f}"


def _images_per_second(row: Row) -> str:
    speed = row.get("images_per_second")
    return "-" if speed is None else f"{speed:.1f}" if speed < 100 else f"{speed:,.0f}"


def _align(table: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """Header, rule and rows, in groups of a family each where there are many."""
    cells = [[column.title, *map(column.text, rows)] for column in table]
    for column in cells:
        if any(cell.endswith("*") for cell in column):  # the others make room for the mark: digits below digits
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


def _wrap(told: Sequence[str]) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line for sentence in told for line in wrapper.wrap(sentence)]
