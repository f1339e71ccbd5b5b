"""The inputs of an evaluation: checkpoint, labelled images and merge schedules, opened and checked."""

import contextlib
import hashlib
import json
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, flat_params, load_checkpoint, versions
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.data import imagenet
from fcvit_jax.data.batches import Batch, device_batches, eval_batches
from fcvit_jax.data.labels import label_by_name, match_head, read_class_names, real_labels
from fcvit_jax.data.records import sample
from fcvit_jax.data.sources import Source, open_labelled_or_not, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import StepConfig
from fcvit_jax.models import zoo
from fcvit_jax.models.fused import choose_kernels
from fcvit_jax.models.schedule import MergeSchedule, Schedules, cross_rules, fit_schedules
from fcvit_jax.models.vit import cast_params
from fcvit_jax.settings import check_settings, setting


@dataclass(frozen=True)
class EvaluationConfig:
    """How to evaluate; `fcvit_jax.evaluation.evaluate` explains the fields."""

    batch_size: int = setting(32, low=1)
    dtype: str = setting("float32", choices=tuple(PRECISIONS))
    limit: int | None = setting(None, low=1)
    real_labels: str = setting("")
    save_logits: bool = setting(False)
    gallery: int = setting(0, low=0)
    throughput_blocks: int = setting(5, low=0)
    workers: int | None = setting(None, low=1)
    rules: str = setting("")
    on_bad: str = setting("stop", choices=("stop", "skip"))
    class_names: str | tuple[str, ...] = ""
    neighbours: str | Source = ""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class EvaluationInputs:
    """All inputs of an evaluation.

    source: its labels index the head's outputs. neighbours: labelled images among which a model without a head looks
    for the nearest; the source then has their classes. checkpoint_name: as given. files: sha256 of the checkpoint's
    files, None for a checkpoint in memory. reported: published top-1 of these weights and images, or None. remarks:
    assumptions and omissions, one line each.
    """

    config: EvaluationConfig
    step_config: StepConfig
    source: Source
    checkpoint: Checkpoint
    checkpoint_name: str
    files: Mapping[str, str] | None
    schedules: dict[str, MergeSchedule]
    reported: float | None
    neighbours: Source | None
    remarks: tuple[str, ...]

    @cached_property
    def params(self) -> Any:
        """The parameters in the dtype of the computation; with bfloat16 both copies are on the devices."""
        return cast_params(self.checkpoint.params, PRECISIONS[self.config.dtype][0])

    @property
    def judged(self) -> bool:
        """Whether images are classified, by a head or by their neighbours."""
        return self.neighbours is not None or not self.checkpoint.config.headless

    @property
    def num_records(self) -> int:
        return len(self.source)

    def batches(self, start: int = 0, limit: int | None = None) -> contextlib.closing[Generator[Batch, None, None]]:
        """Open this process's share of the batches, on the devices, from batch `start` on."""
        host = eval_batches(
            self.source,
            self.checkpoint.preprocess,
            self.config.batch_size,
            start=start,
            limit=limit,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.workers,
            on_bad=self.config.on_bad,
        )
        return contextlib.closing(device_batches(host, parallel.batched(self.step_config.mesh)))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Describe all that outcomes depend on; devices and processes only change rounding."""
        checkpoint, config = self.checkpoint, self.config
        weights = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode())
        if self.files is None:
            for path, array in sorted(flat_params(checkpoint.params).items()):
                weights.update(path.encode() + array.tobytes())
        weights.update(json.dumps([checkpoint.config.to_dict(), checkpoint.preprocess.to_dict()]).encode())
        compute, devices = PRECISIONS[config.dtype][0], self.step_config.mesh.devices.flat
        kernels = {
            choose_kernels(compute, devices, schedule, self.checkpoint.config) for schedule in self.schedules.values()
        }
        return {
            "dataset": [self.source.spec, len(self.source), config.real_labels],
            "class_names": hashlib.sha256("\n".join(self.source.class_names).encode(errors="replace")).hexdigest(),
            "limit": config.limit,
            "neighbours": self.neighbours and [self.neighbours.spec, len(self.neighbours)],
            "checkpoint": weights.hexdigest(),
            "schedules": {name: str(schedule) for name, schedule in self.schedules.items()},
            "batch_size": config.batch_size,
            "dtype": config.dtype,
            "kernels": ",".join(sorted(kernels)),
            "logits": config.save_logits,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }


def open_inputs(
    checkpoint: str | Path | Checkpoint, dataset: str | Source, schedules: Schedules, config: EvaluationConfig
) -> EvaluationInputs:
    """Open the inputs of an evaluation. Raises InputError if something does not exist or does not fit."""
    mesh = parallel.inference_mesh(config.batch_size)
    parallel.check_batch_size(config.batch_size, mesh)
    placing = parallel.replicated(mesh)
    if isinstance(checkpoint, Checkpoint):
        name, files = str(checkpoint.path), None
        host = jax.tree.map(np.asarray, checkpoint.params)  # arrays of one device do not spread over several processes
        checkpoint = replace(checkpoint, params=jax.device_put(host, placing))
    else:
        name, checkpoint = str(checkpoint), load_checkpoint(checkpoint, placing)
        files = checkpoint.meta["files"]
    model = checkpoint.config
    open_any = open_labelled_or_not if model.headless and not config.neighbours else open_source
    opened = dataset if isinstance(dataset, Source) else open_any(dataset)
    labelled = real_labels(opened, config.real_labels) if config.real_labels else opened
    source, neighbours = _match(labelled, checkpoint, config)
    named, left_out = fit_schedules(schedules, model, checkpoint.recommended)
    named = cross_rules(named, config.rules)
    checkpoint.check_correction(named.values())
    reported = None if config.real_labels else reported_top1(opened, checkpoint, config.limit)
    images = source.scored, source.labels_per_image
    step_config = StepConfig(
        checkpoint.preprocess, mesh, config.batch_size, config.dtype, *images, patches=model.headless
    )
    remarks = (*source.remarks, *(neighbours.remarks if neighbours else ()), *left_out)
    facts = name, files, named, reported, neighbours, remarks
    return EvaluationInputs(config, step_config, source, checkpoint, *facts)


def _match(source: Source, checkpoint: Checkpoint, config: EvaluationConfig) -> tuple[Source, Source | None]:
    """Relabel the images to index the head's outputs, or the classes of the neighbours; return these too."""
    model, where, given = checkpoint.config, str(checkpoint.path), config.neighbours
    if not model.headless:
        if given:
            raise InputError(f"neighbours: {where} has a head, which classifies; convert with --num_classes 0")
        names = checkpoint.class_names
        names = read_class_names(config.class_names, model.num_classes) if config.class_names else names
        return sample(match_head(source, model.num_classes, names, where), config.limit), None
    neighbours = (given if isinstance(given, Source) else open_source(given)) if given else None
    if neighbours:
        if neighbours.spec == source.spec:
            raise InputError(f"neighbours: {source.spec} is the data set itself: give another one")
        if neighbours.labels_per_image > 1:
            raise InputError(f"neighbours: {neighbours.spec} has several labels an image: give a set with one")
        source = label_by_name(source, neighbours.class_names, neighbours.spec)
    return sample(source, config.limit), neighbours


def reported_top1(source: Source, checkpoint: Checkpoint, limit: int | None = None) -> float | None:
    """Look up the top-1 that the zoo reports for these weights, if the source holds ImageNet's validation images.

    source: as opened: its class names and size identify a folder of the 50,000, prepared or not. If the images are
    ordered by class, all must be evaluated. If TFDS has shuffled them, some are a fair sample.
    """
    name, config = checkpoint.meta.get("provenance", {}).get("model"), checkpoint.config
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
