"""The tables and plots of docs/flatness_and_compression.md and docs/training.md, made from the stored rows.

    python benchmarks/study_report.py           rewrites them
    python benchmarks/study_report.py --check   writes nothing, and fails if a table differs from the rows

A table lies in a page between `<!-- SETTING: TABLE -->` and `<!-- end -->`.
"""

import argparse
import re

from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.files import write_whole
from study import ROWS, read
from study_plots import plot, plot_ablation
from study_tables import ABLATIONS, TABLES, Rows, choice, select

PAGE = ROWS.parents[1] / "flatness_and_compression.md"
PAGES = (PAGE, PAGE.with_name("training.md"))
ABLATION, COST = ROWS.with_name("ablation.jsonl"), ROWS.with_name("cost.jsonl")
BLOCK = re.compile(r"(<!-- (\w+): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    args = parser.parse_args(argv)
    with one_line_errors():
        if absent := [path for path in (*PAGES, ROWS, ABLATION) if not path.exists()]:
            raise InputError(f"{absent[0]} is missing: run benchmarks/study.py, and write the page around its tables")
        for page in PAGES:
            before = page.read_text()
            after = fill(before, read(ROWS), read(ABLATION), read(COST))
            if args.check and after != before:
                raise InputError(f"{page} differs from the stored rows: run benchmarks/study_report.py")
            if not args.check:
                write_whole(page, after.encode())
        if args.check:
            return
        for setting in dict.fromkeys(row["setting"] for row in read(ROWS)):
            write_whole(ROWS.with_name(f"{setting}.png"), plot(select(read(ROWS), setting)))
        write_whole(ABLATION.with_suffix(".png"), plot_ablation(read(ABLATION)))


def fill(page: str, runs: Rows, ablation: Rows, costs: Rows) -> str:
    """Rewrite every table of a page between its marks."""

    def table(found: re.Match[str]) -> str:
        _, setting, name, _ = found.groups()
        if setting == "ablation":
            return f"{found[1]}{ABLATIONS[name](ablation)}{found[4]}"
        if name == "choice":
            return f"{found[1]}{choice(select(runs, setting), costs)}{found[4]}"
        return f"{found[1]}{TABLES[name](select(runs, setting))}{found[4]}"

    return BLOCK.sub(table, page)


if __name__ == "__main__":
    main()
