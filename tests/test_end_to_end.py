"""The main job as a user runs it: the scripts as processes, on the packaged digits and on real photos."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import fcvit_jax as fc
from configs import digits_adamw, digits_sam, eval_digits
from fcvit_jax.errors import InputError
from fcvit_jax.training import TrainConfig
from fcvit_jax.training.training_run import check_same

ROOT = Path(__file__).parents[1]


def run(*arguments, cwd=ROOT, env=None):
    command = [sys.executable, *map(str, arguments)]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"} | (env or {})  # as for users
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=900)


def run_evaluate(*arguments, **fields):
    return run("evaluate.py", *arguments, *(f"--config.{name}={value}" for name, value in fields.items()))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_the_embedded_default(tmp_path):
    read_only = {"XDG_CACHE_HOME": "/proc/nowhere"}  # no cache can be written, and nothing breaks
    done = run(ROOT / "evaluate.py", "--workdir=out", cwd=tmp_path, env=read_only)  # from anywhere
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    results = rows(tmp_path / "out")
    merged = ("tome_r16", "tome_r32", "tome_r16@nearest", "tome_r32@nearest", "s2dfe_r32", "s2winc5_r32")
    names = ["dense", *merged]
    assert [row["schedule"] for row in results] == names
    table = done.stdout[done.stdout.index("schedule ") :].splitlines()
    assert [line.split()[0] for line in table[2:] if line][: len(names)] == names
    assert len(table) <= 24, "longer than a screen"
    dense = results[0]
    shown = re.findall(r"^    (\S+) +(\d\d\.\d\d)  .*  360 ", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    measured = {row["schedule"]: 100 * row["top1"] for row in results}
    assert [name for name, _ in shown] == names
    for name, top1 in shown:
        assert measured[name] == pytest.approx(float(top1), abs=0.3), name  # an image more or less: another CPU
    assert dense["top1"] >= 0.95
    assert dense["num_images"] == 360
    for row in results:
        assert row["correct"] == round(row["top1"] * 360)
        assert row["images_per_second"] > 0
        assert row["speedup"] == row["images_per_second"] / dense["images_per_second"]
        assert row["preprocess"] == "bicubic 32->32 center, mean .5 std .5"
        assert row["versions"]["jax"]
    assert [row["tokens_out"] for row in results] == [65, 3, 2, 3, 2, 5, 3]
    assert (tmp_path / "out" / "pareto.png").stat().st_size > 10_000
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 8
    # The packaged checkpoint's metadata agree with its results.
    meta = json.loads((ROOT / "fcvit_jax" / "pretrained" / "digits" / "meta.json").read_text())
    assert meta["provenance"]["test"] == {"dataset": "digits:test", "correct": dense["correct"], "num_images": 360}
    size = sum(path.stat().st_size for path in (ROOT / "fcvit_jax" / "pretrained" / "digits").rglob("*"))
    assert size < 3_000_000


@pytest.mark.parametrize(("name", "config"), [("digits", digits_sam), ("digits_adamw", digits_adamw)])
def test_the_packaged_checkpoints_come_from_the_configurations(name, config):
    provenance = fc.load_checkpoint(f"packaged:{name}").meta["provenance"]
    now = TrainConfig.from_dict(config.get_config().to_dict()).to_dict()
    now["schedules"] = now["schedules"].replace("?", "")  # no difference for a model that they fit
    check_same({"config": provenance["train_config"]}, {"config": now}, Path(name))
    assert provenance["steps"] == 27 * (1437 // 32)
    assert f"{provenance['test']['correct']} of 360" in config.__doc__


def test_the_wheel_works_outside_the_tree(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    site = tmp_path / "site"
    assert (site / "fcvit_jax" / "py.typed").exists()
    check = (
        "import fcvit_jax as fc; print(fc.__file__)\n"
        "rows = fc.evaluate('packaged:digits', 'digits:test', 'dense', limit=8, throughput_blocks=0, workdir='out')\n"
        "print(rows[0]['num_images'])"
    )
    done = run("-c", check, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert done.stdout.split() == [str(site / "fcvit_jax" / "__init__.py"), "8"], done.stderr
    assert (tmp_path / "out" / "report.html").stat().st_size > 1_000_000


@pytest.fixture(scope="module")
def clothing(tmp_path_factory):
    from conftest import shared

    out = tmp_path_factory.mktemp("clothing") / "checkpoint"
    weights = shared("weights/clothing_vits14.safetensors")
    given = ("--model", "vit_small_patch14_dinov2", "--preprocess", "deit/official", "--num_classes", 10)
    done = run("-m", "fcvit_jax.convert", weights, out, *given, "--image_size", 224)
    assert done.returncode == 0, done.stderr
    return out


def test_real_photos_under_five_schedules(clothing, clothing_test, tmp_path):
    """The counts are those of timm (dense), the official Token Merging code, and an independent float64 program."""
    done = run_evaluate(
        "--config=configs/eval_folder.py",
        f"--workdir={tmp_path}",
        checkpoint=clothing,
        dataset=f"folder:{clothing_test}",
        schedules="dense,tome_r8,s2dfe_r16,s2winc7_r8,s2winc7_r16",
        throughput_blocks=0,
        save_logits=True,
        gallery=0,
    )
    assert done.returncode == 0, done.stderr
    counts = {row["schedule"]: row["correct"] for row in rows(tmp_path)}
    assert counts == {"dense": 307, "tome_r8": 309, "s2dfe_r16": 307, "s2winc7_r8": 308, "s2winc7_r16": 303}
    for schedule, correct in counts.items():
        saved = np.load(tmp_path / f"logits_{schedule}.npz")
        assert (saved["logits"].argmax(1) == saved["labels"]).sum() == correct
        assert len(set(saved["names"])) == 372


def images(folder, *classes):
    for name in classes:
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (90, 120, 200)).save(folder / name / "one.png")
    return folder


def test_training_ends_in_a_checkpoint_that_evaluates(tmp_path):
    done = run(
        "train_sam.py", f"--workdir={tmp_path}", "--config.epochs=1", "--config.warmup_epochs=0",
        "--config.model.depth=2", "--config.model.embed_dim=16", "--config.model.mlp_dim=32",
        "--config.eval_every=100", "--config.tensorboard=True", "--config.schedules=tome_r20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line, tested = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == tested["step"] == 44
    assert line["loss"] < 3
    assert tested.keys() == {"step", "test/dense", "test/tome_r20"}
    assert list((tmp_path / "events").iterdir())
    done = run_evaluate(f"--workdir={tmp_path / 'eval'}", checkpoint=tmp_path, schedules="dense,tome_r20", limit=100)
    assert done.returncode == 0, done.stderr
    assert [row["num_images"] for row in rows(tmp_path / "eval")] == [100, 100]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"checkpoint": "nowhere"}, "nowhere: there is no such checkpoint directory"),
        ({"checkpoint": "tests"}, "tests has no meta.json"),
        ({"dataset": "folder:nowhere"}, "there is no folder 'nowhere'"),
        ({"dataset": "imagenet"}, "has no known form"),
        ({"dataset": "folder:{tmp}/two"}, "has 2 classes, the head of"),
        ({"dataset": "folder:{tmp}/ten"}, "has class 'a' where"),
        ({"dataset": "folder:{tmp}/broken"}, "image 0/broken.jpg cannot be decoded"),
        ({"dataset": "folder:{tmp}/empty"}, "no class folders"),
        ({"schedules": "s2winc7_r8"}, "does not fit a model of 6 layers"),
        ({"schedules": "local:6:r4:w3x3"}, "8x8 grid does not divide into 3x3 windows"),
        ({"schedules": "tome"}, "'tome' is not a schedule"),
        ({"sweep": "tome:16-0"}, "the range 'tome:16-0' is empty"),
        ({"checkpoint": ""}, "config.checkpoint is empty"),
        ({"dataset": ""}, "config.dataset is empty"),
        ({"real_labels": "{tmp}/two"}, "cannot be read"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"limit": -1}, "limit is -1: it must be a whole number, 1 or more, or none"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(fields, says, tmp_path):
    images(tmp_path / "two", "a", "b")
    images(tmp_path / "ten", *"abcdefghij")
    images(tmp_path / "broken", *map(str, range(10)))
    (tmp_path / "broken" / "0" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (tmp_path / "empty").mkdir()
    config = eval_digits.get_config()
    for name, value in fields.items():
        config[name] = value.format(tmp=tmp_path) if isinstance(value, str) else value
    with pytest.raises(InputError) as caught:
        evaluate.main(config, tmp_path / "out")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.checkpoint=nowhere"], "error: nowhere: there is no such checkpoint directory"),
        (["--config=nowhere.py"], "nowhere.py"),
        (["--config.schedule=dense"], "no field 'schedule'; did you mean 'schedules'?"),
        (["--workdir=README.md"], "README.md cannot be written: File exists"),
        (["tests"], "unknown argument 'tests'"),
        (["--config.batch_size=many"], "many"),
    ],
)
def test_the_script_stops_without_a_traceback(arguments, says, tmp_path):
    done = run("evaluate.py", *arguments, *([] if "--workdir" in arguments[0] else [f"--workdir={tmp_path / 'out'}"]))
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
