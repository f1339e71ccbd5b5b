"""A training run: everything that its configuration names, opened and checked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params, save_checkpoint
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.convert import convert
from fcvit_jax.data.batches import batches_an_epoch
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError, naming
from fcvit_jax.evaluation.accuracy import Accuracy
from fcvit_jax.files import local_path, sweep
from fcvit_jax.models import zoo
from fcvit_jax.models.schedule import MergeSchedule, fit_schedules, is_reference
from fcvit_jax.models.vit import ViT
from fcvit_jax.training import sam
from fcvit_jax.training.optimizer import frozen_mask, make_optimizer
from fcvit_jax.training.starting_point import StartingPoint, from_checkpoint, from_scratch
from fcvit_jax.training.step import Recipe, TrainState, init_state
from fcvit_jax.training.train_config import TrainConfig

# Fields that may change when a run is resumed.
FREE = ("flatness", "fsdp", "keep", "log_every", "on_bad", "remat", "save_every", "tensorboard", "workers")
WRITTEN = ("best", "checkpoint", "last_good")  # checkpoint directories in the working directory


@dataclass(frozen=True)
class TrainingRun:
    """Everything about a run that stays the same from step to step."""

    config: TrainConfig
    workdir: Path
    mesh: jax.sharding.Mesh
    start: StartingPoint
    model: ViT
    schedules: dict[str, MergeSchedule]  # to evaluate, by name; dense is always among them
    recipe: Recipe
    steps: int
    remarks: tuple[str, ...]  # lines to print

    def init(self, params: Any) -> TrainState:
        return init_state(self.model, self.recipe, self.config.seed, params)

    def facts(self) -> dict[str, Any]:
        """Return the facts that a resumed run must find unchanged."""
        train, test = self.start.train_set, self.start.test_set
        labels = {str(label): name for label, name in enumerate(train.class_names)}
        data = {"images": {"train": len(train), "test": len(test)}, "labels": labels}
        return {"config": self.config.to_dict(), "data": data}

    def write_checkpoint(self, name: str, params: Any, step: int, accuracy: Accuracy | None = None) -> Path:
        """Write a checkpoint directory that evaluate.py reads; all processes call it, the first one writes."""
        counts = accuracy and {"correct": accuracy.correct, "num_images": accuracy.num_images}
        provenance = {
            "trained_by": "train_sam.py",
            "train_config": self.config.to_dict(),
            "steps": step,
            "test": counts and {"dataset": self.config.test, **counts},
            "from": self.start.provenance,
        }
        whole = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(self.mesh))(params)
        path = self.workdir / name
        if jax.process_index() == 0:
            save_checkpoint(
                path,
                self.start.config,
                jax.tree.map(np.asarray, whole),
                self.start.preprocess,
                class_names=self.start.train_set.class_names,
                provenance=provenance,
                overwrite=True,
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{name} {step}")
        return path


def open_run(config: TrainConfig, workdir: Path) -> tuple[TrainingRun, Any]:
    """Open and check what the configuration names; returns the first parameters too, None for fresh ones."""
    if config.checkpoint:
        place, here = local_path(config.checkpoint).resolve(), workdir.resolve()
        if place == here or place in (here / name for name in WRITTEN):
            raise InputError(
                f"checkpoint is {config.checkpoint}, which this run would overwrite: choose another --workdir"
            )
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    if config.batch_size % (config.sam.microbatches * mesh.size):
        raise InputError(
            f"batch_size is {config.batch_size}: it must be a multiple of sam.microbatches, {config.sam.microbatches}, "
            f"times the {mesh.size} devices"
        )
    train_set, test_set = open_source(config.train), open_source(config.test)
    an_epoch = batches_an_epoch(train_set, config.batch_size)
    steps, warmup = round(config.epochs * an_epoch), round(config.warmup_epochs * an_epoch)

    start, initial = begin(config, workdir, train_set, test_set)
    schedules, left_out = fit_schedules(f"dense,{config.schedules}", start.config, start.recommended)
    schedule, typed = config.schedule, str(config.schedule)
    if not isinstance(schedule, MergeSchedule):
        schedule = MergeSchedule.parse(schedule, start.config.depth, start.recommended)
    schedule.plan(start.config, typed)
    if is_reference(typed):  # another search may change what it stands for
        config = replace(config, schedule=schedule)
    model = ViT(start.config, schedule, PRECISIONS[config.dtype][0], config.dropout, config.drop_path, config.remat)
    params = abstract_params(start.config)
    sam_config = sam.with_start(config.sam, steps, warmup * config.sam_after_warmup)
    optimizer, learning_rate = make_optimizer(config.optimizer, params, steps, warmup)
    recipe = Recipe(
        optimizer,
        learning_rate,
        sam_config,
        sam.rho_schedule(sam_config, steps),
        config.targets,
        None if config.optimizer.freeze is None else frozen_mask(params, config.optimizer.freeze),
        config.ema_decay,
    )
    unused = ("config.model is not used: the checkpoint has its own",) if config.checkpoint and config.model else ()
    sources = dict.fromkeys((*start.train_set.remarks, *start.test_set.remarks))
    notes = (*sources, *sam.warnings(sam_config), *left_out)
    first = int(sam_config.start) if sam_config.rho else 0
    begins = (f"SAM starts after step {first:,} of {steps:,}",) if first else ()
    remarks = (*start.remarks, *unused, *begins, *(f"warning: {line}" for line in notes))
    return TrainingRun(config, workdir, mesh, start, model, schedules, recipe, steps, remarks), initial


def begin(config: TrainConfig, workdir: Path, train_set: Source, test_set: Source) -> tuple[StartingPoint, Any]:
    """Start from fresh parameters (None), or from a directory, `packaged:NAME`, or a full name of the zoo."""
    if not config.checkpoint:
        model: Any = config.model  # `TrainConfig` requires it and `preprocess` here
        return from_scratch(model, config.preprocess or "", train_set, test_set), None
    path = config.checkpoint
    if path in zoo.names() and not Path(path).exists():
        path = workdir / "pretrained" / config.checkpoint
        if jax.process_index() == 0:
            sweep(path)
            if not path.exists():
                convert(config.checkpoint, path, report=print)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("pretrained")
    size = (config.image_size, config.image_size) if config.image_size else None
    return from_checkpoint(path, train_set, test_set, size, config.preprocess, config.class_names)


def check_same(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """Raise InputError if the configuration or the data of a run have changed: see `TrainingRun.facts`."""
    with naming(f"{workdir}, a run of another version"):
        stored = TrainConfig.from_dict(before["config"]).to_dict()
    old: Any = traverse_util.flatten_dict(stored | before.get("data", {}), sep=".")
    new: Any = traverse_util.flatten_dict(now["config"] | now.get("data", {}), sep=".")
    if differs := [name for name in sorted({**old, **new}) if old.get(name) != new.get(name) and name not in FREE]:
        told = ", ".join(f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in differs[:5])
        raise InputError(
            f"{workdir} holds a run of another configuration or of other data ({told}): choose another --workdir"
        )
