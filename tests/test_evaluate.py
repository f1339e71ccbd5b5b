"""The evaluation as a user runs it: its rows, interrupted and resumed, on several devices and processes."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import evaluate
import fcvit_jax as fc
from configs import eval_digits
from fcvit_jax import evaluation, parallel
from fcvit_jax.checkpoint import without_head
from fcvit_jax.data import imagenet
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import EvaluationConfig, inputs, report
from fcvit_jax.evaluation.outcomes import Journal
from fcvit_jax.evaluation.statistics import mcnemar, wilson
from fcvit_jax.evaluation.times import format_times

ROOT = Path(__file__).parents[1]
CLASSES = tuple("abcdefg")
CONFIG = fc.ViTConfig((16, 16), 4, 16, 3, 2, 32, num_classes=len(CLASSES))
PREPROCESS = preset("timm/augreg,crop_pct=1.0", (16, 16))
SCHEDULES = ("dense", "tome_r3", "s1winc1_r4")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    params = jax.jit(fc.ViT(CONFIG).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    leaves, tree = jax.tree.flatten(params)
    noisy = [np.asarray(leaf) + RNG.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    path = tmp_path_factory.mktemp("weights") / "checkpoint"
    provenance = {"model": "vit_tiny_patch16_224", "sha256": "ab12"}
    return fc.save_checkpoint(
        path, CONFIG, tree.unflatten(noisy), PREPROCESS, class_names=CLASSES, provenance=provenance
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirteen images of noise in seven classes; in the order of the folder, image i has the pixels `PIXELS[i]`."""
    path = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(PIXELS):
        (path / CLASSES[index // 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path / CLASSES[index // 2] / f"{index:02d}.png")
    return path


@pytest.fixture
def run(checkpoint, folder):
    def run(workdir, **changes):
        fields: Any = {"dataset": f"folder:{folder}", "schedules": ",".join(SCHEDULES), "batch_size": 8}
        return evaluation.evaluate(checkpoint, workdir=workdir, **({"throughput_blocks": 0} | fields | changes))

    return run


def logits_by_hand(checkpoint):
    """Logits of each schedule, image by image, in float64."""
    loaded = fc.load_checkpoint(checkpoint)
    found = {}
    for name in SCHEDULES:
        model = fc.ViT(CONFIG, fc.MergeSchedule.parse(name, 3))
        pixels = PREPROCESS.normalize(jax.numpy.asarray(PIXELS))
        found[name] = np.asarray(jax.jit(model.apply)({"params": loaded.params}, pixels)[0], np.float64)
    return found


def ranks(logits, labels, scored=range(7)):
    """Rank the first right label among the scored logits."""
    order = [sorted(scored, key=lambda c: (-row[c], c)) for row in logits]
    return np.array([min(of.index(label) for label in each) for of, each in zip(order, labels, strict=True)])


def log_softmax(rows):
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def test_rows_and_files_equal_a_count_by_hand(checkpoint, run, tmp_path):
    (tmp_path / "logits_old.npz").write_bytes(b"of an earlier run")
    (tmp_path / "notes.txt").write_text("the user's")
    torn = [".results.jsonl.partial", ".report.html.partial", "gallery/.000_photo.png.partial"]  # by a kill
    (tmp_path / "gallery").mkdir()
    for name in torn:
        (tmp_path / name).write_bytes(b"a half")
    rows = run(tmp_path, save_logits=True, gallery=2)
    labels = [index // 2 for index in range(13)]
    logits = logits_by_hand(checkpoint)
    dense = ranks(logits["dense"], [[label] for label in labels])
    saved = np.load(tmp_path / "outcomes.npz")
    assert saved["schedules"].tolist() == [row["schedule"] for row in rows] == list(SCHEDULES)
    assert saved["labels"].tolist() == labels
    assert saved["names"].tolist() == [f"{CLASSES[index // 2]}/{index:02d}.png" for index in range(13)]
    for index, (name, row) in enumerate(zip(SCHEDULES, rows, strict=True)):
        rank = ranks(logits[name], [[label] for label in labels])
        np.testing.assert_array_equal(saved["rank"][index], rank)
        np.testing.assert_array_equal(saved["prediction"][index], logits[name].argmax(axis=1))
        correct = int((rank == 0).sum())
        gained, lost = int(((rank == 0) & (dense > 0)).sum()), int(((rank > 0) & (dense == 0)).sum())
        p, q = log_softmax(logits["dense"]), log_softmax(logits[name])
        divergences = (np.exp(p) * (p - q)).sum(axis=1)
        np.testing.assert_allclose(saved["kl"][index], divergences, atol=1e-5)
        assert row["kl"] == pytest.approx(divergences.mean(), abs=1e-5)
        assert (row["correct"], row["num_images"], row["top1"]) == (correct, 13, correct / 13)
        assert row["top5"] == (rank < 5).sum() / 13
        assert (row["top1_low"], row["top1_high"]) == wilson(correct, 13)
        assert (row["gained"], row["lost"], row["mcnemar_p"]) == (gained, lost, mcnemar(gained, lost))
        assert row["agreement"] == (logits[name].argmax(1) == logits["dense"].argmax(1)).mean()
        assert (row["classes_scored"], row["images_excluded"]) == (7, 0)
        assert (row["model"], row["reference_top1"], row["reference_sigmas"]) == ("vit_tiny_patch16_224", None, None)
        np.testing.assert_allclose(np.load(tmp_path / f"logits_{name}.npz")["logits"], logits[name], atol=1e-4)
    assert rows[0]["gmacs"] > rows[1]["gmacs"]
    assert rows[0]["seconds"].keys() == {"compiling", "waiting for data", "computing", "on the host", "pictures"}
    assert format_times(rows[0]["seconds"]).startswith("time: ")
    table = json.loads((tmp_path / "per_class.json").read_text())
    assert (table["classes"], table["images"]) == (list(CLASSES), [2] * 6 + [1])
    right = (dense == 0).tolist()
    assert table["correct"]["dense"] == [sum(right[2 * c : 2 * c + 2]) for c in range(7)]
    assert len(list((tmp_path / "gallery").glob("*.png"))) == 2
    assert (tmp_path / "notes.txt").exists()
    assert not any((tmp_path / name).exists() for name in torn)
    assert not (tmp_path / "logits_old.npz").exists()
    assert not list(tmp_path.glob(".*"))


def test_some_classes_several_labels_and_images_without_one(checkpoint, run, tmp_path):
    labels: list[tuple[int, ...]] = [(index % 6,) if index % 3 else (2, 5) for index in range(13)]
    labels[4] = labels[11] = ()
    read = lambda i: Record(PIXELS[i], labels[i], f"image {i}")  # noqa: E731
    variant = Source("variant", CLASSES, 13, read, scored=(5, 0, 1, 2, 3, 4), labels_per_image=2)
    rows = run(tmp_path, dataset=variant)
    there = [index for index in range(13) if labels[index]]
    logits = logits_by_hand(checkpoint)
    for name, row in zip(SCHEDULES, rows, strict=True):
        rank = ranks(logits[name][there], [labels[index] for index in there], range(6))
        assert (row["correct"], row["num_images"]) == ((rank == 0).sum(), 11)
        assert row["top5"] == (rank < 5).sum() / 11
        assert (row["classes_scored"], row["images_excluded"]) == (6, 2)
    assert np.load(tmp_path / "outcomes.npz")["labels"].tolist()[:2] == [[2, 5], [1, -1]]
    table = json.loads((tmp_path / "per_class.json").read_text())
    classes = dict(zip(table["classes"], table["images"], strict=True))
    assert classes == {CLASSES[c]: sum(c in each for each in labels) for c in (1, 2, 4, 5)}


def test_without_dense_nothing_is_compared(run, tmp_path):
    (row,) = run(tmp_path, schedules="tome_r3", limit=5)
    assert [row[key] for key in ("gained", "lost", "mcnemar_p", "agreement", "kl")] == [None] * 5
    assert row["num_images"] == 5


def test_names_of_any_bytes_give_all_results(checkpoint, folder, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9"))
    shutil.copytree(folder, odd)
    first = next(each for each in sorted(odd.rglob("*")) if each.is_file())
    first.rename(first.with_name(os.fsdecode(b"\xff") + first.suffix))
    rows = fc.evaluate(checkpoint, f"folder:{odd}", "dense", workdir=odd / "out", batch_size=8, throughput_blocks=0)
    usual = fc.evaluate(checkpoint, f"folder:{folder}", "dense", batch_size=8, throughput_blocks=0)
    assert rows[0]["correct"] == usual[0]["correct"]
    assert rows[0]["dataset"] == f"folder:{tmp_path}/caf\\udce9"
    assert report.reports_in(odd / "out") == [*report.REPORTS]
    report.main([str(odd / "out"), "--html", str(odd / "page.html"), "--csv", str(odd / "rows.csv")])
    assert (odd / "rows.csv").read_bytes() == (odd / "out" / "results.csv").read_bytes()


def test_the_time_of_timing_is_reported(run, tmp_path, monkeypatch):
    # On one device: with eight on a few cores, the many calls in flight wait for each other.
    monkeypatch.setattr(parallel, "inference_mesh", lambda _: jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)))
    (row,) = run(tmp_path, schedules="tome_r3", limit=5, throughput_blocks=1)
    assert row["images_per_second"] > 0
    assert row["seconds"]["timing"] > 0


def test_a_sweep_begins_with_dense_and_nothing_merged_is_dense(tmp_path):
    config: Any = eval_digits.get_config()
    config.update(dataset="digits:test", schedules="tome_r5", sweep="tome:0-4:2", limit=13, throughput_blocks=0)
    evaluate.main(config, tmp_path)
    rows = report.read_run(tmp_path).rows
    assert [row["schedule"] for row in rows] == ["dense", "tome_r5", "tome_r0", "tome_r2", "tome_r4"]
    dense, none = rows[0], rows[2]
    assert (none["gmacs"], none["tokens_out"], none["correct"]) == (
        dense["gmacs"],
        dense["tokens_out"],
        dense["correct"],
    )
    assert (none["agreement"], none["gained"], none["lost"]) == (1.0, 0, 0)
    assert none["kl"] == pytest.approx(0, abs=1e-6)


def test_rules_cross_the_schedules_of_an_evaluation(run, tmp_path):
    rows = run(tmp_path, schedules="dense,tome_r3", rules="tome,random(seed=3)", limit=5, throughput_blocks=0)
    assert [row["schedule"] for row in rows] == ["dense", "tome_r3", "tome_r3@random(seed=3)"]
    assert rows[1]["gmacs"] == rows[2]["gmacs"]
    assert rows[1]["kl"] != rows[2]["kl"] > 0


class Stop(Exception):
    """Ends a run in the middle of a test."""

    @classmethod
    def end(cls, *args):
        raise cls


@contextlib.contextmanager
def interrupted(monkeypatch, batches):
    """Stop a run after this many of its batches, with half of the next one written."""
    append, done = Journal.append, []

    def stop(self, outcomes, logits=()):
        append(self, outcomes, logits)
        done.append(outcomes)
        if len(done) > batches:
            file = self._file(len(self.parts) - 1)
            os.truncate(file, file.stat().st_size // 2)
            raise Stop

    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        patch.setattr(Journal, "append", stop)
        yield
        pytest.fail("the run was not interrupted")


def counts(rows):
    return [(row["schedule"], row["correct"], row["top5"], row["gained"], row["lost"], row["kl"]) for row in rows]


def test_an_interrupted_run_resumes_and_counts_every_image_once(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "inference_mesh", lambda _: jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)))
    two = dict(batch_size=2, save_logits=True, schedules="dense,tome_r3")
    whole = run(tmp_path / "whole", **two)
    for batches in (3, 2):
        with interrupted(monkeypatch, batches):
            run(tmp_path / "parts", **two)
    capsys.readouterr()
    read, starts = inputs.eval_batches, []
    monkeypatch.setattr(inputs, "eval_batches", lambda *a, **k: starts.append(k["start"]) or read(*a, **k))
    with monkeypatch.context() as patch:  # ended after the last batch, before the rows are written
        patch.setattr(report, "write_report", Stop.end)
        with pytest.raises(Stop):
            run(tmp_path / "parts", **two)
    assert "resuming the interrupted run after 10 of 13 images" in capsys.readouterr().out
    rows = run(tmp_path / "parts", **two)
    assert starts == [5, 7]
    assert counts(rows) == counts(whole)
    for name in ("outcomes.npz", *(f"logits_{name}.npz" for name in ("dense", "tome_r3"))):
        ours, theirs = (np.load(tmp_path / place / name) for place in ("parts", "whole"))
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert not list((tmp_path / "parts").glob(".*"))


def test_another_run_in_the_folder_starts_over(run, tmp_path, monkeypatch, capsys):
    with interrupted(monkeypatch, 1):
        run(tmp_path, schedules="dense", save_logits=True)
    assert {path.name for path in tmp_path.iterdir()} == {".outcomes"}
    rows = run(tmp_path, schedules="dense", dtype="bfloat16")
    assert "the interrupted run there differs in dtype, logits; starting over" in capsys.readouterr().out
    assert rows[0]["num_images"] == 13
    assert {path.name for path in tmp_path.iterdir()} == {"outcomes.npz", "per_class.json", *report.REPORTS}


def test_a_run_that_counted_nothing_leaves_nothing(run, tmp_path):
    def read(index):
        raise InputError(f"image {index} cannot be read")

    with pytest.raises(InputError, match="image 0 cannot be read"):
        run(tmp_path, dataset=Source("broken", CLASSES, 13, read), schedules="dense", save_logits=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def damaged(folder, tmp_path):
    """The images of the folder, with the eighth cut off."""
    path = tmp_path / "damaged"
    shutil.copytree(folder, path)
    (file,) = path.glob("*/07.png")
    os.truncate(file, file.stat().st_size // 2)
    return f"folder:{path}"


@pytest.mark.parametrize("devices", [1, 2])
def test_a_bad_image_stops_it_or_is_skipped_and_the_work_before_is_kept(
    run, damaged, devices, tmp_path, monkeypatch, capsys
):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    monkeypatch.setattr(parallel, "inference_mesh", lambda _: mesh)
    two = dict(dataset=damaged, batch_size=2, save_logits=True, schedules="dense,tome_r3")
    with pytest.raises(InputError, match=r"07\.png cannot be decoded: .*; repair it, or leave it out with on_bad=skip"):
        run(tmp_path / "parts", **two)
    done = len(list((tmp_path / "parts" / ".outcomes").iterdir()))
    capsys.readouterr()
    rows = run(tmp_path / "parts", on_bad="skip", gallery=9, throughput_blocks=1, **two)
    printed = capsys.readouterr()
    assert done == 3  # all before the batch with the bad image
    assert f"resuming the interrupted run after {2 * done} of 13 images" in printed.out
    assert "skipped: image d/07.png cannot be decoded" in printed.out + printed.err
    whole = run(tmp_path / "whole", on_bad="skip", **two)
    assert counts(rows) == counts(whole)
    saved = np.load(tmp_path / "parts" / "outcomes.npz")
    assert [name[2:4] for name in saved["names"]] == [f"{index:02d}" for index in range(13) if index != 7]
    assert np.load(tmp_path / "parts" / "logits_dense.npz")["logits"].shape == (12, 7)
    for row in rows:
        assert (row["num_images"], row["images_skipped"], row["images_excluded"]) == (12, 1, 0)
    assert "1 images were skipped" in report.format_table(rows)
    assert "1 images were skipped" in (tmp_path / "parts" / "report.html").read_text()
    # Nine evenly spread images of the thirteen: image 7 is not among them, or is left out.
    assert len(list((tmp_path / "parts" / "gallery").glob("*.png"))) in (8, 9)


def test_skipped_images_are_read_again_by_a_run_that_must_not_skip(run, damaged, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "inference_mesh", lambda _: jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)))
    two = dict(dataset=damaged, batch_size=2, schedules="dense")
    with interrupted(monkeypatch, 5):
        run(tmp_path / "parts", on_bad="skip", **two)
    capsys.readouterr()
    with pytest.raises(InputError, match=r"07\.png cannot be decoded"):
        run(tmp_path / "parts", **two)
    assert "after 6 of 13 images" in capsys.readouterr().out  # the fourth batch has the bad image


def test_a_data_set_without_a_readable_image_is_reported(run, tmp_path):
    bad = Source("broken", CLASSES, 5, lambda index: Record(b"no image", 0, f"image {index}"))
    with pytest.raises(InputError, match="no image was evaluated"):
        run(tmp_path, dataset=bad, on_bad="skip", schedules="dense")


def test_a_limit_on_a_folder_takes_images_of_all_classes(run, tmp_path, capsys):
    rows = run(tmp_path, limit=7, schedules="dense")
    names = [f"{CLASSES[index // 2]}/{index:02d}.png" for index in range(13)]
    spread = [names[place] for place in (0, 2, 4, 6, 8, 10, 12)]
    assert np.load(tmp_path / "outcomes.npz")["names"].tolist() == spread
    assert json.loads((tmp_path / "per_class.json").read_text())["images"] == [1] * 7
    assert "the limit takes 7 images spread evenly over all 13" in capsys.readouterr().out
    assert any("spread evenly over all 13" in line for line in rows[0]["remarks"])
    assert "spread evenly over all 13" in (tmp_path / "report.html").read_text()
    assert run(None, limit=13, schedules="dense")[0]["remarks"] == []
    # If the images are not sorted by class, it takes the first ones.
    shuffled = Source("shuffled", CLASSES, 13, lambda index: Record(PIXELS[index], 0, f"image {index}"))
    run(tmp_path / "first", limit=3, dataset=shuffled, schedules="dense")
    assert np.load(tmp_path / "first" / "outcomes.npz")["names"].tolist() == [f"image {index}" for index in range(3)]


def test_odd_images_are_counted_once_and_over_a_restart(run, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "inference_mesh", lambda _: jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)))
    odd, exif = tmp_path / "odd", Image.Exif()
    shutil.copytree(folder, odd)
    exif[0x0112] = 6
    for index, pixels in enumerate(PIXELS):
        file = odd / CLASSES[index // 2] / f"{index:02d}.png"
        if index in (1, 8, 9):
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(file)
        elif index in (2, 12):
            Image.fromarray(pixels).save(file, exif=exif)
    two = dict(dataset=f"folder:{odd}", batch_size=2, schedules="dense")
    with interrupted(monkeypatch, 3):
        run(tmp_path / "parts", **two)
    capsys.readouterr()
    (row,) = run(tmp_path / "parts", **two)
    deep = "3 images of 16 bits a pixel scaled to 8 bits"
    turned = "2 images with an EXIF orientation read unturned, as timm does"
    out = capsys.readouterr().out
    assert out.count(deep) == out.count(turned) == 1
    assert row["remarks"][0] == deep
    assert row["remarks"][1].startswith(turned)


def test_the_order_of_classes_must_be_known(checkpoint, tmp_path, capsys):
    loaded = fc.load_checkpoint(checkpoint)
    names = [f"c{index + 1}" for index in range(6)] + ["c10"]
    for index, pixels in enumerate(PIXELS):
        (tmp_path / "photos" / names[index // 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / names[index // 2] / f"{index:02d}.png")
    named = dataclasses.replace(loaded, meta=loaded.meta | {"class_names": names})
    lost = dataclasses.replace(loaded, meta=loaded.meta | {"class_names": None})
    ask: Any = dict(dataset=f"folder:{tmp_path / 'photos'}", schedules="dense", batch_size=8, throughput_blocks=0)
    (right,) = evaluation.evaluate(named, **ask)
    with pytest.raises(InputError, match=r"timm: .*c2, c3.*; imagefolder: .*c10, c2"):
        evaluation.evaluate(lost, **ask)
    (timm,) = evaluation.evaluate(lost, class_names="timm", **ask)
    (tmp_path / "names.txt").write_text("\n".join(names))
    (file,) = evaluation.evaluate(lost, class_names=tmp_path / "names.txt", **ask)
    (stored,) = evaluation.evaluate(dataclasses.replace(lost, meta=lost.meta | {"class_order": "timm"}), **ask)
    for row in (timm, file, stored):
        assert (row["correct"], row["top5"]) == (right["correct"], right["top5"])
    # If the orders agree, one is assumed, and this is reported.
    capsys.readouterr()
    shutil.rmtree(tmp_path / "photos" / "c10")
    shutil.copytree(tmp_path / "photos" / "c1", tmp_path / "photos" / "c9")
    (row,) = evaluation.evaluate(lost, **ask)
    assert "has no class names: its 7 outputs are assumed" in capsys.readouterr().out
    assert any("are assumed" in line for line in row["remarks"])


def test_memory_does_not_grow_by_pixels(run, monkeypatch):
    size = 200_000  # bytes an image
    side = round((size / 3) ** 0.5)
    many = Source("many", CLASSES, 400, lambda i: Record(np.zeros((side, side, 3), np.uint8), i % 7, f"image {i}"))
    held = []
    append = Journal.append

    def watch(self, outcomes, logits):
        append(self, outcomes, logits)
        held.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(Journal, "append", watch)
    tracemalloc.start()
    try:
        run(None, dataset=many, schedules="dense", workers=1)
    finally:
        tracemalloc.stop()
    assert len(held) == 50
    early, late = np.mean(held[10:20]), np.mean(held[30:40])
    assert late - early < 160 * 1000  # bytes: outcomes of 160 images, without their pixels


def test_gmacs_need_neither_data_nor_weights():
    rows = evaluation.cost_rows("vit_small_patch16_224", "dense,tome_r3,tome:13-13")
    assert [row["schedule"] for row in rows] == ["dense", "tome_r3", "tome_r13"]
    assert rows[0]["gmacs"] == pytest.approx(4.60, abs=0.01)
    assert rows[2]["gmacs"] == pytest.approx(2.70, abs=0.01)
    assert (rows[2]["tokens_out"], rows[2]["stages"]) == (197 - 12 * 13, "global:12:r13")
    rows = evaluation.cost_rows("vit_small_patch16_224", "dense,tome_r13", "tome,evit(fuse=true)")
    assert [row["schedule"] for row in rows] == ["dense", "tome_r13", "tome_r13@evit(fuse=true)"]
    (row,) = evaluation.cost_rows("deit_small_patch16_224.fb_in1k", "dense")
    assert row["model"] == "deit_small_patch16_224.fb_in1k"


def test_costs_do_not_replace_an_evaluation(run, tmp_path, monkeypatch, capsys):
    config: Any = eval_digits.get_config()
    config.gmacs_only, config.schedules = True, "dense,tome_r12"

    def kept(workdir):
        before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        evaluate.main(config, workdir)
        assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
        told = capsys.readouterr().out.splitlines()
        assert told[0].split()[:3] == ["schedule", "tokens", "GMACs"]
        return told[-1]

    with interrupted(monkeypatch, 1):
        run(tmp_path / "parts", schedules="dense", save_logits=True)
    run(tmp_path / "whole", schedules="dense")
    for name in ("parts", "whole"):
        assert kept(tmp_path / name) == (
            f"nothing is written: {tmp_path / name} has the results of an evaluation, which are kept"
        )
    (tmp_path / "whole" / "outcomes.npz").unlink()  # the table is enough
    assert kept(tmp_path / "whole").startswith("nothing is written")
    # Costs replace costs.
    for _ in range(2):
        evaluate.main(config, tmp_path / "costs")
        assert (
            capsys.readouterr().out.splitlines()[-1] == f"written: results.jsonl, results.csv in {tmp_path / 'costs'}"
        )


def test_from_python_with_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense, merged = evaluation.evaluate("packaged:digits", "digits:test", ["dense", "tome_r12"])
    test = fc.load_checkpoint("packaged:digits").meta["provenance"]["test"]
    assert (dense["correct"], dense["num_images"]) == (test["correct"], test["num_images"])
    assert (dense["checkpoint"], dense["dataset"]) == ("packaged:digits", "digits:test")
    assert merged["images_per_second"] > 0
    assert list(tmp_path.iterdir()) == []
    options: Any = ({"save_logits": True}, {"gallery": 1})
    for option in options:
        with pytest.raises(InputError, match="save_logits and gallery write files: pass a workdir"):
            evaluation.evaluate("packaged:digits", "digits:test", "dense", **option)


def test_loaded_checkpoints_sources_and_schedules_of_ones_own(checkpoint, run, tmp_path):
    loaded = fc.load_checkpoint(checkpoint)
    local = fc.MergeSchedule((fc.Dense(1), fc.Global(2, 3)))
    named = evaluation.evaluate(
        loaded,
        Source("mine", CLASSES, 13, lambda i: Record(PIXELS[i], i // 2, f"image {i}")),
        {"dense": fc.MergeSchedule.dense(3), "my own": local},
        batch_size=8,
        throughput_blocks=0,
        workdir=tmp_path,
        save_logits=True,
    )
    rows = run(None, schedules=[fc.MergeSchedule.dense(3), local, "tome_r3"])
    assert [row["schedule"] for row in rows] == ["dense", "dense:1,global:2:r3", "tome_r3"]
    assert [row["schedule"] for row in named] == ["dense", "my own"]
    assert counts(named)[0] == counts(rows)[0]
    assert counts(named)[1][1:] == counts(rows)[1][1:]
    assert {row["checkpoint"] for row in named} == {str(checkpoint)}
    assert (tmp_path / "logits_my-own.npz").exists()
    (alone,) = run(None, schedules=local)
    assert alone["correct"] == rows[1]["correct"]
    with pytest.raises(InputError, match="no schedule given"):
        run(None, schedules=[])


def test_weights_that_were_changed_in_memory_are_another_run(checkpoint, folder, tmp_path, monkeypatch, capsys):
    loaded = fc.load_checkpoint(checkpoint)
    changed = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: 2 * leaf, loaded.params))
    options: Any = dict(workdir=tmp_path, batch_size=8, throughput_blocks=0)
    with interrupted(monkeypatch, 1):
        evaluation.evaluate(loaded, f"folder:{folder}", "dense", **options)
    evaluation.evaluate(changed, f"folder:{folder}", "dense", **options)
    assert "differs in checkpoint; starting over" in capsys.readouterr().out


def test_the_configuration_lists_the_fields_and_defaults_of_the_code():
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluationConfig)}
    listed: Any = eval_digits.get_config()
    own = ("checkpoint", "dataset", "schedules", "sweep", "gmacs_only")
    assert {name: value for name, value in listed.items() if name not in own} == defaults
    listed.colour = "red"
    with pytest.raises(InputError, match=r"config\.colour is unknown: see configs/eval_digits\.py"):
        evaluate.main(listed, Path("unused"))


def known(
    spec,
    size=50_000,
    classes=None,
    model: str | None = "deit_small_patch16_224.fb_in1k",
    pixels=224,
    limit=None,
    **more: Any,
):
    more = {"ordered": spec.startswith("folder:")} | more
    source = Source(spec, classes or imagenet.synsets(), size, lambda index: Record(b"", 0, ""), **more)
    config = dataclasses.replace(fc.zoo.get("deit_small_patch16_224").config, image_size=(pixels, pixels))
    loaded = fc.Checkpoint(Path(), config, {}, fc.Preprocess(), {"provenance": {"model": model}})
    return inputs.reported_top1(source, loaded, limit)


def test_the_reported_accuracy_is_that_of_these_weights_and_images():
    assert known("tfds:imagenet2012/validation") == 0.79856
    assert known("tfds:imagenet2012:5.1.0/validation[:1000]@/data", size=1000) == 0.79856
    assert known("folder:val") == 0.79856
    assert known("folder:val", classes=imagenet.synsets()[::-1]) == 0.79856
    assert known("folder:val", size=49_999) is None
    assert known("folder:val", classes=tuple(map(str, range(1000)))) is None
    assert known("tfds:imagenet2012/train", size=1_281_167) is None
    assert known("tfds:imagenet2012_real/validation") is None
    assert known("folder:val", model="deit_small_patch16_224") is None
    assert known("folder:val", model=None) is None
    assert known("folder:val", pixels=384) is None
    # The first images of a folder are its first classes; those of a shuffled set are a sample.
    assert known("folder:val", limit=49_999) is None
    assert known("folder:val", limit=50_000) == 0.79856
    assert known("tfds:imagenet2012/validation", limit=1000) == 0.79856
    # The folder as prepared by our own command, under any name.
    for spec in ("tfds:val/test@data", "tfds:imagenet2012/validation@data"):
        assert known(spec, ordered=True) == 0.79856
        assert known(spec, ordered=True, limit=1000) is None
        assert known(spec, ordered=True, size=1000) is None
    assert known("tfds:val/test@data") is None
    assert known("tfds:val/test@data", ordered=True, labels_per_image=9) is None


def test_published_accuracies_are_in_the_rows_of_those_weights_and_images(run, monkeypatch):
    monkeypatch.setattr(inputs, "reported_top1", lambda *args: 0.8)
    load, provenance = inputs.load_checkpoint, {"model": "vit_small_patch16_224.augreg_in21k_ft_in1k"}

    def named(*args):
        return dataclasses.replace(loaded := load(*args), meta=loaded.meta | {"provenance": provenance})

    monkeypatch.setattr(inputs, "load_checkpoint", named)
    rows = run(None, schedules="dense,tome_r1,tome_r13,s1winc1_r4")
    assert rows[0]["reference_top1"] == 0.8
    assert [row["published_top1"] for row in rows] == [0.8141, None, 0.7932, None]
    assert {row["published_gmacs"] for row in rows} == {None}
    monkeypatch.setattr(inputs, "reported_top1", lambda *args: None)  # on other images
    assert {row["published_top1"] for row in run(None, schedules="dense,tome_r13")} == {None}
    (costs,) = evaluation.cost_rows("vit_small_patch16_224", "s2dfe_r18")
    assert (costs["published_top1"], costs["published_gmacs"]) == (0.7973, 2.787)


def start(workdir, *more: Any, devices: Any = 1, cache: Any = None, **fields: Any):
    """Start evaluate.py as a process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONFAULTHANDLER": "1",
    }
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--workdir={workdir}", *more]
    command += [f"--compile_cache={cache}"] if cache else []
    return subprocess.Popen(
        [*command, *(f"--config.{name}={value}" for name, value in fields.items())],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(workdir, devices=(2, 2), **fields: Any):
    """Start two processes, by default of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(workdir, f"--distributed=127.0.0.1:{port},2,{index}", devices=devices[index], **fields)
        for index in (0, 1)
    ]


