"""Training that is stopped, killed, or spread over processes, and resumed, ends in the same parameters."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from typing import Any

import jax
import numpy as np
import pytest

import fcvit_jax as fc
import train_sam
from fcvit_jax import parallel
from fcvit_jax.training import assessment
from fcvit_jax.training.recent_steps import RecentSteps
from processes import places
from short_training import assert_same, finish, params, photos, rows, start, states_in, tiny, train, wait_for


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
    return [start(workdir, f"--distributed={place}", devices=2, **changes) for place in places()]


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
