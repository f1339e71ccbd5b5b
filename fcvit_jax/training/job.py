"""What a training run is asked for, and what that names: opened, and found to fit together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.convert.__main__ import main as convert
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.batches import batches_an_epoch
from fcvit_jax.data.sources import FORMS, Source, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.files import sweep
from fcvit_jax.models import zoo
from fcvit_jax.models.schedule import MergeSchedule, parse_schedules
from fcvit_jax.models.vit import ViT
from fcvit_jax.training import sam
from fcvit_jax.training.optimizer import OptimizerConfig, frozen_mask, make_optimizer
from fcvit_jax.training.start import Start, from_checkpoint, from_scratch
from fcvit_jax.training.step import Recipe, TrainState, init_state
from fcvit_jax.training.targets import TargetConfig

# What may change when a run goes on.
FREE = ("flatness", "fsdp", "keep", "log_every", "on_bad", "remat", "save_every", "tensorboard", "workers")
WRITTEN = ("best", "checkpoint", "last_good")  # checkpoint directories in the working directory

_COUNTS = ("eval_every", "save_every", "log_every", "keep")
_SHARES = ("dropout", "drop_path")


@dataclass(frozen=True)
class Job:
    """What stays the same from step to step.

    schedules: those that are evaluated, by name; dense is always among them. remarks: lines to be said aloud.
    """

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    start: Start
    augment: Augment
    model: ViT
    schedules: dict[str, MergeSchedule]
    recipe: Recipe
    steps: int
    remarks: tuple[str, ...]

    def init(self, params: Any) -> TrainState:
        recipe = self.recipe
        return init_state(
            self.model, recipe.optimizer, recipe.sam, self.config.seed, params, recipe.ema_decay is not None
        )

    def data(self) -> dict[str, Any]:
        """What a run that goes on has to find again: another number of images would come in another order."""
        train, test = self.start.train_set, self.start.test_set
        labels = {str(label): name for label, name in enumerate(train.class_names)}
        return {"images": {"train": len(train), "test": len(test)}, "labels": labels}


def prepare(config: Any, workdir: Path) -> tuple[Job, Any]:
    """Open what the configuration names, and check that it fits together, before any long work.

    Returns the parameters to start from too, None for fresh ones. Raises InputError that names the field.
    """
    check_fields(config, workdir)
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    train_set, test_set = open_source(config.train), open_source(config.test)
    an_epoch, augment = batches_an_epoch(train_set, config.batch_size), Augment(**config.augment)
    if not 0 <= config.warmup_epochs < config.epochs:
        raise InputError(f"warmup_epochs is {config.warmup_epochs}: it must be 0 or more, and below epochs")
    steps, warmup = round(config.epochs * an_epoch), round(config.warmup_epochs * an_epoch)

    start, initial = begin(config, workdir, train_set, test_set)
    sam_config = sam.SAMConfig(**config.sam, start_step=warmup if config.sam_after_warmup else 0)
    if config.batch_size % (sam_config.microbatches * mesh.size):
        raise InputError(
            f"batch_size is {config.batch_size}: it must be a multiple of sam.microbatches, {sam_config.microbatches}, "
            f"times the {mesh.size} devices"
        )
    compute, precision = PRECISIONS[config.dtype]
    jax.config.update("jax_default_matmul_precision", precision)
    depth = start.config.depth
    schedules = {"dense": MergeSchedule.dense(depth), **parse_schedules(config.schedules, depth)}
    schedule = MergeSchedule.parse(config.schedule, depth)
    for each in (schedule, *schedules.values()):
        each.plan(start.config)
    regularised = dict(dropout=config.dropout, drop_path=config.drop_path, remat=config.remat)
    model = ViT(start.config, schedule, dtype=compute, **regularised)
    optimizer = OptimizerConfig(**config.optimizer, warmup_steps=warmup)
    params = abstract_params(start.config)
    transformation, learning_rate = make_optimizer(optimizer, params, steps)
    recipe = Recipe(
        transformation,
        learning_rate,
        sam_config,
        sam.rho_schedule(sam_config, steps),
        TargetConfig(**config.targets),
        None if optimizer.freeze is None else frozen_mask(params, optimizer.freeze),
        config.ema_decay or None,
    )
    unused = ("config.model is not used: the checkpoint has its own",) if config.checkpoint and config.model else ()
    remarks = (*start.remarks, *unused, *(f"warning: {line}" for line in sam.warnings(sam_config)))
    return Job(config, workdir, mesh, start, augment, model, schedules, recipe, steps, remarks), initial


def check_fields(config: Any, workdir: Path) -> None:
    """Raises InputError for what is left out, and for values that make no sense whatever the data are."""
    for name in ("train", "test"):
        if not config[name]:
            raise InputError(f"config.{name} is missing: pass --config.{name}=..., a data set such as {FORMS}")
    if config.checkpoint:
        place, here = Path(config.checkpoint).expanduser().resolve(), workdir.resolve()
        if place == here or place in (here / name for name in WRITTEN):
            raise InputError(
                f"config.checkpoint is {config.checkpoint}, which this run would overwrite: name another --workdir"
            )
    elif not config.model:
        raise InputError(
            "config.checkpoint is missing: pass --config.checkpoint=..., or, to train from scratch, take an experiment "
            "that has config.model, such as configs/imagenet_vit_sam.py"
        )
    elif not config.preprocess:
        raise InputError("config.preprocess is missing: pass --config.preprocess=..., such as timm/augreg")
    elif config.image_size:
        raise InputError(
            f"config.image_size is {config.image_size}, which resamples a checkpoint, and there is none: set "
            "config.model.image_size"
        )
    for name in _COUNTS:
        if type(config[name]) is not int or config[name] < 1:
            raise InputError(f"{name} is {config[name]}: it must be a number of steps, 1 or more")
    for name in _SHARES:
        if not 0 <= config[name] < 1:
            raise InputError(f"{name} is {config[name]}: it must be at least 0 and below 1")
    if config.workers is not None and config.workers < 1:
        raise InputError(f"workers is {config.workers}: it must be 1 or more, or none")
    if config.seed < 0:
        raise InputError(f"seed is {config.seed}: it must be 0 or more")
    for name, choices in (("dtype", tuple(PRECISIONS)), ("on_bad", ("stop", "skip"))):
        if config[name] not in choices:
            raise InputError(f"{name} is {config[name]!r}: choose one of {', '.join(choices)}")


def begin(config: Any, workdir: Path, train_set: Source, test_set: Source) -> tuple[Start, Any]:
    """Fresh parameters (None), or those of a checkpoint: a directory, `packaged:NAME`, or a full name of the zoo."""
    if not config.checkpoint:
        return from_scratch(config.model.to_dict(), config.preprocess, train_set, test_set), None
    path = config.checkpoint
    if path in zoo.names() and not Path(path).exists():
        path = workdir / "pretrained" / config.checkpoint
        if jax.process_index() == 0:
            sweep(path)
            if not path.exists():
                convert([config.checkpoint, str(path)])
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("pretrained")
    size = (config.image_size, config.image_size) if config.image_size else None
    return from_checkpoint(path, train_set, test_set, size, config.preprocess)


def check_same(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """A run goes on with the configuration, and on the data, that it began with."""
    old, new = flat(before), flat(now)
    if differs := [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in FREE]:
        told = ", ".join(f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in differs[:5])
        raise InputError(
            f"{workdir} holds a run of another configuration, or of other data ({told}): name another --workdir"
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sam": {"rho": 0.1}} -> {"sam.rho": 0.1}"""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
