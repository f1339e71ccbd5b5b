"""Result rows, one per merge schedule with all its conditions, and the runs that they are read from.

Rows of earlier versions lack fields, and a field that was not measured is null: read them with `row.get`.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError, printable

ResultRow = dict[str, Any]

# Measured fields; all other fields are the conditions of the measurement.
MEASURED = (
    *("top1", "top1_low", "top1_high", "top5", "correct", "gained", "lost", "mcnemar_p", "agreement", "kl"),
    *("gmacs", "gmacs_executed", "tokens_out", "images_per_second", "images_per_second_spread", "speedup"),
    *("cosine", "cosine_p5", "distance", "distance_p95"),
    *("patch_cosine", "patch_cosine_p5", "patch_distance", "patch_distance_p95", "compile_seconds"),
    *("reference_top1", "reference_sigmas", "published_top1", "published_gmacs"),
)


@dataclass(frozen=True)
class Run:
    """The results of one evaluation.

    per_class: {"classes": names, "images": counts, "correct": {schedule: counts}}, or None. gallery: PNG files.
    """

    name: str
    rows: tuple[ResultRow, ...]
    per_class: Mapping[str, Any] | None = None
    gallery: tuple[Path, ...] = ()

    @property
    def dense(self) -> ResultRow | None:
        return next((row for row in self.rows if row["schedule"] == "dense"), None)

    @property
    def evaluated(self) -> bool:
        """Whether any row has an accuracy or a distance of features, beside the cost."""
        return any(row.get(key) is not None for row in self.rows for key in ("top1", "cosine"))

    def change(self, row: ResultRow) -> float | None:
        """Compute the points of top-1 gained over the dense model; None if either was not measured."""
        before, after = (self.dense or {}).get("top1"), row.get("top1")
        return None if before is None or after is None else 100 * (after - before)


def read_run(path: Path, rows: Sequence[ResultRow] | None = None) -> Run:
    """Read a working directory of `evaluate.py`, or its results.jsonl, with the files beside it.

    rows: the rows of the run, if already known. Raises InputError that names the file and the line.
    """
    directory = path if path.is_dir() else path.parent
    if rows is None:
        rows = _read_rows(directory / "results.jsonl" if path.is_dir() else path)
    gallery = tuple(sorted((directory / "gallery").glob("*.png")))
    return Run(printable(directory.resolve().name), tuple(rows), _read_per_class(directory / "per_class.json"), gallery)


def titled(run: Run, text: str, runs: Sequence[Run]) -> str:
    """Put the run's name before a text, if there are several runs."""
    return f"{run.name}: {text}" if len(runs) > 1 else text


def differences(runs: Sequence[Run]) -> list[str]:
    """List the conditions that differ between rows, one sentence each: such rows are not a fair comparison."""
    found: dict[str, dict[Any, dict[str, None]]] = {}  # the names of the runs, by condition and value
    for run in runs:
        for row in run.rows:
            for noun, value in _conditions(row).items():
                if value:
                    found.setdefault(noun, {}).setdefault(value, {})[run.name] = None
    sentences = []
    for noun, values in found.items():
        if len(values) > 1:
            listed = "; ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
            sentences.append(f"rows of different {noun} are compared: {listed}")
    return sentences


def _conditions(row: ResultRow) -> dict[str, Any]:
    """Return the conditions that comparable rows share; an unknown value is None or empty."""
    timed = all(row.get(key) for key in ("images_per_second", "num_devices", "device", "batch_size", "dtype"))
    return {
        "preprocessing": row.get("preprocess"),
        "data sets": " with ".join(filter(None, (row.get("dataset"), row.get("real_labels")))),
        "numbers of images": row.get("num_images"),
        f"weights of the same model, {row.get('model')},": row.get("model") and row.get("weights_sha256"),
        "devices, batches or dtypes (images/s)": (
            f"{devices(row)}, batch {row['batch_size']}, {row['dtype']}" if timed else None
        ),
    }


def devices(row: ResultRow) -> str:
    """Name the devices of a row: "2 x NVIDIA H200", "CPU (2 cores) as 2 devices"."""
    count, name = row.get("num_devices"), row.get("device")
    one_cpu = str(name).startswith("CPU") and count != 1 and row.get("num_processes", 1) == 1
    return f"{name} as {count} devices" if one_cpu else f"{count} x {name}"


def _read_rows(path: Path) -> list[ResultRow]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a working directory of evaluate.py or a results.jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a results.jsonl: {error}") from None
    rows = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path} has no rows: run evaluate.py again")
    return rows


def _parse(line: str, place: str) -> ResultRow:
    row = None
    with contextlib.suppress(ValueError):
        row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("schedule"), str):
        raise InputError(f"{place}: not a result row, which is a JSON object with a schedule; run evaluate.py again")
    for field in MEASURED:
        value = row.get(field)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value)):
            raise InputError(f"{place}: field {field!r} is {value!r} and should be a number; run evaluate.py again")
    return row


def _read_per_class(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        table = json.loads(path.read_text())
        if np.array([table["images"], *table["correct"].values()], np.int64).shape[1] == len(table["classes"]):
            return table
    except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise InputError(f"{path} is damaged: remove it, or run evaluate.py again")
