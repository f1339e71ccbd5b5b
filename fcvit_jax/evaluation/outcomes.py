"""Outcomes of a whole data set: collected batch by batch, in a file from which an interrupted evaluation resumes."""

import contextlib
import io
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax.data.batches import Batch
from fcvit_jax.data.preprocess import ODDITIES
from fcvit_jax.evaluation.accuracy import Outcome
from fcvit_jax.files import file_name, one_line_file_errors, writable_directory, write_whole

FOUND = ("skipped", *ODDITIES)  # kinds of images that are counted beside the outcomes
NAME_BYTES = 256  # of an image's name that processes exchange: the end of a longer one


class Outcomes(NamedTuple):
    """The outcomes of n images under s schedules, in the data set's order, without images that do not count.

    names: str [n]. labels: int32 [n], or [n, k] padded with -1. rank, prediction: int32 [s, n], as in `Outcome`.
    kl: float32 [s, n], from dense; NaN if dense is not among the schedules. distances: float32 [s, n, 4], in the order
    of `DISTANCES`; [s, n, 0] of a model with a head, or without dense. found: int32 [k], how many images were of each
    kind of `FOUND`.
    """

    names: np.ndarray
    labels: np.ndarray
    rank: np.ndarray
    prediction: np.ndarray
    kl: np.ndarray
    distances: np.ndarray
    found: np.ndarray


def collect(batch: Batch, outcomes: Mapping[str, Outcome]) -> Outcomes:
    """Keep the rows of a batch that count. All processes call this, and each gets the rows of all."""
    names, labels = np.asarray(batch.names), batch.labels
    if jax.process_count() > 1:
        coded = [name.encode(errors="surrogateescape")[-NAME_BYTES:] for name in batch.names]
        rows = np.array(coded, f"S{NAME_BYTES}").view(np.uint8).reshape(-1, NAME_BYTES)
        rows, labels = multihost_utils.process_allgather((rows, labels), tiled=True)
        names = np.array([row.decode(errors="replace") for row in rows.view(f"S{NAME_BYTES}").ravel().tolist()])
    rank, prediction = (np.stack([each[field] for each in outcomes.values()]) for field in (0, 1))
    none = np.full(rank.shape[1], 0 if "dense" in outcomes else np.nan, np.float32)  # dense differs from itself by 0
    kl = np.stack([none if outcome.kl is None else outcome.kl for outcome in outcomes.values()])
    none = np.zeros((rank.shape[1], 0), np.float32)
    distances = np.stack([none if each.distances is None else each.distances for each in outcomes.values()])
    there = Counter({"skipped": len(batch.skipped)}) + Counter(batch.oddities)
    found = np.array([there[kind] for kind in FOUND], np.int32)
    if jax.process_count() > 1:
        found = np.asarray(multihost_utils.process_allgather(found)).sum(axis=0, dtype=np.int32)
    counts = rank[0] >= 0
    rank, prediction, kl, distances = (array[:, counts] for array in (rank, prediction, kl, distances))
    return Outcomes(names[counts], np.asarray(labels)[counts], rank, prediction, kl, distances, found)


def concatenate(parts: Iterable[Outcomes]) -> Outcomes:
    """Concatenate the outcomes of one or more batches."""
    names, labels, *others, found = zip(*parts, strict=True)
    rank, prediction, kl, distances = (np.concatenate(rows, axis=1) for rows in others)
    total = np.stack(found).sum(axis=0)
    return Outcomes(np.concatenate(names), np.concatenate(labels), rank, prediction, kl, distances, total)


def save_outcomes(path: Path, schedules: Sequence[str], outcomes: Outcomes) -> None:
    """Write all arrays that are not empty, except `found`, and `schedules`, str [s], as one .npz, atomically."""
    arrays = {name: array for name, array in outcomes._asdict().items() if array.size and name != "found"}
    write_whole(path, _npz(schedules=np.asarray(schedules), **arrays))


