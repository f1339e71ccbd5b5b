"""The checkpoint directory: parameters (Orbax) beside `meta.json`, which describes the model and its preprocessing.

    DIR/meta.json   configuration, preprocessing, class names, provenance, library versions, sha256 of the files
    DIR/params/     the parameter tree of `ViT(config)`, float32

A directory is written under a temporary name and renamed at the end: it never exists in part.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcvit_jax.data.labels import ORDERS, ClassNames
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError, naming
from fcvit_jax.files import check_room, check_target, local_path, staged, utf8_path, writable_directory, write_whole
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT

FORMAT = 1
ENTRIES = frozenset({"meta.json", "params"})  # of a checkpoint directory
PACKAGED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights with everything needed to run it.

    params: nested dict of float32 arrays, as `ViT(config).init` gives under "params".
    meta: the JSON object of meta.json: "config", "preprocess", "class_names" (list or None), "provenance", "versions",
    and "class_order" if the head has the classes of a data set in one of `labels.ORDERS`.
        "recommended": after a search with --write.
    """

    path: Path
    config: ViTConfig
    params: dict[str, Any]
    preprocess: Preprocess
    meta: dict[str, Any]

    @property
    def class_names(self) -> ClassNames | None:
        """Names of the head's outputs, or the order in which it has a data set's classes; None if neither is known."""
        names = self.meta.get("class_names")
        return tuple(names) if names else self.meta.get("class_order")

    def check_correction(self, schedules: Iterable[MergeSchedule]) -> None:
        """Raise InputError if the head was corrected for another schedule than these."""
        form = self.meta.get("provenance", {}).get("corrected_for")
        for schedule in schedules if form else ():
            if str(schedule) != form:
                raise InputError(
                    f"{self.path}: its head is corrected for the schedule {form}, and wrong under {schedule}: use the "
                    f"schedule `recommended` alone, or the checkpoint {self.meta['provenance']['corrected_from']}"
                )

    @property
    def recommended(self) -> dict[str, str]:
        """Explicit forms of the schedules that a search recommends for this checkpoint, by budget; often none."""
        return self.meta.get("recommended", {})


def load_checkpoint(path: str | Path, sharding: jax.sharding.Sharding | None = None) -> Checkpoint:
    """Open a checkpoint directory, a `train_sam.py` working directory, or a `packaged:NAME` checkpoint.

    sharding: of every parameter; the default is the first device. Raises InputError in one line if the directory is
    missing, without metadata, damaged, or written by a later version.
    """
    directory = _locate(path)
    with naming(directory / "meta.json"):
        try:
            meta = json.loads((directory / "meta.json").read_text())
        except ValueError as error:
            raise InputError(f"the file is damaged ({error}): convert the weights again") from None
        found = meta.get("format") if isinstance(meta, dict) else None
        if found != FORMAT:
            raise InputError(f"format {found} is not {FORMAT}, which this version reads: convert again")
        for name in ("config", "preprocess", "provenance", "files"):
            if type(meta.get(name)) is not dict:
                raise InputError(f"the file lacks {name!r}: convert the weights again")
        config, preprocess = ViTConfig.from_dict(meta["config"]), Preprocess.from_dict(meta["preprocess"])
        _check_fit(config, preprocess, meta.get("class_names"), meta.get("class_order"))
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for name, sha256 in meta["files"].items():
        if file_sha256(directory / "params" / name) != sha256:
            raise InputError(f"{directory / 'params' / name} is missing or damaged (a broken copy?): copy it again")
    import orbax.checkpoint as ocp

    with utf8_path(directory) as place, ocp.StandardCheckpointer() as checkpointer:
        # Compared beforehand: a restore that fails half-way logs from its own threads.
        place, abstract = place / "params", abstract_params(config, sharding)
        _check_shapes(str(directory / "params"), checkpointer.metadata(place).item_metadata.tree, abstract)
        params = checkpointer.restore(place, abstract)
    return Checkpoint(directory, config, params, preprocess, meta)


