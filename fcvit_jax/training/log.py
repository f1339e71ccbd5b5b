"""The log of a run: metrics.jsonl, and events for TensorBoard if tensorboardX is installed."""

import contextlib
import json
from pathlib import Path
from typing import Any

from fcvit_jax.files import one_line_file_errors


class Log:
    """Rows of numbers by step, appended to DIR/metrics.jsonl and DIR/events.

    A run that resumes from a step drops the rows after it, and that step's tests. Raises InputError on a full disk.
    """

    def __init__(self, directory: Path, from_step: int, tensorboard: bool):
        self._path = directory / "metrics.jsonl"
        with one_line_file_errors(self._path):
            self._file = self._path.open("ab")
            self._file.truncate(_kept(self._path.read_bytes(), from_step))
        self._events: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                print("no events for TensorBoard: pip install tensorboardX, or tensorboard=false")
            else:
                self._events = SummaryWriter(str(directory / "events"), purge_step=from_step + 1)

    def write(self, step: int, row: dict[str, float]) -> None:
        with one_line_file_errors(self._path):
            self._file.write(json.dumps({"step": step, **row}).encode() + b"\n")
            self._file.flush()
        if self._events:
            for name, value in row.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was reported when the row was written
            self._file.close()
        if self._events:
            self._events.close()


def _kept(content: bytes, from_step: int) -> int:
    """Count the bytes of the rows that a run keeps when it resumes from a step."""
    length = 0
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):  # the run was killed in this row
        for line in content.splitlines(keepends=True):
            row = json.loads(line)
            tested = any(name.startswith("test/") for name in row)
            if not line.endswith(b"\n") or row["step"] > from_step - tested:
                break
            length += len(line)
    return length