class Journal:
    """A folder with a file for each finished batch, so that the next run can resume after the last of them.

    Each file names its run. Files of another run, and all files after a damaged one, are ignored and later replaced.

    parts: the outcomes of the batches found in the folder, and of those appended since.
    differs: if the folder belongs to another run, which entries differ.
    """

    def __init__(self, folder: Path | None, run: Mapping[str, Any]):
        """Open the folder; None keeps all in memory. run: what the outcomes depend on, as JSON-able values."""
        self.parts: list[Outcomes] = []
        self.differs: tuple[str, ...] = ()
        self._folder, self._run = folder, json.dumps(run)
        self._saved: list[Sequence[np.ndarray]] = []  # the logits, without a folder
        while folder and (arrays := self._read("run", *Outcomes._fields)):
            there = json.loads(str(arrays.pop("run")))
            self.differs = tuple(sorted(key for key in there | run if there.get(key) != run.get(key)))
            if self.differs:
                break
            self.parts.append(Outcomes(**arrays))

    def _read(self, *names: str) -> dict[str, np.ndarray] | None:
        """Read arrays of the batch after `parts`; None if its file does not exist or is damaged."""
        try:
            with self._file(len(self.parts)).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in names}
        except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile):
            return None

    def _file(self, batch: int) -> Path:
        assert self._folder
        return self._folder / f"{batch}.npz"

    def append(self, outcomes: Outcomes, logits: Sequence[np.ndarray] = ()) -> None:
        """Add the next batch, with the logits of each schedule if they are to be saved.

        Raises InputError if it cannot be written.
        """
        if self._folder:
            if not self.parts:
                writable_directory(self._folder)
            named = {f"logits_{index}": rows for index, rows in enumerate(logits)}
            content = _npz(run=np.asarray(self._run), **outcomes._asdict(), **named)
            write_whole(self._file(len(self.parts)), content)
        else:
            self._saved.append(logits)
        self.parts.append(outcomes)

    def forget_skips(self) -> None:
        """Drop the first batch with a skipped image, and all after it."""
        skips = (index for index, part in enumerate(self.parts) if part.found[FOUND.index("skipped")])
        del self.parts[next(skips, len(self.parts)) :]

    def logits(self) -> Iterator[Sequence[np.ndarray]]:
        """Read the appended logits batch by batch: float32 [rows, c] of each schedule."""
        yield from map(self._logits, range(len(self.parts)))

    def _logits(self, batch: int) -> Sequence[np.ndarray]:
        if not self._folder:
            return self._saved[batch]
        with np.load(self._file(batch), allow_pickle=False) as arrays:
            return [arrays[name] for name in arrays if name.startswith("logits_")]

    def logits_between(self, start: int, stop: int) -> list[np.ndarray]:
        """Read the logits of the images from one index to another: float32 [stop - start, c] of each schedule."""
        ends = np.cumsum([len(part.names) for part in self.parts])
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        before = ends[first] - len(self.parts[first].names)
        parts = map(self._logits, range(first, last + 1))
        return [np.concatenate(rows)[start - before : stop - before] for rows in zip(*parts, strict=True)]


def save_logits(
    directory: Path, schedules: Sequence[str], num_classes: int, journal: Journal, outcomes: Outcomes
) -> None:
    """Write one file per schedule: `logits` float32 [n, c], `labels` and `names`; all files or none.

    Raises InputError if they cannot be written.
    """
    targets = [directory / f"logits_{file_name(name)}.npz" for name in schedules]
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(outcomes.names), num_classes)}
    with one_line_file_errors(directory), contextlib.ExitStack() as leftovers:
        for partial in partials:
            leftovers.callback(partial.unlink, missing_ok=True)
        with contextlib.ExitStack() as opened:
            archives = [opened.enter_context(zipfile.ZipFile(partial, "w")) for partial in partials]
            members = [opened.enter_context(each.open("logits.npy", "w", force_zip64=True)) for each in archives]
            for member in members:
                np.lib.format.write_array_header_1_0(member, header)
            for batch in journal.logits():
                for member, logits in zip(members, batch, strict=True):
                    member.write(np.ascontiguousarray(logits, "<f4").tobytes())
            for archive, member in zip(archives, members, strict=True):
                member.close()
                for name, array in (("labels", outcomes.labels), ("names", outcomes.names)):
                    with archive.open(f"{name}.npy", "w") as other:
                        np.lib.format.write_array(other, array, allow_pickle=False)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)


def _npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    return content.getvalue()
