"""Files of `torch.save` as NumPy arrays: the zip of version 1.6 and later, and the legacy stream before it.

Both are pickles, and a pickle is a program. It runs here in an interpreter that produces nothing but plain data:
strings, dicts and the records below. Tensors are read only after it has ended. Nothing else that a file names is
imported or called: such objects are inert dicts, which keep what is stored in them.
"""

import contextlib
import functools
import io
import math
import mmap
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.convert.dtypes import NUMPY_DTYPES, STORAGE_DTYPES, are_sizes, check_total, damaged, is_shape
from fcvit_jax.convert.npz_files import map_member
from fcvit_jax.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MAX_WRAPPERS = 4
# In a pickle: "f4", "i8"; ml_dtypes' by their own names.
_NUMPY_NAMES = {kind.str[1:]: kind for kind in NUMPY_DTYPES.values() if kind.kind != "V"} | NUMPY_DTYPES
# Keys under which training scripts put the weights, and their average over the steps; the first found is taken.
_LIVE = ("model", "state_dict", "model_state_dict", "module", "teacher", "student", "encoder", "net", "network")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "model_ema_state_dict", "ema_state_dict", "ema_model")
_AVERAGED += ("target_encoder",)  # I-JEPA
_MAX_NAME, _MOST_SEARCHED = 500, 1000  # keep hostile files cheap
# Writers of weights in parts -> the tool that joins them.
_TOOLS = {
    "torch.distributed.checkpoint": "convert the directory with `python -m torch.distributed.checkpoint.format_utils "
    "dcp_to_torch DIRECTORY OUT.pth`",
    "torch.distributed": "the weights are spread over processes: save the full state_dict "
    "(torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True)",
}


class NoTensors(InputError):
    """A file without a dictionary of tensors."""


class Wanted(NamedTuple):
    """Which weights of a training checkpoint to read: the averaged ones; those in the dictionary of this name."""

    ema: bool = False
    key: str | None = None


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
    """A run of `length` bytes in the file, or NumPy's `content`; `dtype` is a key of `NUMPY_DTYPES`."""

    key: str | int
    dtype: str
    length: int
    content: bytes | None = None
    big_endian: bool | None = None  # None: as the file is


@dataclass(frozen=True, eq=False, repr=False)
class _Tensor:
    """A strided view of a storage; offset and stride count elements."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert(dict):
    """A stand-in for an object that is not tensor data: it accepts anything, and keeps the items that it gets."""

    array: _Tensor | None = None  # the array, if it is NumPy's
    module: dict[Any, Any] | None = None  # its attributes if it is a torch.nn.Module

    def __init__(self, *args: object, **kwargs: object):
        pass

    __eq__, __ne__ = object.__eq__, object.__ne__

    def __hash__(self) -> int:
        return id(self)

    def ignore(self, *args: object) -> None:
        pass

    append = extend = add = ignore

    def __call__(self, *args: object) -> "_Inert":  # a bound method
        return _Inert()


class _Dtype(_Inert):
    """NumPy's `dtype(name, ...)`; its byte order is among the attributes that it gets."""

    order: object = "<"

    def __init__(self, name: object = None, *ignored: object):
        self.kind = _NUMPY_NAMES.get(name) if isinstance(name, str) else None


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Any:
    if metadata:  # the bits "conj" and "neg": the values are not those in the storage
        raise InputError("holds a lazily conjugated or negated tensor: save it after .resolve_conj().resolve_neg()")
    return _Tensor(storage, storage.dtype, offset, size, stride) if isinstance(storage, _Storage) else _Inert()


def _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Any:
    tensor = _rebuild_tensor(storage, offset, size, stride, metadata=metadata)
    return replace(tensor, dtype=dtype) if dtype in NUMPY_DTYPES and isinstance(tensor, _Tensor) else _Inert()


def _rebuild_subclass(function: Any, kind: object, arguments: Any, *state: object) -> Any:
    return function(*arguments) if function in _REBUILDERS.values() else _Inert()


