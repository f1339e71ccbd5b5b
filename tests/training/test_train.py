"""The trainer as a user runs it: resumed after kill -9 and SIGTERM, on several processes, with bad input."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
import train_sam
from configs import digits_sam

ROOT = Path(__file__).parents[2]
TINY = {
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "model.image_size": (16, 16),
    "batch_size": 32,
    "epochs": 1.0,
    "warmup_epochs": 0.25,
    "drop_path": 0.2,
    "schedules": "tome_r2",
    "eval_every": 1000,
    "save_every": 5,
    "log_every": 4,
    "tensorboard": False,
}


def tiny(**changes):
    config = digits_sam.get_config()
    config.update_from_flattened_dict(TINY | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def arguments(workdir, **changes):
    fields = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        sys.executable,
        str(ROOT / "train_sam.py"),
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def start(workdir, *more, devices=1, **changes):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        [*arguments(workdir, **changes), *more],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def params(workdir):
    return fc.load_checkpoint(workdir).params


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(workdir):
    return [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 44 steps that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir))
    return workdir


def test_the_run_leaves_what_it_says(whole):
    assert {path.name for path in whole.iterdir()} >= {"checkpoint", "best", "metrics.jsonl", "states"}
    steps = [row["step"] for row in rows(whole) if "loss" in row]
    assert steps == list(range(4, 45, 4))
    last = rows(whole)[-2]
    assert {"loss", "gap", "gap_over_rho", "grad_norm", "images_per_second", "waiting_for_data"} <= last.keys()
    assert set(rows(whole)[-1]) == {"step", "test/dense", "test/tome_r2"}
    checkpoint = fc.load_checkpoint(whole)
    assert checkpoint.meta["provenance"]["steps"] == 44
    assert checkpoint.meta["provenance"]["test"]["num_images"] == 360


def test_killed_at_any_moment_it_ends_in_the_same_parameters(whole, tmp_path):
    chance = random.Random(0)
    for _ in range(3):
        process = start(tmp_path)
        steps = tmp_path / "states"
        # Not before its first state in this life, and then at any moment.
        before = set(steps.glob("*")) if steps.exists() else set()
        waited = time.monotonic()
        while process.poll() is None and time.monotonic() - waited < 120:
            if steps.exists() and set(steps.glob("*")) - before:
                break
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        process.communicate()
    output = finish(start(tmp_path))
    assert "test top-1" in output
    assert_same(params(tmp_path), params(whole))
    ours, theirs = ([row["step"] for row in rows(place)] for place in (tmp_path, whole))
    assert ours[-1] == theirs[-1]
    assert len(ours) == len(set(ours)) + 1  # none twice but the last, which is logged and tested


def test_sigterm_saves_and_loses_no_step(whole, tmp_path):
    process = start(tmp_path, save_every=1000)
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "stopped and saved" in finish(process)
    (state,) = (int(path.name) for path in (tmp_path / "states").iterdir() if path.name.isdigit())
    assert 4 <= state < 44
    finish(start(tmp_path, save_every=1000))
    assert_same(params(tmp_path), params(whole))


def test_another_configuration_is_refused_with_what_differs(whole):
    process = start(whole, sam__rho=0.1, optimizer__learning_rate=1e-3)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "optimizer.learning_rate 0.003 there, 0.001 here, sam.rho 0.05 there, 0.1 here" in output
    assert output.count("\n") == 1


def start_pair(workdir, **changes):
    """Two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(workdir, f"--distributed=127.0.0.1:{port},2,{index}", devices=2, **changes) for index in (0, 1)]


def test_two_processes_equal_one(tmp_path):
    # Adam would divide gradients that are rounding alone, such as those of the keys' biases, by their own size.
    changes = dict(fsdp=True, optimizer__name="sgd", optimizer__learning_rate=0.1)
    for process in start_pair(tmp_path / "two", **changes):
        finish(process)
    finish(start(tmp_path / "one", devices=4, **changes))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5)  # noqa: E731
    jax.tree.map(close, params(tmp_path / "two"), params(tmp_path / "one"))

    # Killed after a state is written, they go on to the same parameters, bit for bit.
    both, states = start_pair(tmp_path / "killed", **changes), tmp_path / "killed" / "states"
    while all(process.poll() is None for process in both):
        if states.exists() and any(place.name.isdigit() for place in states.iterdir()):
            break
        time.sleep(0.02)
    for process in both:
        process.kill()
        process.communicate()
    for process in both:
        assert process.returncode == -signal.SIGKILL
    for process in start_pair(tmp_path / "killed", **changes):
        finish(process)
    assert_same(params(tmp_path / "killed"), params(tmp_path / "two"))