def finish(process):
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:  # a process that hangs prints where
        process.send_signal(signal.SIGABRT)
        pytest.fail(process.communicate()[1])
    assert process.returncode == 0, errors
    return output, errors


def outcomes(workdir):
    return dict(np.load(workdir / "outcomes.npz"))


def assert_same_outcomes(ours, theirs):
    for key in ("schedules", "names", "labels", "rank", "prediction"):
        np.testing.assert_array_equal(ours[key], theirs[key])
    np.testing.assert_allclose(ours["kl"], theirs["kl"], atol=1e-5)


# JAX's transport prints its connections to standard output, a word at a time from several threads: lines interleave.
GLOO = re.compile(r"\[Gloo\]| Rank |is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+")


def less_gloo(output):
    return GLOO.sub("", output).strip()


@pytest.mark.devices(8)
def test_one_device_eight_devices_and_two_processes_count_the_same(checkpoint, folder, run, tmp_path):
    fields = dict(checkpoint=checkpoint, dataset=f"folder:{folder}", schedules=",".join(SCHEDULES), batch_size=8)
    both = start_two(tmp_path / "two", throughput_blocks=1, **fields)
    one = start(tmp_path / "one", throughput_blocks=0, **fields)
    assert run(tmp_path / "eight")[0]["num_devices"] == 8
    quiet = [finish(process)[0] for process in both][1]
    finish(one)
    assert less_gloo(quiet) == ""
    rows = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert (rows[0]["num_devices"], rows[0]["num_processes"]) == (4, 2)
    assert all(row["images_per_second"] > 0 for row in rows)
    assert len(outcomes(tmp_path / "one")["names"]) == 13
    for place in ("two", "eight"):
        assert_same_outcomes(outcomes(tmp_path / place), outcomes(tmp_path / "one"))


