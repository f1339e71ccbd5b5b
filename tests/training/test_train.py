"""The trainer as a user runs it: resumed after kill -9 and SIGTERM, on several processes, with bad input."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shlex
import shutil
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
from jax.sharding import AxisType, Mesh
from PIL import Image

import fcvit_jax as fc
import train_sam
from configs import digits_sam
from configs.training import defaults
from fcvit_jax import parallel
from fcvit_jax import training as fc_training
from fcvit_jax.checkpoint import PACKAGED
from fcvit_jax.data.sources import open_source
from fcvit_jax.flatness import FlatnessConfig, FlatnessReport
from fcvit_jax.flatness.__main__ import main as measure_and_print
from fcvit_jax.training import TrainConfig, assessment, loop, training_run
from fcvit_jax.training.recent_steps import RecentSteps

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
    "sam.refresh_every": 2,
    "ema_decay": 0.9,
    "schedules": "tome_r2",
    "eval_every": 22,
    "save_every": 5,
    "log_every": 4,
    "tensorboard": False,
}
# Fields of a measurement of flatness that takes seconds.
FEW = dict(limit=8, batch_size=4, ascent_steps=1, draws=1, eigen_steps=1, probes=1, line_points=0, plane_points=0)


NEWER: Any = dict(model__learned_positions=False, model__rotary={"theta": 100.0}, model__gated=True, model__pool="map")


def tiny(**changes):
    config = digits_sam.get_config()
    config.update_from_flattened_dict(TINY | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def run(config, workdir):
    """Call `train` with a configuration of the scripts."""
    return loop.train(TrainConfig.from_dict(config.to_dict()), workdir)


def train(config, workdir):
    """Train; return the final accuracy, None if a signal stopped the run."""
    return run(config, workdir).accuracy


def arguments(workdir, **changes):
    fields = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [
        sys.executable,
        str(ROOT / "train_sam.py"),
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def start(workdir, *more, devices=1, **changes):
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)} | quickly
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


def states_in(workdir):
    """List the steps of the states on disk."""
    return sorted(int(path.name) for path in (workdir / "states").glob("*") if path.name.isdigit())


def wait_for(found, process):
    while process.poll() is None and not found():
        time.sleep(0.02)


@pytest.fixture
def devices(monkeypatch):
    """Return a function that sets the number of devices which a run in this process sees."""

    def few(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        monkeypatch.setattr(parallel, "data_mesh", lambda: mesh)

    few(1)
    return few


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function that makes the next run in this process see a signal at its n-th query."""

    def at(number):
        @contextlib.contextmanager
        def stop_signal():
            asked = []
            yield lambda: asked.append(None) or len(asked) >= number

        monkeypatch.setattr(parallel, "stop_signal", stop_signal)

    return at


def photos(folder, count=16, size=(24, 20), broken=0):
    """Write two kinds of pictures; the first few of the first kind are broken."""
    chance = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = chance.integers(low, low + 90, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    for index in range(broken):
        (folder / "bright" / f"{index:02}.png").write_bytes(b"nothing")
    return f"folder:{folder}"


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


def assert_equals_whole(workdir, whole):
    for name in ("checkpoint", "best"):
        assert_same(params(workdir / name), params(whole / name))
        facts = [fc.load_checkpoint(place / name).meta["provenance"] for place in (workdir, whole)]
        assert (facts[0]["steps"], facts[0]["test"]) == (facts[1]["steps"], facts[1]["test"])


def test_the_run_writes_its_files_and_rows(whole):
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
    chance, began = random.Random(0), time.monotonic()
    finish(start(tmp_path / "timed"))  # its programs are compiled already, as are those of the later starts
    seconds = time.monotonic() - began
    tmp_path, ends = tmp_path / "killed", []
    for _ in range(10):
        process = start(tmp_path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, seconds))
        process.kill()
        process.communicate()
        ends.append(process.returncode)
        if not process.returncode:  # faster than the timed one: begin again, and kill sooner
            shutil.rmtree(tmp_path)
            seconds /= 2
    assert ends.count(-signal.SIGKILL) >= 5
    output = finish(start(tmp_path))
    assert "test top-1" in output
    assert_equals_whole(tmp_path, whole)
    ours, theirs = ([row["step"] for row in rows(place)] for place in (tmp_path, whole))
    assert ours[-1] == theirs[-1]
    assert len(ours) == len(set(ours)) + 1  # none twice except the last, which is logged and tested
    litter = [path.name for path in (*tmp_path.iterdir(), *(tmp_path / "states").iterdir()) if "-" in path.name]
    assert litter == []


