"""Weight files as NumPy arrays, without torch and without running anything that a file brings along.

Three formats are read, told apart by content: safetensors, the zip of `torch.save`, and the legacy stream that it wrote
before version 1.6.
"""

import hashlib
import json
import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcvit_jax.convert.dtypes import DTYPES, SAFETENSORS_DTYPES, are_sizes
from fcvit_jax.convert.torch_files import read_torch_legacy, read_torch_zip
from fcvit_jax.errors import InputError

_MAX_HEADER = 100_000_000
_MAX_PREFIXES = 8
_PREFIXES = ("module.", "_orig_mod.", "backbone.")

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
_FOREIGN = {b"\x93NUMPY": ".npy", b"\x89HDF\r\n\x1a\n": "HDF5", b"GGUF": "GGUF"}


@dataclass(frozen=True)
class WeightFile:
    """Named arrays of one file.

    `arrays` is in the file's order and in the file's dtypes: nothing is upcast. Arrays may be read-only, may be views
    of the memory-mapped file, share memory where the file's tensors do, and need not be contiguous.
    """

    path: Path
    format: str  # "safetensors", "torch zip" or "torch legacy"
    arrays: dict[str, np.ndarray]
    sha256: str  # of the file's bytes, in hex
    wrapper: str | None  # what stood around the names: "model", "module.", or both as "model, module."
    skipped: tuple[str, ...]  # entries that are not among the tensors: "epoch", "args", "optimizer"


def read_weights(path: str | Path) -> WeightFile:
    """Read `.safetensors`, or what `torch.save` made of a state dict (`.pth`, `.pt`, `.bin`), whatever its suffix.

    Dtypes are float64/32/16, bfloat16 and float8 (of `ml_dtypes`), complex, signed and unsigned integers, and bool. A
    state dict under a usual key such as "model" is unwrapped, the averaged weights only where there are no others. A
    prefix such as "module." that all names share is taken off.

    Raises:
      InputError: the file is missing, damaged, of a kind that is not read, holds no tensors, or refers to a function or
        class that is not tensor data. Nothing that a file names is imported or called.
    """
    path = Path(path)
    try:
        return _read(path)
    except InputError as error:
        raise InputError(_one_line(f"{path} {error}")) from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(_one_line(f"{path} cannot be read ({error.strerror}): check the path")) from error
        # A damaged file can fail anywhere in json, zipfile, pickle or numpy: for the user it is one and the same thing.
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise InputError(_one_line(f"{path} is damaged ({what}): download it again")) from error


def _one_line(text: str) -> str:
    """Names come from the file: no line break, escape sequence or lone surrogate of theirs reaches a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _read(path: Path) -> WeightFile:
    if path.is_dir():
        raise InputError("is a directory: name the weight file inside it")
    if not path.exists():
        raise InputError("does not exist: check the path")
    if not path.is_file():
        raise InputError("is not a regular file: copy the weights to one")
    if path.stat().st_size == 0:
        raise InputError("is empty: download it again")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    kind = _identify(data, path)
    if kind == "safetensors":
        arrays, wrapper, skipped = _read_safetensors(data), None, ()
    elif kind == "torch zip":
        arrays, wrapper, skipped = read_torch_zip(path, len(data))
    else:
        arrays, wrapper, skipped = read_torch_legacy(data)
    if not arrays:
        raise InputError("holds no tensors: save the model's state_dict")
    arrays, prefixes = _strip_prefixes(arrays)
    unwrapped = ", ".join(filter(None, (wrapper, prefixes)))
    return WeightFile(path, kind, arrays, hashlib.sha256(data).hexdigest(), unwrapped or None, skipped)


def _identify(data: mmap.mmap, path: Path) -> str:
    """The format, by content; InputError for the files that people take for weights."""
    head = data[:512]
    if head[4:9] == b"\0\0\0\0{":  # a header length below 4 GiB, then JSON
        return "safetensors"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "torch zip"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "torch legacy"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise InputError("starts like HTML: this is a web page, not a checkpoint: the download failed")
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        told = f" of {size[1].decode()} bytes" if size else ""
        raise InputError(f"is a Git LFS pointer{told}, not the weights: run `git lfs pull`")
    if text.startswith(b"{") and (path.name.endswith(".index.json") or data.find(b'"weight_map"') >= 0):
        raise InputError("is the index of a checkpoint in several shards, which are not read yet: save it as one file")
    for magic, packer in _PACKED.items():
        if head.startswith(magic):
            raise InputError(f"is packed by {packer}, which is not read: unpack it first")
    if head[257:262] == b"ustar":
        raise InputError("is a tar archive, which is not read: unpack it first")
    # What has no magic number is known by its suffix alone.
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), path.suffix)
    if foreign in (*_FOREIGN.values(), ".onnx", ".msgpack"):
        raise InputError(f"is a file of {foreign} kind, which is not read: save the weights as .safetensors")
    if path.suffix == ".safetensors":
        return "safetensors"
    raise InputError("is neither a safetensors nor a torch.save file: name the right one, or download it again")


def _read_safetensors(data: mmap.mmap) -> dict[str, np.ndarray]:
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER, len(data) - 8):
        raise InputError(f"is damaged (a header of {length} bytes in a file of {len(data)}): download it again")
    header = json.loads(data[8 : 8 + length].decode())
    if not isinstance(header, dict):
        raise InputError("is damaged (its header is not an object): download it again")
    header.pop("__metadata__", None)
    content = np.frombuffer(data, np.uint8, offset=8 + length) if len(data) > 8 + length else np.empty(0, np.uint8)
    return {name: _safetensor(name, entry, content) for name, entry in header.items()}


def _safetensor(name: str, entry: dict[str, Any], content: np.ndarray) -> np.ndarray:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise InputError(f"has {name!r} in dtype {entry['dtype']!r}, which is not read: save it as F32, F16 or BF16")
    dtype = DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]]
    if not are_sizes(*shape, begin, end) or not begin <= end <= len(content):
        raise InputError(f"is damaged ({name!r} lies outside the file): download it again")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise InputError(f"is damaged ({name!r} has {end - begin} bytes for shape {shape}): download it again")
    array = content[begin:end].view(dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _strip_prefixes(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Take off the prefixes that all names share, and say which; a bound on their number keeps hostile names cheap."""
    removed = []
    while len(removed) < _MAX_PREFIXES:
        shared = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in arrays)), None)
        if shared is None:
            break
        arrays = {name.removeprefix(shared): array for name, array in arrays.items()}
        removed.append(shared)
    return arrays, "".join(removed)
