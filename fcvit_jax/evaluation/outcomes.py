"""Outcomes of a whole data set: collected batch by batch, in a file from which an interrupted evaluation resumes."""

import io
import itertools
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Outcome
from fcvit_jax.files import write_whole

NAME_BYTES = 256  # that processes exchange of an image's name: the end of a longer one


class Outcomes(NamedTuple):
    """The outcomes of n images under s schedules, in the data set's order, without images that do not count.

    names: str [n]. labels: int32 [n], or [n, k] padded with -1. rank, prediction: int32 [s, n], as in `Outcome`.
    kl: float32 [s, n], from dense; NaN if dense is not among the schedules.
    """

    names: np.ndarray
    labels: np.ndarray
    rank: np.ndarray
    prediction: np.ndarray
    kl: np.ndarray


def collect(batch: Batch, outcomes: Mapping[str, Outcome], mesh: jax.sharding.Mesh) -> Outcomes:
    """Keep the rows of a batch that count. All processes call this, and each gets the rows of all."""
    rank = np.stack([outcome.rank for outcome in outcomes.values()])
    names, labels = _everywhere(batch, mesh) if jax.process_count() > 1 else (np.asarray(batch.names), batch.labels)
    none = np.full(rank.shape[1], 0 if "dense" in outcomes else np.nan, np.float32)  # dense differs from itself by 0
    kl = np.stack([none if outcome.kl is None else outcome.kl for outcome in outcomes.values()])
    prediction = np.stack([outcome.prediction for outcome in outcomes.values()])
    counts = rank[0] >= 0
    return Outcomes(names[counts], np.asarray(labels)[counts], rank[:, counts], prediction[:, counts], kl[:, counts])


def _everywhere(batch: Batch, mesh: jax.sharding.Mesh) -> tuple[np.ndarray, Any]:
    """Gather the names and labels of a batch's rows on all processes: names do not leave their process otherwise."""
    coded = np.array([name.encode(errors="surrogateescape")[-NAME_BYTES:] for name in batch.names], f"S{NAME_BYTES}")
    spread = jax.make_array_from_process_local_data(
        parallel.batched(mesh), coded.view(np.uint8).reshape(-1, NAME_BYTES)
    )
    whole, labels = jax.device_put((spread, batch.labels), parallel.replicated(mesh))
    rows = np.asarray(whole).view(f"S{NAME_BYTES}").ravel()
    return np.array([row.decode(errors="replace") for row in rows.tolist()]), labels


def concatenate(parts: Iterable[Outcomes]) -> Outcomes:
    """Concatenate the outcomes of one or more batches."""
    names, labels, *others = zip(*parts, strict=True)
    return Outcomes(np.concatenate(names), np.concatenate(labels), *(np.concatenate(rows, axis=1) for rows in others))


def save_outcomes(path: Path, schedules: Sequence[str], outcomes: Outcomes) -> None:
    """Write the arrays as one .npz, with `schedules`, str [s]. A partial file is never left behind."""
    write_whole(path, _npz(schedules=np.asarray(schedules), **outcomes._asdict()))


_BLOCK = struct.Struct("<III")  # before each block: the number of its batch, its length, its CRC-32


class Journal:
    """A file to which the outcomes of each batch are appended as a block, so that the next run can resume after it.

    The first line identifies the run. A block that is torn, because the process was killed while writing it, is cut off
    with everything after it; so is a block out of order, which two runs in one directory would leave.

    parts: the outcomes of the whole batches found in the file, and of those appended since.
    differs: if the file belongs to another run, which entries differ; none of its outcomes are used.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]):
        """path: None keeps the outcomes in memory alone. run: what decides the outcomes, as JSON-able values."""
        self.parts: list[Outcomes] = []
        self.differs: tuple[str, ...] = ()
        self._path, self._head = path, json.dumps(run, sort_keys=True).encode() + b"\n"
        self._used = len(self._head)
        before = b""
        if path and path.exists():
            with path.open("rb") as file:
                before = file.readline()
        if before == self._head:
            for arrays, end in self._blocks():
                self.parts.append(Outcomes(*(arrays[name] for name in Outcomes._fields)))
                self._used = end
        elif before:
            there, now = _json(before), _json(self._head)
            self.differs = tuple(sorted(key for key in there | now if there.get(key) != now.get(key)))

    def _blocks(self) -> Iterator[tuple[Mapping[str, np.ndarray], int]]:
        """The whole blocks in the file, and where each ends; one at a time is in memory."""
        assert self._path
        with self._path.open("rb") as file:
            file.seek(len(self._head))
            for number in itertools.count():
                if len(start := file.read(_BLOCK.size)) < _BLOCK.size:
                    return
                batch, length, checksum = _BLOCK.unpack(start)
                block = file.read(length)
                if batch != number or len(block) < length or zlib.crc32(block) != checksum:
                    return
                with np.load(io.BytesIO(block), allow_pickle=False) as arrays:
                    yield arrays, file.tell()

    def append(self, outcomes: Outcomes, logits: Sequence[np.ndarray] = ()) -> None:
        """Add the next batch, with the logits of each schedule if they are to be saved.

        Raises InputError if it cannot be written.
        """
        if self._path:
            named = {f"logits_{index}": rows for index, rows in enumerate(logits)}
            self._write(self._path, _npz(**outcomes._asdict(), **named))
        self.parts.append(outcomes)

    def _write(self, path: Path, block: bytes) -> None:
        try:
            if not self.parts:  # replaces what another run has left there
                path.write_bytes(self._head)
            with path.open("r+b") as file:
                file.seek(self._used)
                file.truncate()
                file.write(_BLOCK.pack(len(self.parts), len(block), zlib.crc32(block)) + block)
                self._used = file.tell()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written ({error.strerror}): make room, then run it again to resume"
            ) from None

    def logits(self) -> Iterator[list[np.ndarray]]:
        """The logits that were appended, read batch by batch: float32 [rows, c] of each schedule."""
        for arrays, _ in self._blocks():
            yield [arrays[name] for name in arrays if name.startswith("logits_")]


def _npz(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    return content.getvalue()


def _json(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
