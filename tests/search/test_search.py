"""Searches of the packaged digits, and their command line."""

import json

import jax
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.data.records import Source
from fcvit_jax.data.sources import open_source
from fcvit_jax.evaluation import cost_rows
from fcvit_jax.models import flops
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.search import MEMORY, SearchConfig
from fcvit_jax.search.__main__ import main
from fcvit_jax.search.budgets import LayerTimes, parse_budgets
from fcvit_jax.search.front import Front
from fcvit_jax.search.scores import Memory, distance

SMALL = {"limit": 64, "candidates": 6, "rules": "nearest"}


@pytest.fixture(scope="module")
def digits():
    return fc.load_checkpoint("packaged:digits")


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory):
    """A search of two budgets, and its working directory."""
    workdir = tmp_path_factory.mktemp("found")
    return fc.search(digits, "digits:train", "0.5,0.7", workdir=workdir, **SMALL), workdir


def test_it_keeps_the_budget_and_reports_every_candidate(found, digits):
    report, workdir = found
    dense = flops.gmacs(digits.config)
    for each, share in zip(report.found, (0.5, 0.7), strict=True):
        for text in (each.recommended, each.schedule):
            assert flops.gmacs(digits.config, MergeSchedule.parse(text, 6)) <= share * dense
        assert each.simple_score == min(each.families.values())
        assert each.costs["found"] == flops.gmacs(digits.config, parse(each.schedule))
        assert all(each.costs[name] == flops.gmacs(digits.config, parse(name)) for name in each.families)
        assert each.recommended == (each.schedule if each.judgement.better else str(parse(each.simple)))
    written = json.loads((workdir / "search.json").read_text())
    assert written["recommended"] == report.recommended
    assert written["conditions"]["chosen_by"] == written["conditions"]["judged_by"] == 32
    whole = [row for row in written["candidates"] if row["budget"] == "0.5" and row["images"] == 32]
    assert report.found[0].schedule == min(whole, key=lambda row: row["score"])["schedule"]
    assert {path.name for path in workdir.iterdir()} == {"search.json", "search.png"}


def parse(name):
    return MergeSchedule.parse(name, 6)


def test_scores_are_those_of_a_real_evaluation(found, digits):
    """Against `fc.evaluate` on the same images, which drew them as documented: by the seed's permutation."""
    report, _ = found
    source = open_source("digits:train")
    order = np.random.default_rng(0).permutation(len(source))[32:64]
    drawn = Source("judging", source.class_names, 32, lambda index: source[int(order[index])])
    each = report.found[0]
    schedules = {"dense": MergeSchedule.dense(6), "found": parse(each.schedule), "simple": parse(each.simple)}
    rows = fc.evaluate(digits, drawn, schedules, throughput_blocks=0, batch_size=16)
    kl = {row["schedule"]: row["kl"] for row in rows}
    assert each.score == pytest.approx(kl["found"], rel=1e-4, abs=1e-8)
    assert each.simple_score == pytest.approx(kl["simple"], rel=1e-4)


def test_killed_and_resumed_it_finds_the_same(found, digits, tmp_path, monkeypatch, capsys):
    report, _ = found
    calls, real = [], Memory.keep

    def killed(self, key, values):
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(key)
        return real(self, key, values)

    monkeypatch.setattr(Memory, "keep", killed)
    with pytest.raises(KeyboardInterrupt):
        fc.search(digits, "digits:train", "0.5,0.7", workdir=tmp_path, **SMALL)
    monkeypatch.setattr(Memory, "keep", real)
    path = tmp_path / MEMORY
    path.write_text(path.read_text() + '{"half a li')
    again = fc.search(digits, "digits:train", "0.5,0.7", workdir=tmp_path, **SMALL)
    assert "resuming the interrupted search after 9 measurements" in capsys.readouterr().out
    assert again == report
    assert not path.exists()


def test_another_search_in_the_same_directory_starts_over(tmp_path):
    Memory(tmp_path / MEMORY, {"seed": 0}).keep("a", [1.0])
    assert Memory(tmp_path / MEMORY, {"seed": 0}).known == {"a": [1.0]}
    other = Memory(tmp_path / MEMORY, {"seed": 1})
    assert (other.known, other.differs) == ({}, ("seed",))


def test_without_a_head_the_score_is_the_cosine(digits):
    dense, merged = jax.numpy.asarray([[3.0, 4.0], [1.0, 0.0]]), jax.numpy.asarray([[6.0, 8.0], [0.0, 2.0]])
    headless = fc.ViTConfig(**{**digits.config.to_dict(), "num_classes": 0})
    np.testing.assert_allclose(distance(headless, dense, merged), [0.0, 1.0], atol=1e-6)


