"""Evaluations on several devices and processes, which count the same and end together."""

import json
import re
import shutil
import time
from typing import Any

import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax import parallel
from fcvit_jax.checkpoint import without_head
from fcvit_jax.errors import InputError
from processes import finish, places, start_python
from thirteen_images import SCHEDULES


def start(workdir, *more: Any, devices: Any = 1, cache: Any = None, **fields: Any):
    """Start evaluate.py as a process."""
    command = ["evaluate.py", f"--workdir={workdir}", *more, *([f"--compile_cache={cache}"] if cache else [])]
    return start_python(*command, *(f"--config.{name}={value}" for name, value in fields.items()), devices=devices)


def start_two(workdir, devices=(2, 2), **fields: Any):
    """Start two processes, by default of two devices each."""
    return [
        start(workdir, f"--distributed={place}", devices=number, **fields)
        for place, number in zip(places(), devices, strict=True)
    ]


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