OTHER = "error: another process stopped: see its message"


@pytest.mark.slow
def test_two_processes_vote_as_one(tmp_path):
    whole = fc.load_checkpoint("packaged:digits")
    config, params = without_head(whole.config, whole.params)
    backbone = fc.save_checkpoint(tmp_path / "backbone", config, params, whole.preprocess)
    fields: Any = dict(dataset="digits:test", neighbours="digits:train", schedules="tome_r12,dense", limit=50)
    fields |= dict(batch_size=8, throughput_blocks=0, save_logits=True)
    both = start_two(tmp_path / "two", (1, 1), checkpoint=backbone, **fields)
    alone = fc.evaluate(backbone, workdir=tmp_path / "one", **fields)
    for process in both:
        finish(process)
    rows = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert [row["num_processes"] for row in rows] == [2, 2]
    for row, one in zip(rows, alone, strict=True):
        assert (row["correct"], row["num_images"], row["neighbours"]) == (one["correct"], 50, one["neighbours"])
        assert row["cosine"] == pytest.approx(one["cosine"], abs=1e-6)
        assert row["patch_cosine"] == pytest.approx(one["patch_cosine"], abs=1e-6)
    np.testing.assert_array_equal(outcomes(tmp_path / "two")["prediction"], outcomes(tmp_path / "one")["prediction"])
    features, wanted = (np.load(tmp_path / where / "logits_tome_r12.npz")["logits"] for where in ("two", "one"))
    np.testing.assert_allclose(features, wanted, atol=1e-5)


