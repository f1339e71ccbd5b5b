import csv
import io
import json

import numpy as np
from PIL import Image

from fcvit_jax.evaluation.report import format_table, plot_pareto, write_report


def row(schedule, top1, gmacs, rate, speedup):
    return {
        "schedule": schedule,
        "top1": top1,
        "top5": 1.0,
        "num_images": 1000,
        "gmacs": gmacs,
        "tokens_out": 7,
        "images_per_second": rate,
        "images_per_second_spread": 0.1,
        "speedup": speedup,
        "checkpoint": "C",
        "dataset": "D",
        "preprocess": "P",
        "dtype": "float32",
        "batch_size": 8,
        "num_devices": 1,
        "device": "X",
        "versions": {"jax": "1"},
    }


ROWS = [
    row("dense", 0.9, 4.6, 100.0, 1.0),
    row("tome_r8", 0.88, 3.4, 130.0, 1.3),
    row("tome_r13", 0.85, 2.7, 170.0, 1.7),
    row("s2winc7_r16", 0.89, 2.64, 160.0, 1.6),
]


def test_table():
    lines = format_table(ROWS).splitlines()
    assert " ".join(lines[0].split()) == "schedule top-1 top-5 change images GMACs tokens images/s speed-up"
    assert lines[3].split() == ["tome_r8", "88.00%", "100.00%", "-2.00", "1,000", "3.40", "7", "130", "1.30x"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "P" in lines[7]
    assert "no decoding" in lines[-1]


def test_a_noisy_timing_is_told():
    noisy = [*ROWS[:-1], {**ROWS[-1], "images_per_second_spread": 0.4}]
    assert "differed by up to 40%" in format_table(noisy).splitlines()[-1]


def test_without_dense_and_without_timing():
    untimed = [{**row, "images_per_second": None, "speedup": None} for row in ROWS[1:]]
    lines = format_table(untimed).splitlines()
    assert lines[2].split() == ["tome_r8", "88.00%", "100.00%", "-", "1,000", "3.40", "7", "-", "-"]
    assert "images/s:" not in lines[-1]
    assert plot_pareto(untimed).startswith(b"\x89PNG")


def test_files(tmp_path):
    write_report(ROWS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pareto.png", "results.csv", "results.jsonl"]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == ROWS
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [line["schedule"] for line in table] == [row["schedule"] for row in ROWS]
    assert float(table[2]["top1"]) == 0.85
    assert json.loads(table[0]["versions"]) == {"jax": "1"}
    # Two panels, and something drawn in each.
    picture = np.asarray(Image.open(tmp_path / "pareto.png").convert("L"))
    assert picture.shape[1] > 2 * picture.shape[0]
    half = picture.shape[1] // 2
    assert picture[:, :half].std() > 5
    assert picture[:, half:].std() > 5
