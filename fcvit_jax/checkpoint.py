"""The checkpoint directory: parameters (Orbax) beside `meta.json`, which says how to build and feed the model.

    DIR/meta.json   configuration, preprocessing, class names, provenance, library versions, sizes of the files
    DIR/params/     the parameter tree of `ViT(config)`, float32

A directory is written under another name beside its place and renamed at the end: it is whole or not there.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.models.vit import ViT, ViTConfig

FORMAT = 1
PACKAGED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights with all that is needed to run it.

    params: nested dict of float32 arrays, as `ViT(config).init` gives under "params".
    meta: the JSON object of meta.json: "config", "preprocess", "class_names" (list or None), "provenance", "versions".
    """

    path: Path
    config: ViTConfig
    params: dict[str, Any]
    preprocess: Preprocess
    meta: dict[str, Any]


def load_checkpoint(path: str | Path, sharding: jax.sharding.Sharding | None = None) -> Checkpoint:
    """Open a checkpoint directory, a `train_sam.py` working directory, or a `packaged:NAME` checkpoint.

    sharding: of every parameter; by default they lie on the first device. Raises InputError in one line where the
    directory is missing, without metadata, damaged, or written by a later version.
    """
    directory = _locate(path)
    try:
        meta = json.loads((directory / "meta.json").read_text())
    except ValueError as error:
        raise InputError(f"{directory / 'meta.json'} is damaged ({error}): convert the weights again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise InputError(
            f"{directory / 'meta.json'}: format {found} is not {FORMAT}, which this version reads: convert again"
        )
    if missing := [name for name in ("config", "preprocess") if not isinstance(meta.get(name), dict)]:
        raise InputError(f"{directory / 'meta.json'} lacks {missing[0]!r}: convert the weights again")
    config = ViTConfig.from_dict(meta["config"])
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if meta.get("files") != _sizes(directory / "params"):
        raise InputError(f"{directory / 'params'} is damaged or incomplete (a broken copy?): copy or convert it again")
    params = _restore(directory / "params", abstract_params(config, sharding))
    return Checkpoint(directory, config, params, Preprocess.from_dict(meta["preprocess"]), meta)


def save_checkpoint(
    path: str | Path,
    config: ViTConfig,
    params: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    class_names: tuple[str, ...] | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint directory, atomically.

    provenance: JSON-able facts on where the parameters come from. Raises InputError where `path` exists; with
    `overwrite`, where it exists and is not a checkpoint.
    """
    path = check_target(path, overwrite)
    meta = {
        "format": FORMAT,
        "config": config.to_dict(),
        "preprocess": preprocess.to_dict(),
        "class_names": list(class_names) if class_names else None,
        "provenance": dict(provenance or {}),
        "versions": versions(),
    }
    with _staged(path) as staging:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((staging / "params").absolute(), jax.tree.map(jnp.asarray, dict(params)))
        (staging / "params" / "commit_success.txt").unlink(missing_ok=True)  # names the place it was staged at
        meta["files"] = _sizes(staging / "params")
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return path


def check_target(path: str | Path, overwrite: bool) -> Path:
    """The path, if a checkpoint may be written there; otherwise InputError. To be called before any long work."""
    path = Path(path).expanduser()
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already: choose another name, or pass --overwrite to replace a checkpoint")
    if path.exists() and not (path / "meta.json").is_file():
        raise InputError(f"{path} exists and is not a checkpoint: it is not overwritten; choose another name")
    return path


def abstract_params(config: ViTConfig, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """The parameter tree of a model as `jax.ShapeDtypeStruct`s: paths, shapes and dtypes, nothing allocated."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    params = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params)


def versions() -> dict[str, str]:
    """Versions of this library and of those that shape its numbers."""
    names = ("fcvit-jax", "jax", "jaxlib", "flax", "numpy", "pillow")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _locate(path: str | Path) -> Path:
    text = str(path)
    if text.startswith("packaged:"):
        directory = PACKAGED / text.removeprefix("packaged:")
        if not (directory / "meta.json").is_file():
            there = ", ".join(f"packaged:{meta.parent.name}" for meta in sorted(PACKAGED.glob("*/meta.json")))
            raise InputError(f"no packaged checkpoint {text!r}: there is {there}")
        return directory
    directory = Path(path).expanduser()
    if directory.is_file():
        raise InputError(
            f"{directory} is a file, not a checkpoint directory: python -m fcvit_jax.convert {directory} OUT"
        )
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such checkpoint directory")
    for candidate in (directory, directory / "checkpoint"):
        if (candidate / "meta.json").is_file():
            return candidate
    raise InputError(
        f"{directory} has no meta.json, so it is not a checkpoint directory: make one with "
        f"python -m fcvit_jax.convert WEIGHTS OUT"
    )


def _sizes(folder: Path) -> dict[str, int]:
    """Every file below a folder and its size in bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}


def _restore(path: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        # Compared beforehand: a restore that fails half-way complains from threads of its own.
        there = _shapes(checkpointer.metadata(path.absolute()).item_metadata.tree)
        wanted = _shapes(abstract)
        if odd := sorted(name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)):
            name = odd[0]
            raise InputError(
                f"{path}: {name} is {there.get(name)}, its meta.json wants {wanted.get(name)}: convert again"
            )
        try:
            return checkpointer.restore(path.absolute(), abstract)
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path} is damaged: copy or convert it again ({reason})") from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf, array or metadata, by its path."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {"/".join(str(part.key) for part in path): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A directory beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield staging
        staging.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            os.replace(path, retired)
            os.replace(staging, path)
            shutil.rmtree(retired)
        else:
            os.replace(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