def _rebuild_numpy(content: object, dtype: object, shape: Any, order: object = "C") -> _Tensor | None:
    """Rebuild the array of a NumPy pickle; None if it does not hold numbers."""
    kind = dtype.kind if isinstance(dtype, _Dtype) else None
    if not (kind and isinstance(content, bytes) and isinstance(shape, tuple) and is_shape(shape)):
        return None
    if len(content) != math.prod(shape) * kind.itemsize:
        return None
    big = dtype.order == ">"  # pyright: ignore[reportAttributeAccessIssue]
    steps = np.cumprod([1, *(shape[:-1] if order == "F" else shape[:0:-1])], dtype=np.int64).tolist()
    stride = tuple(steps if order == "F" else steps[::-1]) if shape else ()
    return _Tensor(_Storage("", kind.name, len(content), content, big), kind.name, 0, tuple(shape), stride)


def _plain(data: Any, *ignored: object) -> Any:
    """Return the tensor inside a parameter or a device's tensor, which may hold a NumPy array."""
    return data.array if isinstance(data, _Inert) and data.array else data


_REBUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._tensor._rebuild_from_type": _rebuild_subclass,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "numpy.dtype": _Dtype,
    "numpy.core.numeric._frombuffer": lambda *arguments: _rebuild_numpy(*arguments) or _Inert(),
}
_REBUILDERS["numpy._core.numeric._frombuffer"] = _REBUILDERS["numpy.core.numeric._frombuffer"]
for _what in ("parameter", "parameter_with_state", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor"):
    _REBUILDERS[f"torch._utils._rebuild_{_what}"] = _plain
for _device in ("xla", "ort", "hpu", "mtia", "mlc", "npu"):
    _REBUILDERS[f"torch._utils._rebuild_{_device}_tensor"] = _plain


def _seal_tuple(run: Callable[[Any], None]) -> Callable[[Any], None]:
    def run_and_seal(unpickler: Any) -> None:
        run(unpickler)
        unpickler.stack[-1] = _Tuple(unpickler.stack[-1])

    return run_and_seal


# Left out: EXT, whose cache of objects bypasses `find_class`; BYTEARRAY8, which allocates the stated size before it
# reads (it is read as bytes); buffers outside the file; and FROZENSET, which compares its elements at any depth.
_ABSENT = pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.BYTEARRAY8 + pickle.FROZENSET
_ABSENT += pickle.NEXT_BUFFER + pickle.READONLY_BUFFER
_TUPLES = pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE


# The Python interpreter, not the C one: its memo is a dict, so that an index of four billion allocates nothing.
class _Unpickler(pickle._Unpickler):
    """A pickle interpreter whose only callables are `_REBUILDERS` and `_Inert`.

    stranger: the first object that the file names and that is not tensor data.
    """

    def __init__(self, file: Any, size: int):
        super().__init__(file, encoding="latin1")
        self.storages: dict[str | int, _Storage] = {}
        self.stranger: str | None = None
        self.unread = size

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "_codecs.encode":
            return self.encode
        if full in _REBUILDERS:
            return _REBUILDERS[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]  # a string: it cannot be called
        if module in ("torch", "ml_dtypes") and name in NUMPY_DTYPES:
            return name
        self.stranger = self.stranger or full[:200]
        return _Inert

    def encode(self, text: object, *coding: object) -> bytes:
        """Return the bytes that old protocols write as text; all texts together at most the size of the file."""
        content = text.encode("latin1") if isinstance(text, str) and len(text) <= self.unread else b""
        self.unread -= len(content)
        return content

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # the class of a module, in legacy files
            return _Inert
        kind, dtype, key, _location, numel, *view = pid
        if kind != "storage" or not isinstance(key, str | int) or not are_sizes(numel) or any(view):
            raise ValueError("a reference to something that is not a whole storage")
        if not isinstance(dtype, str):  # quantised, say
            return _Inert()
        storage = _Storage(key, dtype, numel * NUMPY_DTYPES[dtype].itemsize)
        self.storages.setdefault(key, storage)
        return storage

    dispatch = {  # noqa: RUF012
        code: _seal_tuple(run) if code in _TUPLES else run
        for code, run in pickle._Unpickler.dispatch.items()
        if code not in _ABSENT
    }

    # The opcode can set attributes of any object, even our functions: here only these, and only of inert objects.
    def load_build(self: Any) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Inert):
            return
        if isinstance(state, dict):
            target.module = state if "_modules" in state else None
        elif isinstance(target, _Dtype):
            target.order = state[1]
        elif isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _Dtype):
            _, shape, dtype, fortran, content = state
            target.array = _rebuild_numpy(content, dtype, shape, "F" if fortran else "C")

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = pickle._Unpickler.load_binbytes8  # pyright: ignore[reportAttributeAccessIssue]