@pytest.mark.parametrize("method", ["gradient", "momentum"])
def test_killed_before_at_and_after_the_start_of_sam_it_ends_in_the_same_parameters(method, tmp_path):
    late: dict[str, Any] = dict(
        sam__start=0.5, sam__direction=method, sam__refresh_every=1, schedules="dense", save_every=1, keep=50
    )
    output = finish(start(tmp_path / "whole", **late))
    assert "SAM starts after step 22 of 44" in output
    logged = {row["step"]: row["rho"] for row in rows(tmp_path / "whole") if "rho" in row}
    assert [step for step, rho in logged.items() if rho] == [step for step in logged if step > 22]
    place = tmp_path / "killed"
    for at in (20, 22, 24):  # a state of this step exists, and no later one
        train_to_kill = start(place, **late)
        wait_for(lambda: (place / "states" / str(at)).exists(), train_to_kill)  # noqa: B023
        train_to_kill.kill()
        train_to_kill.communicate()
        assert train_to_kill.returncode == -signal.SIGKILL
        for step in states_in(place):
            if step > at:
                shutil.rmtree(place / "states" / str(step))
        assert states_in(place)[-1] == at
    finish(start(place, **late))
    assert_equals_whole(place, tmp_path / "whole")


def test_sigterm_saves_and_loses_no_step(tmp_path, devices, monkeypatch, capsys):
    config = tiny(epochs=0.25, warmup_epochs=0.0, save_every=1000)
    train(config, tmp_path / "whole")
    add, steps = RecentSteps.add, []

    def and_signal(self, *rest):
        add(self, *rest)
        steps.append(rest)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RecentSteps, "add", and_signal)
        before = signal.getsignal(signal.SIGTERM)
        train_sam.main(config, tmp_path / "stopped")
        assert signal.getsignal(signal.SIGTERM) == before
    assert f"stopped and saved; run the same command to resume: {tmp_path}" in capsys.readouterr().out
    assert states_in(tmp_path / "stopped") == [7]
    stopped = fc.load_checkpoint(tmp_path / "stopped")  # evaluate.py has something to read
    assert stopped.meta["provenance"]["steps"] == 7
    assert stopped.meta["provenance"]["test"] is None
    train(config, tmp_path / "stopped")
    assert_equals_whole(tmp_path / "stopped", tmp_path / "whole")


def pauses(patch):
    """Record whether the clock of the log is stopped, each time that a test begins."""
    paused, assess, inside, told = RecentSteps.paused, assessment.Assessment.__call__, [], []

    @contextlib.contextmanager
    def watched(self):
        with paused(self):
            inside.append(True)
            yield
            inside.pop()

    def asked(*arguments):
        told.append(bool(inside))
        return assess(*arguments)

    patch.setattr(RecentSteps, "paused", watched)
    patch.setattr(assessment.Assessment, "__call__", asked)
    return told


def test_a_signal_during_an_evaluation_loses_no_step_and_the_evaluation_is_made_up_for(
    tmp_path, devices, stop_at, monkeypatch
):
    config = tiny(epochs=0.25, warmup_epochs=0.0, eval_every=4, save_every=1000)
    with pytest.MonkeyPatch.context() as undisturbed:
        undisturbed.setattr(parallel, "stop_signal", lambda: contextlib.nullcontext(lambda: False))
        accuracy = train(config, tmp_path / "whole")
    # Each step queries once; an evaluation, of 12 batches, queries after each of them and at its end.
    for question, state, tested in ((4 + 3, 4, []), (5, 4, []), (13 + 4 + 3, 8, [4]), (13 + 3, 11, [4, 8])):
        stop_at(question)
        stopped = tmp_path / "stopped"
        assert train(config, stopped) is None
        assert states_in(stopped)[-1] == state
        assert fc.load_checkpoint(stopped).meta["provenance"]["steps"] == state
        assert [row["step"] for row in rows(stopped) if "test/dense" in row] == tested
        assert (stopped / "best").exists() == bool(tested)
    stop_at(1000)
    with monkeypatch.context() as patch:
        told = pauses(patch)
        assert train(config, tmp_path / "stopped") == accuracy
        assert told == [True]  # the late evaluation does not count in the steps' time
    assert_equals_whole(tmp_path / "stopped", tmp_path / "whole")
    steps = [[(row["step"], "loss" in row) for row in rows(tmp_path / name)] for name in ("stopped", "whole")]
    assert steps[0][-1] == steps[1][-1]
    assert [step for step, logged in steps[0] if not logged] == [step for step, logged in steps[1] if not logged]


