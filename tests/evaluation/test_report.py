import csv
import io
import json
import os
import subprocess
import sys

import pytest

from fcvit_jax.evaluation.report import format_table, main, reports_in, write_report
from fcvit_jax.evaluation.runs import read_run


def test_files(tmp_path, make_rows):
    rows = make_rows()
    write_report(rows, tmp_path)
    assert reports_in(tmp_path) == ["results.jsonl", "results.csv", "pareto.png", "report.html"]
    assert sorted(os.listdir(tmp_path)) == ["pareto.png", "report.html", "results.csv", "results.jsonl"]
    assert list(read_run(tmp_path).rows) == rows
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [line["schedule"] for line in table] == ["dense", "tome_r8", "tome_r13", "s2winc7_r16"]
    assert float(table[2]["top1"]) == 0.85
    assert json.loads(table[0]["versions"]) == {"jax": "1"}
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>C on D</title>" in (tmp_path / "report.html").read_text()


def test_rows_may_have_different_fields(tmp_path, make_rows):
    rows = make_rows()
    rows[2]["note"] = "late"
    del rows[0]["kl"]
    write_report(rows, tmp_path)
    table = list(csv.DictReader(io.StringIO((tmp_path / "results.csv").read_text())))
    assert [line["note"] for line in table] == ["", "", "late", ""]
    assert (table[0]["kl"], table[1]["kl"]) == ("", str(rows[1]["kl"]))


def test_costs_alone_have_neither_plot_nor_page(tmp_path, make_rows):
    write_report(make_rows(), tmp_path)
    costs = [{"schedule": "dense", "stages": "S", "gmacs": 4.6, "tokens_out": 197, "checkpoint": "C", "model": None}]
    write_report(costs, tmp_path)
    assert reports_in(tmp_path) == ["results.jsonl", "results.csv"]
    assert sorted(os.listdir(tmp_path)) == ["results.csv", "results.jsonl"]  # and nothing of the run before
    for flag in ("--html", "--png"):
        with pytest.raises(SystemExit):
            main([str(tmp_path), flag, str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_one_run_again(tmp_path, write_run, make_rows, capsys):
    directory = write_run(tmp_path / "run")
    main([str(directory), "--html", str(tmp_path / "again.html")])
    told = capsys.readouterr().out
    assert told == f"{format_table(make_rows())}\n\nwritten: {tmp_path / 'again.html'}\n"
    assert "<title>C on D</title>" in (tmp_path / "again.html").read_text()


def test_several_runs_together(tmp_path, write_run, capsys):
    one = write_run(tmp_path / "vit_s")
    other = write_run(tmp_path / "vit_b", preprocess="Q", batch_size=64)
    out = {kind: tmp_path / f"both.{kind}" for kind in ("html", "csv", "png")}
    flags = [part for kind, path in out.items() for part in (f"--{kind}", str(path))]
    main([str(one), str(other / "results.jsonl"), *flags])
    told = capsys.readouterr().out.splitlines()
    assert (told[0], told[1].split()[0]) == ("vit_s", "schedule")
    assert "vit_b" in told
    warnings = [line for line in told if line.startswith("warning: ")]
    assert warnings[0] == "warning: rows of different preprocessing are compared: P (vit_s); Q (vit_b)"
    assert len(warnings) == 2
    page = out["html"].read_text()
    assert page.count('class="warning">Warning: rows of different') == 2
    table = list(csv.DictReader(io.StringIO(out["csv"].read_text())))
    assert [line["run"] for line in table] == ["vit_s"] * 4 + ["vit_b"] * 4
    assert out["png"].stat().st_size > 10_000


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, write_run, capsys, monkeypatch):
    write_run(tmp_path / "a" / "run")
    write_run(tmp_path / "b" / "run")
    monkeypatch.chdir(tmp_path)
    main(["a/run", "b/run", "--csv", "out.csv"])
    assert {line["run"] for line in csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))} == {
        "a/run",
        "b/run",
    }
    with pytest.raises(SystemExit):
        main(["a/run", "a/run"])
    assert capsys.readouterr().err == "error: the same results are given twice: give each run once\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "error: absent does not exist: give a working directory of evaluate.py or a results.jsonl\n"),
        (["run", "--csv", "no/where.csv"], "error: no/where.csv cannot be written (No such file or directory): "),
        (["run", "--html"], "error: argument --html: expected one argument (see --help)\n"),
        ([], "error: the following arguments are required: RESULTS (see --help)\n"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, write_run, capsys, monkeypatch, arguments, message):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1
    assert os.listdir(tmp_path) == ["run"]


def test_the_command_line(tmp_path, write_run):
    directory = write_run(tmp_path / "run")
    command = [sys.executable, "-m", "fcvit_jax.evaluation.report", str(directory), "--csv", str(tmp_path / "out.csv")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told.startswith("schedule")
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 5
