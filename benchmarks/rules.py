"""Compare merge rules: what each does to a model's predictions at equal token counts, as a table and a plot.

    python benchmarks/rules.py vit_s folder:photos --rules tome,nearest --schedules tome:4-20:4,s2dfe_r16 --out rules

Writes rules.md, rules.csv and rules.png into --out, beside what evaluate.py writes. Rerun the same command to resume.

    GMACs     of the schedule, the rule's own included
    KL        mean over images of KL(dense || merged) of the predicted classes
    ratio     KL over that of the first rule at the same schedule
    95 %      bootstrap interval of the ratio over images
    agree     share of images with the dense model's top-1 class
    speed     images/s over those of the first rule, in alternating blocks of one run (--throughput_blocks)
"""

import argparse
import csv
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

import fcvit_jax as fc
from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.errors import OneLineParser, one_line_errors
from fcvit_jax.evaluation.statistics import ratio_of_means
from fcvit_jax.figures import COLOURS, HEIGHT, WIDTH, blank_figure, plain, png
from fcvit_jax.models.schedule import cross_rules, parse_schedules

COLUMNS = ("schedule", "rule", "GMACs", "KL", "ratio", "95 %", "agree", "top-1", "speed")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    keep_freed_memory()
    rules, checkpoint = re.split(r",(?![^(]*\))", args.rules), fc.load_checkpoint(args.checkpoint)
    bases = parse_schedules(args.schedules, checkpoint.config.depth, checkpoint.recommended)
    pairs = [(base, rule) for base in bases for rule in rules]
    name = {(base, rule): next(iter(cross_rules({base: bases[base]}, rule))) for base, rule in pairs}
    rows = fc.evaluate(
        checkpoint,
        args.dataset,
        ["dense", *name.values()],
        workdir=args.out,
        batch_size=args.batch_size,
        limit=args.limit,
        throughput_blocks=args.throughput_blocks,
    )
    named = {row["schedule"]: row for row in rows}
    with np.load(args.out / "outcomes.npz") as outcomes:
        kl = dict(zip(outcomes["schedules"].tolist(), outcomes["kl"].astype(np.float64), strict=True))
    table = []
    for base, rule in pairs:
        row, first = named[name[base, rule]], named[name[base, rules[0]]]
        ratio, low, high = ratio_of_means(kl[name[base, rule]], kl[name[base, rules[0]]])
        speed = row["images_per_second"] / first["images_per_second"] if args.throughput_blocks else None
        interval = f"{low:.2f} to {high:.2f}"
        values = base, rule, row["gmacs"], row["kl"], ratio, interval, row["agreement"], row["top1"], speed
        table.append(dict(zip(COLUMNS, values, strict=True)))
    write(table, args.out)
    draw(table, args.out / "rules.png")
    print((args.out / "rules.md").read_text())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint directory or packaged:NAME")
    parser.add_argument("dataset", help="labelled images: folder:PATH, digits:test or tfds:NAME/SPLIT")
    parser.add_argument("--rules", default="tome,nearest", help="merge rules; the first is the reference")
    parser.add_argument("--schedules", default="tome:4-20:4", help="schedules without rules, or ranges")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="the first images only")
    parser.add_argument("--throughput_blocks", type=int, default=0, help="timed blocks a schedule; 0: none")
    return parser.parse_args(argv)


def write(table: list[dict[str, Any]], directory: Path) -> None:
    with (directory / "rules.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row.values() for row in table)
    formats = ("", "", ".3g", ".3g", ".2f", "", ".1%", ".1%", ".2f")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in table:
        cells = ("" if each is None else format(each, form) for each, form in zip(row.values(), formats, strict=True))
        lines.append("| " + " | ".join(cells) + " |")
    (directory / "rules.md").write_text("\n".join(lines) + "\n")


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Plot KL over GMACs, one line per rule."""
    figure = blank_figure(WIDTH, HEIGHT)
    axes = figure.subplots()
    for colour, marker, rule in zip(cycle(COLOURS), cycle("osD^vPXh"), dict.fromkeys(row["rule"] for row in table)):
        points = sorted((row["GMACs"], row["KL"]) for row in table if row["rule"] == rule)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=rule)
    axes.set(xlabel="GMACs an image (fewer is cheaper)", ylabel="KL to the dense model (nats)", yscale="log")
    plain(axes)
    axes.legend(frameon=False)
    path.write_bytes(png(figure))


if __name__ == "__main__":
    with one_line_errors():
        main()
