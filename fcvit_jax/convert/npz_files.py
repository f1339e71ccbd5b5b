"""Zip archives of weights: their common parts, and NumPy's `.npz` without its pickles."""

import io
import mmap
import struct
import warnings
import zipfile
import zlib
from collections import Counter

import numpy as np
from numpy.lib import format as npy

from fcvit_jax.convert.dtypes import NUMPY_DTYPES, check_total, damaged, shaped
from fcvit_jax.errors import InputError

_CHUNK = 2**16
_MAX_HEADER = 2**11  # enough for 64 axes; parsing takes about eighty times as much
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_RAW = np.dtype("V2")  # bfloat16 for a NumPy that does not know it


def check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raise InputError if an archive of `size` bytes names a member twice, or unpacks to over four times that."""
    if twice := [name for name, count in Counter(archive.namelist()).items() if count > 1]:
        raise damaged(f"it has two members {twice[0]!r}")
    check_total(sum(member.file_size for member in archive.infolist()), size)


def map_member(archive: zipfile.ZipFile, name: str, data: mmap.mmap) -> np.ndarray:
    """Return the bytes of an uncompressed member: a view of the mapped file, perhaps not aligned.

    Raises KeyError for a missing member, InputError or an error of zipfile for a damaged one.
    """
    member = archive.getinfo(name)
    with archive.open(member):  # the standard library compares the member's own header with the directory
        pass
    lengths = struct.unpack_from("<HH", data, member.header_offset + 26)  # of the name and of the extra field
    begin = member.header_offset + 30 + sum(lengths)
    content = np.frombuffer(data, np.uint8)[begin : begin + member.file_size]
    if len(content) < member.file_size:
        raise damaged(f"{name!r} reaches past its end")
    # torch writes zero if it computes none: set_crc32_options(False).
    if member.CRC not in (0, zlib.crc32(content.data)):
        raise damaged(f"the checksum of {name!r} is wrong")
    return content


def read_npz(archive: zipfile.ZipFile, data: mmap.mmap) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read the arrays by name, and list the members that are not arrays; call `check_members` first.

    Raises InputError without the file's name, or whatever zipfile and NumPy make of a damaged member.
    """
    names = archive.namelist()
    arrays = {name[:-4]: _read_npy(archive, name, data) for name in names if name.endswith(".npy")}
    return arrays, tuple(name for name in names if not name.endswith(".npy"))


def _read_npy(archive: zipfile.ZipFile, name: str, data: mmap.mmap) -> np.ndarray:
    stored = archive.getinfo(name).compress_type == zipfile.ZIP_STORED
    content = map_member(archive, name, data) if stored else _inflate_member(archive, name)
    head = io.BytesIO(content[: _MAX_HEADER + 16].data)
    version = npy.read_magic(head)
    if version not in _HEADERS:
        raise InputError(f"has {name!r} in version {version} of .npy, which is not read: save it as .safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # headers by Python 2, and odd literals in damaged ones
        shape, fortran_order, dtype = _HEADERS[version](head, _MAX_HEADER)
    if dtype.hasobject:
        raise InputError(f"has pickled objects in {name!r}, which are not read: save it as an array of numbers")
    target = NUMPY_DTYPES["bfloat16"] if dtype == _RAW else dtype.newbyteorder("=")
    if target not in NUMPY_DTYPES.values():
        raise InputError(f"has {name!r} in dtype {str(dtype)[:50]}, which is not read: save it as float32")
    array = shaped(name, content[head.tell() :], dtype, shape[::-1] if fortran_order else shape)
    if not dtype.isnative:
        array = array.byteswap(inplace=array.flags.writeable)  # mapped bytes are not
    return array.view(target).T if fortran_order else array.view(target)


def _inflate_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Unpack in pieces: a stream longer than its stated size is never held."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise InputError(f"has {name!r} packed otherwise than by deflate: save it with numpy.savez")
    content = np.empty(member.file_size, np.uint8)
    with archive.open(member) as stream:
        for begin in range(0, len(content), _CHUNK):
            piece = stream.read(min(_CHUNK, len(content) - begin))
            content.data[begin : begin + _CHUNK] = piece  # ValueError if the stream ends early
    return content
