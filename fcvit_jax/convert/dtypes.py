"""Element types of weight files, and checks of the sizes and shapes that a file gives."""

import math
from collections.abc import Sequence

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
NUMPY_DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name, _, _ in _TABLE}
SAFETENSORS_DTYPES = {tag: name for name, tag, _ in _TABLE if tag}
STORAGE_DTYPES = {storage: name for name, _, storage in _TABLE if storage} | {
    "UntypedStorage": "uint8",  # bytes: the tensor has their dtype
    "TypedStorage": "uint8",
    # Dtypes of quantised tensors, which are not read.
    "QInt8Storage": "int8",
    "QUInt8Storage": "uint8",
    "QInt32Storage": "int32",
}


def are_sizes(*values: object) -> bool:
    """Return whether values that a file gives may be counts, offsets or lengths."""
    return all(type(value) is int and 0 <= value < 2**62 for value in values)


def is_shape(shape: Sequence[object]) -> bool:
    """Return whether a shape that a file gives can be one; NumPy has 64 axes at most, and short products are cheap."""
    return len(shape) <= 64 and are_sizes(*shape)


def damaged(what: str) -> InputError:
    return InputError(f"is damaged ({what}): download it again")


def check_total(unpacked: int, packed: int) -> None:
    """Raise InputError if a file of `packed` bytes unpacks to more than four times as many."""
    if unpacked > 4 * packed:
        raise InputError(f"unpacks to {unpacked} bytes from {packed}: it is damaged, or a zip bomb: download it again")


def shaped(name: str, content: np.ndarray, dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """View bytes (uint8) as an array of the dtype and shape that a file gives; InputError if they do not fit."""
    if not is_shape(shape) or math.prod(shape) * dtype.itemsize != len(content):
        raise damaged(f"{name!r} has {len(content)} bytes for shape {str(shape)[:100]}")
    return content.view(dtype).reshape(shape)