def complaints(processes):
    """Return what failing processes print, without the lines of JAX's transport."""
    told = []
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 2, output + errors
        told.append(less_gloo(output) + errors)
    return told


def test_if_one_process_fails_the_others_end_at_once_with_one_line_each(checkpoint, folder, tmp_path):
    broken = tmp_path / "photos"
    shutil.copytree(folder, broken)
    (broken / "c" / "05.png").write_bytes(b"x")  # the second process decodes it: images 4 to 7 of a batch of 8
    fields = dict(schedules="dense", batch_size=8, throughput_blocks=0)
    two = start_two(tmp_path / "two", dataset=f"folder:{broken}", checkpoint=checkpoint, **fields)
    two[1].wait(timeout=120)
    ended = time.monotonic()
    two[0].wait(timeout=60)
    assert time.monotonic() - ended < 10  # and not when the exchange gives up, after 30 seconds
    why = "no known image format; repair it, or leave it out with on_bad=skip, and resume"
    assert complaints(two) == [f"{OTHER}\n", f"error: image c/05.png cannot be decoded: {why}\n"]
    # Errors of the first process alone, before it begins and when the others have finished.
    (tmp_path / "file").write_text("")
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "gallery").write_text("")
    for place, culprit in (("file", "file"), ("late", "late/gallery")):
        first, second = complaints(start_two(tmp_path / place, gallery=1, **fields))
        assert first.startswith(f"error: {tmp_path}/{culprit} ")
        assert first.count("\n") == 1
        assert second == f"{OTHER}\n"


