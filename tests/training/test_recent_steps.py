"""The means of the log, with fake clocks and steps."""

import contextlib
import importlib.util
import json
import re
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.data.preprocess import preset
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.vit import ViT
from fcvit_jax.training import recent_steps
from fcvit_jax.training.log import Log
from fcvit_jax.training.recent_steps import RecentSteps, WaitingTime
from fcvit_jax.training.sam import SAMConfig
from fcvit_jax.training.step import StepInputs


class Clock:
    """Time that passes on request."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(recent_steps, "time", clock)
    return clock


def batch(*names, skipped=()):
    return Batch(np.zeros(1), np.zeros(1), np.zeros(1), names, skipped)


def metrics(rho=0.1, gap=0.0, finite=1.0, **others):
    rest = {"loss": 1.0, "grad_norm": 2.0, "gap_over_rho": gap / rho if rho else 0.0} | others
    return {name: jnp.float32(x) for name, x in {"rho": rho, "gap": gap, "finite": finite, **rest}.items()}


@contextlib.contextmanager
def opened(directory, **others):
    with contextlib.closing(RecentSteps(Log(directory, 0, False), 8, 100, 0, **others)) as made:
        yield made


def last_row(directory):
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])


def test_gap_and_radius_are_means_over_steps_with_a_second_pass(tmp_path):
    with opened(tmp_path) as steps:
        for rho, gap, loss in ((0.1, 0.3, 1.0), (0.0, 0.0, 2.0), (0.0, 0.0, 3.0), (0.1, 0.5, 4.0)):
            steps.add(batch("a"), metrics(rho, gap, loss=loss))
        steps.log(4)
        row = last_row(tmp_path)
        assert row["loss"] == 2.5
        assert row["gap"] == pytest.approx(0.4)
        assert row["gap_over_rho"] == pytest.approx(4)
        assert row["rho"] == pytest.approx(0.1)
        steps.add(batch("a"), metrics(0.0))
        steps.log(5)
        assert {last_row(tmp_path)[name] for name in ("gap", "gap_over_rho", "rho")} == {0}


def test_the_first_step_that_was_not_finite_is_named_though_later_ones_are(tmp_path):
    with opened(tmp_path) as steps:
        for name, finite in (("a", 1), ("b", 0), ("c", 1)):
            steps.add(batch(name), metrics(finite=finite))
        assert steps.first_bad(8) == (7, ("b",))
        steps.log(8)
        assert steps.first_bad(8) is None


def test_skipped_images_are_reported_and_counted(tmp_path, capsys):
    with opened(tmp_path, skipped=5) as steps:
        steps.add(batch("a", skipped=("b cannot be read", "c cannot be read")), metrics())
        assert steps.skipped() == 7
        steps.log(1)
    assert last_row(tmp_path)["skipped"] == 7
    *skipped, step = capsys.readouterr().out.splitlines()
    assert skipped == ["skipped: b cannot be read", "skipped: c cannot be read"]
    assert re.fullmatch(r"step 1 of 100: loss 1\.000, \S+ images/s", step)
    with opened(tmp_path) as steps:
        assert steps.skipped() is None


def test_only_the_first_process_announces_what_the_run_does(tmp_path, capsys):
    with opened(tmp_path) as first:
        first.announce("resuming")
    with contextlib.closing(RecentSteps(None, 8, 100, 0)) as other:
        other.announce("resuming")
        other.add(batch("a"), metrics())
        other.log(1)
    assert capsys.readouterr().out == "resuming\n"


def test_counts_of_processes_are_added_up(monkeypatch):
    assert parallel.sum_over_processes(3) == 3
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", lambda mine: np.array([mine, 4]))
    assert parallel.sum_over_processes(3) == 7


def test_time_between_steps_does_not_count(tmp_path, clock):
    with opened(tmp_path) as steps:
        for _ in (1, 2):
            clock.now += 2
            steps.add(batch("a"), metrics())
            with steps.paused():
                clock.now += 100
        steps.log(2)
        assert last_row(tmp_path)["images_per_second"] == 2 * 8 / (2 * 2)
        with steps.paused():
            clock.now += 100
        clock.now += 4
        steps.add(batch("a"), metrics())
        steps.log(3)
        assert last_row(tmp_path)["images_per_second"] == 8 / 4


def drive(load, step, count=6):
    """Return the seconds that devices wait, and all seconds, if a batch takes `load` and a step `step` seconds."""

    class Busy:
        free = 0.0

        def __init__(self):
            Busy.free = self.end = max(Busy.free, time.perf_counter()) + step

        def block_until_ready(self):
            time.sleep(max(0.0, self.end - time.perf_counter()))
            return self

    def batches():
        for index in range(count):
            time.sleep(load)
            yield index

    with contextlib.closing(WaitingTime()) as wait:
        began = time.perf_counter()
        for _ in wait.timed(batches()):
            wait.started(Busy())
        return wait.seconds, time.perf_counter() - began


def test_the_host_waits_for_a_batch_while_the_step_before_is_computed():
    waited, _ = drive(load=0.05, step=0.2)  # all but the first batch are loaded during a step
    assert 0.05 <= waited < 0.15
    waited, took = drive(load=0.2, step=0.05)  # 0.05 s of each load are
    assert 6 * 0.15 < waited < took - 5 * 0.05 + 0.01


def test_the_host_is_one_step_ahead_and_no_more():
    started, ended = [], []

    class Step:
        def __init__(self, index):
            self.index = index
            started.append(index)

        def block_until_ready(self):
            time.sleep(0.05)
            ended.append(self.index)
            return self

    with contextlib.closing(WaitingTime()) as wait:
        for index in wait.timed(iter(range(5))):
            wait.started(Step(index))
            assert len(started) - len(ended) <= 1 or index == 0


def test_the_benchmark_feeds_one_device_of_several(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "training.py"
    spec: Any = importlib.util.spec_from_file_location("benchmark_of_training", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(4):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    config, pixels = ViTConfig((8, 8), 4, 8, 1, 2, 8, num_classes=2), preset("timm/augreg", (8, 8))
    rows = StepInputs(jnp.zeros((4, 8, 8, 3), jnp.uint8), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))
    assert jax.device_count() > 1
    contender = benchmark.Contender(ViT(config), pixels, SAMConfig(), rows)
    args, source = Namespace(batch_size=4, blocks=2), benchmark.open_source(f"folder:{tmp_path}")
    assert 0 <= benchmark.waiting(args, contender, pixels, source) < 1
    assert int(contender.state.step) == 3 * benchmark.BLOCK
