"""Write result rows as JSON lines, CSV, a plot of the trade-off and an HTML page; compare several runs.

  python -m fcvit_jax.evaluation.report results --html report.html                  one run again, gallery included
  python -m fcvit_jax.evaluation.report vit_s vit_b --html both.html --csv both.csv --png both.png

RESULTS are working directories of evaluate.py, or their results.jsonl. Rows of several runs that differ in their
conditions, such as the images or the preprocessing, cause a warning here and on the page.
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fcvit_jax.errors import InputError, OneLineParser, one_line_errors, printable
from fcvit_jax.evaluation.html import render_page
from fcvit_jax.evaluation.plot import MEASURES, plot_pareto
from fcvit_jax.evaluation.runs import ResultRow, Run, differences, read_run
from fcvit_jax.evaluation.table import format_table
from fcvit_jax.files import local_path, write_whole

__all__ = ["format_table", "main", "reports_in", "write_report"]

REPORTS = ("results.jsonl", "results.csv", "pareto.png", "report.html")


def write_report(rows: Sequence[ResultRow], workdir: Path) -> None:
    """Write `REPORTS` into a working directory, each whole or not at all.

    The page includes per_class.json and gallery/*.png from there. Rows without accuracies have neither plot nor page;
    a plot and a page of an earlier run are deleted.
    """
    run = read_run(workdir, rows)
    write_whole(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_whole(workdir / "results.csv", _csv([run]))
    for name, make in (("pareto.png", plot_pareto), ("report.html", _page)):
        (workdir / name).unlink(missing_ok=True)
        if run.evaluated:
            write_whole(workdir / name, make([run]))


def reports_in(workdir: Path) -> list[str]:
    """List the `REPORTS` that exist in a working directory."""
    return [name for name in REPORTS if (workdir / name).exists()]


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(prog="python -m fcvit_jax.evaluation.report", description=__doc__)
    results = "a working directory of evaluate.py, or its results.jsonl"
    parser.add_argument("results", metavar="RESULTS", nargs="+", type=Path, help=results)
    files = {
        "--csv": (_csv, "all rows, with the name of the run in front"),
        "--png": (plot_pareto, "the plot"),
        "--html": (_page, "the page, one file that includes plots and pictures"),
    }
    for flag, (_, what) in files.items():
        parser.add_argument(flag, metavar="FILE", type=Path, help=f"write {what} to FILE")
    axis = f"what --png draws over the cost: {', '.join(MEASURES)}; default: the first that was measured"
    parser.add_argument("--axis", metavar="NAME", default="", choices=["", *MEASURES], help=axis)
    args = vars(parser.parse_args(argv))
    with one_line_errors():
        runs = _read_runs([local_path(path) for path in args["results"]])
        for run in runs:
            print(f"{run.name}\n" * (len(runs) > 1) + format_table(run.rows) + "\n")
        for difference in differences(runs):
            print(f"warning: {difference}")
        for flag, (make, _) in files.items():
            if given := args[flag.removeprefix("--")]:
                path = local_path(given)
                if flag != "--csv" and not all(run.evaluated for run in runs):
                    raise InputError(f"{path} is not written: some results have costs alone; pass only --csv")
                write_whole(path, make(runs, args["axis"]) if make is plot_pareto else make(runs))
                print(f"written: {path}")


def _read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read runs, named after their directories or, if these are not unique, by the paths as given."""
    runs = [read_run(path) for path in paths]
    if len({run.name for run in runs}) < len(runs):
        runs = [replace(run, name=printable(path)) for run, path in zip(runs, paths, strict=True)]
    if len({run.name for run in runs}) < len(runs):
        raise InputError("the same results are given twice: give each run once")
    return runs


def _page(runs: Sequence[Run]) -> bytes:
    return render_page(runs).encode(errors="backslashreplace")


def _csv(runs: Sequence[Run]) -> bytes:
    """Write one line per row, after the run's name if there are several runs; objects and lists as JSON."""
    rows = [{"run": run.name, **row} if len(runs) > 1 else row for run in runs for row in run.rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(v) if isinstance(v, dict | list) else v for key, v in row.items()})
    return text.getvalue().encode(errors="backslashreplace")


if __name__ == "__main__":
    main()