def test_the_others_notice_that_a_process_was_killed(tmp_path):
    two = start_two(tmp_path, schedules="dense", batch_size=4, throughput_blocks=0)
    while two[1].poll() is None and not (tmp_path / ".outcomes").exists():
        time.sleep(0.001)
    two[1].kill()
    two[1].communicate()
    (told,) = complaints(two[:1])
    assert told.startswith(OTHER)
    assert told.count("\n") == 1
    assert (tmp_path / ".outcomes").exists()  # from which it resumes


def test_how_processes_find_each_other_is_reported_in_one_line(tmp_path):
    def told(where):
        with pytest.raises(InputError) as caught:
            parallel.start_processes(where)
        return str(caught.value)

    form = "write auto, or HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1"
    for where in ("a,2,0", "a:1,2", "a:1,2,2", "a:1,2,x"):
        assert told(where) == f"--distributed {where!r}: {form}"
    process = start(tmp_path, "--distributed=auto")
    assert complaints([process]) == [
        "error: --distributed auto: found no Slurm, Open MPI, Kubernetes or TPU pod that lists the processes; "
        "write HOST:PORT,COUNT,INDEX\n"
    ]
    line = (
        "error: --distributed: the processes have 1, 2 devices, but batches are split evenly; give each as many "
        "(CUDA_VISIBLE_DEVICES)\n"
    )
    assert complaints(start_two(tmp_path, devices=(1, 2))) == [line, line]


