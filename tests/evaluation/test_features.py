"""Evaluations of a checkpoint without a head: distances of features, and neighbours, counted by hand."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
from fcvit_jax.checkpoint import without_head
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.evaluation import report
from fcvit_jax.evaluation.outcomes import Journal
from fcvit_jax.evaluation.table import format_table

SCHEDULES = ("dense", "tome_r10", "s2winc5_r8")


@pytest.fixture(scope="module")
def backbone():
    whole = fc.load_checkpoint("packaged:digits")
    config, params = without_head(whole.config, whole.params)
    return dataclasses.replace(whole, config=config, params=params)


def spread(count, start=0, name="some digits"):
    source = open_source("digits:train")
    return Source(name, source.class_names, count, lambda index: source[start + index])


IMAGES, NEAR = spread(26), spread(60, 100, "neighbours")


def by_hand(checkpoint, source, name):
    """Compute pooled features [n, d] and features of all patches [n, p, d], float64, under one schedule."""
    pixels = np.stack([checkpoint.preprocess(Image.fromarray(source[i].image)) for i in range(len(source))])
    model = fc.ViT(checkpoint.config, fc.MergeSchedule.parse(name, checkpoint.config.depth))
    pooled, out = jax.jit(model.apply)({"params": checkpoint.params}, checkpoint.preprocess.normalize(pixels))
    patches = np.take_along_axis(np.asarray(out["tokens"]), np.asarray(out["source"])[..., None], axis=1)
    return np.asarray(pooled, np.float64), patches.astype(np.float64)


def compared(a, b):
    """Compute the cosine and the relative distance of rows."""
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return cosine, np.linalg.norm(a - b, axis=-1) / np.linalg.norm(a, axis=-1)


@pytest.fixture(scope="module")
def evaluated(backbone, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("features")
    fields: dict[str, Any] = dict(throughput_blocks=0, batch_size=8, workdir=workdir, neighbours=NEAR, save_logits=True)
    return fc.evaluate(backbone, IMAGES, SCHEDULES, **fields), workdir


def test_rows_equal_a_count_by_hand(evaluated, backbone):
    from sklearn.neighbors import KNeighborsClassifier

    rows, workdir = evaluated
    dense = by_hand(backbone, IMAGES, "dense")
    labels, near_labels = ([source[i].label for i in range(len(source))] for source in (IMAGES, NEAR))
    saved = np.load(workdir / "outcomes.npz")
    for index, (name, row) in enumerate(zip(SCHEDULES, rows, strict=True)):
        pooled, patches = by_hand(backbone, IMAGES, name)
        cosine, distance = compared(dense[0], pooled)
        patch_cosine = compared(dense[1], patches)[0].mean(axis=1)
        patch_distance = compared(*(each.reshape(26, -1) for each in (dense[1], patches)))[1]
        expected = np.stack([cosine, distance, patch_cosine, patch_distance], axis=1)
        np.testing.assert_allclose(saved["distances"][index], expected, atol=5e-5)
        for place, (field, worst) in enumerate(
            (("cosine", 5), ("distance", 95), ("patch_cosine", 5), ("patch_distance", 95))
        ):
            assert row[field] == pytest.approx(expected[:, place].mean(), abs=1e-4)
            assert row[f"{field}_p{worst}"] == pytest.approx(np.percentile(expected[:, place], worst), abs=1e-4)
        near: dict[str, Any] = dict(
            metric="cosine", algorithm="brute", weights=lambda apart: np.exp((1 - apart) / 0.07)
        )
        other = KNeighborsClassifier(20, **near).fit(by_hand(backbone, NEAR, name)[0], near_labels)
        np.testing.assert_array_equal(saved["prediction"][index], other.predict(pooled))
        assert row["correct"] == (other.predict(pooled) == labels).sum()
        assert row["kl"] is None
        assert row["neighbours"] == "20 of the 60 images of neighbours, temperature 0.07"
        features = np.load(workdir / f"logits_{name}.npz")
        np.testing.assert_allclose(features["logits"], pooled, atol=1e-4)
    assert rows[0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert rows[1]["distance"] > 0.005
    assert json.loads((workdir / "per_class.json").read_text())["images"] == np.bincount(labels).tolist()
    assert not list(workdir.glob(".*"))


def test_the_report_draws_any_of_the_measures(evaluated, tmp_path, capsys):
    _, workdir = evaluated
    for axis in ("", "patch_cosine"):
        report.main([str(workdir), "--png", str(tmp_path / f"a{axis}.png"), *(["--axis", axis] if axis else [])])
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "apatch_cosine.png").read_bytes()
    assert "top-1: by the nearest neighbours, 20 of the 60 images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main([str(workdir), "--png", str(tmp_path / "b.png"), "--axis", "kl"])
    assert "axis 'kl' was not measured: choose one of top1, cosine, " in capsys.readouterr().err


def test_a_folder_without_labels(backbone, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(5):
        Image.fromarray(np.asarray(IMAGES[index].image)).save(tmp_path / "photos" / f"{index}.png")
    spec = f"folder:{tmp_path / 'photos'}"
    rows = fc.evaluate(backbone, spec, "dense,tome_r10", throughput_blocks=0, batch_size=4, workdir=tmp_path / "out")
    cosine, _ = compared(*(by_hand(backbone, spread(5), name)[0] for name in ("dense", "tome_r10")))
    assert rows[1]["cosine"] == pytest.approx(cosine.mean(), abs=1e-4)
    assert (rows[1]["num_images"], rows[1]["top1"], rows[1]["agreement"]) == (5, None, None)
    text = format_table(rows)
    assert "cosine" in text
    assert "top-1" not in text
    assert report.reports_in(tmp_path / "out") == [*report.REPORTS]
    with pytest.raises(fc.InputError, match="5 images but no class folders; put the images of each class into a"):
        fc.evaluate(backbone, spec, "dense", neighbours=NEAR)


def test_an_interrupted_evaluation_resumes(evaluated, backbone, tmp_path, monkeypatch):
    rows, _ = evaluated
    fields: dict[str, Any] = dict(
        throughput_blocks=0, batch_size=8, workdir=tmp_path, neighbours=NEAR, save_logits=True
    )
    real, done = Journal.append, []

    def killed(self, *arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(self, *arguments))

    monkeypatch.setattr(Journal, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        fc.evaluate(backbone, IMAGES, SCHEDULES, **fields)
    monkeypatch.setattr(Journal, "append", real)
    read: list[int] = []
    counting = dataclasses.replace(NEAR, read=lambda index: read.append(index) or NEAR.read(index))
    fields["neighbours"] = counting
    again = fc.evaluate(backbone, IMAGES, SCHEDULES, **fields)
    assert not read
    for before, after in zip(rows, again, strict=True):
        assert {**before, "seconds": 0, "compile_seconds": 0} == {**after, "seconds": 0, "compile_seconds": 0}


def test_a_projection_gives_features_too(backbone):
    """CLIP's image tower: the output is an embedding, without classes."""
    config = dataclasses.replace(backbone.config, num_classes=24, head_bias=False)
    kernel = np.random.default_rng(0).normal(0, 1, (64, 24)).astype(np.float32)
    tower = dataclasses.replace(backbone, config=config, params={**backbone.params, "head": {"kernel": kernel}})
    rows = fc.evaluate(tower, IMAGES, "dense,tome_r10", throughput_blocks=0, batch_size=8)
    dense, merged = (by_hand(backbone, IMAGES, name)[0] @ kernel for name in ("dense", "tome_r10"))
    assert rows[1]["cosine"] == pytest.approx(compared(dense, merged)[0].mean(), abs=1e-4)
    assert rows[1]["top1"] is None


@pytest.mark.parametrize(
    ("neighbours", "message"),
    [
        (IMAGES, r"neighbours: some digits is the data set itself"),
        (
            dataclasses.replace(NEAR, class_names=("a", *NEAR.class_names[1:])),
            r"has class '0' where neighbours has 'a'",
        ),
        (dataclasses.replace(NEAR, labels_per_image=2), r"neighbours has several labels an image"),
    ],
)
def test_neighbours_that_do_not_fit(neighbours, message, backbone):
    with pytest.raises(fc.InputError, match=message) as caught:
        fc.evaluate(backbone, IMAGES, "dense", neighbours=neighbours, batch_size=8)
    assert "\n" not in str(caught.value)


def test_neighbours_of_a_model_with_a_head():
    with pytest.raises(fc.InputError, match=r"neighbours: .* has a head, which classifies; convert with --num_classes"):
        fc.evaluate("packaged:digits", IMAGES, "dense", neighbours=NEAR, batch_size=8)
