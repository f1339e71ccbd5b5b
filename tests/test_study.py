"""The tables of benchmarks/study_report.py, on rows made by hand, and the page that is made of the stored ones."""

import importlib
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
report = importlib.import_module("study_report")


def row(arm, seed, top1, kl, worst, verdict=None):
    schedules = [
        {"schedule": name, "gmacs": gmacs, "top1": value, "kl": divergence}
        for name, gmacs, value, divergence in zip(
            ("dense", "tome_r8", "tome_r16"), (4.0, 3.0, 2.0), top1, (0.0, *kl), strict=True
        )
    ]
    curves = {name: {"0.1": worst} for name in report.MEASURES}
    return {
        "setting": "digits",
        "arm": arm,
        "seed": seed,
        "config": {"sam": {"rho": 0.05}, "epochs": 2.0},
        "gradients": 1000,
        "schedules": schedules,
        "flatness": {
            "loss": 0.5 + seed / 10,
            "weight_norm": 3.0,
            "eigenvalue": 10 * worst,
            "trace": 20.0 + worst,
            "curves": curves,
        },
        "against_adamw": verdict and {"verdict": verdict},
    }


ROWS = [
    row("adamw", 0, (0.90, 0.88, 0.80), (0.1, 0.3), 4.0),
    row("adamw", 1, (0.92, 0.88, 0.84), (0.2, 0.6), 5.0),
    row("sam", 0, (0.91, 0.90, 0.86), (0.05, 0.15), 1.0, "flatter"),
    row("sam", 1, (0.93, 0.92, 0.90), (0.1, 0.3), 2.0, "inconclusive"),
]


def cells(table):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]


def test_means_have_students_interval_over_the_seeds():
    # 12.706 is t at 97.5 % with one degree of freedom; the standard error of 90 and 92 is 1.
    assert report.mean([90.0, 92.0], ".3f") == "91.000 ± 12.706"
    assert report.mean([90.0], ".1f") == "90.0"


def test_a_column_an_arm_and_a_line_a_schedule():
    head, _, *body = cells(report.TABLES["accuracy"](ROWS))
    assert head == ["schedule", "GMACs", "AdamW", "SAM"]
    assert [line[:2] for line in body] == [["`dense`", "4"], ["`tome_r8`", "3"], ["`tome_r16`", "2"]]
    assert body[2][2].startswith("82.00 ± ")
    assert cells(report.TABLES["drop"](ROWS))[4][2].startswith("+9.00 ± ")  # of 10 and 8 points


def test_differences_are_taken_seed_by_seed():
    (_, _, line) = cells(report.TABLES["paired"](ROWS))
    assert line[:3] == ["SAM less AdamW", "2", "+1.00 ± 0.00"]
    assert line[3].startswith("+4.50 ± ")  # merged: 88 less 84, 91 less 86
    assert line[4].startswith("-3.50 ± ")  # the drop: 3 less 6, 2 less 6
    assert line[5] == f"{np.log(0.5):+.2f} ± 0.00"


def test_verdicts_are_counted_and_measures_ranked():
    body = cells(report.TABLES["flatness"](ROWS))
    assert body[-1] == ["verdict against AdamW, seed by seed", "-", "1 flatter, 1 inconclusive"]
    assert next(line for line in body if line[0] == "largest eigenvalue")[1].startswith("45 ± ")
    ranked = {line[0]: line[1:] for line in cells(report.TABLES["relation"](ROWS))[2:]}
    assert ranked["worst case, radius 0.1"][0].startswith("+0.74 ")  # drops 6, 6, 3, 2 over 4, 5, 1, 2


def test_only_what_stands_between_the_marks_is_written():
    page = "before\n<!-- digits: conditions -->\nold\n<!-- end -->\nafter\n"
    filled = report.fill(page, ROWS, [])
    assert filled.startswith("before\n<!-- digits: conditions -->\n|  | radius |")
    assert filled.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, ROWS, []) == filled


def test_the_ablation_has_a_line_a_rate_and_a_column_a_family():
    rows = [
        {"schedule": f"{family}_r{r}", "correct": 300 + r, "gmacs": 5 - r / 8}
        for family in ("tome", "s2dfe")
        for r in (8, 16)
    ]
    head, _, *body = cells(report.ABLATIONS["prefix"](rows))
    assert head == ["r", "`tome`", "`s1dfe`", "`s2dfe`", "`s3dfe`", "`s4dfe`"]
    assert body == [["8", "308 at 4.00", "", "308 at 4.00", "", ""], ["16", "316 at 3.00", "", "316 at 3.00", "", ""]]


def test_the_plots_are_pictures():
    assert report.plot(report.select(ROWS, "digits")).startswith(b"\x89PNG")
    bounds = {"top1": 0.8, "top1_low": 0.7, "top1_high": 0.9}
    names = ("dense", "tome_r4", "tome_r8", "s2dfe_r8")
    ablation = [{"schedule": name, "gmacs": 4.0 - i, "kl": 0.1 * i, **bounds} for i, name in enumerate(names)]
    assert report.plot_ablation(ablation).startswith(b"\x89PNG")


def test_the_page_is_what_the_stored_rows_make():
    report.main(["--check"])
