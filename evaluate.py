"""Evaluate a checkpoint under many merge schedules, in one pass over the data.

    python evaluate.py
    python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/eval_digits.py, the default, lists them.
Writes results.jsonl, results.csv and pareto.png into the working directory, and logits_<schedule>.npz on request.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, load_checkpoint, versions, writable_directory
from fcvit_jax.data.batches import Batch, device_batches, eval_batches
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Accuracy, CompiledStep, compile_step, evaluate
from fcvit_jax.evaluation.logits import LogitsWriter
from fcvit_jax.evaluation.report import format_table, write_report
from fcvit_jax.evaluation.throughput import Rate, measure_throughput
from fcvit_jax.flags import run_script
from fcvit_jax.models import flops
from fcvit_jax.models.schedule import MergeSchedule, parse_schedules
from fcvit_jax.models.vit import ViT


def main(config: Any, workdir: Path) -> None:
    rows = run(config, workdir)
    if jax.process_index() == 0:
        write_report(rows, workdir)
        print(format_table(rows))
        print(f"written: results.jsonl, results.csv and pareto.png in {workdir}")


def run(config: Any, workdir: Path) -> list[dict[str, Any]]:
    """Check everything that can be checked beforehand, then compile, evaluate and time; returns the result rows."""
    for field in ("checkpoint", "dataset"):
        if not config[field]:
            raise InputError(f"config.{field} is empty: pass --config.{field}=...")
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    source = open_source(config.dataset)
    checkpoint = load_checkpoint(config.checkpoint, parallel.replicated(mesh))
    check_classes(source, checkpoint)
    schedules = parse_schedules(config.schedules, checkpoint.config.depth)
    for schedule in schedules.values():
        schedule.plan(checkpoint.config)
    writable_directory(workdir)
    for stale in workdir.glob("logits_*.npz"):  # of an earlier run, and perhaps of other schedules
        stale.unlink()

    steps = {
        name: compile_step(
            ViT(checkpoint.config, schedule),
            checkpoint.preprocess,
            checkpoint.params,
            config.batch_size,
            mesh,
            config.dtype,
        )
        for name, schedule in progress(schedules.items(), desc="compiling", unit="schedule")
    }
    accuracies, batch = count(config, source, checkpoint, steps, mesh, workdir)
    rates = {}
    if config.throughput_blocks > 0:
        with progress(desc="timing", total=config.throughput_blocks * len(steps), unit="block") as bar:
            rates = measure_throughput(steps, checkpoint.params, batch, config.throughput_blocks, on_block=bar.update)
    return [
        result_row(config, checkpoint, name, schedule, accuracies[name], steps[name], rates)
        for name, schedule in schedules.items()
    ]


def count(
    config: Any,
    source: Source,
    checkpoint: Checkpoint,
    steps: dict[str, CompiledStep],
    mesh: jax.sharding.Mesh,
    workdir: Path,
) -> tuple[dict[str, Accuracy], Batch]:
    """The pass over the data; returns the accuracies and the first batch, which stays on the device to be timed."""
    host = eval_batches(
        source,
        checkpoint.preprocess,
        config.batch_size,
        limit=config.limit,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
    )
    num_images = min(len(source), config.limit or len(source))
    first: list[Batch] = []
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(device_batches(host, parallel.batched(mesh))))
        writer = None
        if config.save_logits:
            writer = stack.enter_context(LogitsWriter(workdir, steps, num_images, checkpoint.config.num_classes))
        bar = stack.enter_context(progress(desc="evaluating", total=num_images, unit="img"))

        def on_batch(batch: Batch, logits: Any) -> None:
            if not first:
                first.append(batch)
            if writer:
                writer.add(batch, logits)
            bar.update(min(config.batch_size, num_images - bar.n))

        return evaluate(steps, checkpoint.params, batches, on_batch), first[0]


def result_row(
    config: Any,
    checkpoint: Checkpoint,
    name: str,
    schedule: MergeSchedule,
    accuracy: Accuracy,
    step: CompiledStep,
    rates: dict[str, Rate],
) -> dict[str, Any]:
    """One schedule's result with all its conditions."""
    rate, dense = rates.get(name), rates.get("dense")
    return {
        "schedule": name,
        "stages": str(schedule),
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        "correct": accuracy.correct,
        "num_images": accuracy.num_images,
        "gmacs": flops.gmacs(checkpoint.config, schedule),
        "tokens_out": schedule.tokens(checkpoint.config)[-1],
        "images_per_second": rate.images_per_second if rate else None,
        "images_per_second_spread": rate.spread if rate else None,
        "speedup": rate.images_per_second / dense.images_per_second if rate and dense else None,
        "compile_seconds": step.compile_seconds,
        "checkpoint": config.checkpoint,
        "weights_sha256": checkpoint.meta["provenance"].get("sha256"),
        "dataset": config.dataset,
        "limit": config.limit,
        "preprocess": str(checkpoint.preprocess),
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "device": device_name(),
        "num_devices": jax.device_count(),
        "versions": versions(),
    }


def check_classes(source: Source, checkpoint: Checkpoint) -> None:
    """The data set's labels must mean what the head's outputs mean."""
    classes, names = checkpoint.config.num_classes, checkpoint.meta["class_names"]
    if not classes:
        raise InputError(f"{checkpoint.path} has no head: it gives features, not classes")
    if (there := len(source.class_names)) != classes:
        raise InputError(f"{source.spec} has {there} classes, the head of {checkpoint.path} has {classes}")
    wnids = [bool(re.fullmatch(r"n\d{8}", name)) for name in (source.class_names[0], *(names or [])[:1])]
    if wnids == [True, False] and classes == 1000 and list(source.class_names) == sorted(source.class_names):
        return  # the 1,000 synsets of ImageNet in their order, which the model has by their names
    if names and list(source.class_names) != names:
        ours, theirs = next(pair for pair in zip(names, source.class_names, strict=True) if pair[0] != pair[1])
        raise InputError(
            f"{source.spec} has class {theirs!r} where {checkpoint.path} has {ours!r}: its labels mean other classes"
        )


def device_name() -> str:
    device = jax.devices()[0]
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar on the terminal of the first process."""
    return tqdm(*args, **kwargs, leave=False, disable=None if jax.process_index() == 0 else True)


if __name__ == "__main__":
    run_script(main, config=Path(__file__).parent / "configs" / "eval_digits.py", workdir="workdir/evaluate")
