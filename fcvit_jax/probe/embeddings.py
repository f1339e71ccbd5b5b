"""Class embeddings from a text tower, one vector a class: a head on features of length 1 (CLIP, SigLIP)."""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fcvit_jax.errors import InputError, naming
from fcvit_jax.files import local_path

CLIP_SCALE = float(np.log(100))
LARGEST = 7.0  # of logit_scale: its exponential is 1,097


class ClassEmbeddings(NamedTuple):
    """Embeddings of classes, float32 [c, w], of length 1. The logits are exp(scale) * cosine + bias."""

    embeddings: np.ndarray
    names: tuple[str, ...]
    scale: float
    bias: float


def read_embeddings(path: str | Path) -> ClassEmbeddings:
    """Read `embeddings` [classes, width], `names`, and optionally `logit_scale` and `logit_bias`.

    path: an .npz, or a .safetensors whose metadata hold the names as a JSON list. logit_scale is a logarithm, as CLIP
    and SigLIP store it; without one it is CLIP's, log 100. Raises InputError for other files.
    """
    file = local_path(path)
    with naming(file):
        arrays = _read(file)
        values, names = arrays.get("embeddings"), [str(name) for name in arrays.get("names", ())]
        if values is None or values.ndim != 2 or not names:
            raise InputError("the file needs embeddings [classes, width] and names, one a class; see docs/probing.md")
        if len(names) != len(values) or len(set(names)) != len(names):
            raise InputError(
                f"{len(values)} embeddings have {len(set(names))} different names: give each class its own"
            )
        if len(names) < 2:
            raise InputError(f"there is one class, {names[0]!r}: a head needs two or more")
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        if not np.isfinite(lengths).all() or not lengths.all():
            row = int(np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))[0])
            raise InputError(f"the embedding of {names[row]!r} is zero or not finite: make the file again")
        scale, bias = _scalar(arrays, "logit_scale", CLIP_SCALE), _scalar(arrays, "logit_bias", 0.0)
        if scale > LARGEST:
            raise InputError(
                f"logit_scale is {scale:g}: give its logarithm, as CLIP and SigLIP store it (np.log({scale:g}))"
            )
    return ClassEmbeddings((values / lengths[:, None]).astype(np.float32), tuple(names), scale, bias)


def _scalar(arrays: dict[str, Any], name: str, usual: float) -> float:
    value = np.asarray(arrays.get(name, usual), np.float64)
    if value.size != 1 or not np.isfinite(value).all():
        raise InputError(f"{name} has the shape {value.shape}: give one finite number")
    return float(value.reshape(()))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "numpy") as file:
                named = json.loads((file.metadata() or {}).get("names", "[]"))
                return {name: file.get_tensor(name) for name in file.keys()} | {"names": named}  # noqa: SIM118
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, LookupError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot be read ({error}): write the names as text, not as objects") from None
    except Exception as error:  # safetensors' own
        raise InputError(f"cannot be read ({error}): make the file again") from None
    raise InputError("is neither .npz nor .safetensors: see docs/probing.md")
