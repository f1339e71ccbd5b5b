"""Logits of a whole data set as `logits_<schedule>.npz`, streamed: memory does not grow with the number of images."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.outcomes import Outcomes
from fcvit_jax.files import file_name


class LogitsWriter:
    """Logits batch by batch, in files under `directory/.logits`; `save` makes the files for users from them."""

    def __init__(self, directory: Path, schedules: Sequence[str], shape: tuple[int, int], start: int = 0):
        """shape: images, classes. start: rows that an interrupted run has written; with 0 the files are created.

        Raises InputError if the files cannot be created, or no longer exist.
        """
        self._directory, self._folder, self._rows = directory, directory / ".logits", start
        try:
            if not start:
                self.remove(directory)
                self._folder.mkdir()
            files = {name: self._folder / f"{index}.npy" for index, name in enumerate(schedules)}
            self._arrays = {
                name: np.lib.format.open_memmap(path, "r+" if start else "w+", np.float32, shape)
                for name, path in files.items()
                if not start or path.exists() or not self._target(name).exists()  # else `save` has finished this one
            }
            if not start:
                self._reserve()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._folder} cannot be used for the logits ({error}): make room, or choose another --workdir"
            ) from None

    def _target(self, schedule: str) -> Path:
        return self._directory / f"logits_{file_name(schedule)}.npz"

    def _reserve(self) -> None:
        """Allocate the disk space now, with one file more for `save`: a full disk kills who writes to a mapped file."""
        sizes = {path: path.stat().st_size for path in self._folder.iterdir()}
        sizes[self._folder / "whole.npz"] = max(sizes.values())
        for path, size in sizes.items() if hasattr(os, "posix_fallocate") else ():
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def add(self, batch: Batch, logits: Mapping[str, jax.Array]) -> None:
        """Append the rows of a batch that count."""
        counts = np.asarray(batch.mask)
        start, self._rows = self._rows, self._rows + int(counts.sum())
        for name, array in self._arrays.items():
            array[start : self._rows] = np.asarray(logits[name])[counts]

    def save(self, outcomes: Outcomes) -> None:
        """Write one file a schedule: `logits` float32 [n, c], `labels` and `names`; each whole or not at all.

        Removes the files that it reads, one by one. Raises InputError if the disk is full.
        """
        for name, logits in self._arrays.items():
            partial, target = self._folder / "whole.npz", self._target(name)
            try:
                np.savez(partial, logits=logits[: self._rows], labels=outcomes.labels, names=outcomes.names)
                os.replace(partial, target)
                Path(str(logits.filename)).unlink()
            except OSError as error:
                raise InputError(
                    f"{target} cannot be written ({error.strerror}): make room and run it again; all counts are kept"
                ) from None

    @staticmethod
    def remove(directory: Path) -> None:
        """Remove the files that `save` reads."""
        shutil.rmtree(directory / ".logits", ignore_errors=True)
