"""What `torch.save` wrote, as NumPy arrays: the zip of version 1.6 and later, and the legacy stream before it.

Both are pickles, and a pickle is a program. It runs here in an interpreter that gives out nothing but plain data:
strings, dicts and the records below. Tensors are looked at only when it has ended.
"""

import functools
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fcvit_jax.convert.dtypes import NUMPY_DTYPES, STORAGE_DTYPES, are_sizes, check_total, damaged, is_shape
from fcvit_jax.convert.npz_files import map_member
from fcvit_jax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_WRAPPERS = 4
# Keys under which training scripts put the weights, and an average of them over the steps; the first found is taken.
_LIVE = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder", "net", "network")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "model_ema_state_dict", "ema_state_dict", "ema_model")
_AVERAGED += ("target_encoder",)  # I-JEPA


class _Tuple(tuple):
    """A tuple that is compared, hashed and printed by identity.

    A pickle may name one object twice: forty pairs, each of the one before and itself, would take 2**40 steps to walk.
    """

    __slots__ = ()
    __eq__ = object.__eq__
    __ne__ = object.__ne__
    __hash__ = object.__hash__
    __repr__ = object.__repr__


# The records are compared by identity for the same reason.
@dataclass(frozen=True, eq=False, repr=False)
class _Storage:
    """A run of `length` bytes in the file; `dtype` is a key of `NUMPY_DTYPES`."""

    key: str | int
    dtype: str
    length: int


@dataclass(frozen=True, eq=False, repr=False)
class _Tensor:
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
    return replace(_rebuild_tensor(storage, offset, size, stride, metadata=metadata), dtype=dtype)


