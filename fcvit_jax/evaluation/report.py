"""Result rows as files: JSON lines, CSV, the plot of the trade-off and a page; and several runs side by side.

  python -m fcvit_jax.evaluation.report results --html report.html                  one run again, gallery included
  python -m fcvit_jax.evaluation.report vit_s vit_b --html both.html --csv both.csv --png both.png

RESULTS are working directories of evaluate.py, or their results.jsonl. What makes rows of different runs a poor
comparison, such as other images or other preprocessing, is said here and on the page.
"""

import argparse
import csv
import importlib.util
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.evaluation.html import render_page
from fcvit_jax.evaluation.plot import plot_pareto
from fcvit_jax.evaluation.rows import Row, Run, differences, read_run
from fcvit_jax.evaluation.table import format_table
from fcvit_jax.files import write_whole

__all__ = ["format_table", "main", "write_report"]


def write_report(rows: Sequence[Row], workdir: Path) -> list[str]:
    """Write results.jsonl, results.csv, pareto.png and report.html into `workdir`, each whole or not at all.

    The page has what lies there of per_class.json and gallery/*.png. Rows without accuracies have neither plot nor
    page, and without plotly there is no page; those of an earlier run go. Returns the names of what was written.
    """
    run = read_run(workdir, rows)
    written = ["results.jsonl", "results.csv"]
    write_whole(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_whole(workdir / "results.csv", _csv([run]))
    for name in ("pareto.png", "report.html"):
        (workdir / name).unlink(missing_ok=True)
    if run.evaluated:
        write_whole(workdir / "pareto.png", plot_pareto([run]))
        written.append("pareto.png")
        if importlib.util.find_spec("plotly"):
            write_whole(workdir / "report.html", _page([run]))
            written.append("report.html")
        else:
            print("report.html is left out: it needs plotly (pip install plotly)", file=sys.stderr)
    return written


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        runs = _read_runs(args.results)
        for run in runs:
            print(f"{run.name}\n" * (len(runs) > 1) + format_table(run.rows) + "\n")
        for difference in differences(runs):
            print(f"warning: {difference}")
        for path, make in ((args.csv, _csv), (args.png, plot_pareto), (args.html, _page)):
            if path and make is not _csv and not all(run.evaluated for run in runs):
                raise InputError(f"{path} is not written: of some results only the costs are known; pass --csv alone")
            if path:
                write_whole(path, make(runs))
                print(f"written: {path}")


def _read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs under names that tell them apart: their directories', or the paths as given."""
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=str(path)) for run, path in zip(runs, paths, strict=True)]
    if len({run.name for run in runs}) < len(runs):
        raise InputError("the same results are given twice: name each run once")
    return runs


def _page(runs: Sequence[Run]) -> bytes:
    return render_page(runs).encode()


def _csv(runs: Sequence[Run]) -> bytes:
    """A line a row, of several runs behind the run's name; objects and lists as JSON."""
    rows = [{"run": run.name, **row} if len(runs) > 1 else row for run in runs for row in run.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(v) if isinstance(v, dict | list) else v for key, v in row.items()})
    return text.getvalue().encode()


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m fcvit_jax.evaluation.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = "a working directory of evaluate.py, or its results.jsonl"
    parser.add_argument("results", metavar="RESULTS", nargs="+", type=Path, help=what)
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the page there: one file, plots and pictures inside"
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write all rows there, the run's name in front")
    parser.add_argument("--png", metavar="FILE", type=Path, help="write the plot there")
    return parser


if __name__ == "__main__":
    main()
