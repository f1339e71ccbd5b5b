"""What `torch.save` wrote, as NumPy arrays: the zip of version 1.6 and later, and the legacy stream before it.

Both are pickles, and a pickle is a program. It runs here in an interpreter that hands out nothing but plain data:
strings, dicts and the records below. Tensors are looked at only when it has ended.
"""

import functools
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.convert.dtypes import DTYPES, STORAGE_DTYPES, are_sizes
from fcvit_jax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "model_ema", "state_dict_ema")


class _Storage(NamedTuple):
    """A run of `length` bytes in the file; `dtype` is a key of `DTYPES`."""

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
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]  # a string: it cannot be called
        if module == "torch" and name in DTYPES:
            return name
        if _HARMLESS.fullmatch(full):
            return _Inert
        raise InputError(
            f"refers to {full[:200]}, which is not tensor data: it was not executed, and the file is refused: "
            "save the model's state_dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(key, str | int) or not are_sizes(numel) or any(view):
            raise ValueError("a reference to something that is not a whole storage")
        storage = _Storage(key, dtype, numel * DTYPES[dtype].itemsize)
        self.storages.setdefault(key, storage)
        return storage

    # Without the opcodes EXT, whose cache of objects goes past `find_class`.
    dispatch = {  # noqa: RUF012
        code: _ignore_state if code in pickle.BUILD else run
        for code, run in pickle._Unpickler.dispatch.items()
        if code not in pickle.EXT1 + pickle.EXT2 + pickle.EXT4
    }


# The tensors by name; the key they stood under, if any; the entries that are no tensors.
Contents = tuple[dict[str, np.ndarray], str | None, tuple[str, ...]]


def read_torch_zip(path: Path, size: int) -> Contents:
    """Read a zip archive of `size` bytes; for what is wrong with it, an InputError without the file's name."""
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


def read_torch_legacy(data: mmap.mmap) -> Contents:
    """Read a legacy file from its start; for what is wrong with it, an InputError without the file's name."""
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
        end = begin + numel * DTYPES[storage.dtype].itemsize
        if end - begin != storage.length or end > len(data):
            raise InputError("is damaged (it ends inside its tensors): download it again")
        places[key] = slice(begin, end)
        data.seek(end)

    @functools.cache
    def load(key: str | int) -> np.ndarray:
        return np.frombuffer(data[places[key]], np.uint8)  # a copy: in the file nothing is aligned

    return _build_arrays(tree, load, swap=False)


def _build_arrays(tree: object, load: Callable[[str | int], np.ndarray], swap: bool) -> Contents:
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
    dtype, length, size, stride = DTYPES[tensor.dtype], tensor.storage.length, tensor.size, tensor.stride
    if len(size) != len(stride) or not are_sizes(tensor.offset, *size, *stride) or length > len(content):
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
