"""The tutorial notebook, run cell by cell as stored: it prints what it shows."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_small_and_holds_its_outputs():
    assert NOTEBOOK.stat().st_size < 1_000_000
    kinds = [output["output_type"] for cell in CELLS for output in cell.get("outputs", ())]
    assert "error" not in kinds
    pictures = [output for cell in CELLS for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def test_the_cells_run_and_print_what_is_stored():
    matplotlib.use("agg")  # show() returns at once
    names: dict[str, Any] = {}
    for cell in CELLS:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]).replace("plt.show()", "plt.close()"), names)
        stored = "".join("".join(each["text"]) for each in cell["outputs"] if each["output_type"] == "stream")
        assert printed.getvalue().splitlines()[:1] == stored.splitlines()[:1]  # later lines may differ by rounding
    tome, nearest = (
        {row["schedule"]: row["kl"] for row in names["rows"]}[f"tome_r32{rule}"] for rule in ("", "@nearest")
    )
    assert 0 < nearest < tome
    assert names["folder"].joinpath("run.py").exists()
    assert names["report"].recommended["0.5"]
    assert names["rows"][0]["top1"] == pytest.approx(0.98, abs=0.02)
