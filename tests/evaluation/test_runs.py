import json

import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.runs import Run, devices, differences, read_run


def test_change_is_against_the_runs_own_dense(make_run):
    run = make_run()
    assert [run.change(row) for row in run.rows] == pytest.approx([0, -2, -5, -0.5])
    without = Run("w", run.rows[1:])
    assert without.dense is None
    assert without.change(run.rows[1]) is None
    assert run.change({"schedule": "tome_r1", "gmacs": 1.0}) is None


def test_a_directory_and_its_file_are_the_same_run(tmp_path, write_run, make_rows):
    directory = write_run(tmp_path / "vit_s")
    (directory / "gallery").mkdir()
    for name in ("001_b.png", "000_a.png"):
        (directory / "gallery" / name).touch()
    table = {"classes": ["a"], "images": [3], "correct": {"dense": [2]}}
    (directory / "per_class.json").write_text(json.dumps(table))
    run = read_run(directory)
    assert run == read_run(directory / "results.jsonl")
    assert (run.name, run.rows, run.per_class) == ("vit_s", tuple(make_rows()), table)
    assert [path.name for path in run.gallery] == ["000_a.png", "001_b.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("\n", "has no rows"),
        ('{"schedule": "dense"}\nnonsense\n', r"results.jsonl, line 2: not a result row"),
        ('{"top1": 0.5}\n', "line 1: not a result row"),
        ('{"schedule": "dense", "top1": "high"}\n', "field 'top1' is 'high' and should be a number"),
        ('{"schedule": "dense", "gmacs": NaN}\n', "field 'gmacs' is nan"),
        ('{"schedule": "dense", "correct": true}\n', "field 'correct' is True"),
        (b"\x89PNG\xff", "cannot be read"),
    ],
)
def test_bad_results_are_reported_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "results.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        read_run(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "table",
    [
        "{",
        "[]",
        '{"classes": ["a"], "images": [1]}',
        '{"classes": ["a"], "images": [1, 2], "correct": {}}',
        '{"classes": ["a"], "images": [1], "correct": {"dense": ["x"]}}',
        '{"classes": ["a"], "images": [Infinity], "correct": {}}',
    ],
)
def test_a_damaged_class_table(tmp_path, write_run, table):
    write_run(tmp_path)
    (tmp_path / "per_class.json").write_text(table)
    with pytest.raises(InputError, match=r"per_class\.json is damaged"):
        read_run(tmp_path)


def test_equal_runs_have_no_differences(make_run):
    assert differences([make_run("a"), make_run("b")]) == []
    # A missing field is not a difference.
    assert differences([make_run("a"), make_run("b", preprocess=None, device=None, weights_sha256=None)]) == []
    # Other weights are another model, unless they have one name.
    assert differences([make_run("a", model="v"), make_run("b", model="w", weights_sha256="cd34")]) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"preprocess": "Q"}, "rows of different preprocessing are compared: P (a); Q (b)"),
        ({"dataset": "E"}, "rows of different data sets are compared: D (a); E (b)"),
        ({"real_labels": "real.json"}, "rows of different data sets are compared: D (a); D with real.json (b)"),
        ({"num_images": 500}, "rows of different numbers of images are compared: 1000 (a); 500 (b)"),
        (
            {"weights_sha256": "cd34"},
            "rows of different weights of the same model, v, are compared: ab12 (a); cd34 (b)",
        ),
        (
            {"batch_size": 64},
            "rows of different devices, batches or dtypes (images/s) are compared: "
            "1 x X, batch 8, float32 (a); 1 x X, batch 64, float32 (b)",
        ),
    ],
)
def test_what_differs_is_reported(make_run, changes, expected):
    assert differences([make_run("a", model="v"), make_run("b", model="v", **changes)]) == [expected]


def test_untimed_rows_may_come_from_different_machines(make_run):
    assert differences([make_run("a"), make_run("b", device="Y", images_per_second=None)]) == []


def test_one_cpu_taken_as_several_devices_is_reported_as_one():
    cpu = {"device": "CPU (2 cores)", "num_devices": 2, "num_processes": 1}
    assert devices(cpu) == "CPU (2 cores) as 2 devices"
    assert devices(cpu | {"num_devices": 1}) == "1 x CPU (2 cores)"
    assert devices(cpu | {"num_processes": 2}) == "2 x CPU (2 cores)"
    assert devices({"device": "NVIDIA H200", "num_devices": 8, "num_processes": 1}) == "8 x NVIDIA H200"