# The tensors by name; the keys above them, if any; the entries that are not tensors.
Contents = tuple[dict[str, np.ndarray], str | None, tuple[str, ...]]


def read_torch_zip(archive: zipfile.ZipFile, data: mmap.mmap, wanted: Wanted) -> Contents:
    """Read an archive, given the map of its file. Raises InputError without the file's name."""
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

    pickled = map_member(archive, f"{root}data.pkl", data)
    unpickler = _Unpickler(io.BytesIO(pickled.data), len(pickled))
    with _naming_stranger(unpickler):
        return _build_arrays(unpickler.load(), load, len(data), wanted, swapped=order == b"big")


def read_torch_legacy(data: mmap.mmap, wanted: Wanted) -> Contents:
    """Read a legacy file from its start. Raises InputError without the file's name."""
    unpickler = _Unpickler(data, len(data))
    tree = unpickler.load()
    if isinstance(tree, dict) and not unpickler.storages:  # pickle.dump of NumPy's arrays
        with contextlib.suppress(NoTensors):
            return _build_arrays(tree, lambda key: np.empty(0, np.uint8), len(data), wanted)
    if tree != _LEGACY_MAGIC:
        raise InputError("is a pickle that torch.save did not write: save the model's state_dict with torch.save")
    if _Unpickler(data, len(data)).load() != _LEGACY_PROTOCOL:
        raise InputError("is of an unknown version of the torch format: save it again with a current torch")
    _Unpickler(data, len(data)).load()  # the machine that wrote it; storages are little-endian on every machine
    unpickler = _Unpickler(data, len(data))
    tree = unpickler.load()
    places = {}
    for key in _Unpickler(data, len(data)).load():
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

    with _naming_stranger(unpickler):
        return _build_arrays(tree, load, len(data), wanted)


@contextlib.contextmanager
def _naming_stranger(unpickler: _Unpickler) -> Iterator[None]:
    """Describe the content of a file without tensors in its error."""
    try:
        yield
    except NoTensors as error:
        stranger = unpickler.stranger
        if stranger and (tool := next((tool for start, tool in _TOOLS.items() if stranger.startswith(start)), None)):
            raise InputError(f"holds {stranger}: {tool}") from error
        held = f" but a {stranger}, which was not executed" if stranger else ""
        raise InputError(f"{error}{held}: save the model's state_dict alone") from error


def no_averaged(entries: Iterable[object]) -> InputError:
    """Make the error for averaged weights that are requested and absent."""
    names = [str(entry) for entry in entries if isinstance(entry, str | int)]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return InputError(f"holds no averaged weights; its entries are {listed or 'none'}: leave ema out")


