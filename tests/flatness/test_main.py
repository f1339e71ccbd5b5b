"""The command line, on a tiny model of the digits."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import open_source
from fcvit_jax.flatness.__main__ import main
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport
from fcvit_jax.flatness.measurement import measure
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT

TINY = ViTConfig((8, 8), 4, 8, 1, 2, 16, num_classes=10)
QUICK = (
    "--limit=40 --batch_size=4 --ascent_steps=2 --draws=2 --eigen_steps=3 --probes=2 --line_points=3 --plane_points=3"
)


def save(path, scale=1.0):
    params = jax.jit(ViT(TINY).init)(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    params["head"]["kernel"] = scale * jax.random.normal(jax.random.key(2), (8, 10))  # it begins with zeros
    pixels = preset("timm/augreg,crop_pct=1.0", (8, 8))
    return str(fc.save_checkpoint(path, TINY, params, pixels, class_names=tuple("0123456789")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two working directories of the trainer; the second model's head is larger."""
    root = tmp_path_factory.mktemp("runs")
    for name, scale in (("a", 0.5), ("b", 0.55)):
        (root / name).mkdir()
        save(root / name / "checkpoint", scale)
    return root


def run(*arguments):
    main([*arguments, *QUICK.split()])


def read(path):
    return FlatnessReport.read(Path(path))


def test_a_run_is_measured_into_its_own_directory(runs, capsys):
    run("--checkpoint", str(runs / "a"), "--rho", "0.1,0.3")
    out = capsys.readouterr().out
    assert {path.name for path in (runs / "a").iterdir()} == {"checkpoint", "flatness.json", "flatness.png"}
    report = read(runs / "a" / "flatness.json")
    assert report.config == FlatnessConfig(
        limit=40,
        batch_size=4,
        rho=(0.1, 0.3),
        ascent_steps=2,
        draws=2,
        eigen_steps=3,
        probes=2,
        line_points=3,
        plane_points=3,
    )
    assert report.conditions["dataset"] == "digits:train"
    assert report.losses.shape == (10,)
    with Image.open(runs / "a" / "flatness.png") as image:
        assert image.size[0] > 800
    assert f"loss {report.loss:.4g}, accuracy {report.accuracies.mean():.2%}" in out
    value = report.curves["worst"].samples[1].mean()
    assert value > report.curves["one_step"].samples[1].mean() > 0
    assert any(line.startswith("worst case, plain") and f" {value:.4g} " in line for line in out.splitlines())
    assert f"written into {runs / 'a'}: flatness.json, flatness.png" in out
    fc.load_checkpoint(runs / "a")  # is still a checkpoint


def test_two_checkpoints_are_compared(runs, tmp_path, capsys):
    run("--checkpoint", str(runs / "a"), "--compare", str(runs / "b"), "--workdir", str(tmp_path))
    out = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {
        "flatness.json",
        "flatness_other.json",
        "comparison.json",
        "flatness.png",
    }
    ours, theirs = read(tmp_path / "flatness.json"), read(tmp_path / "flatness_other.json")
    assert ours.conditions["fingerprint"] == theirs.conditions["fingerprint"]
    assert ours.conditions["params_sha256"] != theirs.conditions["params_sha256"]
    assert theirs.weight_norm > ours.weight_norm
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["paired"]
    assert f"verdict: {comparison['verdict']} (" in out
    (row,) = (row for row in comparison["ratios"] if (row["name"], row["radius"]) == ("worst", 0.5))
    assert row["ratio"] == pytest.approx(
        ours.curves["worst"].samples[2].mean() / theirs.curves["worst"].samples[2].mean()
    )
    assert row["low"] <= row["ratio"] <= row["high"]
    assert f" {row['ratio']:.3g} {row['low']:.3g} .. {row['high']:.3g}" in " ".join(out.split())

    # The report in place of the checkpoint gives the same, and stale files are deleted.
    before = (tmp_path / "comparison.json").read_text()
    other = tmp_path / "other.json"
    shutil.copy(tmp_path / "flatness_other.json", other)
    run("--checkpoint", str(runs / "a"), "--compare", str(other), "--workdir", str(tmp_path))
    assert (tmp_path / "comparison.json").read_text() == before
    run("--checkpoint", str(runs / "a"), "--workdir", str(tmp_path))
    assert not (tmp_path / "comparison.json").exists()


