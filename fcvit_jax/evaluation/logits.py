"""Logits of a whole data set as `logits_<schedule>.npz`, streamed: memory does not grow with the number of images."""

import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError


class LogitsWriter:
    """Collects logits batch by batch; `close` writes one file a schedule: `logits` float32 [n, c], `labels`, `names`.

    A context manager: the files appear when the block ends well, and nothing is left when it does not.
    """

    def __init__(self, directory: Path, schedules: Iterable[str], num_images: int, num_classes: int):
        if jax.process_count() > 1:
            raise InputError("save_logits works in a single process only: leave it out")
        self._directory = directory
        self._scratch = tempfile.TemporaryDirectory(prefix=".logits-", dir=directory)
        folder = Path(self._scratch.name)
        self._paths = {name: folder / f"{index}.npy" for index, name in enumerate(schedules)}
        self._arrays = {
            name: np.lib.format.open_memmap(path, "w+", np.float32, (num_images, num_classes))
            for name, path in self._paths.items()
        }
        self._labels = np.zeros(num_images, np.int32)
        self._names: list[str] = []

    def add(self, batch: Batch, logits: Mapping[str, jax.Array]) -> None:
        """Append the rows of a batch that are not padding."""
        rows = np.flatnonzero(np.asarray(batch.mask))
        start, stop = len(self._names), len(self._names) + len(rows)
        for name, values in logits.items():
            self._arrays[name][start:stop] = np.asarray(values)[rows]
        self._labels[start:stop] = np.asarray(batch.labels)[rows]
        self._names += [batch.names[row] for row in rows]

    def close(self) -> None:
        """Write the files."""
        for name, path in self._paths.items():
            self._arrays[name].flush()
            target = Path(self._scratch.name) / "whole.npz"
            with zipfile.ZipFile(target, "w", allowZip64=True) as archive:
                archive.write(path, "logits.npy")
                for key, array in (("labels", self._labels), ("names", np.asarray(self._names))):
                    with archive.open(f"{key}.npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            os.replace(target, self._directory / f"logits_{file_name(name)}.npz")

    def __enter__(self) -> "LogitsWriter":
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is None:
            self.close()
        self._arrays.clear()
        self._scratch.cleanup()


def file_name(schedule: str) -> str:
    """A schedule's name as part of a file name: an explicit form holds colons and commas."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", schedule)
