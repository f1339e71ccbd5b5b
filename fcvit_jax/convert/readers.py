"""Weight files as NumPy arrays, without torch and without running anything that a file brings along.

Three formats are read, told apart by content: safetensors, the zip of `torch.save`, and the legacy stream that it wrote
before version 1.6. The two torch formats are pickles, and a pickle is a program. It runs here in an interpreter that
hands out nothing but plain data: strings, dicts and the records below. Tensors are looked at only when it has ended.
"""

import functools
import hashlib
import io
import json
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fcvit_jax.errors import InputError

# NumPy's name, the name in a safetensors header, the name of the storage class in a torch pickle
_TABLE = (
    ("float64", "F64", "DoubleStorage"),
    ("float32", "F32", "FloatStorage"),
    ("float16", "F16", "HalfStorage"),
    ("bfloat16", "BF16", "BFloat16Storage"),
    ("float8_e4m3fn", "F8_E4M3", None),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", None),
    ("float8_e5m2", "F8_E5M2", None),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", None),
    ("float8_e8m0fnu", "F8_E8M0", None),
    ("complex128", None, "ComplexDoubleStorage"),
    ("complex64", "C64", "ComplexFloatStorage"),
    ("int64", "I64", "LongStorage"),
    ("int32", "I32", "IntStorage"),
    ("int16", "I16", "ShortStorage"),
    ("int8", "I8", "CharStorage"),
    ("uint64", "U64", None),
    ("uint32", "U32", None),
    ("uint16", "U16", None),
    ("uint8", "U8", "ByteStorage"),
    ("bool", "BOOL", "BoolStorage"),
)
_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name, _, _ in _TABLE}
_SAFETENSORS_DTYPES = {tag: name for name, tag, _ in _TABLE if tag}
_STORAGE_DTYPES = {storage: name for name, _, storage in _TABLE if storage} | {
    "UntypedStorage": "uint8",  # bytes: the tensor says what they are
    "TypedStorage": "uint8",
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_HEADER = 100_000_000
_MAX_PREFIXES = 8
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema")
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
        arrays, wrapper, skipped = _read_torch_zip(path, len(data))
    else:
        arrays, wrapper, skipped = _read_torch_legacy(data)
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
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise InputError(f"has {name!r} in dtype {entry['dtype']!r}, which is not read: save it as F32, F16 or BF16")
    dtype = _DTYPES[_SAFETENSORS_DTYPES[entry["dtype"]]]
    if not _are_sizes(*shape, begin, end) or not begin <= end <= len(content):
        raise InputError(f"is damaged ({name!r} lies outside the file): download it again")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise InputError(f"is damaged ({name!r} has {end - begin} bytes for shape {shape}): download it again")
    array = content[begin:end].view(dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _are_sizes(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


class _Storage(NamedTuple):
    """A run of `length` bytes in the file; `dtype` is a key of `_DTYPES`."""

    key: str | int
    dtype: str
    length: int


class _Tensor(NamedTuple):
    """A strided view of a storage; offset and stride count elements."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands for an object that is not tensor data: takes anything, does nothing."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def __setitem__(self, key: object, value: object):
        pass


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    if metadata:  # the bits "conj" and "neg": the values are not those in the storage
        raise InputError("holds a lazily conjugated or negated tensor: save it after .resolve_conj().resolve_neg()")
    return _Tensor(storage, storage.dtype, offset, size, stride)


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> _Tensor:
    return _rebuild_tensor(storage, offset, size, stride, metadata=metadata)._replace(dtype=dtype)


def _rebuild_parameter(data: object, *ignored: object) -> object:
    return data


_REBUILDERS = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
# What training scripts leave beside the weights: arguments, scores, paths.
_HARMLESS = re.compile(
    r"argparse\.Namespace|torch\.(Size|device)|collections\.(defaultdict|Counter)|_codecs\.encode"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|(builtins|__builtin__)\.(set|frozenset|list|tuple|dict|bytes|bytearray|str|bool|int|float|complex|range|slice)"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)


def _ignore_state(unpickler: Any) -> None:
    # The opcode BUILD sets attributes of any object, our functions included; nothing wanted here has such a state.
    unpickler.stack.pop()


# The interpreter in Python, not the one in C: its memo is a dict, so that an index of four billion allocates nothing.
class _Unpickler(pickle._Unpickler):
    """A pickle interpreter whose only callables are `_REBUILDERS` and `_Inert`."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str | int, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _REBUILDERS:
            return _REBUILDERS[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]  # a string: it cannot be called
        if module == "torch" and name in _DTYPES:
            return name
        if _HARMLESS.fullmatch(full):
            return _Inert
        raise InputError(
            f"refers to {full[:200]}, which is not tensor data: it was not executed, and the file is refused: "
            "save the model's state_dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(key, str | int) or not _are_sizes(numel) or any(view):
            raise ValueError("a reference to something that is not a whole storage")
        storage = _Storage(key, dtype, numel * _DTYPES[dtype].itemsize)
        self.storages.setdefault(key, storage)
        return storage

    # Without the opcodes EXT, whose cache of objects goes past `find_class`.
    dispatch = {  # noqa: RUF012
        code: _ignore_state if code in pickle.BUILD else run
        for code, run in pickle._Unpickler.dispatch.items()
        if code not in pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    }


_Contents = tuple[dict[str, np.ndarray], str | None, tuple[str, ...]]


def _read_torch_zip(path: Path, size: int) -> _Contents:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith(".npy") for name in names):
            raise InputError("is a NumPy .npz file, which is not read yet: use the model's .safetensors or .pth file")
        root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
        if root is None:
            raise InputError("is a zip archive that torch.save did not write: unpack it, or use the .safetensors file")
        if any(name.startswith((f"{root}constants.pkl", f"{root}code/")) for name in names):
            raise InputError("is a TorchScript archive: export its state_dict with torch.save(module.state_dict())")
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError("has compressed members, which torch.save does not write: save it again")
        if sum(member.file_size for member in members) > size:
            raise InputError("is damaged (its members are larger than the file): download it again")
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        if order not in (b"little", b"big"):
            raise InputError("is damaged (its byte order is unknown): download it again")

        @functools.cache
        def load(key: str | int) -> np.ndarray:
            return np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)

        tree = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl"))).load()
        return _build_arrays(tree, load, swap=order == b"big")


def _read_torch_legacy(data: mmap.mmap) -> _Contents:
    if _Unpickler(data).load() != _LEGACY_MAGIC:
        raise InputError("is a pickle that torch.save did not write: save the model's state_dict with torch.save")
    if _Unpickler(data).load() != _LEGACY_PROTOCOL:
        raise InputError("is of an unknown version of the torch format: save it again with a current torch")
    _Unpickler(data).load()  # the machine that wrote it; storages are little-endian on every machine
    unpickler = _Unpickler(data)
    tree = unpickler.load()
    places = {}
    for key in _Unpickler(data).load():
        storage = unpickler.storages[key]
        numel, begin = int.from_bytes(data.read(8), "little"), data.tell()
        end = begin + numel * _DTYPES[storage.dtype].itemsize
        if end - begin != storage.length or end > len(data):
            raise InputError("is damaged (it ends inside its tensors): download it again")
        places[key] = slice(begin, end)
        data.seek(end)

    @functools.cache
    def load(key: str | int) -> np.ndarray:
        return np.frombuffer(data[places[key]], np.uint8)  # a copy: in the file nothing is aligned

    return _build_arrays(tree, load, swap=False)


def _build_arrays(tree: object, load: Callable[[str | int], np.ndarray], swap: bool) -> _Contents:
    """The tensors of the state dict in `tree`. Storages that it does not use, an optimizer's say, are not loaded."""
    if not isinstance(tree, dict):
        what = "a tensor without a name" if isinstance(tree, _Tensor) else f"a {type(tree).__name__.strip('_')}"
        raise InputError(f"holds {what}, not a dictionary of tensors: save the model's state_dict")
    # The wrapper goes first: some training scripts leave a score beside it that is a tensor as well.
    wrapper = next((key for key in _WRAPPERS if isinstance(tree.get(key), dict) and _tensors(tree[key])), None)
    state = tree if wrapper is None else tree[wrapper]
    beside = () if wrapper is None else (key for key in tree if key != wrapper)
    tensors = _tensors(state)
    rest = (*beside, *(key for key in state if key not in tensors))
    skipped = tuple(str(key) for key in rest if isinstance(key, str | int))
    arrays = {name: _build_array(name, tensor, load(tensor.storage.key), swap) for name, tensor in tensors.items()}
    return arrays, wrapper, skipped


def _tensors(tree: dict[Any, object]) -> dict[str, _Tensor]:
    return {name: leaf for name, leaf in tree.items() if isinstance(name, str) and isinstance(leaf, _Tensor)}


def _build_array(name: str, tensor: _Tensor, content: np.ndarray, swap: bool) -> np.ndarray:
    dtype, length, size, stride = _DTYPES[tensor.dtype], tensor.storage.length, tensor.size, tensor.stride
    if len(size) != len(stride) or not _are_sizes(tensor.offset, *size, *stride) or length > len(content):
        raise InputError(f"is damaged ({name!r} does not fit its storage): download it again")
    count, held = math.prod(size), length // dtype.itemsize
    if count == 0:
        return np.empty(size, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= held:
        raise InputError(f"is damaged ({name!r} reaches past the end of its storage): download it again")
    if count > held:
        raise InputError(f"has {name!r} expanded to {count} values of {held} that are stored: save it .contiguous()")
    # A step along an axis of length one is never taken, and may be any number.
    steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
    array = np.ndarray(size, dtype, buffer=content, offset=tensor.offset * dtype.itemsize, strides=steps)
    return array.byteswap() if swap else array


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