def test_fine_tuning_replaces_the_head_and_resamples(tmp_path, capsys):
    chance = np.random.default_rng(0)
    for name in ("bright", "dark"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(16):
            low = 160 if name == "bright" else 0
            pixels = chance.integers(low, low + 90, (40, 48, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    config = tiny(checkpoint="packaged:digits", image_size=48, preprocess=None, batch_size=16, epochs=6.0)
    config.model = {}
    config.train = config.test = f"folder:{tmp_path / 'photos'}"
    config.schedules = "tome_r8"
    accuracy = train_sam.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "packaged:digits has 10 classes, the data set 2: its head is replaced by zeros" in printed
    assert "position embedding 8x8, the model's grid 12x12" in printed
    assert accuracy is not None
    assert accuracy.top1 == 1.0
    loaded = fc.load_checkpoint(tmp_path / "run")
    assert (loaded.config.image_size, loaded.config.num_classes) == ((48, 48), 2)
    assert loaded.meta["class_names"] == ["bright", "dark"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 33}, "batch_size is 33: it must be a positive multiple of the 8 devices"),
        ({"batch_size": 3200}, "digits:train has 1437 images"),
        ({"warmup_epochs": 1.0}, "warmup_epochs is 1.0: it must be 0 or more, and below epochs"),
        ({"sam.rho": -1.0}, "sam.rho is -1.0"),
        ({"sam.microbatches": 3}, "it must be a multiple of sam.microbatches, 3"),
        ({"optimizer.name": "adam"}, "optimizer.name is 'adam': choose one of"),
        ({"optimizer.freeze": "nothing"}, "optimizer.freeze is 'nothing'"),
        ({"dtype": "float16"}, "dtype is 'float16': choose one of"),
        ({"schedule": "tome_x"}, "tome_x"),
        ({"test": "folder:/nowhere"}, "no folder"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"checkpoint": "/nowhere"}, "no such checkpoint directory"),
    ],
)
def test_bad_configurations_are_one_line(changes, says, tmp_path):
    config = tiny()
    config.update_from_flattened_dict(changes)
    with pytest.raises(fc.InputError, match=says.replace(".", r"\.")):
        train_sam.train(config, tmp_path)


def test_flatness_is_measured_at_the_end_where_it_is_asked_for(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(train_sam, "flatness", measured.append)
    train_sam.main(tiny(epochs=0.25, warmup_epochs=0.0), tmp_path)
    assert measured == []
    train_sam.main(tiny(epochs=0.25, warmup_epochs=0.0, flatness=True), tmp_path)  # of the run that is complete
    assert measured == [["--checkpoint", str(tmp_path), "--dataset", "digits:train"]]


def test_a_loss_that_is_not_finite_stops_with_the_images(tmp_path):
    with pytest.raises(fc.InputError, match=r"not finite at step \d+ \(images digits/\d+"):
        train_sam.train(tiny(optimizer__learning_rate=1e30, optimizer__clip_norm=1e30), tmp_path)


def test_an_unreadable_image_is_named_or_skipped(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(16):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / "photos" / name / f"{index}.png")
    (tmp_path / "photos" / "a" / "3.png").write_bytes(b"nothing")
    config = tiny(train=f"folder:{tmp_path / 'photos'}", batch_size=16, epochs=2.0)
    (tmp_path / "good").mkdir()
    config.test = config.train
    with pytest.raises(fc.InputError, match=r"a/3\.png cannot be decoded"):
        train_sam.train(config, tmp_path / "stop")


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    from fcvit_jax.training.states import States

    def full(self, step, state, notes):
        raise fc.InputError("the state cannot be written (No space left on device): make room")

    monkeypatch.setattr(States, "save", full)
    with pytest.raises(fc.InputError, match="No space left"):
        train_sam.train(tiny(epochs=0.25, warmup_epochs=0.0), tmp_path)


def test_the_first_step_that_was_not_finite_is_named_though_later_ones_are(tmp_path):
    run: Any = SimpleNamespace(workdir=tmp_path, steps=9, config=SimpleNamespace(tensorboard=False))
    with contextlib.closing(train_sam.Window(run, 5)) as window:
        finite = {"a": jnp.float32(1), "b": jnp.float32(0), "c": jnp.float32(1)}
        window.steps = [((name,), {"finite": value}) for name, value in finite.items()]
        with pytest.raises(fc.InputError, match=r"not finite at step 7 \(images b"):
            window.log(8)
