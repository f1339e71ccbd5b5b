"""TFRecord files without TensorFlow: random access to their records.

A record is its length (uint64), a checksum of the length (uint32), its bytes and a checksum of the bytes (uint32), all
little-endian. The checksums are not read: damaged lengths do not add up to the file's size, and images decode or fail.
"""

import bisect
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError

_HEADER, _FOOTER = 12, 4  # bytes around a record's own


class TFRecords:
    """The records of several files, or of parts of them, as one sequence; several threads may read it at once.

    A file is indexed when its first record is read, with 8 bytes per record. Raises InputError, naming the file, if it
    is damaged or holds an unexpected number of records.

    parts: TFDS's file instructions: `filename`, `skip`, `take` and `examples_in_shard`.
    """

    def __init__(self, parts: Sequence[Any]):
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(part.take for part in parts))
        self._starts = functools.cache(record_starts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        which = bisect.bisect_right(self._ends, index)
        part = self._parts[which]
        starts = self._starts(part.filename, part.examples_in_shard)
        place = part.skip + part.take - (self._ends[which] - index)
        start, end = int(starts[place]) + _HEADER, int(starts[place + 1]) - _FOOTER
        # Opened for each record: a process may not have a handle for each of a thousand files.
        with open(part.filename, "rb") as file:
            return os.pread(file.fileno(), end - start, start)


def record_starts(path: str | os.PathLike, count: int) -> np.ndarray:
    """Find the byte at which each record's header starts, then the file's size: int64 [count + 1].

    Raises InputError if the file is not exactly `count` records long.
    """
    starts = [0]
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while starts[-1] < size and len(starts) <= count:
                length = int.from_bytes(os.pread(file.fileno(), 8, starts[-1]), "little")
                starts.append(starts[-1] + _HEADER + length + _FOOTER)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    found = len(starts) - 1
    if (found, starts[-1]) != (count, size):
        what = f"{path} is damaged, or no TFRecord file of {count} records"
        raise InputError(f"{what}: record {found} ends at byte {starts[-1]} of {size}; copy or prepare it again")
    return np.asarray(starts, np.int64)
