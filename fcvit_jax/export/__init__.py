"""Export for serving: StableHLO programs and their weights, which run on jax and numpy, without this library.

    DIR/meta.json                          programs, preprocessing, class names, dtype, platforms, versions, sha256
    DIR/programs/SCHEDULE_bN.stablehlo     one per schedule and batch size, serialised by `jax.export`
    DIR/weights.npz                        the parameters by path, which all programs share
    DIR/run.py                             loads and runs them; imports jax and numpy, and Pillow to read pictures

The weights are an argument of the programs, not constants: StableHLO files stay small and quick to parse.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from fcvit_jax.checkpoint import Checkpoint, file_sha256, flat_params, load_checkpoint, versions
from fcvit_jax.compiling import computation
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.files import check_target, file_name, staged
from fcvit_jax.models.schedule import Schedules, fit_schedules
from fcvit_jax.models.vit import ViT, cast_params

FORMAT = 1
ENTRIES = frozenset({"meta.json", "programs", "run.py", "weights.npz", "__pycache__"})  # the last is Python's
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export(
    checkpoint: Checkpoint | str | Path,
    schedules: Schedules,
    batch_sizes: int | Sequence[int],
    path: str | Path,
    *,
    dtype: str = "float32",
    platforms: Sequence[str] = ("cpu", "cuda"),
    features: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a directory of programs, one per schedule and batch size, atomically; returns its path.

    Each is `program(params, images) -> logits`: params a dict of the arrays in weights.npz, images uint8 [b, height,
    width, 3] with RGB in 0..255 (the program normalises them), logits float32 [b, c]. No accelerator is needed here.

    Args:
      schedules: names and explicit forms separated by commas, `MergeSchedule`s, or a mapping, as `evaluate` takes them.
      batch_sizes: each program has one, fixed.
      dtype: a key of `PRECISIONS`. With bfloat16 the weights are stored in it too, except those of the norms.
      platforms: what the programs can be compiled for, some of `PLATFORMS`.
      features: return (logits, pooled) from a program, pooled float32 as in `ViT`: [b, d].
      overwrite: replace an earlier export.

    Raises:
      InputError: in one line, before anything is written, if an argument does not fit.
    """
    path = check_target(path, overwrite, ENTRIES)
    batch_sizes = (batch_sizes,) if isinstance(batch_sizes, int) else tuple(batch_sizes)
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"batch_sizes is {batch_sizes}: give at least one, each 1 or more")
    compute, precision = computation(dtype)
    if not platforms or set(platforms) - set(PLATFORMS):
        raise InputError(f"platforms is {','.join(platforms)!r}: choose some of {', '.join(PLATFORMS)}")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint)
    config = checkpoint.config
    named, _ = fit_schedules(schedules, config, checkpoint.recommended)
    checkpoint.check_correction(named.values())
    weights = cast_params(flat_params(checkpoint.params), compute)

    with staged(path) as staging:
        # numpy's format has no bfloat16: its bits are stored as uint16.
        stored: Any = {name: x if x.dtype == np.float32 else x.view(np.uint16) for name, x in weights.items()}
        np.savez(staging / "weights.npz", **stored)
        shutil.copyfile(Path(__file__).with_name("run.py"), staging / "run.py")
        (staging / "programs").mkdir()
        programs = {}
        pairs = [(name, size) for name in named for size in batch_sizes]
        for name, batch_size in tqdm(pairs, desc="exporting", unit="program", leave=False, disable=None):
            step = _classifier(ViT(config, named[name], compute), checkpoint.preprocess, features)
            images = jax.ShapeDtypeStruct((batch_size, *config.image_size, 3), jnp.uint8)
            with jax.default_matmul_precision(precision), _without_source_paths():
                exported = jax.export.export(jax.jit(step), platforms=tuple(platforms))(weights, images)
            file = f"programs/{file_name(name)}_b{batch_size}.stablehlo"
            (staging / file).write_bytes(exported.serialize())
            programs[Path(file).stem] = {
                "file": file,
                "sha256": file_sha256(staging / file),
                "schedule": name,
                "stages": str(named[name]),
                "batch_size": batch_size,
            }
        preprocess, provenance = checkpoint.preprocess, checkpoint.meta.get("provenance", {})
        meta = {
            "format": FORMAT,
            "programs": programs,
            "outputs": ["logits", "features"] if features else ["logits"],
            "dtype": dtype,
            "platforms": list(platforms),
            "parameters": sum(array.size for array in weights.values()),
            "weights_sha256": file_sha256(staging / "weights.npz"),
            "class_names": checkpoint.meta.get("class_names"),
            "preprocess": preprocess.to_dict() | {"resize_size": list(preprocess.resize_size), "text": str(preprocess)},
            "config": config.to_dict(),
            "provenance": {name: provenance.get(name) for name in ("source", "sha256", "model")},
            "versions": versions(),
        }
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return path


def _classifier(model: ViT, preprocess: Preprocess, features: bool) -> Callable[..., Any]:
    """Make the function that becomes a program; its parameters are one flat dict, which needs no library to build."""

    def classify(params: dict[str, jax.Array], images: jax.Array) -> Any:
        variables = {"params": traverse_util.unflatten_dict(params, sep="/")}
        outputs: Any = model.apply(variables, preprocess.normalize(images))
        logits, out = outputs
        return (logits, out["pooled"].astype(jnp.float32)) if features else logits

    return classify


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """Let programs name the module of an operation, without the path of its source file on this machine."""
    option = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)
