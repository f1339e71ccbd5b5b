"""The evaluation as a user runs it: its rows, files, remarks and errors."""

import dataclasses
import json
import os
import shutil
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
from fcvit_jax.data import imagenet
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import EvaluationConfig, inputs, report
from fcvit_jax.evaluation.outcomes import Journal
from fcvit_jax.evaluation.statistics import mcnemar, wilson
from fcvit_jax.evaluation.times import format_times
from thirteen_images import CLASSES, CONFIG, PIXELS, PREPROCESS, SCHEDULES, counts


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