def _build_arrays(
    tree: object, load: Callable[[str | int], np.ndarray], size: int, wanted: Wanted, swapped: bool = False
) -> Contents:
    """Build the tensors of a state dict in `tree`; unused storages, such as an optimizer's, are not loaded."""
    if not isinstance(tree, dict):
        what = "a tensor without a name" if isinstance(tree, _Tensor) else f"a {type(tree).__name__.strip('_').lower()}"
        raise InputError(f"holds {what}, not a dictionary of tensors: save the model's state_dict")
    path, node, rest = _find_state(tree, wanted), tree, []
    for key in path:
        rest += [other for other in node if other != key]
        node = node[key]
    tensors = _tensors(node)
    if not tensors:
        raise NoTensors("holds no tensors")
    rest += [key for key in node if key not in tensors]
    skipped = tuple(str(key) for key in rest if isinstance(key, str | int))
    arrays, copied = {}, 0
    for name, tensor in tensors.items():
        storage = tensor.storage
        held = load(storage.key) if storage.content is None else np.frombuffer(storage.content, np.uint8)
        array = _build_array(name, tensor, held)
        if swapped if storage.big_endian is None else storage.big_endian:
            copied += array.nbytes
            check_total(copied, size)
            array = array.byteswap()
        arrays[name] = array
    check_total(sum(array.nbytes for array in arrays.values()), size)
    return arrays, ", ".join(path) or None, skipped


def _find_state(tree: dict[Any, Any], wanted: Wanted) -> tuple[str, ...]:
    """Find the keys that lead to the wanted tensors: live weights first, averaged ones if alone, or with `ema`.

    Live wrappers go first, as some training scripts leave a score beside them that is a tensor as well. Under unknown
    keys, the only dictionary of tensors is taken; those that hold less than half as many as the largest do not count.
    Raises InputError if there are several.
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
    counts = _count_tensors(tree)
    if wanted.key:
        named = [path for path in counts if wanted.key in (".".join(path), *path[-1:])]
        if len(named) == 1:
            return named[0]
        path, node = tuple(wanted.key.split(".")), tree
        for key in path:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        if not named and _tensors(node):  # a dictionary that stands at several places is counted at the first
            return path
    if wanted.ema:
        averaged += [path for path in live if "teacher" in path]  # DINO's: the live one is the student
        if not averaged:
            raise no_averaged(tree)
        return averaged[0]
    if known := next(iter(live + averaged), ()):
        return known
    large = [path for path, count in counts.items() if 2 * count >= max(counts.values())]
    if len(large) > 1 and () not in large:
        listed = ", ".join(".".join(path) for path in large[:8])
        raise InputError(f"holds {len(large)} dictionaries of tensors ({listed}): choose one with --key NAME")
    return () if () in large else next(iter(large), ())


def _count_tensors(tree: dict[Any, Any]) -> dict[tuple[str, ...], int]:
    """Count the tensors of each dictionary that has any, by the keys that lead to it."""
    counts, seen = {}, set()
    reached: list[tuple[tuple[str, ...], dict[Any, Any]]] = [((), tree)]
    for path, node in reached:  # grows
        if id(node) in seen or len(path) > _MAX_WRAPPERS or len(seen) > _MOST_SEARCHED:
            continue
        seen.add(id(node))
        if count := len(_tensors(node)):
            counts[path] = count
        for key, each in node.items():
            if isinstance(key, str) and isinstance(each, dict):
                reached.append(((*path, key), each))
    return counts


def _tensors(node: dict[Any, Any]) -> dict[str, _Tensor]:
    """Collect the tensors of a dictionary, or the parameters and buffers of a pickled module."""
    found, seen, reached = {}, set(), [("", node)]
    for prefix, module in reached:  # grows
        if id(module) in seen:
            continue
        seen.add(id(module))
        attributes = module.module if isinstance(module, _Inert) and module.module else {}
        parts = [module, *(attributes.get(part) for part in ("_parameters", "_buffers"))]
        for name, leaf in (item for part in parts if isinstance(part, dict) for item in part.items()):
            leaf = leaf.array if isinstance(leaf, _Inert) and leaf.array else leaf
            if isinstance(name, str) and isinstance(leaf, _Tensor):
                found[f"{prefix}{name}"] = leaf
        inside = attributes.get("_modules")
        for name, child in inside.items() if isinstance(inside, dict) else ():
            if isinstance(name, str) and isinstance(child, dict) and len(prefix) < _MAX_NAME:
                reached.append((f"{prefix}{name}.", child))
    return found


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
