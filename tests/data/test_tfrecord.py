"""TFRecord's framing: where records start, parts of files as one sequence, and damage in one line."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from fcvit_jax.data.tfrecord import TFRecords, record_starts
from fcvit_jax.errors import InputError


def part(path, skip, take, count):
    return SimpleNamespace(filename=str(path), skip=skip, take=take, examples_in_shard=count)


def framed(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + b"crc1" + data + b"crc2"  # checksums are not read


def test_records_of_parts_of_files(tmp_path):
    records = [b"a" * n for n in (5, 0, 300, 7)]
    for name, some in (("one", records), ("two", [b"x"])):
        (tmp_path / name).write_bytes(b"".join(map(framed, some)))
    np.testing.assert_array_equal(record_starts(tmp_path / "one", 4), [0, 21, 37, 353, 376])
    assert record_starts(tmp_path / "one", 4).dtype == np.int64
    sequence = TFRecords([part(tmp_path / "one", 2, 2, 4), part(tmp_path / "two", 0, 1, 1), part("none", 0, 0, 9)])
    assert len(sequence) == 3
    assert [sequence[i] for i in range(3)] == [b"a" * 300, b"a" * 7, b"x"]
    with pytest.raises(IndexError):
        sequence[3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole[:-1], "record 3 ends at byte 63 of 62; copy or prepare it again"),
        (lambda whole: whole[:35], "record 2 ends at byte 42 of 35"),
        (lambda whole: whole[:24], "record 2 ends at byte .* of 24"),  # within a length
        (lambda whole: whole[:42], "record 2 ends at byte 42 of 42"),
        (lambda whole: whole * 2, "record 3 ends at byte 63 of 126"),
        (lambda whole: b"", "no TFRecord file of 3 records: record 0 ends at byte 0 of 0"),
        (lambda whole: bytes(10**6), "record 3 ends at byte 48 of 1000000"),
        (lambda whole: whole[:21] + b"\x09" + whole[22:], "record 3 ends at byte .* of 63"),
        (lambda whole: b"\xff\xd8 a picture " + whole, "record 1 ends at byte"),
    ],
)
def test_damage_is_reported(tmp_path, change, message):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(change(framed(b"hello") * 3))
    with pytest.raises(InputError, match=message) as caught:
        TFRecords([part(path, 0, 3, 3)])[0]
    assert str(caught.value).startswith(f"{path} is damaged")


def test_an_absent_file_is_reported(tmp_path):
    with pytest.raises(InputError, match="x cannot be read: No such file"):
        record_starts(tmp_path / "x", 1)
