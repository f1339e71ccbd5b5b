"""The tables and plots of the study, on rows made by hand; the pages made from the stored rows; and the training
of benchmarks/study.py that ends at a loss."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import fcvit_jax as fc
from configs import digits_sam
from fcvit_jax.training import TrainConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
report, study, tables, plots = map(importlib.import_module, ("study_report", "study", "study_tables", "study_plots"))


def row(arm, seed, top1, kl, worst, verdict=None):
    schedules = [
        {"schedule": name, "gmacs": gmacs, "top1": value, "kl": divergence}
        for name, gmacs, value, divergence in zip(
            ("dense", "tome_r8", "tome_r16"), (4.0, 3.0, 2.0), top1, (0.0, *kl), strict=True
        )
    ]
    curves = {name: {"0.1": worst} for name in tables.MEASURES}
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
    assert tables.mean([90.0, 92.0], ".3f") == "91.000 ± 12.706"
    assert tables.mean([90.0], ".1f") == "90.0"


def test_tables_have_a_column_per_arm_and_a_line_per_schedule():
    head, _, *body = cells(tables.TABLES["accuracy"](ROWS))
    assert head == ["schedule", "GMACs", "AdamW", "SAM"]
    assert [line[:2] for line in body] == [["`dense`", "4"], ["`tome_r8`", "3"], ["`tome_r16`", "2"]]
    assert body[2][2].startswith("82.00 ± ")
    assert cells(tables.TABLES["drop"](ROWS))[4][2].startswith("+9.00 ± ")  # of 10 and 8 points


def test_differences_are_taken_seed_by_seed():
    (_, _, line) = cells(tables.TABLES["paired"](ROWS))
    assert line[:3] == ["SAM less AdamW", "2", "+1.00 ± 0.00"]
    assert line[3].startswith("+4.50 ± ")  # merged: 88 less 84, 91 less 86
    assert line[4].startswith("-3.50 ± ")  # the drop: 3 less 6, 2 less 6
    assert line[5] == f"{np.log(0.5):+.2f} ± 0.00"


def test_verdicts_are_counted_and_measures_ranked():
    body = cells(tables.TABLES["flatness"](ROWS))
    assert body[-1] == ["verdict against AdamW, seed by seed", "-", "1 flatter, 1 inconclusive"]
    assert next(line for line in body if line[0] == "largest eigenvalue")[1].startswith("45 ± ")
    ranked = {line[0]: line[1:] for line in cells(tables.TABLES["relation"](ROWS))[2:]}
    assert ranked["worst case, radius 0.1"][0].startswith("+0.74 ")  # drops 6, 6, 3, 2 over 4, 5, 1, 2


def test_only_text_between_the_marks_is_rewritten():
    page = "before\n<!-- digits: conditions -->\nold\n<!-- end -->\nafter\n"
    filled = report.fill(page, ROWS, [], [])
    assert filled.startswith("before\n<!-- digits: conditions -->\n|  | radius |")
    assert filled.endswith("|\n<!-- end -->\nafter\n")
    assert "old" not in filled
    assert report.fill(filled, ROWS, [], []) == filled


def fitted(row, loss, target, steps, gradients):
    return row | {"fit": {"loss": loss, "target": target}, "steps": steps, "gradients": gradients}


FITTED = [
    fitted(ROWS[0], 0.20, None, 100, 100),
    fitted(ROWS[1], 0.30, None, 100, 100),
    fitted(ROWS[2], 0.19, 0.20, 150, 300),
    fitted(ROWS[3], 0.33, 0.30, 250, 500),
    fitted(row("sam_last25", 0, (0.90, 0.90, 0.88), (0.05, 0.29), 2.5), 0.20, 0.20, 110, 145),
]


def test_arms_at_equal_fit_are_shown_beside_the_adamw_of_their_seed():
    _, _, adamw, sam, late = cells(tables.TABLES["fit"](FITTED))
    assert adamw[:2] + adamw[5:] == ["AdamW", "0.05", "", "", "0, 1"]
    assert sam[2].startswith("200 ± ")
    assert sam[3].startswith("4.00 ± ")  # 300 / 100 and 500 / 100 gradients
    assert sam[5:] == ["+10.0 %", "1", "0, 1"]
    assert late == ["SAM, last 25 %", "0.05", "110", "1.45", "0.2000", "+0.0 %", "0", "0"]


def test_differences_from_adamw_a_line_a_schedule_and_the_share_of_the_way_to_sam():
    head, _, *body = cells(tables.TABLES["paired_top1"](FITTED))
    assert head == ["top-1, points", "SAM", "SAM, last 25 %"]
    assert body[2] == ["`tome_r16`", "+6.00 ± 0.00", "+8.00"]  # 86 less 80, 90 less 84; 88 less 80
    body = cells(tables.TABLES["paired_kl"](FITTED))[2:]
    assert body[0] == ["`tome_r8`", f"{np.log(0.5):+.2f} ± 0.00", f"{np.log(0.5):+.2f}"]
    lines = {line[0]: line[1:] for line in cells(tables.TABLES["halfway"](FITTED))[2:]}
    assert lines["worst case, radius 0.1"] == ["0.25", "0.50"]  # seed 0, which all have: 4, 1 and 2.5


def test_costs_and_gains_of_each_method():
    others = [row(arm, 0, (0.90, 0.88, 0.80), (0.1, 0.3), 4.0) for arm in ("msam", "asam")]
    costs = [
        {"method": name, "ratio": 1.0 + i, "half": 0.1 * i}
        for i, name in enumerate(("AdamW", "MSAM", "SAM-last-25%", "SAM"))
    ]
    table = tables.choice([*FITTED, *(fitted(each, 0.2, 0.2, 90, 90) for each in others)], costs)
    _, _, *body = cells(table)
    assert [line[0] for line in body] == ["AdamW", "MSAM", "SAM, last 25 %", "SAM", "ASAM"]
    assert body[0][1:5] == ["1.00 ± 0.00", "1.00", "1.00", "1.00"]
    assert body[2] == ["SAM, last 25 %", "3.00 ± 0.20", "1.45", "0.62", "0.85", "90.0", "89.0"]  # 2.5 / 4, 0.17 / 0.2


# SAM that starts at step 10 takes at least AdamW's 22 steps.
@pytest.mark.parametrize(
    ("start", "target", "steps"), [(10.0, None, 22), (0.0, 100.0, 4), (10.0, 100.0, 24), (10.0, 0.0, 44)]
)
def test_training_ends_at_the_first_measurement_that_fits(start, target, steps, tmp_path):
    config = digits_sam.get_config()
    size = {"model.embed_dim": 16, "model.depth": 1, "model.mlp_dim": 32, "model.image_size": (16, 16)}
    config.update_from_flattened_dict(
        size | {"epochs": 1.0, "warmup_epochs": 0.25, "ema_decay": 0.9, "sam.start": start}
    )
    fit = study.Fit(epochs=0.5, most=2, every=4, images=64)
    with jax.numpy_dtype_promotion("standard"):  # as for users
        found = study.train_until(TrainConfig.from_dict(config.to_dict()), tmp_path, fit, target)
    checkpoint = fc.load_checkpoint(tmp_path)
    assert checkpoint.meta["provenance"]["steps"] == steps
    assert found["gradients"] == steps + max(steps - start, 0)
    assert [step for step, _ in found["losses"]] == [*range(4, steps, 4), steps]
    assert found["losses"][-1][1] == pytest.approx(found["loss"], abs=1e-5)
    assert 1 < found["loss"] < 3


def test_rows_do_not_tell_where_files_lie():
    args = study._parser().parse_args(
        ["clothing", "sam", "0", "--photos", "/a/p", "--checkpoint", "/a/c", "--workdir", "/a/w"]
    )
    row = {
        "config": {"train": "folder:/a/p/train", "checkpoint": "/a/c"},
        "report": "/a/w/clothing/x",
        "other": "/a/pq",
    }
    assert study.with_default_names(row, args) == {
        "config": {"train": "folder:photos/train", "checkpoint": "clothing"},
        "report": "workdir/study/clothing/x",
        "other": "/a/pq",
    }


def test_the_ablation_has_a_line_per_rate_and_a_column_per_family():
    rows = [
        {"schedule": f"{family}_r{r}", "correct": 300 + r, "gmacs": 5 - r / 8}
        for family in ("tome", "s2dfe")
        for r in (8, 16)
    ]
    head, _, *body = cells(tables.ABLATIONS["prefix"](rows))
    assert head == ["r", "`tome`", "`s1dfe`", "`s2dfe`", "`s3dfe`", "`s4dfe`"]
    assert body == [["8", "308 at 4.00", "", "308 at 4.00", "", ""], ["16", "316 at 3.00", "", "316 at 3.00", "", ""]]


def test_the_plots_are_pictures():
    assert plots.plot(tables.select(ROWS, "digits")).startswith(b"\x89PNG")
    bounds = {"top1": 0.8, "top1_low": 0.7, "top1_high": 0.9}
    names = ("dense", "tome_r4", "tome_r8", "s2dfe_r8")
    ablation = [{"schedule": name, "gmacs": 4.0 - i, "kl": 0.1 * i, **bounds} for i, name in enumerate(names)]
    assert plots.plot_ablation(ablation).startswith(b"\x89PNG")


def test_the_pages_match_the_stored_rows():
    report.main(["--check"])
