"""Probes of the packaged digits model's features, and the command line."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.evaluation import features
from fcvit_jax.evaluation.statistics import wilson
from fcvit_jax.probe.__main__ import main
from processes import finish, places, start_python

ROOT = Path(__file__).parents[2]
LIMIT = 120


@pytest.fixture(scope="module")
def digits():
    return fc.load_checkpoint("packaged:digits")


def spread(count=LIMIT, start=0):
    """Take digits of the training set, from one index on."""
    source = open_source("digits:train")
    return Source("some digits", source.class_names, count, lambda index: source[start + index])


@pytest.fixture(scope="module")
def probed(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("probed") / "out"
    return fc.probe(digits, spread(), out), out


def pooled(checkpoint, source):
    """Compute class tokens, image by image, by the unchanged model."""
    pixels = np.stack([checkpoint.preprocess(Image.fromarray(source[i].image)) for i in range(len(source))])
    model = fc.ViT(checkpoint.config)
    return np.asarray(
        jax.jit(model.apply)({"params": checkpoint.params}, checkpoint.preprocess.normalize(pixels))[1]["pooled"]
    )


def test_the_features_are_the_models_and_the_head_is_evaluated_as_any_other(probed, digits):
    report, out = probed
    folder = out.with_name("out.features")
    saved, labels = (np.load(folder / name) for name in ("features_dense.npy", "labels.npy"))
    expected = pooled(digits, spread())
    np.testing.assert_allclose(saved[:LIMIT], expected, atol=1e-4)
    assert labels[:LIMIT].tolist() == [spread()[i].label for i in range(LIMIT)]
    assert (labels[LIMIT:] == -1).all()
    found = fc.load_checkpoint(out)
    assert found.class_names == tuple("0123456789")
    assert found.config == dataclasses.replace(digits.config, num_classes=10)
    fresh = spread(100, start=LIMIT)
    rows = fc.evaluate(out, fresh, "dense,tome_r12", throughput_blocks=0)
    head = found.params["head"]
    logits = pooled(digits, fresh).astype(np.float64) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    right = int((logits.argmax(axis=1) == [fresh[i].label for i in range(100)]).sum())
    assert rows[0]["correct"] == right
    assert right >= 90
    about = found.meta["provenance"]["probe"]
    assert (about["dataset"], about["num_images"], about["strength"]) == ("some digits", LIMIT, report.strength)


def test_the_report_counts_the_held_out_images(probed):
    report, _ = probed
    counts = np.bincount([spread()[i].label for i in range(LIMIT)])
    assert report.held_out.count == sum(max(1, round(0.2 * count)) for count in counts)
    best = max(report.tried, key=lambda pair: (pair[1].correct, -pair[1].loss))
    assert (report.strength, report.held_out) == best
    text = str(report)
    low, high = wilson(report.held_out.correct, report.held_out.count)
    assert f"95 % interval {100 * low:.2f}-{100 * high:.2f}" in text
    assert f"k-NN: {100 * report.neighbours / report.held_out.count:.2f} %" in text


def test_neighbours_equal_scikit_learn(probed, digits):
    from sklearn.neighbors import KNeighborsClassifier

    from fcvit_jax.evaluation.features import Features
    from fcvit_jax.probe import ProbeConfig, hold_out

    report, out = probed
    folder = out.with_name("out.features")
    saved, labels = (np.load(folder / name) for name in ("features_dense.npy", "labels.npy"))
    held = hold_out(Features(saved, labels), tuple("0123456789"), ProbeConfig())
    rest = ~held & (labels >= 0)
    near: dict[str, Any] = dict(
        metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    other = KNeighborsClassifier(20, **near).fit(saved[rest], labels[rest])
    assert report.neighbours == (other.predict(saved[held]) == labels[held]).sum()


@pytest.mark.parametrize("options", [{"head": "ridge", "schedule": "tome_r6"}, {"head": "means", "pool": "token_avg"}])
def test_other_heads_poolings_and_schedules(options, digits, tmp_path):
    report = fc.probe(digits, spread(), tmp_path / "out", **options)
    assert report.accuracy > 0.7
    found = fc.load_checkpoint(tmp_path / "out")
    assert found.config.unit_features == (options["head"] == "means")
    assert found.config.pool == options.get("pool", "token")
    schedule = options.get("schedule", "dense")
    (row,) = fc.evaluate(found, spread(60, start=LIMIT), schedule, throughput_blocks=0)
    assert row["top1"] > 0.75


def test_features_are_used_again_and_an_interrupted_pass_resumes(digits, tmp_path, monkeypatch):
    whole = fc.probe(digits, spread(), tmp_path / "whole", head="ridge")
    real, batches = features.write_whole, []

    def killed(path, content):
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(path)
        real(path, content)

    monkeypatch.setattr(features, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        fc.probe(digits, spread(), tmp_path / "out", head="ridge")
    monkeypatch.setattr(features, "write_whole", real)
    assert not (tmp_path / "out").exists()
    read: list[int] = []
    source = spread()
    counting = dataclasses.replace(source, read=lambda index: read.append(index) or source.read(index))
    again = fc.probe(digits, counting, tmp_path / "out", head="ridge")
    assert min(read) == 3 * 16
    assert (again.held_out, again.neighbours) == (whole.held_out, whole.neighbours)
    same = [np.load(tmp_path / f"{name}.features" / "features_dense.npy") for name in ("whole", "out")]
    np.testing.assert_array_equal(*same)
    read.clear()
    fc.probe(digits, counting, tmp_path / "out", overwrite=True)
    assert not read
    fc.probe(digits, counting, tmp_path / "out", overwrite=True, head="ridge", pool="avg")  # other features
    assert len(read) == LIMIT


def test_an_image_that_cannot_be_read_is_left_out(digits, tmp_path):
    source = spread()
    broken = dataclasses.replace(
        source, read=lambda index: source.read(index)._replace(**({"image": b"x"} if index == 5 else {}))
    )
    with pytest.raises(fc.InputError, match=r"cannot be decoded: .* leave it out with on_bad=skip, and resume"):
        fc.probe(digits, broken, tmp_path / "out")
    report = fc.probe(digits, broken, tmp_path / "out", on_bad="skip", head="ridge")
    assert report.num_images == LIMIT - 1


def of_classes(*counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    pixels = np.zeros((8, 8, 3), np.uint8)
    names = tuple(f"class {index}" for index in range(len(counts)))
    return Source("drawn", names, len(labels), lambda index: Record(pixels, int(labels[index]), f"image {index}"))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (of_classes(5), {}, r"drawn has one class, 'class 0': a head needs two or more"),
        (of_classes(3, 1), {}, r"class 'class 1' has one image: at least two are needed"),
        (of_classes(3, 3), {"pool": "map"}, r"pool 'map' needs weights that the model lacks \(pool\)"),
        (of_classes(3, 3), {"pool": "max"}, r"pool is 'max': choose one of token, avg, token_avg, map"),
        (of_classes(3, 3), {"head": "svm"}, r"head is 'svm': choose one of logistic, ridge, means"),
        (of_classes(3, 3), {"schedule": "dense,tome_r3"}, r"names 2: give one"),
        (of_classes(3, 3), {"strengths": (0.0,)}, r"strengths is \(0.0,\)"),
        (dataclasses.replace(of_classes(3, 3), labels_per_image=2), {}, r"needs images with one label each"),
    ],
)
def test_bad_input_is_one_line(source, options, message, digits, tmp_path):
    with pytest.raises(fc.InputError, match=message) as caught:
        fc.probe(digits, source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_labels_is_one_line(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as caught:
        main(["--dataset", f"folder:{tmp_path}", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "1 images but no class folders; put the images of each class into a folder" in capsys.readouterr().err


def test_the_command_line(tmp_path, capsys):
    main(["--limit", "90", "--head", "ridge", "--strengths", "1,0.1", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "digits:train: 90 images of 10 classes" in told
    assert told.endswith(f"written: {tmp_path / 'out'}\n")
    assert fc.load_checkpoint(tmp_path / "out").config.num_classes == 10
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out")])
    assert "exists already" in capsys.readouterr().err


def test_two_processes_find_the_head_of_one(tmp_path):
    # At a strength this high the logistic loss has one sharp minimum, wherever rounding starts from.
    options = ["--limit", "90", "--batch_size", "8", "--strengths", "0.1"]
    command = ["-m", "fcvit_jax.probe", *options, tmp_path / "two"]
    for process in [start_python(*command, f"--distributed={place}", devices=2) for place in places()]:
        finish(process)
    main([*options, str(tmp_path / "one")])
    heads = [fc.load_checkpoint(tmp_path / name) for name in ("one", "two")]
    one, other = (head.params["head"] for head in heads)
    scale = np.abs(np.asarray(one["kernel"])).max()
    np.testing.assert_allclose(other["kernel"], one["kernel"], atol=1e-2 * scale)
    about = [head.meta["provenance"]["probe"] for head in heads]
    assert about[0] == about[1] | {"held_out": about[0]["held_out"]}
    shutil.rmtree(tmp_path / "two")


def test_the_documentation_runs_as_written(tmp_path, monkeypatch, capsys):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    python, text_tower = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "probing.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(python, names)
    assert len(names["rows"]) == 2
    assert names["rows"][0]["top1"] > 0.8
    # A small random model stands in for the published one.
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    config = transformers.CLIPConfig(text_config=text | {"eos_token_id": 2}, vision_config={}, projection_dim=24)
    config.vision_config.update(dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64))
    model = transformers.CLIPModel(config).eval()
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda name: model)
    tokens = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 2, 2], [10, 11, 12, 2]])}
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: lambda prompts, **_: tokens)
    exec(text_tower, {})
    found = np.load("prompts.npz")
    assert found["embeddings"].shape == (3, 24)
    assert found["names"].tolist() == ["hat", "shirt", "shoes"]
    assert found["logit_scale"] == pytest.approx(model.logit_scale.item())
