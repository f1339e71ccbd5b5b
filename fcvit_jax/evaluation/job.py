"""What an evaluation is asked for, and what that names: opened, and found to fit together."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, load_checkpoint, versions
from fcvit_jax.compiling import PRECISIONS, computation
from fcvit_jax.data import imagenet
from fcvit_jax.data.labels import match_head, real_labels
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.files import writable_directory
from fcvit_jax.models import zoo
from fcvit_jax.models.fused import choose_kernels
from fcvit_jax.models.schedule import MergeSchedule, parse_schedules
from fcvit_jax.models.vit import cast_params


@dataclass(frozen=True)
class Settings:
    """What to evaluate, and how: the fields of configs/eval_digits.py, which explains them."""

    checkpoint: str
    dataset: str
    real_labels: str
    schedules: str
    sweep: str
    gmacs_only: bool
    batch_size: int
    dtype: str
    limit: int | None
    save_logits: bool
    gallery: int
    throughput_blocks: int
    workers: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Settings":
        """From the fields of a configuration. Raises InputError where they are not these."""
        if odd := sorted({field.name for field in fields(cls)} ^ set(config)):
            raise InputError(
                f"config.{odd[0]} is {'unknown' if odd[0] in config else 'missing'}: see configs/eval_digits.py"
            )
        return cls(**config)

    def parse_schedules(self, depth: int) -> dict[str, MergeSchedule]:
        """Schedules by name; dense is the first of them where there is a sweep."""
        lists = ("dense", self.schedules, self.sweep) if self.sweep else (self.schedules,)
        return parse_schedules(",".join(lists), depth)


@dataclass(frozen=True)
class Job:
    """Settings, and what they name: opened, and found to fit together.

    source: with labels that index the head's outputs. reported: top-1 that is known of these weights and images.
    """

    settings: Settings
    workdir: Path
    mesh: jax.sharding.Mesh
    source: Source
    checkpoint: Checkpoint
    schedules: dict[str, MergeSchedule]
    reported: float | None

    @cached_property
    def params(self) -> Any:
        """Those of the checkpoint, in the dtype of the computation; in bfloat16 both are on the devices."""
        return cast_params(self.checkpoint.params, PRECISIONS[self.settings.dtype][0])

    @property
    def num_records(self) -> int:
        return min(len(self.source), self.settings.limit or len(self.source))


def prepare(settings: Settings, workdir: Path) -> Job:
    """Open what the settings name. Raises InputError where it is not there or does not fit."""
    computation(settings.dtype)  # complains of one that there is not
    if not settings.dataset:
        raise InputError("config.dataset is empty: pass --config.dataset=...")
    if settings.save_logits and jax.process_count() > 1:
        raise InputError("save_logits works in a single process only: leave it out")
    mesh = parallel.data_mesh()
    parallel.check_batch_size(settings.batch_size, mesh)
    opened = open_source(settings.dataset)
    labelled = real_labels(opened, settings.real_labels) if settings.real_labels else opened
    checkpoint = load_checkpoint(settings.checkpoint, parallel.replicated(mesh))
    named = checkpoint.meta["class_names"]
    source = match_head(labelled, checkpoint.config.num_classes, named, str(checkpoint.path))
    schedules = settings.parse_schedules(checkpoint.config.depth)
    for schedule in schedules.values():
        schedule.plan(checkpoint.config)
    if jax.process_index() == 0:
        writable_directory(workdir)
    reported = None if settings.real_labels else reported_top1(opened, checkpoint, settings.limit)
    return Job(settings, workdir, mesh, source, checkpoint, schedules, reported)


def fingerprint(job: Job) -> dict[str, Any]:
    """What decides the outcomes. The number of devices and processes does not, but for rounding."""
    settings, meta = job.settings, job.checkpoint.meta
    weights = json.dumps([meta["files"], meta["config"], meta["preprocess"]], sort_keys=True)
    return {
        "dataset": [settings.dataset, len(job.source), settings.real_labels],
        "limit": settings.limit,
        "checkpoint": hashlib.sha256(weights.encode()).hexdigest(),
        "schedules": {name: str(schedule) for name, schedule in job.schedules.items()},
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "kernels": {
            name: choose_kernels(PRECISIONS[settings.dtype][0], job.mesh.devices.flat, schedule)
            for name, schedule in job.schedules.items()
        },
        "save_logits": settings.save_logits,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def reported_top1(source: Source, checkpoint: Checkpoint, limit: int | None = None) -> float | None:
    """What the zoo reports of these weights as they are, where the source has ImageNet's validation images.

    source: as it was opened: its class names and size tell a folder of the 50,000, prepared or not, from another. All
    must be evaluated where they stand class by class; of those that TFDS has shuffled, some are a fair sample.
    """
    name, config = checkpoint.meta["provenance"].get("model"), checkpoint.config
    if name not in zoo.names():
        return None
    model = zoo.get(name)
    if source.ordered:
        whole = len(source) == 50_000 <= (limit or 50_000) and source.labels_per_image == 1
        there = whole and sorted(source.class_names) == list(imagenet.synsets())
    else:
        there = re.match(r"tfds:imagenet2012(:[\d.]+)?/validation(\[|@|$)", source.spec)
    same = (config.image_size, config.num_classes) == (model.config.image_size, model.config.num_classes)
    return model.top1 if same and there else None
