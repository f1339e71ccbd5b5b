"""Weight files as NumPy arrays, without torch and without executing code from a file.

Four formats are read, identified by content: safetensors, the zip of `torch.save`, its legacy stream before version
1.6, and NumPy's `.npz`; also the index of a checkpoint in several such files.
"""

import contextlib
import hashlib
import json
import mmap
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from fcvit_jax.convert.dtypes import NUMPY_DTYPES, SAFETENSORS_DTYPES, are_sizes, check_total, damaged, shaped
from fcvit_jax.convert.npz_files import check_members, read_npz
from fcvit_jax.convert.torch_files import Contents, Wanted, no_averaged, read_torch_legacy, read_torch_zip
from fcvit_jax.convert.unfinished import check_finished, check_name
from fcvit_jax.errors import InputError

_MAX_HEADER = 100_000_000
# Additions of torch.compile, FSDP, checkpointing and DDP to the names of a module's tensors.
_INFIX = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|_forward_module)\.|(?<=\.)module\."
)

_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}
_FOREIGN = {b"\x93NUMPY": ".npy", b"\x89HDF\r\n\x1a\n": "HDF5", b"GGUF": "GGUF"}


@dataclass(frozen=True)
class WeightFile:
    """Named arrays of one file, or of all files of an index.

    `arrays` is in the files' order and in the files' dtypes: nothing is upcast. Arrays may be read-only, may be views
    of the memory-mapped file, share memory where the file's tensors do, and need not be contiguous or aligned.
    """

    path: Path
    format: str  # "safetensors", "torch zip", "torch legacy" or "npz"; of shards "safetensors, 3 shards"
    arrays: dict[str, np.ndarray]
    files: dict[str, str]  # the names of the files read, and the sha256 of their bytes in hex; an index comes first
    wrapper: str | None  # removed around the names: "state_dict, model", "module.", or both as "model, module."
    skipped: tuple[str, ...]  # entries that are not among the tensors: "epoch", "model_ema"


def read_weights(path: str | Path, ema: bool = False, key: str | None = None) -> WeightFile:
    """Read `.safetensors`, `.npz`, a state dict saved by `torch.save`, or the `.index.json` of several such files.

    A state dict under a key such as "model" is unwrapped: the live weights, or with `ema` the averaged ones. Additions
    of torch.compile, FSDP and checkpointing to names are removed. Nothing that a file names is imported or called.

    key: the dictionary of a training checkpoint that holds the weights, or the beginning of their names.

    Raises InputError if a file is missing, damaged, of a kind that is not read, without tensors, in disagreement with
    its index, or needs another tool first. The same if it unpacks to more than four times its size, has no averaged
    weights for `ema`, or nothing under `key`.
    """
    path = Path(path)
    with _told_of(path):
        files: dict[str, str] = {}
        check_name(path.name)
        kind, (arrays, wrapper, skipped) = _read(path, Wanted(ema, key), files)
        if not arrays:
            raise InputError("holds no tensors: save the model's state_dict")
        if odd := next((name for name in arrays if not name.isprintable()), None):
            raise damaged(f"a tensor is called {odd!r}")
        check_finished(arrays, skipped)
        prefix = None
        if key and key not in (str(wrapper).replace(", ", "."), str(wrapper).split(", ")[-1]):
            arrays, prefix, beside = _select(arrays, key)
            skipped += beside
        plain = {_INFIX.sub("", name): array for name, array in arrays.items()}
        arrays = plain if len(plain) == len(arrays) else arrays
    unwrapped = ", ".join(filter(None, (wrapper, prefix)))
    return WeightFile(path, kind, arrays, files, unwrapped or None, tuple(map(_one_line, skipped)))


@contextlib.contextmanager
def _told_of(subject: object) -> Iterator[None]:
    """Turn whatever is raised into an InputError of one line that begins with the subject."""
    try:
        yield
    except InputError as error:
        raise InputError(_one_line(f"{subject} {error}")) from error
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(_one_line(f"{subject} cannot be read ({error.strerror}): check the path")) from error
        # A damaged file can fail anywhere in json, zipfile, pickle or numpy: for the user this is the same error.
        what = damaged(f"{type(error).__name__}: {str(error)[:200]}")
        raise InputError(_one_line(f"{subject} {what}")) from error


