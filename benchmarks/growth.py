"""How time and memory grow with the number of tokens: dense, and merged at a share of the dense GMACs.

    python benchmarks/growth.py
    python benchmarks/growth.py --model vit_base_patch16_224 --image_sizes 224,384,512 --rules nearest

One image, float32, one device. Each rule merges at the smallest constant rate that meets the share. MiB are the buffers
of the compiled program, without weights and images. The blocks of all programs alternate, and the median counts. The
exponent is the slope of a line through the logarithms: 1 is linear in the tokens, 2 quadratic.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Run, compile_program, random_params, repeat
from inference import time_blocks, write
from tqdm import tqdm

from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.checkpoint import versions
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import Rule, parse_rule
from fcvit_jax.models.schedule import Global, MergeSchedule
from fcvit_jax.parallel import data_mesh


class Program(NamedTuple):
    """One model at one size under one schedule, compiled."""

    name: str
    tokens: int
    rate: int
    gmacs: float
    mebibytes: float
    compile_seconds: float
    run: Run


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="architecture, by timm's name")
    parser.add_argument("--image_sizes", default="224,320,448,640,1024", help="pixels a side (default: %(default)s)")
    parser.add_argument("--rules", default="tome,nearest", help="merge rules (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.6, help="of the dense GMACs (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each program")
    parser.add_argument("--block_seconds", type=float, default=0.5, help="a block is as many calls as fill this time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a JSON object a line")
    args = parser.parse_args(argv)
    keep_freed_memory()
    with one_line_errors():
        rows = measure(args)
        if args.json:
            write(args.json, "".join(json.dumps(row) + "\n" for row in rows).encode())


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all programs, print the table and the exponents, and return the rows."""
    config = zoo.get(args.model).config
    try:
        sides = sorted({int(side) for side in args.image_sizes.split(",")})
    except ValueError:
        raise InputError(f"--image_sizes: {args.image_sizes!r} is not a list of numbers: write 224,448") from None
    if len(sides) < 2:
        raise InputError("--image_sizes: give at least two sizes")
    if not 0 < args.share < 1 or args.blocks < 1 or args.block_seconds <= 0:
        raise InputError("--share must be between 0 and 1, --blocks and --block_seconds positive")
    rules = [("dense", None), *((name, parse_rule(name)) for name in args.rules.split(","))]
    configs = [dataclasses.replace(config, image_size=(side, side)) for side in sides]
    wanted = [(each, name, rule, pick_rate(each, rule, args.share)) for each in configs for name, rule in rules]
    programs = [prepare(*each) for each in tqdm(wanted, "compiling", leave=False)]
    with tqdm(total=args.blocks * len(programs), desc="timing", leave=False) as bar:
        blocks = time_blocks([each.run for each in programs], args.blocks, args.block_seconds, bar.update)
    rows: list[dict[str, Any]] = []
    print(f"{args.model}, one image, float32, {jax.devices()[0].device_kind}, JAX {versions()['jax']}")
    print(f"{'tokens':>7} {'':<10}{'r':>5}{'GMACs':>9}{'ms':>10}{'spread':>8}{'/dense':>8}{'MiB':>8}{'/dense':>8}")
    dense: dict[str, Any] = {}
    for program, rates in zip(programs, blocks, strict=True):
        seconds = 1 / statistics.median(rates)
        row = program._asdict() | {"seconds": seconds, "model": args.model, "versions": versions()}
        del row["run"]
        rows.append(row)
        dense = row if program.name == "dense" else dense
        print(
            f"{program.tokens:>7} {program.name:<10}{program.rate:>5}{program.gmacs:>9.2f}{1e3 * seconds:>10.1f}"
            f"{(max(rates) - min(rates)) * seconds:>8.1%}{dense['seconds'] / seconds:>7.2f}x"
            f"{program.mebibytes:>8.1f}{program.mebibytes / dense['mebibytes']:>7.2f}x"
        )
    for name, _ in rules:
        mine = [row for row in rows if row["name"] == name]
        found = {field: exponent(mine, field) for field in ("gmacs", "seconds", "mebibytes")}
        print(f"{name:<10} grows as tokens^ " + ", ".join(f"{value:.2f} ({field})" for field, value in found.items()))
    return rows


def pick_rate(config: ViTConfig, rule: Rule | None, share: float) -> int:
    """Find the smallest rate whose schedule has at most this share of the dense GMACs; 0 without a rule."""
    if rule is None:
        return 0
    most = share * flops.gmacs(config)
    for rate in itertools.count(1):
        if flops.gmacs(config, MergeSchedule((Global(config.depth, rate, rule=rule),))) <= most:
            return rate
        if rate > config.num_patches:
            raise InputError(f"--share: {rule} cannot reach {share:g} of the dense GMACs")
    raise AssertionError


def prepare(config: ViTConfig, name: str, rule: Rule | None, rate: int) -> Program:
    """Compile one program, and call it once."""
    stage = Global(config.depth, rate, rule=rule) if rule else None
    schedule = MergeSchedule((stage,)) if stage else MergeSchedule.dense(config.depth)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((1, *config.image_size, 3), np.float32))
    params, mesh, started = random_params(config), data_mesh(jax.devices()[:1]), time.perf_counter()
    call = compile_program(config, schedule, "float32", params, images, mesh)
    seconds, buffers = time.perf_counter() - started, call.memory_analysis().temp_size_in_bytes / 2**20
    gmacs = flops.gmacs(config, schedule)
    return Program(name, config.num_tokens, rate, gmacs, buffers, seconds, repeat(call, params, images))


def exponent(rows: Sequence[dict[str, Any]], field: str) -> float:
    """Fit the slope of log(field) over log(tokens), by least squares."""
    tokens, values = (np.log([row[key] for row in rows]) for key in ("tokens", field))
    return float(np.polyfit(tokens, values, 1)[0])


if __name__ == "__main__":
    main()