def test_another_configuration_is_refused_with_what_differs(whole, devices):
    told = "optimizer.learning_rate 0.002 there, 0.001 here, sam.rho 0.05 there, 0.1 here"
    with pytest.raises(fc.InputError, match=rf"of another configuration or of other data \({told}\): choose another"):
        train(tiny(sam__rho=0.1, optimizer__learning_rate=1e-3), whole)


def test_other_data_than_those_of_the_run_are_refused(tmp_path, devices, stop_at):
    training, testing, spare = tmp_path / "train", tmp_path / "test", tmp_path / "spare.png"
    changes = dict(batch_size=16, epochs=3.0, schedules="dense")
    config = tiny(train=photos(training), test=photos(testing, count=4), **changes)
    stop_at(2)
    assert train(config, tmp_path / "run") is None
    stop_at(1000)

    def refused(told):
        with pytest.raises(fc.InputError, match=rf"holds a run of .* \({told}\): choose another --workdir"):
            train(config, tmp_path / "run")

    for folder, told in ((training, "images.train 32 there, 31 here"), (testing, "images.test 8 there, 7 here")):
        (folder / "bright" / "00.png").rename(spare)
        refused(told)
        spare.rename(folder / "bright" / "00.png")
    for folder in (training, testing):
        (folder / "dark").rename(folder / "dusk")
    refused("labels.1 'dark' there, 'dusk' here")
    for folder in (training, testing):
        (folder / "dusk").rename(folder / "dark")
        (folder / "third").mkdir()  # not a class, without images
    assert train(config, tmp_path / "run") is not None


