"""What each choice that makes our model fast on a CPU gains: the model without it against the model with it.

    python benchmarks/tuning.py
    python benchmarks/tuning.py --models vit_small_patch14_dinov2 --image_size 518 --batch_sizes 1,2

All programs of one table run in one process, in alternating blocks. A number is the time without the choice over the
time with all of them: the median over the blocks, with its 95 % interval. Above 1 the choice pays. "compile" compares
the times of one compilation each. docs/tuning_notes.md lists what else was tried.
"""

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from contenders import compile_program, random_params, repeat
from inference import compare_blocks, describe_machine, positive_numbers, time_blocks, write
from tqdm import tqdm

from fcvit_jax import compiling, parallel
from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.models import attention, published, rules, zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import parse_schedules


def _mean(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).mean(axis=1)


CPU = compiling.cpu_info()


def _another_cpu() -> str:
    return "" if "GenuineIntel" in CPU else "GenuineIntel"


# The choice -> what to replace to be without it: (module, name, value).
CHOICES: dict[str, Sequence[tuple[Any, str, Any]]] = {
    "parts of a batch": [(compiling, "part_size", lambda images, tokens, devices: images)],
    "the older emitter of loops": [(compiling, "_LOOPS", {})],
    "this CPU's library of products": [(compiling, "cpu_info", _another_cpu)],
    "softmax divided after its product": [(attention, "_attend_and_divide", attention._attend_by_softmax)],
    "many keys attended in parts": [(attention, "_attend_and_divide", attention._attend_at_once)],
    "the mean over heads as a sum": [(module, "mean_over_heads", _mean) for module in (rules, published)],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vit_small_patch16_224", help="named as timm names them")
    parser.add_argument("--image_size", type=int, help="pixels a side, if not those of the name")
    parser.add_argument("--schedules", default="dense,tome_r13")
    parser.add_argument("--batch_sizes", type=positive_numbers, default=[8, 32])
    told = "numbers of devices that the CPU is split into (default: 1,2)"
    parser.add_argument("--devices", type=positive_numbers, default=[1, 2], help=told)
    parser.add_argument("--choices", default=",".join(CHOICES), help="which to leave out in turn (default: all)")
    parser.add_argument("--blocks", type=int, default=11, help="timed blocks of each program")
    parser.add_argument("--block_seconds", type=float, default=0.7, help="a block is as many calls as fill this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a JSON object a line")
    args = parser.parse_args(argv)
    keep_freed_memory()
    rows = []
    with one_line_errors():
        choices = args.choices.split(",")
        if odd := set(choices) - set(CHOICES):
            raise InputError(f"--choices: {odd.pop()!r} is none of {', '.join(CHOICES)}")
        if all(size % count for size in args.batch_sizes for count in args.devices):
            raise InputError("--batch_sizes: none of them spreads evenly over a number of --devices")
        with suppress(RuntimeError):  # JAX has created its devices already
            jax.config.update("jax_num_cpu_devices", max(args.devices))
        cases = itertools.product(args.models.split(","), args.batch_sizes, args.devices)
        for model, batch_size, count in cases:
            config = zoo.get(model).config
            if args.image_size:
                config = dataclasses.replace(config, image_size=(args.image_size,) * 2)
            if batch_size % count == 0:
                found = measure(model, config, batch_size, count, choices, args)
                print_table(found)
                rows += found
            if args.json:
                write(args.json, "".join(json.dumps(row) + "\n" for row in rows).encode())


def measure(
    model: str, config: ViTConfig, batch_size: int, count: int, choices: Sequence[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Compile and time a model with all choices and without each, under every schedule; a row for each left out."""
    mesh = parallel.data_mesh(jax.devices()[:count])
    params = jax.device_put(random_params(config), parallel.replicated(mesh))
    images = np.random.default_rng(0).standard_normal((batch_size, *config.image_size, 3), np.float32)
    images = jax.device_put(images, parallel.batched(mesh))
    schedules = parse_schedules(args.schedules, config.depth)
    wanted = list(itertools.product(schedules, (None, *choices)))
    runs, seconds = [], []
    for name, choice in tqdm(wanted, "compiling", leave=False):
        with ExitStack() as stack:
            for module, attribute, value in CHOICES[choice] if choice else ():
                stack.enter_context(patch.object(module, attribute, value))
            started = time.perf_counter()
            call = compile_program(config, schedules[name], "float32", params, images, mesh)
            seconds.append(time.perf_counter() - started)
        runs.append(repeat(call, params, images))
    with tqdm(total=args.blocks * len(runs), desc="timing", leave=False) as bar:
        rates = time_blocks(runs, args.blocks, args.block_seconds, bar.update)
    rows = []
    for index, (name, choice) in enumerate(wanted):
        base = wanted.index((name, None))
        ratio, interval = compare_blocks(rates[base], rates[index])
        rows.append(
            {
                "model": model,
                "image_size": config.image_size,
                "batch_size": batch_size,
                "devices": count,
                "schedule": name,
                "without": choice,
                "images_per_second": float(np.median(rates[index])) * batch_size,
                "time_ratio": ratio,
                "time_ratio_interval": interval,
                "compile_seconds": seconds[index],
                "compile_ratio": seconds[index] / seconds[base],
                **describe_machine(None),
            }
        )
    return rows


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    row = rows[0]
    height, width = row["image_size"]
    print(f"{row['model']} at {height}x{width}, batch {row['batch_size']}, {row['devices']} devices: {row['device']}")
    for choice in dict.fromkeys(row["without"] for row in rows):
        members = [row for row in rows if row["without"] == choice]
        if choice is None:
            told = [f"{each['schedule']} {each['images_per_second']:.1f} images/s" for each in members]
            print("with all choices: " + ", ".join(told))
            continue
        cells = []
        for each in members:
            low, high = each["time_ratio_interval"] or (float("nan"),) * 2
            cells.append(f"{each['time_ratio']:.3f} ({low:.3f}-{high:.3f}), compile {each['compile_ratio']:.2f}")
        print(f"without {choice:<36}" + " | ".join(cells))
    print(flush=True)


if __name__ == "__main__":
    main()