def test_eight_images_are_too_few_and_the_simple_schedule_is_written_into_the_checkpoint(digits, tmp_path):
    checkpoint = fc.save_checkpoint(tmp_path / "copy", digits.config, digits.params, digits.preprocess)
    report = fc.search(checkpoint, "digits:train", 0.6, limit=8, candidates=1, rules="nearest", write=True)
    assert not report.found[0].judgement.better
    assert "4 images are too few to judge" in str(report)
    assert report.recommended == {"0.6": str(parse(report.found[0].simple))}
    copy = fc.load_checkpoint(checkpoint)
    assert copy.recommended == report.recommended
    (row,) = cost_rows(copy, "recommended")
    assert (row["schedule"], row["stages"]) == ("recommended", report.recommended["0.6"])


def test_layers_are_timed_for_a_speed(digits, monkeypatch):
    monkeypatch.setattr(Front, "_speeds", lambda self, schedules: dict.fromkeys(["dense", *schedules], 7.0))
    report = fc.search(digits, "digits:train", "1x", limit=16, candidates=1, rules="nearest", batch_size=8)
    (each,) = report.found
    assert (each.images_per_second, each.speedup) == (7.0, 1.0)


def test_a_speed_is_measured(digits, monkeypatch):
    """On a machine whose time is the GMACs, a speed budget finds the same as the share."""
    images = {}

    def speeds(self, schedules):
        named = {"dense": MergeSchedule.dense(6), **schedules}
        images.update({name: 1 / flops.gmacs(digits.config, each) for name, each in named.items()})
        return {name: images[name] for name in named}

    def times(self):
        counts = list(range(1, 66))
        layer = [flops.layer_macs(digits.config)[0] / 1e9 * n / 65 for n in counts]
        return LayerTimes(counts, layer, {"nearest": [0.0] * 65, "tome": [0.0] * 65}, flops.gmacs(digits.config))

    monkeypatch.setattr(Front, "_speeds", speeds)
    monkeypatch.setattr(Front, "_layer_times", times)
    report = fc.search(digits, "digits:train", "1.5x", **{**SMALL, "limit": 32, "candidates": 2})
    (each,) = report.found
    assert each.speedup == pytest.approx(flops.gmacs(digits.config) / each.gmacs)
    assert (each.speedup or 0) >= 0.99 * 1.5
    with pytest.raises(fc.InputError, match=r"budget 9x: the fastest schedule reaches about [2-5]\.\d\dx, \S+ "):
        fc.search(digits, "digits:train", "9x", limit=32)


def test_layer_times_add_up():
    config = fc.load_checkpoint("packaged:digits").config
    times = LayerTimes([1, 65], [1.0, 65.0], {"tome": [0.0, 6.4]}, whole=400.0)
    assert times.seconds(MergeSchedule.dense(6), config) == pytest.approx(400)
    # Two layers: from 65 to 53 tokens, and from 53 to 41; merging adds a tenth of the tokens above 1.
    two = times.seconds(MergeSchedule.parse("global:2:r12,dense:4", 6), config)
    assert two == pytest.approx(400 - 6 * 65 + (59 + 6.4) + (47 + 5.2) + 4 * 41)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "nowhere"], "images 'nowhere': there is no such file or folder"),
        (["--budget", "1.2"], "budget 1.2: the dense model needs only"),
        (["--budget", "0.01"], "budget 0.01: the cheapest schedule needs"),
        (["--budget", "9G"], "budget 9G: the dense model needs only"),
        (["--budget", "0.9x"], "budget 0.9x: a speed-up below 1 restricts nothing"),
        (["--budget", "fast"], "budget 'fast' is not one: write 0.6"),
        (["--rules", "nearst"], "unknown merge rule 'nearst': choose nearest"),
        (["--batch_size", "3"], "batch_size is 3: it must be a positive multiple of the 2 devices"),
        (["--limit", "1"], "limit is 1: it must be a whole number, 2 or more"),
        (["--write"], "belongs to the library"),
        (["--correct", "/proc/none/out"], "/proc/none cannot be written"),
    ],
)
def test_bad_input_is_one_line(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ending:
        main(["--workdir", str(tmp_path / "out"), *argv])
    error = capsys.readouterr().err
    assert ending.value.code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_budgets_are_read():
    assert [(each.number, each.unit) for each in parse_budgets("0.6, 2.8G,1.7x,900/s")] == [
        (0.6, ""),
        (2.8, "G"),
        (1.7, "x"),
        (900.0, "/s"),
    ]
    assert parse_budgets(0.6)[0].text == "0.6"
    assert SearchConfig().limit == 512