def start_pair(workdir, **changes):
    """Start two processes with two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(workdir, f"--distributed=127.0.0.1:{port},2,{index}", devices=2, **changes) for index in (0, 1)]


def test_two_processes_equal_one(whole, tmp_path):
    # Adam would divide gradients that are only rounding, such as those of the keys' biases, by their own size.
    changes = dict(fsdp=True, optimizer__name="sgd", optimizer__learning_rate=0.1, checkpoint=str(whole), epochs=0.5)
    for process in start_pair(tmp_path / "two", **changes):
        finish(process)
    finish(start(tmp_path / "one", devices=4, **changes))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5)  # noqa: E731
    jax.tree.map(close, params(tmp_path / "two"), params(tmp_path / "one"))
    tests = [fc.load_checkpoint(tmp_path / name).meta["provenance"]["test"] for name in ("one", "two")]
    assert tests[0] == tests[1]

    # Killed after a state is written, they resume to the same parameters, bit for bit.
    both, killed = start_pair(tmp_path / "killed", **changes), tmp_path / "killed"
    wait_for(lambda: states_in(killed), both[0])
    for process in both:
        process.kill()
        process.communicate()
    for process in both:
        assert process.returncode == -signal.SIGKILL
    # The same after SIGTERM, which both obey at the same step.
    before, both = states_in(killed), start_pair(killed, save_every=1000, **changes)
    wait_for(lambda: any(row["step"] > before[-1] for row in rows(killed)), both[0])
    for process in both:
        process.send_signal(signal.SIGTERM)
    assert "stopped and saved" in finish(both[0])
    finish(both[1])
    assert before[-1] < states_in(killed)[-1] < 22
    for process in start_pair(killed, **changes):
        finish(process)
    assert_same(params(killed), params(tmp_path / "two"))


def test_a_run_from_a_checkpoint_starts_where_that_ended_on_several_devices(whole, tmp_path, devices, capsys):
    devices(2)
    config = tiny(checkpoint=str(whole), preprocess=None, optimizer__learning_rate=0.0, epochs=0.25, warmup_epochs=0.0)
    accuracy = train(config, tmp_path)
    ended = fc.load_checkpoint(whole)
    assert "config.model is not used: the checkpoint has its own\n" in capsys.readouterr().out
    assert accuracy is not None
    assert accuracy.correct == ended.meta["provenance"]["test"]["correct"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params(tmp_path), ended.params)


@pytest.mark.parametrize("family", [{}, NEWER], ids=["ViT", "rotary, gate and probe"])
def test_sharded_leaves_are_trained_to_the_same(family, tmp_path, devices, monkeypatch):
    devices(2)
    monkeypatch.setattr(parallel, "_SMALLEST_SHARDED", 1)
    original, shards = loop.loop, {}
    for fsdp in (True, False):

        def watched(run, state, *rest, fsdp=fsdp):
            tree = (state.params, state.opt_state, state.ema, state.sam)
            shards[fsdp] = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)]
            return original(run, state, *rest)

        monkeypatch.setattr(loop, "loop", watched)
        changes = dict(optimizer__name="sgd", optimizer__learning_rate=0.1, epochs=0.25, warmup_epochs=0.0)
        train(tiny(fsdp=fsdp, **changes, **family), tmp_path / str(fsdp))
    assert all(shards[False])
    assert sum(shards[True]) < 0.1 * len(shards[True])  # all but counters and the like
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=5e-5)  # noqa: E731
    jax.tree.map(close, params(tmp_path / "True"), params(tmp_path / "False"))


def test_fine_tuning_replaces_the_head_and_resamples(tmp_path, capsys, devices):
    changes = dict(image_size=48, preprocess=None, batch_size=16, epochs=6.0, sam__refresh_every=1)
    config = tiny(checkpoint="packaged:digits", **changes)
    config.model = {}
    config.train = config.test = photos(tmp_path / "photos", size=(40, 48))
    config.ema_decay, config.schedules = 0.0, "tome_r8"
    accuracy = train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "packaged:digits has 10 classes, the data set 2: its head is replaced by zeros" in printed
    assert "position embedding 8x8, the model's grid 12x12" in printed
    assert "config.model" not in printed
    assert accuracy is not None
    assert accuracy.top1 == 1.0
    loaded = fc.load_checkpoint(tmp_path / "run")
    assert (loaded.config.image_size, loaded.config.num_classes) == ((48, 48), 2)
    assert loaded.meta["class_names"] == ["bright", "dark"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 33}, "batch_size is 33: it must be a positive multiple of the 2 devices"),
        ({"batch_size": 3200}, "batch_size: 3200 is more than the 1437 images of digits:train"),
        ({"warmup_epochs": 1.0}, "warmup_epochs is 1.0: it must be below epochs, 1.0"),
        ({"sam.rho": -1.0}, "sam.rho is -1.0"),
        ({"optimizer.learning_rate": None}, "optimizer.learning_rate is None: it must be a number, 0 or more"),
        ({"model.colour": 3}, "model.colour: there is no such field; the fields are image_size,"),
        ({"model.dept": 3}, "model.dept: there is no such field; did you mean 'depth'?"),
        ({"sam.microbatches": 3}, "it must be a multiple of sam.microbatches, 3"),
        ({"optimizer.name": "adam"}, "optimizer.name is 'adam': choose one of"),
        ({"optimizer.freeze": "nothing"}, "optimizer.freeze is 'nothing'"),
        ({"dtype": "float16"}, "dtype is 'float16': choose one of"),
        ({"schedule": "tome_x"}, "tome_x"),
        ({"test": "folder:/nowhere"}, "no folder"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"checkpoint": "/nowhere"}, "no such checkpoint directory"),
        ({"train": ""}, "train is missing: set --config.train=... to a data set such as folder:PATH"),
        ({"test": ""}, "test is missing: set --config.test=..."),
        ({"preprocess": ""}, "preprocess is missing: set --config.preprocess=..., such as timm/augreg"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be a number, 0 or more and below 1"),
        ({"drop_path": -0.1}, "drop_path is -0.1: it must be a number, 0 or more and below 1"),
        ({"workers": 0}, "workers is 0: it must be a whole number, 1 or more, or none"),
        ({"seed": -1}, "seed is -1: it must be a whole number, 0 or more"),
        ({"on_bad": "ignore"}, "on_bad is 'ignore': choose one of stop, skip"),
        ({"augment.flip": 50.0}, "augment.flip is 50.0: it must be a number from 0 to 1"),
        ({"image_size": 32}, "image_size is 32: it resamples a checkpoint, and none is given"),
        ({"schedules": "local:2:r4:w3x3"}, "4x4 grid does not divide into 3x3 windows"),
    ],
)
def test_bad_configurations_are_a_one_line_error_at_once(changes, says, tmp_path, monkeypatch):
    monkeypatch.setattr(assessment, "compile_steps", None)
    config = tiny()
    config.update_from_flattened_dict(changes)
    with pytest.raises(fc.InputError, match=says.replace(".", r"\.")):
        train(config, tmp_path)


def several_labels(spec):
    """Give each image of a data set a tuple of labels; the last image has none."""
    source = open_source(spec)

    def read(index):
        record = source[index]
        return record._replace(label=(record.label,) if index < len(source) - 1 else ())

    return dataclasses.replace(source, read=read, labels_per_image=2)


def test_several_labels_an_image_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "open_source", several_labels)
    monkeypatch.setattr(assessment, "compile_steps", None)
    with pytest.raises(fc.InputError, match="digits:train has several labels per image: it can be evaluated on, not"):
        train(tiny(), tmp_path)


def test_a_published_model_is_converted_once_and_not_taken_for_another(tmp_path, monkeypatch):
    converted, digits = [], open_source("digits:test")

    def convert(source, path, report):
        converted.append(source)
        shutil.copytree(PACKAGED / "digits", path)

    monkeypatch.setattr(training_run, "convert", convert)
    names = ["deit_small_patch16_224.fb_in1k", "vit_small_patch16_224.augreg_in21k_ft_in1k"]
    for name in (*names, *names):
        killed = tmp_path / "pretrained" / f".{name}.partial-12345678"
        killed.mkdir(parents=True)
        config = TrainConfig.from_dict(tiny(checkpoint=name, preprocess=None).to_dict())
        begun, _ = training_run.begin(config, tmp_path, digits, digits)
        assert begun.config.depth == 6
        assert not killed.exists()
    assert converted == names
    assert {path.name for path in (tmp_path / "pretrained").iterdir()} == {*names}


def test_a_run_from_nowhere_requires_a_checkpoint_and_one_over_its_source_is_refused(tmp_path):
    config = defaults()
    config.train = config.test = "digits:train"
    config.optimizer.learning_rate = 1e-3
    for preprocess in (None, "timm/augreg"):
        config.preprocess = preprocess
        with pytest.raises(fc.InputError, match=r"checkpoint is missing: set --config\.checkpoint=\.\.\., or"):
            train(config, tmp_path)
    for source in ("", "checkpoint", "best"):
        config.checkpoint = str(tmp_path / source)
        with pytest.raises(fc.InputError, match="which this run would overwrite: choose another --workdir"):
            train(config, tmp_path)


def test_the_schedule_may_be_that_of_a_search_and_is_stored_in_its_explicit_form(tmp_path, devices):
    form = "dense:1,global:5:r3@nearest"
    (tmp_path / "search.json").write_text(json.dumps({"recommended": {"0.6": form}}))
    config = tiny(checkpoint="packaged:digits", schedule=f"search:{tmp_path}", schedules=f"search:{tmp_path}:0.6")
    opened, _ = training_run.open_run(TrainConfig.from_dict(config.to_dict()), tmp_path / "run")
    assert str(opened.model.schedule) == opened.facts()["config"]["schedule"] == form
    assert list(map(str, opened.schedules.values())) == ["dense:6", form]
    config.schedule = "recommended"
    with pytest.raises(fc.InputError, match="the checkpoint recommends none"):
        training_run.open_run(TrainConfig.from_dict(config.to_dict()), tmp_path / "run")


def test_folders_of_different_classes_are_refused(tmp_path, devices):
    config = tiny(train=photos(tmp_path / "train"), test=photos(tmp_path / "test"), batch_size=16)
    (tmp_path / "test" / "dark").rename(tmp_path / "test" / "dusk")
    told = f"{config.test} has class 'dusk' where a model trained on {config.train} has 'dark'"
    with pytest.raises(fc.InputError, match=told):
        train(config, tmp_path / "run")
    photos(tmp_path / "test" / "third")
    with pytest.raises(fc.InputError, match=f"{config.test} has 3 classes, the head of a model trained on"):
        train(config, tmp_path / "run")


def test_evaluation_is_compiled_before_the_first_step_and_as_large_as_a_micro_batch(tmp_path, devices, monkeypatch):
    sizes = []

    def out_of_memory(model, schedules, params, config):
        sizes.append(config.batch_size)
        raise MemoryError

    monkeypatch.setattr(assessment, "compile_steps", out_of_memory)
    with pytest.raises(MemoryError):
        train(tiny(sam__microbatches=4), tmp_path)
    assert sizes == [8]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_flatness_is_measured_at_the_end_if_configured(tmp_path, monkeypatch, devices, capsys):
    config = tiny(epochs=0.25, warmup_epochs=0.0, targets__loss="sigmoid", schedule="tome_r2", schedules="dense")
    config.model.pool = "avg"  # a last merge does not change the class token
    train_sam.main(config, tmp_path)
    assert not (tmp_path / "flatness.json").exists()
    monkeypatch.setattr(loop.flatness, "FlatnessConfig", functools.partial(FlatnessConfig, **FEW))
    config.flatness = True
    train_sam.main(config, tmp_path)  # the run is complete
    report = FlatnessReport.read(tmp_path / "flatness.json")
    assert report.config.loss == "sigmoid"
    facts = {name: report.conditions[name] for name in ("checkpoint", "dataset", "schedule")}
    assert facts == {"checkpoint": str(tmp_path), "dataset": "digits:train", "schedule": "global:2:r2"}
    (tmp_path / "flatness.png").stat()
    assert f"written into {tmp_path}: flatness.json, flatness.png\ntest top-1 " in capsys.readouterr().out
    # The command that several processes print gives the same measures.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    loop.measure_flatness(TrainConfig.from_dict(config.to_dict()), tmp_path)
    told = capsys.readouterr().out
    assert told.startswith("flatness is measured by one process: run python -m fcvit_jax.flatness ")
    monkeypatch.undo()
    words = shlex.split(told.partition("fcvit_jax.flatness ")[2])
    measure_and_print([*words, *(f"--{name}={value}" for name, value in FEW.items())])
    again = FlatnessReport.read(tmp_path / "flatness.json")
    np.testing.assert_array_equal(again.losses, report.losses)
    assert again.conditions == report.conditions


@pytest.mark.parametrize("interval", ["log_every", "save_every", "eval_every"])
def test_a_loss_that_is_not_finite_stops_with_the_images(tmp_path, devices, interval):
    """It stops at whatever is due first, so that nothing later is saved, tested or logged."""
    intervals = dict(log_every=1000, save_every=1000, eval_every=1000) | {interval: 4}
    config = tiny(optimizer__learning_rate=1e30, optimizer__clip_norm=1e30, schedules="dense", **intervals)
    with pytest.raises(fc.InputError, match=r"not finite at step \d+ \(images digits/\d+") as told:
        train(config, tmp_path)
    kept = fc.load_checkpoint(tmp_path / "last_good")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))
    at = kept.meta["provenance"]["steps"] + 1
    assert f"at step {at} (" in str(told.value)
    assert f"all of them in {tmp_path / 'not_finite.txt'}" in str(told.value)
    assert f"the last good parameters are in {tmp_path / 'last_good'}" in str(told.value)
    names = (tmp_path / "not_finite.txt").read_text().splitlines()
    assert len(set(names)) == 32
    assert f"(images {', '.join(names[:4])}, ..." in str(told.value)
    assert states_in(tmp_path) == []
    assert not (tmp_path / "best").exists()
    assert rows(tmp_path) == []


def test_parameters_that_are_not_finite_are_not_called_good(tmp_path):
    run: Any = SimpleNamespace(workdir=tmp_path)
    state: Any = SimpleNamespace(weights={"a": jnp.ones(3), "b": jnp.asarray([1.0, jnp.inf])})
    told = str(loop.give_up(run, state, 7, ("x", "y", "")))
    assert told.startswith("loss or gradient is not finite at step 7 (images x, y, ...; all of them in ")
    assert told.endswith("the parameters before it are not finite either")
    assert (tmp_path / "not_finite.txt").read_text() == "x\ny\n"
    assert not (tmp_path / "last_good").exists()


def test_unreadable_images_stop_it_or_are_skipped_and_counted_through_a_restart(tmp_path, capsys, devices, stop_at):
    changes = dict(batch_size=16, epochs=3.0, log_every=1, eval_every=4, schedules="dense")
    config = tiny(train=photos(tmp_path / "train", broken=3), test=photos(tmp_path / "test", broken=2), **changes)
    told = r"bright/0\d\.png cannot be decoded: .*; repair it, or leave it out with --config\.on_bad=skip"
    with pytest.raises(fc.InputError, match=told):
        train(config, tmp_path / "stop")
    config.on_bad = "skip"
    stop_at(2)  # of six steps
    assert train(config, tmp_path / "run") is None
    stop_at(1000)
    accuracy = train(config, tmp_path / "run")
    assert accuracy is not None
    assert accuracy.num_images == 30
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert len([line for line in told if "bright/02" in line]) == 3  # a broken training image, once an epoch
    assert len(told) == 3 * 3 + 2  # broken test images once, though tested twice
    logged = {row["step"]: row["skipped"] for row in rows(tmp_path / "run") if "skipped" in row}
    assert (logged[2], logged[4], logged[6]) == (3, 6, 9)
    assert [row["test/skipped"] for row in rows(tmp_path / "run") if "test/skipped" in row] == [2, 2]


def test_a_run_that_an_unreadable_image_ended_resumes_without_it(tmp_path, devices, monkeypatch):
    changes = dict(batch_size=16, epochs=3.0, eval_every=4, schedules="dense")
    config = tiny(train=photos(tmp_path / "train"), test=photos(tmp_path / "test", broken=2), **changes)
    opened = lambda spec: (several_labels if spec == config.test else open_source)(spec)  # noqa: E731
    monkeypatch.setattr(training_run, "open_source", opened)
    for _ in range(2):  # started again, it is tested first
        with pytest.raises(
            fc.InputError, match=r"bright/0\d\.png cannot be decoded: .*; repair it, .*--config\.on_bad=skip"
        ):
            train(config, tmp_path / "run")
        assert states_in(tmp_path / "run") == [4]
    # Fields that do not change the result may change too.
    config.update(on_bad="skip", fsdp=True, remat=True, workers=1)
    accuracy = train(config, tmp_path / "run")
    assert accuracy is not None
    assert accuracy.num_images == 29  # one has no label, and does not count as skipped
    assert [(row["step"], row["test/skipped"]) for row in rows(tmp_path / "run") if "test/skipped" in row] == [
        (4, 2),
        (6, 2),
    ]


def test_a_full_disk_ends_a_run_in_one_line(tmp_path, devices):
    """A real disk of two megabytes, if this user may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (disk / "full").write_bytes(bytes(2**21 - 2**16))  # a state has 118 kB
        with pytest.raises(fc.InputError, match=r"cannot be written \(the disk is full.*\): make room"):
            train(tiny(epochs=0.25, warmup_epochs=0.0), disk)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_run_in_a_notebook(tmp_path, devices):
    config = fc_training.TrainConfig(
        train="digits:train",
        test="digits:test",
        checkpoint="packaged:digits",
        optimizer=fc_training.OptimizerConfig(learning_rate=0.0),
        batch_size=32,
        epochs=0.05,
        tensorboard=False,
    )
    result = fc_training.train(config, str(tmp_path))
    assert result.accuracy is not None
    assert (result.accuracy.correct, int(result.state.step)) == (354, 2)
    assert_same(fc.load_checkpoint(result.checkpoint).params, fc.load_checkpoint("packaged:digits").params)
    facts = fc.load_checkpoint(tmp_path).meta["provenance"]
    assert TrainConfig.from_dict(facts["train_config"]) == config
