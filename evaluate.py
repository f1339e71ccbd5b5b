"""Evaluate a checkpoint under many merge schedules, in one pass over the data.

    python evaluate.py
    python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/eval_digits.py, the default, lists them.
Writes results.jsonl, results.csv and pareto.png into the working directory, and logits_<schedule>.npz on request.
"""

import contextlib
import os
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, load_checkpoint, versions
from fcvit_jax.data.batches import device_batches, eval_batches
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError, one_line_errors
from fcvit_jax.evaluation.accuracy import CompiledStep, compile_step, evaluate
from fcvit_jax.evaluation.logits import LogitsWriter
from fcvit_jax.evaluation.report import format_table, write_report
from fcvit_jax.evaluation.throughput import measure_throughput
from fcvit_jax.models import flops
from fcvit_jax.models.schedule import parse_schedules
from fcvit_jax.models.vit import ViT

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parent / "configs" / "eval_digits.py"), "The experiment.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "workdir/evaluate", "Where the results are written.")


def main(argv: list[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"unknown argument {argv[1]!r}: fields are set by --config.FIELD=VALUE")
    with one_line_errors():
        rows = run(_CONFIG.value, Path(_WORKDIR.value))
        if jax.process_index() == 0:
            print(format_table(rows))
            print(f"written: results.jsonl, results.csv, pareto.png in {_WORKDIR.value}")


def run(config: ConfigDict, workdir: Path) -> list[dict]:
    """Load, evaluate, time, and write; returns the result rows."""
    for field in ("checkpoint", "dataset"):
        if not config[field]:
            raise InputError(f"config.{field} is empty: pass --config.{field}=...")
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    checkpoint = load_checkpoint(config.checkpoint, parallel.replicated(mesh))
    schedules = parse_schedules(config.schedules, checkpoint.config.depth)
    for schedule in schedules.values():
        schedule.plan(checkpoint.config)
    source = open_source(config.dataset)
    check_classes(source, checkpoint)
    workdir.mkdir(parents=True, exist_ok=True)

    num_images = min(len(source), config.limit or len(source))
    show = {"disable": None if jax.process_index() == 0 else True, "leave": False}
    steps: dict[str, CompiledStep] = {}
    for name, schedule in tqdm(schedules.items(), "compiling", unit="schedule", **show):
        model = ViT(checkpoint.config, schedule)
        steps[name] = compile_step(
            model, checkpoint.preprocess, checkpoint.params, config.batch_size, mesh, config.dtype
        )

    host = eval_batches(
        source,
        checkpoint.preprocess,
        config.batch_size,
        limit=config.limit,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
    )
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc="evaluating", total=num_images, unit="img", **show))
        save = None
        if config.save_logits:
            classes = checkpoint.config.num_classes
            save = stack.enter_context(LogitsWriter(workdir, steps, num_images, classes))
        first = None

        def on_batch(batch, logits):
            nonlocal first
            first = first or batch
            bar.update(min(config.batch_size, num_images - bar.n))
            if save:
                save.add(batch, logits)

        stack.enter_context(contextlib.closing(host))
        accuracies = evaluate(steps, checkpoint.params, device_batches(host, parallel.batched(mesh)), on_batch)

    rates = {}
    if config.throughput_blocks:
        with tqdm(desc="timing", total=config.throughput_blocks * len(steps), unit="block", **show) as bar:
            rates = measure_throughput(steps, checkpoint.params, first, config.throughput_blocks, on_block=bar.update)

    conditions = {
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
    dense_rate = rates["dense"].images_per_second if "dense" in rates else None
    rows = []
    for name, schedule in schedules.items():
        rate = rates.get(name)
        rows.append(
            {
                "schedule": name,
                "stages": str(schedule),
                "top1": accuracies[name].top1,
                "top5": accuracies[name].top5,
                "correct": accuracies[name].correct,
                "num_images": accuracies[name].num_images,
                "gmacs": flops.gmacs(checkpoint.config, schedule),
                "tokens_out": schedule.tokens(checkpoint.config)[-1],
                "images_per_second": rate and rate.images_per_second,
                "images_per_second_spread": rate and rate.spread,
                "speedup": rate.images_per_second / dense_rate if rate and dense_rate else None,
                "compile_seconds": steps[name].compile_seconds,
                **conditions,
            }
        )
    if jax.process_index() == 0:
        write_report(rows, workdir)
    return rows


def check_classes(source: Source, checkpoint: Checkpoint) -> None:
    """The data set's labels must mean what the head's outputs mean."""
    classes, names = checkpoint.config.num_classes, checkpoint.meta["class_names"]
    if not classes:
        raise InputError(f"{checkpoint.path} has no head: it gives features, not classes")
    if len(source.class_names) != classes:
        there = len(source.class_names)
        raise InputError(f"{source.spec} has {there} classes, the head of {checkpoint.path} has {classes}")
    if names and list(source.class_names) != names:
        ours, theirs = next(pair for pair in zip(names, source.class_names, strict=True) if pair[0] != pair[1])
        raise InputError(
            f"{source.spec}: class {theirs!r} stands where {checkpoint.path} has {ours!r}: its labels mean other classes"
        )


def device_name() -> str:
    device = jax.devices()[0]
    return f"CPU ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main)