def _one_line(text: str) -> str:
    """Escape line breaks, escape sequences and lone surrogates, which names in a file may contain."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _read(path: Path, wanted: Wanted, files: dict[str, str]) -> tuple[str, Contents]:
    """Read the format and the content of a file; enter its sha256 in `files`, which is empty except for shards."""
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
    if kind == "index" and files:
        raise InputError("is an index itself: name the files that hold the tensors")
    files[path.name] = hashlib.sha256(data).hexdigest()
    if kind == "index":
        return _read_shards(path.parent, data, wanted, files)
    if kind == "torch legacy":
        return kind, read_torch_legacy(data, wanted)
    if kind == "safetensors":
        arrays, skipped = _read_safetensors(data), ()
    else:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, len(data))
            if not any(name.endswith(".npy") for name in archive.namelist()):
                return "torch zip", read_torch_zip(archive, data, wanted)
            kind, (arrays, skipped) = "npz", read_npz(archive, data)
    if wanted.ema:
        raise no_averaged(arrays)
    return kind, (arrays, None, skipped)


def _read_shards(folder: Path, data: mmap.mmap, wanted: Wanted, files: dict[str, str]) -> tuple[str, Contents]:
    """Join the files that an index names, and enter them in `files`."""
    shards = parse_index(data[:_MAX_HEADER])
    if missing := [name for name in shards if not (folder / name).exists()]:
        raise InputError(
            f"needs the shard {missing[0]!r} beside it ({len(missing)} of {len(shards)} are missing): download it too"
        )
    arrays, formats, wrappers, skipped = {}, {}, {}, {}
    for name, listed in shards.items():
        with _told_of(f"needs the shard {name!r}, which"):
            kind, (found, wrapper, rest) = _read(folder / name, wanted, files)
            for odd, does in ((listed - found.keys(), "lacks"), (found.keys() - listed, "also holds")):
                if odd:
                    raise InputError(
                        f"{does} {min(odd)!r}, against the index: download the index and its shards from one place"
                    )
        arrays |= found
        formats[kind] = wrappers[wrapper] = None
        skipped |= dict.fromkeys(rest)
    count = f"{len(shards)} shard" + "s" * (len(shards) > 1)
    return ", ".join([*formats, count]), (arrays, ", ".join(filter(None, wrappers)) or None, tuple(skipped))


def parse_index(data: bytes) -> dict[str, set[str]]:
    """Read the names of the shards in an index.json, and of the tensors in each.

    Raises InputError, without the name of the index, if it is damaged or names a file elsewhere.
    """
    try:
        index = json.loads(data)
    except ValueError as error:
        raise damaged(str(error)) from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise damaged("its weight_map names no tensors")
    shards: dict[str, set[str]] = {}
    for tensor, name in places.items():
        # A name that means another directory on any system: a file may not choose what is read.
        if not isinstance(name, str) or name in ("", "..") or PureWindowsPath(name).name != name:
            raise InputError(f"names the shard {str(name)[:100]!r}, which is not a plain file name: download it again")
        shards.setdefault(name, set()).add(tensor)
    return shards


def _identify(data: mmap.mmap, path: Path) -> str:
    """Identify the kind of file by its content; InputError for files that are often mistaken for weights."""
    head = data[:512]
    if head[4:9] == b"\0\0\0\0{":  # a header length below 4 GiB, then JSON
        return "safetensors"
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return "torch legacy"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        raise InputError("starts like HTML: this is a web page, not a checkpoint: the download failed")
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        size_text = f" of {size[1].decode()} bytes" if size else ""
        raise InputError(f"is a Git LFS pointer{size_text}, not the weights: run `git lfs pull`")
    if text.startswith(b"{") and (path.name.endswith(".index.json") or data.find(b'"weight_map"') >= 0):
        return "index"
    if packer := next((packer for magic, packer in _PACKED.items() if head.startswith(magic)), None):
        raise InputError(f"is packed by {packer}, which is not read: unpack it first")
    if head[257:262] == b"ustar":
        raise InputError("is a tar archive, which is not read: unpack it first")
    # Files without a magic number are known only by their suffix.
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), path.suffix)
    if foreign in (*_FOREIGN.values(), ".onnx", ".msgpack"):
        raise InputError(f"is a file of {foreign} kind, which is not read: save the weights as .safetensors")
    if path.suffix == ".safetensors":
        return "safetensors"
    raise InputError(
        "is neither a safetensors, a torch.save nor an .npz file: name the right one, or download it again"
    )


# The safetensors library copies every tensor that it reads; here they are views of the mapped file.
def _read_safetensors(data: mmap.mmap) -> dict[str, np.ndarray]:
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER, len(data) - 8):
        raise damaged(f"a header of {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length].decode())
    if not isinstance(header, dict):
        raise damaged("its header is not an object")
    header.pop("__metadata__", None)
    content = np.frombuffer(data, np.uint8)[8 + length :]
    arrays = {name: _safetensor(name, entry, content) for name, entry in header.items()}
    check_total(sum(array.nbytes for array in arrays.values()), len(data))
    return arrays


def _safetensor(name: str, entry: dict[str, Any], content: np.ndarray) -> np.ndarray:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise InputError(f"has {name!r} in dtype {entry['dtype']!r}, which is not read: save it as F32, F16 or BF16")
    if not are_sizes(begin, end) or not begin <= end <= len(content):
        raise damaged(f"{name!r} lies outside the file")
    return shaped(name, content[begin:end], NUMPY_DTYPES[SAFETENSORS_DTYPES[entry["dtype"]]], shape)


def _select(arrays: dict[str, np.ndarray], key: str) -> tuple[dict[str, np.ndarray], str, tuple[str, ...]]:
    """Select tensors whose names begin with `key`, or with a wrapper's prefix and it; return prefix and other names."""
    starts = {name: found[0] for name in arrays if (found := re.match(rf"(?:.*?[./])?{re.escape(key)}[./]", name))}
    if not starts:
        listed = ", ".join(dict.fromkeys(re.split(r"[./]", name)[0] for name in [*arrays][:1000]))[:200]
        raise InputError(f"holds nothing under {key!r} (--key); its names begin with {listed}")
    prefix = min(starts.values(), key=len)
    chosen = {name.removeprefix(prefix): arrays[name] for name, start in starts.items() if start == prefix}
    return chosen, prefix, tuple(name for name in arrays if starts.get(name) != prefix)