def test_killed_at_any_moment_on_any_devices_it_ends_in_the_same_outcomes(tmp_path):
    fields = dict(batch_size=4, throughput_blocks=0, schedules="dense,tome_r12", cache=tmp_path / "cache")
    finish(start(tmp_path / "whole", **fields))
    parts = tmp_path / "parts"
    for processes in (start_two(parts, **fields), [start(parts, devices=4, **fields)]):
        count = lambda: len(list((parts / ".outcomes").glob("[0-9]*.npz")))  # noqa: E731
        before = count()
        while processes[0].poll() is None and count() == before:
            time.sleep(0.001)
        for process in processes:
            process.kill()
            process.communicate()
    programs = lambda: {path.name for path in (tmp_path / "cache").glob("jit_eval_step-*")}  # noqa: E731
    kept = programs()
    assert len(kept) >= 2
    output, errors = finish(start(parts, **fields))
    done = re.search(r"resuming the interrupted run after (\d+) of 360 images", output)
    assert done
    assert 8 <= int(done[1]) < 360
    assert errors == ""  # and XLA accepts its own programs from the cache without a warning
    assert len(outcomes(parts)["names"]) == 360
    assert_same_outcomes(outcomes(parts), outcomes(tmp_path / "whole"))
    assert not list(parts.glob(".*"))
    assert programs() == kept