_REBUILDERS = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *ignored: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *ignored: data,
}
# What training scripts leave beside the weights: arguments, scores, paths.
_HARMLESS = re.compile(
    r"argparse\.Namespace|torch\.(Size|device)|collections\.(defaultdict|Counter)|_codecs\.encode"
    r"|numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    r"|(builtins|__builtin__)\.(set|frozenset|list|tuple|dict|bytes|bytearray|str|bool|int|float|complex|range|slice)"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)


def _seal_tuple(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def run_and_seal(unpickler: Any) -> None:
        run(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return run_and_seal


# Absent are EXT, whose cache of objects goes past `find_class`; BYTEARRAY8, which allocates what it is told before it
# looks for it; buffers outside the file; and FROZENSET, which compares what it holds, however deep. torch writes none.
_ABSENT = pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.BYTEARRAY8 + pickle.FROZENSET
_ABSENT += pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
_TUPLES = pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE


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
        if module == "torch" and name in NUMPY_DTYPES:
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
        storage = _Storage(key, dtype, numel * NUMPY_DTYPES[dtype].itemsize)
        self.storages.setdefault(key, storage)
        return storage

    dispatch = {  # noqa: RUF012
        code: _seal_tuple(run) if code in _TUPLES else run
        for code, run in pickle._Unpickler.dispatch.items()
        if code not in _ABSENT
    }

    # The opcode sets attributes of any object, our functions included: nothing wanted here has such a state.
    def load_build(self: Any) -> None:
        self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build


# The tensors by name; the keys they stood under, if any; the entries that are no tensors.
Contents = tuple[dict[str, np.ndarray], str | None, tuple[str, ...]]


def read_torch_zip(archive: zipfile.ZipFile, data: mmap.mmap, ema: bool) -> Contents:
    """Read an archive and the map of its file; for what is wrong with it, an InputError without the file's name."""
    names = archive.namelist()
    root = next((name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)), None)
    if root is None:
        raise InputError("is a zip archive that torch.save did not write: unpack it, or use the .safetensors file")
    if any(name.startswith((f"{root}constants.pkl", f"{root}code/")) for name in names):
        raise InputError("is a TorchScript archive: export its state_dict with torch.save(module.state_dict())")
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise InputError("has compressed members, which torch.save does not write: save it again")
    order = map_member(archive, f"{root}byteorder", data).tobytes() if f"{root}byteorder" in names else b"little"
    if order not in (b"little", b"big"):
        raise damaged("its byte order is unknown")

    @functools.cache
    def load(key: str | int) -> np.ndarray:
        content = map_member(archive, f"{root}data/{key}", data)
        fits = content.ctypes.data % 16 == 0 or order == b"big"  # aligned for the largest number, or copied below
        return content if fits else content.copy()

    tree = _Unpickler(io.BytesIO(map_member(archive, f"{root}data.pkl", data).data)).load()
    arrays, wrapper, skipped = _build_arrays(tree, load, len(data), ema)
    if order == b"big":
        arrays = {name: array.byteswap() for name, array in arrays.items()}
    return arrays, wrapper, skipped


def read_torch_legacy(data: mmap.mmap, ema: bool) -> Contents:
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
        end = begin + numel * NUMPY_DTYPES[storage.dtype].itemsize
        if end - begin != storage.length or end > len(data):
            raise damaged("it ends inside its tensors")
        places[key] = slice(begin, end)
        data.seek(end)

    @functools.cache
    def load(key: str | int) -> np.ndarray:
        return np.frombuffer(data[places[key]], np.uint8)  # a copy: in the file nothing is aligned

    return _build_arrays(tree, load, len(data), ema)


def no_averaged(entries: Iterable[object]) -> InputError:
    """The error for averaged weights that are asked and absent."""
    names = [str(entry) for entry in entries if isinstance(entry, str | int)]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return InputError(f"holds no averaged weights; its entries are {listed or 'none'}: leave ema out")


def _build_arrays(tree: object, load: Callable[[str | int], np.ndarray], size: int, ema: bool) -> Contents:
    """The tensors of a state dict in `tree`. Storages that it does not use, an optimizer's say, are not loaded."""
    if not isinstance(tree, dict):
        what = "a tensor without a name" if isinstance(tree, _Tensor) else f"a {type(tree).__name__.strip('_').lower()}"
        raise InputError(f"holds {what}, not a dictionary of tensors: save the model's state_dict")
    path, node, rest = _find_state(tree, ema), tree, []
    for key in path:
        rest += [other for other in node if other != key]
        node = node[key]
    tensors = _tensors(node)
    rest += [key for key in node if key not in tensors]
    skipped = tuple(str(key) for key in rest if isinstance(key, str | int))
    arrays = {name: _build_array(name, tensor, load(tensor.storage.key)) for name, tensor in tensors.items()}
    check_total(sum(array.nbytes for array in arrays.values()), size)
    return arrays, ", ".join(path) or None, skipped


def _find_state(tree: dict[Any, Any], ema: bool) -> tuple[str, ...]:
    """The keys that lead to the tensors wanted: live weights first, averaged ones where there are no others or `ema`.

    Live wrappers go first, as some training scripts leave a score beside them that is a tensor as well.
    """
    live, averaged, seen = [], [], set()

    def visit(node: object, path: tuple[str, ...], found: list[tuple[str, ...]]) -> None:
        # No dictionary is searched twice: a pickle may hold one at many places, itself among them.
        if not isinstance(node, dict) or len(path) > _MAX_WRAPPERS or (id(node), found is live) in seen:
            return
        seen.add((id(node), found is live))
        for key in _LIVE:
            visit(node.get(key), (*path, key), found)
        if _tensors(node):
            found.append(path)
        for key in _AVERAGED:
            visit(node.get(key), (*path, key), averaged)

    visit(tree, (), live)
    if ema:
        averaged += [path for path in live if "teacher" in path]  # DINO's: the live one is the student
        if not averaged:
            raise no_averaged(tree)
        return averaged[0]
    return next(iter(live + averaged), ())


def _tensors(tree: dict[Any, object]) -> dict[str, _Tensor]:
    return {name: leaf for name, leaf in tree.items() if isinstance(name, str) and isinstance(leaf, _Tensor)}


def _build_array(name: str, tensor: _Tensor, content: np.ndarray) -> np.ndarray:
    dtype, length, size, stride = NUMPY_DTYPES[tensor.dtype], tensor.storage.length, tensor.size, tensor.stride
    if len(size) != len(stride) or not is_shape(size) or not are_sizes(tensor.offset, *stride) or length > len(content):
        raise damaged(f"{name!r} does not fit its storage")
    count, held = math.prod(size), length // dtype.itemsize
    if count == 0:
        return np.empty(size, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= held:
        raise damaged(f"{name!r} reaches past the end of its storage")
    if count > held:
        raise InputError(f"has {name!r} expanded to {count} values of {held} that are stored: save it .contiguous()")
    # A step along an axis of length one is never taken, and may be any number.
    steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(size, stride, strict=True)]
    return np.ndarray(size, dtype, buffer=content, offset=tensor.offset * dtype.itemsize, strides=steps)
