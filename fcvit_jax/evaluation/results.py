"""What a result row says of a schedule: how right it is and how sure that is, what it costs, how fast it runs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcvit_jax.checkpoint import load_checkpoint, versions
from fcvit_jax.evaluation import published
from fcvit_jax.evaluation.accuracy import Accuracy, CompiledStep
from fcvit_jax.evaluation.job import Job, Settings
from fcvit_jax.evaluation.outcomes import Outcomes
from fcvit_jax.evaluation.statistics import mcnemar, per_class, sigmas, wilson
from fcvit_jax.evaluation.throughput import Rate
from fcvit_jax.evaluation.times import Times
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule

Row = dict[str, Any]


def accuracy_fields(outcomes: Outcomes, index: int, dense: int | None) -> dict[str, Any]:
    """The counts of the schedule in row `index` of the outcomes, and its differences from the one in row `dense`.

    top1_low, top1_high: Wilson's interval at 95 %. gained, lost: images that are right here and wrong there, and the
    other way round; mcnemar_p: how likely chance makes them so unequal. agreement: fraction of equal predictions; kl:
    mean divergence in nats. Those are None without dense.
    """
    accuracy = Accuracy.of(outcomes.rank[index])
    low, high = wilson(accuracy.correct, accuracy.num_images)
    fields: dict[str, Any] = {
        "top1": accuracy.top1,
        "top1_low": low,
        "top1_high": high,
        "top5": accuracy.top5,
        "correct": accuracy.correct,
        "num_images": accuracy.num_images,
    }
    if dense is None:
        return fields | dict.fromkeys(("gained", "lost", "mcnemar_p", "agreement", "kl"))
    here, there = outcomes.rank[index] == 0, outcomes.rank[dense] == 0
    gained, lost = int((here & ~there).sum()), int((there & ~here).sum())
    return fields | {
        "gained": gained,
        "lost": lost,
        "mcnemar_p": mcnemar(gained, lost),
        "agreement": float((outcomes.prediction[index] == outcomes.prediction[dense]).mean()),
        "kl": float(outcomes.kl[index].mean(dtype=np.float64)),
    }


def cost_fields(schedule: MergeSchedule, config: ViTConfig) -> dict[str, Any]:
    return {
        "gmacs": flops.gmacs(config, schedule),
        "gmacs_executed": flops.executed_gmacs(config, schedule),
        "tokens_out": schedule.tokens(config)[-1],
    }


def speed_fields(rate: Rate | None, dense: Rate | None) -> dict[str, Any]:
    """Images/s, None where it was not timed."""
    return {
        "images_per_second": rate.images_per_second if rate else None,
        "images_per_second_spread": rate.spread if rate else None,
        "speedup": rate.images_per_second / dense.images_per_second if rate and dense else None,
    }


def class_table(outcomes: Outcomes, schedules: Mapping[str, Any], class_names: tuple[str, ...]) -> dict[str, Any]:
    """{"classes": names, "images": counts, "correct": {schedule: counts}}; classes without images are left out.

    An image of several labels counts in each of its classes.
    """
    counts = {
        name: per_class(outcomes.labels, rank == 0, len(class_names))
        for name, rank in zip(schedules, outcomes.rank, strict=True)
    }
    images = next(iter(counts.values()))[0]
    there = np.flatnonzero(images)
    return {
        "classes": [class_names[index] for index in there],
        "images": images[there].tolist(),
        "correct": {name: correct[there].tolist() for name, (_, correct) in counts.items()},
    }


def gmacs_rows(settings: Settings) -> list[Row]:
    """What the schedules cost: no data are read, and for a name of the zoo no weights either."""
    name = settings.checkpoint
    if name in zoo.names() and not Path(name).exists():
        config, model = zoo.get(name).config, name
    else:
        checkpoint = load_checkpoint(name)
        config, model = checkpoint.config, checkpoint.meta["provenance"].get("model")
    schedules = settings.parse_schedules(config.depth)
    return [
        {
            "schedule": key,
            "stages": str(schedule),
            **cost_fields(schedule, config),
            **published.fields(model, key),
            "checkpoint": name,
            "model": model,
        }
        for key, schedule in schedules.items()
    ]


def result_rows(
    job: Job,
    outcomes: Outcomes,
    steps: Mapping[str, CompiledStep],
    rates: Mapping[str, Rate],
    times: Times,
) -> list[Row]:
    """One schedule's result a row, with all its conditions."""
    settings, checkpoint, source = job.settings, job.checkpoint, job.source
    names = list(job.schedules)
    dense = names.index("dense") if "dense" in names else None
    conditions = {
        "checkpoint": settings.checkpoint,
        "model": checkpoint.meta["provenance"].get("model"),
        "weights_sha256": checkpoint.meta["provenance"].get("sha256"),
        "dataset": settings.dataset,
        "real_labels": settings.real_labels or None,
        "classes_scored": len(source.scored or source.class_names),
        "images_excluded": job.num_records - len(outcomes.names),
        "limit": settings.limit,
        "preprocess": str(checkpoint.preprocess),
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
        "kernels": next(iter(steps.values())).model.kernels,
        "device": device_name(),
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "versions": versions(),
        "seconds": {name: round(seconds, 3) for name, seconds in times.seconds.items()},
    }
    rows = []
    for index, (name, schedule) in enumerate(job.schedules.items()):
        accuracy = accuracy_fields(outcomes, index, dense)
        known = job.reported if index == dense else None
        rows.append(
            {
                "schedule": name,
                "stages": str(schedule),
                **accuracy,
                "reference_top1": known,
                "reference_sigmas": sigmas(accuracy["correct"], accuracy["num_images"], known) if known else None,
                **cost_fields(schedule, checkpoint.config),
                **published.fields(conditions["model"] if job.reported else None, name),  # of the same images
                **speed_fields(rates.get(name), rates.get("dense")),
                "compile_seconds": steps[name].compile_seconds,
                **conditions,
            }
        )
    return rows


def device_name() -> str:
    device = jax.devices()[0]
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind
