"""What a run tells while it goes on: metrics.jsonl, and events for TensorBoard where its writer is installed."""

import contextlib
import json
from pathlib import Path
from typing import Any


class Log:
    """Rows of numbers by step, appended to DIR/metrics.jsonl and DIR/events.

    A run that goes on from a step drops the rows after it: they will be written again.
    """

    def __init__(self, directory: Path, from_step: int, tensorboard: bool):
        path = directory / "metrics.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        path.write_text("".join(f"{row}\n" for row in rows if _step(row) <= from_step))
        self._file = path.open("a")
        self._events: Any = None
        if tensorboard:
            with contextlib.suppress(ImportError):  # pip install "fcvit-jax[tensorboard]"
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(directory / "events"), purge_step=from_step + 1)

    def write(self, step: int, row: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._events:
            for name, value in row.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()


def _step(row: str) -> float:
    """The step of a row; of one that a killed run left unfinished, one that is dropped."""
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
