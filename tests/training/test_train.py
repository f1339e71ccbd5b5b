"""The trainer as a user runs it: what it writes and prints, from checkpoints and with bad input."""

import dataclasses
import functools
import json
import shlex
import shutil
import subprocess
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
import train_sam
from configs.training import defaults
from fcvit_jax import parallel
from fcvit_jax import training as fc_training
from fcvit_jax.checkpoint import PACKAGED
from fcvit_jax.data.sources import open_source
from fcvit_jax.flatness import FlatnessConfig, FlatnessReport
from fcvit_jax.flatness.__main__ import main as measure_and_print
from fcvit_jax.training import TrainConfig, assessment, loop, training_run
from short_training import FEW, NEWER, assert_same, params, photos, rows, states_in, tiny, train


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
