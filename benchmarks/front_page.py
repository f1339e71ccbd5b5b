"""Draw README's picture: a photo, its tokens under two merge rules, and each rule's divergence over GMACs.

python benchmarks/rules.py vit_s folder:photos --rules tome,nearest --schedules tome_r8,tome_r16 --out rules
python benchmarks/front_page.py vit_s photos/hat/cap.jpg rules/rules.csv docs/front_page.png
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import fcvit_jax as fc
from fcvit_jax.data.sources import open_images
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.evaluation.families import family, rate
from fcvit_jax.evaluation.visualize import draw_regions, first_images, regions
from fcvit_jax.figures import COLOURS, plain

SCALE = 4  # pixels of the picture per pixel of the model's input


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint directory or packaged:NAME")
    parser.add_argument("photo", help="an image file")
    parser.add_argument("table", type=Path, help="rules.csv, as benchmarks/rules.py writes it")
    parser.add_argument("out", type=Path, help="the picture, .png")
    parser.add_argument("--schedule", default="tome_r16", help="schedule that merges the photo; a row of the table")
    parser.add_argument("--images", default="photos", help="images of the table, for the label")
    args = parser.parse_args(argv)
    checkpoint = fc.load_checkpoint(args.checkpoint)
    with args.table.open() as file:
        rows = list(csv.DictReader(file))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    shown = {row["rule"]: row for row in rows if row["schedule"] == args.schedule}
    if not rows or set(shown) != set(rules):
        raise InputError(f"{args.table} has no row of {args.schedule} for every rule: pass --schedule")
    rows = [row for row in rows if family(row["schedule"]) == family(args.schedule)]
    images, _ = first_images(open_images(args.photo), checkpoint, 1)

    plt.rcParams["font.size"] = 13
    figure = plt.figure(figsize=(8, 6.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(3, 3.4))
    above, below = parts
    panels = above.subplots(1, 1 + len(rules))
    rows_, columns = checkpoint.config.grid
    draw_panel(panels[0], np.kron(images[0], np.ones((SCALE, SCALE, 1), np.uint8)), f"{rows_ * columns} patches")
    for axes, rule in zip(panels[1:], rules, strict=True):
        schedule = fc.MergeSchedule.parse(f"{args.schedule}@{rule}", checkpoint.config.depth)
        token, pruned = (array[0] for array in regions(checkpoint, schedule, images)[-1])
        picture = draw_regions(images[0], token, pruned, checkpoint.config.patch_size, SCALE)
        draw_panel(axes, picture, f"{rule}: {token.max() + 1} tokens", COLOURS[rules.index(rule)])
    axes = below.subplots()
    dense = fc.flops.gmacs(checkpoint.config)
    for colour, marker, rule in zip(COLOURS, "os^Dv", rules, strict=False):
        points = sorted((float(row["GMACs"]), float(row["KL"]), row["schedule"]) for row in rows if row["rule"] == rule)
        x, y, _ = zip(*points, strict=True)
        axes.plot((*x, dense), (*y, 0), color=colour, linewidth=2, zorder=1)
        axes.plot(x, y, color=colour, marker=marker, markersize=8, linestyle="none", label=rule)
        for place, height, name in points if rule == rules[0] else ():
            axes.annotate(f"r={rate(name)}", (place, height), (7, 4), textcoords="offset points")
    axes.plot(dense, 0, "k*", markersize=14, label="dense")
    axes.legend(frameon=False)
    axes.set(xlabel=f"GMACs an image ({args.images})", ylabel="KL to the dense model\n(lower is better)")
    plain(axes)
    figure.savefig(args.out, dpi=140, pil_kwargs={"optimize": True})
    plt.close(figure)


def draw_panel(axes: Any, picture: np.ndarray, title: str, colour: str = "black") -> None:
    axes.imshow(picture)
    axes.set_title(title, color=colour)
    axes.axis("off")


if __name__ == "__main__":
    with one_line_errors():
        main()
