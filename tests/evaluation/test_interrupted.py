"""Evaluations that are interrupted, resumed, or meet an image that cannot be read."""

import contextlib
import dataclasses
import os
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import evaluate
import fcvit_jax as fc
from configs import eval_digits
from fcvit_jax import evaluation, parallel
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import inputs, report
from fcvit_jax.evaluation.outcomes import Journal
from thirteen_images import CLASSES, PIXELS, counts


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


def test_weights_that_were_changed_in_memory_are_another_run(checkpoint, folder, tmp_path, monkeypatch, capsys):
    loaded = fc.load_checkpoint(checkpoint)
    changed = dataclasses.replace(loaded, params=jax.tree.map(lambda leaf: 2 * leaf, loaded.params))
    options: Any = dict(workdir=tmp_path, batch_size=8, throughput_blocks=0)
    with interrupted(monkeypatch, 1):
        evaluation.evaluate(loaded, f"folder:{folder}", "dense", **options)
    evaluation.evaluate(changed, f"folder:{folder}", "dense", **options)
    assert "differs in checkpoint; starting over" in capsys.readouterr().out
