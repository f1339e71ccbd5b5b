"""Result rows: how accurate a schedule is and how certain that is, what it costs, how fast it runs."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fcvit_jax.checkpoint import Checkpoint, load_checkpoint, versions
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import printable
from fcvit_jax.evaluation import published
from fcvit_jax.evaluation.accuracy import DISTANCES, Accuracy, CompiledStep
from fcvit_jax.evaluation.inputs import EvaluationInputs
from fcvit_jax.evaluation.neighbours import TEMPERATURE, K
from fcvit_jax.evaluation.outcomes import FOUND, Outcomes
from fcvit_jax.evaluation.runs import ResultRow
from fcvit_jax.evaluation.statistics import mcnemar, sigmas, wilson
from fcvit_jax.evaluation.throughput import Rate
from fcvit_jax.evaluation.times import Times
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule, Schedules, cross_rules, fit_schedules


def cost_rows(checkpoint: str | Path | Checkpoint, schedules: Schedules, rules: str = "") -> list[ResultRow]:
    """Compute what schedules cost, one row each, without reading data; for a name of the zoo, without weights too.

    rules: as `evaluate` takes them.
    """
    name = str(checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint)
    if not isinstance(checkpoint, Checkpoint) and name in zoo.names() and not Path(name).exists():
        config, model, recommended = zoo.get(name).config, name, {}
    else:
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        config, model = loaded.config, loaded.meta.get("provenance", {}).get("model")
        recommended = loaded.recommended
    named, remarks = fit_schedules(schedules, config, recommended)
    return [
        {
            "schedule": key,
            "stages": str(schedule),
            **_cost_fields(schedule, config),
            **published.fields(model, key),
            "checkpoint": printable(name),
            "model": model,
            "remarks": list(remarks),
        }
        for key, schedule in cross_rules(named, rules).items()
    ]


def result_rows(
    inputs: EvaluationInputs,
    outcomes: Outcomes,
    steps: Mapping[str, CompiledStep],
    rates: Mapping[str, Rate],
    times: Times,
) -> list[ResultRow]:
    """Make one row a schedule, with all conditions. images_per_second, its spread, speedup: None if not timed."""
    checkpoint, source, config = inputs.checkpoint, inputs.source, inputs.config
    provenance = checkpoint.meta.get("provenance", {})
    near, names = inputs.neighbours, list(inputs.schedules)
    device, skipped = jax.devices()[0], int(outcomes.found[FOUND.index("skipped")])
    dense, fastest = names.index("dense") if "dense" in names else None, rates.get("dense")
    conditions = {
        "checkpoint": printable(inputs.checkpoint_name),
        "model": provenance.get("model"),
        "weights_sha256": provenance.get("sha256"),
        "dataset": printable(source.spec),
        "real_labels": printable(config.real_labels) or None,
        "classes_scored": len(source.scored or source.class_names),
        "images_excluded": inputs.num_records - len(outcomes.names) - skipped,
        "images_skipped": skipped,
        "remarks": [*inputs.remarks, *image_remarks(outcomes, checkpoint.preprocess)],
        "limit": config.limit,
        "neighbours": near and f"{K} of the {len(near):,} images of {printable(near.spec)}, temperature {TEMPERATURE}",
        "preprocess": str(checkpoint.preprocess),
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "kernels": None,  # each schedule has its own
        "device": f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind,
        "num_devices": inputs.step_config.mesh.size,
        "num_processes": jax.process_count(),
        "versions": versions(),
        "seconds": {name: round(seconds, 3) for name, seconds in times.seconds.items()},
    }
    rows = []
    for index, (name, schedule) in enumerate(inputs.schedules.items()):
        accuracy: ResultRow = _accuracy_fields(outcomes, index, dense)
        if not inputs.judged:
            accuracy = {name: value if name == "num_images" else None for name, value in accuracy.items()}
        known, rate = inputs.reported if index == dense else None, rates.get(name)
        rows.append(
            {
                "schedule": name,
                "stages": str(schedule),
                **accuracy,
                **_distance_fields(outcomes, index),
                "reference_top1": known,
                "reference_sigmas": sigmas(accuracy["correct"], accuracy["num_images"], known) if known else None,
                **_cost_fields(schedule, checkpoint.config),
                **published.fields(provenance.get("model") if inputs.reported else None, name),  # for the same images
                "images_per_second": rate and rate.images_per_second,
                "images_per_second_spread": rate and rate.spread,
                "speedup": rate.images_per_second / fastest.images_per_second if rate and fastest else None,
                "compile_seconds": steps[name].compile_seconds,
                **conditions,
                "kernels": steps[name].model.kernels,
            }
        )
    return rows


def image_remarks(outcomes: Outcomes, preprocess: Preprocess) -> list[str]:
    """Describe the images that are not read unchanged, one line a kind."""
    counts = dict(zip(FOUND, outcomes.found.tolist(), strict=True))
    return [text.format(f"{counts[kind]:,} images") for kind, text in preprocess.oddities.items() if counts[kind]]


def class_table(outcomes: Outcomes, schedules: Iterable[str], class_names: tuple[str, ...]) -> dict[str, Any]:
    """Count per class: {"classes": names, "images": counts, "correct": {schedule: counts}}.

    Classes without images are left out. An image with several labels counts in each of its classes.
    """

    def count(labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels[labels >= 0], minlength=len(class_names))

    images = count(outcomes.labels)
    there = np.flatnonzero(images)
    correct = zip(schedules, outcomes.rank == 0, strict=True)
    return {
        "classes": [printable(class_names[index]) for index in there],
        "images": images[there].tolist(),
        "correct": {name: count(outcomes.labels[right])[there].tolist() for name, right in correct},
    }


def _accuracy_fields(outcomes: Outcomes, index: int, dense: int | None) -> ResultRow:
    """Count for the schedule in row `index` of the outcomes, and compare it with the one in row `dense`.

    top1_low, top1_high: Wilson's interval at 95 %. gained, lost: images that are correct here but not there, and the
    reverse; mcnemar_p: how likely chance makes them so unequal. agreement: fraction of equal predictions; kl: mean
    divergence in nats. The last five are None without dense.
    """
    accuracy = Accuracy.of(outcomes.rank[index])
    low, high = wilson(accuracy.correct, accuracy.num_images)
    fields: ResultRow = {"top1": accuracy.top1, "top1_low": low, "top1_high": high, "top5": accuracy.top5}
    fields |= {"correct": accuracy.correct, "num_images": accuracy.num_images}
    compared = dict.fromkeys(("gained", "lost", "mcnemar_p", "agreement", "kl"))
    if dense is None:
        return fields | compared
    here, there = outcomes.rank[index] == 0, outcomes.rank[dense] == 0
    gained, lost = int((here & ~there).sum()), int((there & ~here).sum())
    agreement = (outcomes.prediction[index] == outcomes.prediction[dense]).mean()
    kl = None if outcomes.distances.shape[-1] else float(outcomes.kl[index].mean(dtype=np.float64))  # of features none
    values = gained, lost, mcnemar(gained, lost), float(agreement), kl
    return fields | dict(zip(compared, values, strict=True))


def _distance_fields(outcomes: Outcomes, index: int) -> ResultRow:
    """Compute the mean of each of `DISTANCES` over the images, and its worst twentieth: 5th or 95th percentile."""
    fields: ResultRow = {}
    for name, values in zip(DISTANCES, outcomes.distances[index].T, strict=False):
        worst = 5 if name.endswith("cosine") else 95
        fields[name] = float(values.mean(dtype=np.float64))
        fields[f"{name}_p{worst}"] = float(np.percentile(values, worst))
    return fields


def _cost_fields(schedule: MergeSchedule, config: ViTConfig) -> ResultRow:
    gmacs, executed = flops.gmacs(config, schedule), flops.executed_gmacs(config, schedule)
    return {"gmacs": gmacs, "gmacs_executed": executed, "tokens_out": schedule.tokens(config)[-1]}
