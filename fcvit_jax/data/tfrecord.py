"""TFRecord files without TensorFlow: random access to their records.

A record is its length (uint64), a checksum of that (uint32), its bytes and a checksum of those, all little-endian. A
checksum is CRC-32C, rotated and shifted.
"""

import bisect
import functools
import itertools
import os
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")


class TFRecords:
    """The records of several files, or of parts of them, as one sequence; may be read from several threads at a time.

    A file's index is made when its first record is asked for, from the records' headers alone, and takes 8 bytes a
    record. Raises InputError, naming the file, where it is truncated, damaged, or not what was to be expected.
    """

    def __init__(self, parts: Sequence[Any]):
        """parts: TFDS's file instructions: `filename`, `skip`, `take` and `examples_in_shard`."""
        self._parts = list(parts)
        self._ends = list(itertools.accumulate(part.take for part in parts))
        self._indices: list[np.ndarray | None] = [None] * len(parts)
        self._locks = [threading.Lock() for _ in parts]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        which = bisect.bisect_right(self._ends, index)
        part = self._parts[which]
        with self._locks[which]:
            starts = self._indices[which]
            if starts is None:
                starts = self._indices[which] = record_starts(part.filename, part.examples_in_shard)
        place = part.skip + part.take - (self._ends[which] - index)
        start, end = int(starts[place]) + _HEADER.size, int(starts[place + 1]) - _FOOTER.size
        # Opened for each record: a handle for each of a thousand files would be more than a process may have.
        with open(part.filename, "rb") as file:
            return os.pread(file.fileno(), end - start, start)


def record_starts(path: str | os.PathLike, count: int) -> np.ndarray:
    """int64 [count + 1]: at which byte each record's header stands, and at last the file's end.

    Raises InputError if the file is truncated or damaged, or holds more or fewer records than `count`.
    """
    starts = [0]
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while starts[-1] < size:
                header = os.pread(file.fileno(), _HEADER.size, starts[-1])
                if len(header) < _HEADER.size:
                    starts.append(starts[-1] + _HEADER.size)
                    break
                length, checksum = _HEADER.unpack(header)
                if masked_crc32c(header[:8]) != checksum:
                    raise InputError(
                        f"{path} is no TFRecord file, or damaged: the header at byte {starts[-1]} does not fit its "
                        "checksum; copy or prepare it anew"
                    )
                starts.append(starts[-1] + _HEADER.size + length + _FOOTER.size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    found = len(starts) - 1
    if starts[-1] > size:
        raise InputError(
            f"{path} is truncated: record {found} of {count} ends at byte {starts[-1]}, the file has {size}; copy or "
            "prepare it anew"
        )
    if found != count:
        raise InputError(f"{path} has {found} records, its data set says {count}; copy or prepare it anew")
    return np.asarray(starts, np.int64)


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum of the bytes. In Python: for headers, not for images."""
    crc = 0xFFFFFFFF
    table = _crc32c_table()
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)
