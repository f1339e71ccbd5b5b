"""Result rows, one a schedule with all its conditions, as a table, JSON lines, CSV and the plot of the trade-off."""

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_report(rows: Sequence[Row], workdir: Path) -> None:
    """Write results.jsonl, results.csv and pareto.png into `workdir`, each whole or not at all."""
    _write(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, dict) else value for key, value in row.items()})
    _write(workdir / "results.csv", text.getvalue().encode())
    _write(workdir / "pareto.png", plot_pareto(rows))


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, with their common conditions below."""
    cells = [("schedule", "top-1", "top-5", "change", "images", "GMACs", "tokens", "images/s", "speed-up")]
    dense = next((row for row in rows if row["schedule"] == "dense"), None)
    for row in rows:
        rate, speedup = row["images_per_second"], row["speedup"]
        cells.append(
            (
                row["schedule"],
                f"{row['top1']:.2%}",
                f"{row['top5']:.2%}",
                f"{100 * (row['top1'] - dense['top1']):+.2f}" if dense else "-",
                f"{row['num_images']:,}",
                f"{row['gmacs']:#.3g}" if row["gmacs"] < 1 else f"{row['gmacs']:.2f}",
                str(row["tokens_out"]),
                f"{rate:.4g}" if rate else "-",
                f"{speedup:.2f}x" if speedup else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}" for column, (cell, width) in pairs)
        for pairs in (enumerate(zip(row, widths, strict=True)) for row in cells)
    ]
    lines.insert(1, "-" * len(lines[0]))
    first = rows[0]
    lines += [
        "",
        f"{first['checkpoint']} on {first['dataset']}; pixels: {first['preprocess']}",
        f"{first['dtype']}, batch {first['batch_size']}, {first['num_devices']} x {first['device']}",
        "change: points of top-1 against dense; tokens: left after the last layer; GMACs: 1e9 multiply-accumulates.",
    ]
    if first["images_per_second"]:
        lines.append("images/s: the model alone, compiled and warm, the median of blocks; no decoding, no transfer.")
        if (spread := max(row["images_per_second_spread"] for row in rows)) > 0.25:
            lines.append(f"note: blocks differed by up to {spread:.0%}: was the machine busy with something else?")
    return "\n".join(lines)


def plot_pareto(rows: Sequence[Row]) -> bytes:
    """Top-1 against GMACs and against images/s, one line a family of schedules, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dense = next((row for row in rows if row["schedule"] == "dense"), None)
    families: dict[str, list[Row]] = {}
    for row in rows:
        if row is not dense:
            families.setdefault(_family(row["schedule"]), []).append(row)
    panels = [("gmacs", "GMACs per image (fewer is cheaper)"), ("images_per_second", "images/s (model alone)")]
    panels = [(key, label) for key, label in panels if all(row[key] for row in rows)]

    figure = Figure(figsize=(5.6 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, (family, members) in enumerate(families.items()):
            members = sorted(members, key=lambda row: row[key])
            color, marker = f"C{index}", "osD^vP"[index % 6]
            heights = [100 * row["top1"] for row in members]
            axes.plot([row[key] for row in members], heights, color=color, marker=marker, label=family)
            for row, height in zip(members, heights, strict=True):
                if rate := re.search(r"_r(\d+)$", row["schedule"]):
                    axes.annotate(
                        f"r={rate[1]}", (row[key], height), xytext=(4, 5), textcoords="offset points", fontsize=8
                    )
        if dense:
            axes.plot(dense[key], 100 * dense["top1"], color="black", marker="*", markersize=12, ls="", label="dense")
            axes.axhline(100 * dense["top1"] - 1, color="grey", linestyle=":", linewidth=1, label="dense - 1 point")
        axes.set_xlabel(label)
        axes.set_ylabel("top-1 (%)")
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    first = rows[0]
    figure.suptitle(
        f"{first['checkpoint']} on {first['dataset']}, {first['num_images']:,} images, {first['dtype']}, "
        f"batch {first['batch_size']}, {first['device']}",
        fontsize=9,
    )
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _family(schedule: str) -> str:
    """Schedules that differ in their rate alone share a line."""
    return re.sub(r"_?r\d+", "", schedule)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
