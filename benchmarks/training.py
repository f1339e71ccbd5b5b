"""The cost of a training step, compared in one run: by method and merge schedule, in memory, and in waiting for photos.

    python benchmarks/training.py
    python benchmarks/training.py --methods AdamW,SAM --schedules dense,tome_r13,s2dfe_r18
    python benchmarks/training.py --model vit_base_patch16_224 --batch_size 64 --dataset folder:photos/train
    python benchmarks/training.py --model packaged:digits --batch_size 32 --json rows.jsonl

Blocks of all contenders alternate, so that other load on the machine affects all alike; the median counts. A block is
twenty steps: LookSAM-5 takes its second gradient in four of them, SAM-last-25% in the last five. SAM/4 is SAM in four
micro-batches. Weights are random: cost does not depend on them. Activations are the memory that grows with the batch:
what the compiled step needs for twice the batch, less what it needs for the batch. Ratios are to the first method under
the first schedule. The rows of --json have the ratio of time with its 95 % interval over the blocks.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import stats
from tqdm import tqdm

from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.checkpoint import abstract_params, load_checkpoint, versions
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.batches import device_batches, train_batches
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.models import zoo
from fcvit_jax.models.flops import gmacs
from fcvit_jax.models.schedule import parse_schedules
from fcvit_jax.models.vit import ViT
from fcvit_jax.program_cache import keep_programs
from fcvit_jax.training.optimizer import OptimizerConfig, make_optimizer
from fcvit_jax.training.recent_steps import WaitingTime
from fcvit_jax.training.sam import SAMConfig, rho_schedule
from fcvit_jax.training.step import Recipe, StepInputs, init_state, make_train_step, phases
from fcvit_jax.training.targets import TargetConfig

BLOCK = 20  # steps
METHODS = {
    "AdamW": SAMConfig(rho=0.0),
    "SAM": SAMConfig(rho=0.05),
    "SAM-last-25%": SAMConfig(rho=0.05, start=0.75 * BLOCK),
    "MSAM": SAMConfig(rho=0.75, direction="momentum"),
    "LookSAM-5": SAMConfig(rho=0.05, refresh_every=5),
    "SAM/4": SAMConfig(rho=0.05, microbatches=4),
}


class Contender:
    """A training run with its own state. steps: compiled steps, by the first step of a block that they compute."""

    def __init__(self, model: ViT, preprocess: Preprocess, sam: SAMConfig, batch: Any):
        params = abstract_params(model.config)
        optimizer, learning_rate = make_optimizer(OptimizerConfig(learning_rate=1e-4), params, 10_000)
        recipe = Recipe(optimizer, learning_rate, sam, rho_schedule(sam, 10_000), TargetConfig())
        self.state = init_state(model, recipe, seed=0)
        self.steps = {}
        for first, each in phases(recipe).items():
            step = jax.jit(make_train_step(model, preprocess, each), donate_argnums=0)
            self.steps[first] = step.lower(self.state, batch).compile()

    def block(self, batches: Iterator[Any], on_step: Callable[[Any], None] = lambda metrics: None) -> float:
        """Measure the seconds of a block and its batches. on_step: called with the metrics of each dispatched step."""
        started = time.perf_counter()
        for index in range(BLOCK):
            step = self.steps[max(first for first in self.steps if first <= index)]
            self.state, metrics = step(self.state, next(batches))
            on_step(metrics)
        jax.block_until_ready(metrics)
        return time.perf_counter() - started

    def memory(self) -> int:
        """Return the bytes that the step needs beside its arguments and results: activations, and gradients."""
        analyses: list[Any] = [step.memory_analysis() for step in self.steps.values()]
        return max(analysis.temp_size_in_bytes for analysis in analyses)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="architecture: timm's name, or a checkpoint")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, help="pixels; the model's own by default")
    parser.add_argument("--methods", default=",".join(METHODS), help="default: %(default)s")
    parser.add_argument("--schedules", default="dense", help="merge schedules to train under (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each contender")
    parser.add_argument("--json", type=Path, help="append a row for each contender to this file")
    parser.add_argument("--dataset", help="photos to feed to the first contender, to measure how long it waits")
    args = parser.parse_args()
    with one_line_errors():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    methods = args.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        raise InputError(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    if args.blocks < 1 or args.batch_size < 1:
        raise InputError("--blocks and --batch_size: both must be positive")
    if args.batch_size % max(METHODS[name].microbatches for name in methods):
        raise InputError(f"--batch_size: {args.batch_size} images do not make four micro-batches: leave SAM/4 out")
    source = open_source(args.dataset) if args.dataset else None  # before anything is compiled
    stored = args.model.startswith("packaged:") or Path(args.model).exists()
    config = load_checkpoint(args.model).config if stored else zoo.get(args.model).config
    size = (args.image_size, args.image_size) if args.image_size is not None else config.image_size
    config = dataclasses.replace(config, image_size=size)
    schedules = parse_schedules(args.schedules, config.depth)
    preprocess = Preprocess(image_size=size)
    keep_freed_memory()
    keep_programs(None)
    rng = np.random.default_rng(0)

    def batch_of(rows: int) -> Any:
        return StepInputs(
            jax.device_put(rng.integers(0, 256, (rows, *size, 3), np.uint8)),
            jax.device_put(rng.integers(0, config.num_classes, rows, np.int32)),
            jax.device_put(np.ones(rows, np.bool_)),
        )

    batch, contenders, activations = batch_of(args.batch_size), {}, {}
    for name, schedule in tqdm(list(itertools.product(methods, schedules)), "compiling", leave=False):
        model = ViT(config, schedules[schedule])
        contender = contenders[name, schedule] = Contender(model, preprocess, METHODS[name], batch)
        twice = Contender(model, preprocess, METHODS[name], batch_of(2 * args.batch_size))
        activations[name, schedule] = twice.memory() - contender.memory()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for warm in tqdm([True] + [False] * args.blocks, "timing", leave=False):
        for key, contender in contenders.items():
            time.sleep(0.1)  # lets spinning threads of the previous one go to sleep
            took = contender.block(iter([batch] * BLOCK))
            if not warm:
                seconds[key].append(took)

    device = jax.devices()[0].device_kind
    print(f"{args.model} at {size[0]} px, batch {args.batch_size}, float32, {device}, JAX {versions()['jax']}")
    layout = f"{{:<14}}{{:<{max(map(len, schedules)) + 2}}}{{:>15}}{{:>17}}{{:>9}}{{:>20}}"
    print(layout.format("", "schedule", "GMACs", "ms/step", "spread", "activations"))
    first, *_ = contenders
    base = gmacs(config, schedules[first[1]]), statistics.median(seconds[first]), activations[first]
    for (name, schedule), times in seconds.items():
        found = gmacs(config, schedules[schedule]), statistics.median(times), activations[name, schedule]
        ratios = [each / one if one else float("nan") for each, one in zip(found, base, strict=True)]
        print(
            layout.format(
                name,
                schedule,
                f"{found[0]:.3f} ({ratios[0]:.2f}x)",
                f"{1e3 * found[1] / BLOCK:.1f} ({ratios[1]:.2f}x)",
                f"{(max(times) - min(times)) / found[1]:.1%}",
                f"{found[2] / 2**20:.0f} MiB ({ratios[2]:.2f}x)",
            )
        )
    if args.json:
        conditions = {"model": args.model, "image_size": size, "batch_size": args.batch_size, "steps": BLOCK}
        conditions |= {"device": f"{device} ({os.cpu_count()} cores)", "versions": versions()}
        conditions |= {"date": date.today().isoformat()}
        with args.json.open("a") as file:
            for (name, schedule), times in seconds.items():
                ratios = np.array(times) / np.array(seconds[first])
                half = stats.t.ppf(0.975, len(times) - 1) * stats.sem(ratios) if len(times) > 1 else float("nan")
                row = {"method": name, "schedule": schedule, "seconds": times, "ratio": ratios.mean(), "half": half}
                file.write(json.dumps(row | conditions) + "\n")
    if source:
        share = waiting(args, contenders[first], preprocess, source)
        print(f"{' under '.join(first)} waits for photos {share:.1%} of the time")


def waiting(args: argparse.Namespace, contender: Contender, preprocess: Preprocess, source: Source) -> float:
    """Measure the share of the time in which the device only waits for photos, after the first block."""
    augment = Augment()
    host = train_batches(
        source,
        lambda image, rng: augment(image, preprocess, rng),
        preprocess.image_size,
        args.batch_size,
        range((args.blocks + 1) * BLOCK),
        seed=0,
    )
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # where the contenders are
    with contextlib.closing(device_batches(host, one)) as batches, contextlib.closing(WaitingTime()) as wait:
        fed = (StepInputs(batch.images, batch.labels, batch.mask) for batch in wait.timed(batches))
        contender.block(fed, wait.started)
        wait.seconds = 0.0
        total = sum(contender.block(fed, wait.started) for _ in tqdm(range(args.blocks), "feeding", leave=False))
        return wait.seconds / total


if __name__ == "__main__":
    main()
