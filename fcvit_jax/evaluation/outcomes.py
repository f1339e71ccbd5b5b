"""Outcomes of a whole data set: collected batch by batch, in a file from which an interrupted evaluation goes on."""

import io
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Outcome
from fcvit_jax.files import write_whole

NAME_BYTES = 256  # of an image's name, as it travels between processes; of a longer one the end


class Outcomes(NamedTuple):
    """What became of n images under s schedules, in the data set's order; images that do not count are left out.

    names: str [n]. labels: int32 [n], or [n, k] padded with -1. rank, prediction: int32 [s, n], as in `Outcome`.
    kl: float32 [s, n], from dense; NaN where dense is not among the schedules.
    """

    names: np.ndarray
    labels: np.ndarray
    rank: np.ndarray
    prediction: np.ndarray
    kl: np.ndarray


def collect(batch: Batch, outcomes: Mapping[str, Outcome], mesh: jax.sharding.Mesh) -> Outcomes:
    """The rows of a batch that count. Of several processes all call it, and all get the rows of all."""
    rank = np.stack([outcome.rank for outcome in outcomes.values()])
    names, labels = _everywhere(batch, mesh) if jax.process_count() > 1 else (np.asarray(batch.names), batch.labels)
    none = np.full(rank.shape[1], 0 if "dense" in outcomes else np.nan, np.float32)  # dense differs from itself by 0
    kl = np.stack([none if outcome.kl is None else outcome.kl for outcome in outcomes.values()])
    prediction = np.stack([outcome.prediction for outcome in outcomes.values()])
    counts = rank[0] >= 0
    return Outcomes(names[counts], np.asarray(labels)[counts], rank[:, counts], prediction[:, counts], kl[:, counts])


def _everywhere(batch: Batch, mesh: jax.sharding.Mesh) -> tuple[np.ndarray, Any]:
    """The names and labels of a batch's rows on all processes. Names never leave their process otherwise."""
    coded = np.array([name.encode(errors="surrogateescape")[-NAME_BYTES:] for name in batch.names], f"S{NAME_BYTES}")
    spread = jax.make_array_from_process_local_data(
        parallel.batched(mesh), coded.view(np.uint8).reshape(-1, NAME_BYTES)
    )
    whole, labels = jax.device_put((spread, batch.labels), parallel.replicated(mesh))
    rows = np.asarray(whole).view(f"S{NAME_BYTES}").ravel()
    return np.array([row.decode(errors="replace") for row in rows.tolist()]), labels


def concatenate(parts: Iterable[Outcomes]) -> Outcomes:
    """The parts, one behind the other. There must be one at least."""
    names, labels, *others = zip(*parts, strict=True)
    return Outcomes(np.concatenate(names), np.concatenate(labels), *(np.concatenate(rows, axis=1) for rows in others))


def save_outcomes(path: Path, schedules: Sequence[str], outcomes: Outcomes) -> None:
    """Write the arrays as one .npz, with `schedules`, str [s]; whole or not at all."""
    write_whole(path, _npz(schedules=np.asarray(schedules), **outcomes._asdict()))


_BLOCK = struct.Struct("<III")  # ahead of each block: the number of its batch, its length, its CRC-32


class Journal:
    """A file of outcomes to which each batch is appended as a block, so that the next run goes on behind the last.

    Its first line says what the run is. A block that is torn, because the process was killed while writing it, is cut
    off with all behind it; so is one that is not the next in order, as two runs in one folder would leave it.

    parts: the outcomes of the whole batches found there, and of those appended since.
    differs: where the file is of another run, in what; nothing of it is used.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]):
        """run: what decides the outcomes, as JSON-able values."""
        self.parts: list[Outcomes] = []
        self.differs: tuple[str, ...] = ()
        self._path, self._head = path, json.dumps(run, sort_keys=True).encode() + b"\n"
        content = path.read_bytes() if path.exists() else b""
        if content.startswith(self._head):
            self._used = self._read(content, len(self._head))
        elif content:
            before, now = _json(content.partition(b"\n")[0]), _json(self._head)
            self.differs = tuple(sorted(key for key in before | now if before.get(key) != now.get(key)))

    def _read(self, content: bytes, at: int) -> int:
        """Take over the whole blocks that begin there; returns where they end."""
        while at + _BLOCK.size <= len(content):
            batch, length, checksum = _BLOCK.unpack_from(content, at)
            block = content[at + _BLOCK.size : at + _BLOCK.size + length]
            if batch != len(self.parts) or len(block) < length or zlib.crc32(block) != checksum:
                break
            with np.load(io.BytesIO(block), allow_pickle=False) as arrays:
                self.parts.append(Outcomes(**arrays))
            at += _BLOCK.size + length
        return at

    def append(self, outcomes: Outcomes) -> None:
        """Add the next batch. Raises InputError where it cannot be written."""
        block = _npz(**outcomes._asdict())
        content = _BLOCK.pack(len(self.parts), len(block), zlib.crc32(block)) + block
        try:
            if not self.parts:  # and not what another run has left there
                self._path.write_bytes(self._head)
                self._used = len(self._head)
            with self._path.open("r+b") as file:
                file.seek(self._used)
                file.truncate()
                file.write(content)
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be written ({error.strerror}): make room and start again; it goes on from there"
            ) from None
        self._used += len(content)
        self.parts.append(outcomes)


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