def test_a_checkpoint_against_itself(runs, tmp_path, capsys):
    run("--checkpoint", str(runs / "a"), "--compare", str(runs / "a"), "--workdir", str(tmp_path))
    assert "verdict: inconclusive (radii at which it is lower, and higher: worst 0 and 0, " in capsys.readouterr().out
    ratios = json.loads((tmp_path / "comparison.json").read_text())["ratios"]
    assert {row["ratio"] for row in ratios} <= {1.0, None}


def test_numbers_are_those_of_the_library(runs, tmp_path):
    run("--checkpoint", str(runs / "a"), "--workdir", str(tmp_path), "--seed", "5")
    report = read(tmp_path / "flatness.json")
    again = measure(fc.load_checkpoint(runs / "a"), open_source("digits:train"), report.config)
    np.testing.assert_array_equal(again.curves["average"].samples, report.curves["average"].samples)
    np.testing.assert_array_equal(again.trace, report.trace)
    assert again.conditions | {"checkpoint": str(runs / "a")} == report.conditions


def test_reports_of_other_checkpoints_go_into_the_working_directory(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("--checkpoint", str(runs / "a" / "checkpoint"))
    assert (tmp_path / "workdir" / "flatness" / "flatness.json").is_file()
    assert {path.name for path in (runs / "a" / "checkpoint").iterdir()} == {"meta.json", "params"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere: there is no such checkpoint directory"),
        (["--dataset", "digits:both"], "digits:both: no split 'both'; there are digits:train and digits:test"),
        (["--rho", "0.5,0.1"], "rho is (0.5, 0.1): it must be numbers, above 0, in rising order"),
        (["--rho", "a"], "argument --rho: 'a' is not a list of numbers such as 0.05,0.2"),
        (["--limit", "3", "--batch_size", "4"], "batch_size is 4: limit is 3 and digits:train has 1437 images"),
        (["--schedule", "tome"], "schedule"),
        (["--schedule", "recommended"], "recommended: the checkpoint recommends none"),
        (["--compare", "none.json"], "none.json cannot be read: No such file or directory"),
        (["--compare", "packaged:none"], "no packaged checkpoint 'packaged:none'"),
        (["--compare", "packaged:digits", "--loss_tolerance", "-1"], "loss_tolerance is -1.0"),
        (["--workdir", "/proc/none"], "/proc/none cannot be written"),
        (["--depth", "3"], "unrecognized arguments: --depth 3"),
    ],
)
def test_mistakes_are_reported_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("error: ")
    assert message in told
    assert "\n" not in told
    assert not (tmp_path / "workdir" / "flatness" / "flatness.json").exists()


def test_a_report_of_other_measures_is_refused_before_the_work(runs, tmp_path, capsys):
    run("--checkpoint", str(runs / "a"), "--workdir", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(runs / "b"), "--compare", str(tmp_path / "flatness.json")])
    assert "error: batch_size is 16 here and 4 in the other report: pass --batch_size 4" in capsys.readouterr().err
    assert not (runs / "b" / "flatness.json").exists()


def test_help_has_every_field():
    command = [sys.executable, "-m", "fcvit_jax.flatness", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    for field in dataclasses.fields(FlatnessConfig):
        assert f"--{field.name} " in told
    assert "not flatter" in told


def test_the_earlier_command_names_this_one():
    command = [sys.executable, "-m", "fcvit_jax.training.flatness", "--checkpoint", "packaged:digits"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr == "error: this command has moved: run python -m fcvit_jax.flatness, with the same arguments\n"
