"""TFRecord's checksum and framing, against published values."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest

from fcvit_jax.data.tfrecord import TFRecords, masked_crc32c, record_starts
from fcvit_jax.errors import InputError


def part(path, skip, take, count):
    return SimpleNamespace(filename=str(path), skip=skip, take=take, examples_in_shard=count)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + bytes(4)  # the last checksum is not read


@pytest.mark.parametrize(
    ("data", "crc32c"),
    [  # RFC 3720, B.4, and the check value of the polynomial
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_checksum(data, crc32c):
    rotated = (masked_crc32c(data) - 0xA282EAD8) % 2**32
    assert (rotated << 15 | rotated >> 17) % 2**32 == crc32c


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
        (lambda whole: whole[:-1], "is truncated: record 3 of 3 ends at byte 63, the file has 62; copy or prepare it"),
        (lambda whole: whole[:35], "is truncated: record 2 of 3 ends at byte 42, the file has 35"),
        (lambda whole: whole[:30], "is truncated: record 2 of 3 ends at byte 33, the file has 30"),  # or later
        (lambda whole: whole[:47], "is truncated: record 3 of 3 ends at byte 54, the file has 47"),
        (lambda whole: whole[:42], "has 2 records, its data set says 3"),
        (lambda whole: whole * 2, "has 6 records, its data set says 3"),
        (lambda whole: b"", "has 0 records, its data set says 3"),
        (lambda whole: whole[:21] + b"\x09" + whole[22:], "damaged: the header at byte 21 does not fit its checksum"),
        (lambda whole: b"\xff\xd8 a picture " + whole, "is no TFRecord file, or damaged: the header at byte 0"),
    ],
)
def test_damage_is_told(tmp_path, change, message):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(change(framed(b"hello") * 3))
    with pytest.raises(InputError, match=message) as caught:
        TFRecords([part(path, 0, 3, 3)])[0]
    assert str(caught.value).startswith(str(path))


def test_an_absent_file_is_told(tmp_path):
    with pytest.raises(InputError, match="x cannot be read: No such file"):
        record_starts(tmp_path / "x", 1)