def save_checkpoint(
    path: str | Path,
    config: ViTConfig,
    params: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    class_names: ClassNames | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint directory, atomically. One process calls this, with parameters that it holds whole.

    class_names: as in `match_head`. provenance: JSON-able facts about where the parameters come from. Raises
    InputError if `path` exists (with `overwrite`: and is not a checkpoint) or cannot be written, or if the parts do not
    fit each other.
    """
    path = check_target(path, overwrite, ENTRIES)
    order = class_names if isinstance(class_names, str) else None
    names = None if order else class_names
    _check_fit(config, preprocess, names, order)
    _check_shapes("params", params, abstract_params(config))
    meta = {
        "format": FORMAT,
        "config": config.to_dict(),
        "preprocess": preprocess.to_dict(),
        "class_names": list(names) if names else None,
        **({"class_order": order} if order else {}),
        "provenance": dict(provenance or {}),
        "versions": versions(),
    }
    check_room(path.parent, params)
    with staged(path) as staging:
        import orbax.checkpoint as ocp

        # Alone, even if other processes belong to the run: their parameters are the same. Orbax then refuses arrays on
        # the devices of one process; of NumPy arrays it makes one more copy.
        host = jnp.asarray if jax.process_count() == 1 else np.asarray
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="save")
        with utf8_path(staging) as place, ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
            checkpointer.save(place / "params", jax.tree.map(host, dict(params)))
        (staging / "params" / "commit_success.txt").unlink(missing_ok=True)  # names the place it was staged at
        files = sorted(file for file in (staging / "params").rglob("*") if file.is_file())
        meta["files"] = {file.relative_to(staging / "params").as_posix(): file_sha256(file) for file in files}
        (staging / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return path


def without_head(config: ViTConfig, params: Mapping[str, Any], pool: str | None = None) -> tuple[ViTConfig, Any]:
    """Drop the head: pooled features become the output. pool: another way of pooling, which must need no new weights.

    Raises InputError if the model cannot pool like that.
    """
    bare = dict(num_classes=0, representation_size=0, projection_dim=0, head_bias=True, unit_features=False)
    config = replace(config, **bare, pool=pool or config.pool)
    wanted = abstract_params(config)
    if lacking := wanted.keys() - params.keys():
        raise InputError(f"pool {pool!r} needs weights that the model lacks ({', '.join(lacking)}): choose another")
    return config, {name: params[name] for name in wanted}


def recommend(checkpoint: Checkpoint, schedules: Mapping[str, str] | None) -> None:
    """Write recommended schedules, explicit forms by budget, into meta.json of a checkpoint directory.

    With None, only check that this is possible. Raises InputError if not, and for a packaged checkpoint.
    """
    path = checkpoint.path / "meta.json"
    if PACKAGED in path.resolve().parents:
        raise InputError(f"{checkpoint.path} belongs to the library: leave --write out, and use search:DIR")
    if not path.is_file():
        raise InputError(f"{path} does not exist: leave --write out, or save the checkpoint first")
    writable_directory(path.parent)
    if schedules is not None:
        meta = json.loads(path.read_text()) | {"recommended": dict(schedules)}
        write_whole(path, (json.dumps(meta, indent=2) + "\n").encode())


def abstract_params(config: ViTConfig, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """Build the parameter tree of a model from `jax.ShapeDtypeStruct`s: shapes and dtypes, nothing allocated."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    # All blocks have the same parameters: one is traced.
    params = jax.eval_shape(ViT(replace(config, depth=1)).init, jax.random.key(0), images)["params"]
    params |= {f"blocks_{index}": params["blocks_0"] for index in range(config.depth)}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), params)


def versions() -> dict[str, str]:
    """List the versions of this library and of the libraries that determine its numbers."""
    names = ("fcvit-jax", "jax", "jaxlib", "flax", "numpy", "pillow")
    found = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in names}
    return {name: distribution.version for name, distribution in found.items() if distribution}


def _locate(path: str | Path) -> Path:
    text = str(path)
    if text.startswith("packaged:"):
        directory = PACKAGED / text.removeprefix("packaged:")
        if not (directory / "meta.json").is_file():
            there = ", ".join(f"packaged:{meta.parent.name}" for meta in sorted(PACKAGED.glob("*/meta.json")))
            raise InputError(f"no packaged checkpoint {text!r}: choose one of {there}")
        return directory
    directory = local_path(path)
    for candidate in (directory, directory / "checkpoint"):
        if (candidate / "meta.json").is_file():
            return candidate
    if not directory.exists():
        raise InputError(f"{directory}: there is no such checkpoint directory")
    kind = "has no meta.json" if directory.is_dir() else "is a file"
    weights = "WEIGHTS" if directory.is_dir() else directory
    raise InputError(f"{directory} {kind}: make a checkpoint directory: python -m fcvit_jax.convert {weights} OUT")


def _check_fit(config: ViTConfig, preprocess: Preprocess, class_names: Any, class_order: Any) -> None:
    if preprocess.image_size != config.image_size:
        raise InputError(
            f"image_size: the preprocessing gives {preprocess.image_size}, the model takes {config.image_size}"
        )
    named = isinstance(class_names, list | tuple) and all(isinstance(name, str) for name in class_names)
    if class_names and not (named and len(class_names) == config.num_classes):
        raise InputError(f"class_names: expected the names of {config.num_classes} classes, or none")
    if class_order not in (None, *ORDERS):
        raise InputError(f"class_order is {class_order!r}: expected one of {', '.join(ORDERS)}")


def flat_params(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flatten a parameter tree to arrays on the host, by path: "blocks_0/attn/qkv/kernel"."""
    leaves: Any = traverse_util.flatten_dict(params, sep="/")
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def leaf_shapes(tree: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf of nested dicts, by path: "blocks_0/attn/qkv/kernel"."""
    leaves: Any = traverse_util.flatten_dict(tree, sep="/")
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _check_shapes(where: str, tree: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
    there, wanted = leaf_shapes(tree), leaf_shapes(abstract)
    for name in sorted(there.keys() | wanted.keys()):
        if there.get(name) != wanted.get(name):
            raise InputError(f"{where}: {name} is {there.get(name)}, its configuration requires {wanted.get(name)}")


def file_sha256(path: Path) -> str | None:
    """Compute the sha256 of a file's content; None if the file does not exist."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
