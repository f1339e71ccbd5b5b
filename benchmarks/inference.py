"""Speed of merged ViTs: images/s, compile time, memory, and the share of the machine's best matmul.

    python benchmarks/inference.py
    python benchmarks/inference.py --peer timm --compile --json cpu.jsonl --plot cpu.png
    python benchmarks/inference.py --models vit_base_patch16_224 --batch_sizes 1,8 --schedules dense,s2winc7_r16

On a machine with an NVIDIA GPU, after pip install -e ".[cuda,parity]", all that docs/performance.md shows a part of:

    python benchmarks/inference.py --models vit_small_patch16_224,vit_base_patch16_224,vit_large_patch16_224 \\
        --batch_sizes 1,64,256 --dtypes bfloat16 --schedules dense,tome_r8,s2dfe_r8,s2winc7_r8 \\
        --kernels xla,triton --peer timm --compile --json gpu.jsonl --plot gpu.png

Blocks of calls of all contenders and of the matmul alternate, so that other load on the machine affects all alike. The
median counts, and the spread is (fastest - slowest) / median. All start from normalised images of their dtype on the
device and end with logits there. On a GPU the calls of a block are queued and waited for together.

Before anything is timed, every contender's logits are compared with those of our model in float32 on the same weights:
random ones of a trained model's magnitude, or a checkpoint's. A difference that rounding does not explain ends the run.

With --peer timm, "timm" is timm's own forward for dense schedules, and Token Merging on timm's modules
(pytorch_tome.py) for schedules that merge globally. Schedules that merge in windows have no peer.

    /dense    images/s over those of the same contender's dense model
    executed  GMACs that are computed: only what the logits need in the last layer
    cut       GMACs of the dense model over GMACs
    of cut    /dense over cut: 1 if all saved GMACs become time
    of exec   the same, for the GMACs executed
    /first    images/s over those on the first number of --devices; --json has a 95 % interval from 6 blocks on
    /timm     images/s over the fastest timm's under the same schedule
    peak      2 x multiply-accumulates that are executed a second, over FLOP/s of the best matmul in this run
    MiB       arguments, outputs and buffers of the compiled program; for PyTorch, its peak on the GPU
    compile   tracing and compiling; for torch.compile, the first call
    max diff  the largest difference of a logit from float32's, in standard deviations of the logits

With --devices 2 our model is spread over two GPUs. It is compared with the matmul of both, but not with PyTorch, which
computes on one. A CPU runs as two devices, each with a part of the work of the cores. --devices 1,2 compares both where
the batch divides.

On Linux, glibc would map fresh memory for every buffer above 32 MiB, which slows both sides on CPU. The benchmark makes
it keep freed memory, as the library's programs do, unless MALLOC_... variables are set.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, cycle
from math import ceil, gcd, prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import (
    OURS,
    PRECISIONS,
    Case,
    Run,
    compile_program,
    compute_logits,
    prepare_matmuls,
    prepare_ours,
    prepare_timm,
    random_params,
)
from tqdm import tqdm

from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.checkpoint import load_checkpoint, versions
from fcvit_jax.compiling import cpu_info
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.figures import COLOURS
from fcvit_jax.files import writable_directory
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.schedule import parse_schedules
from fcvit_jax.parallel import data_mesh

CHECKED = 8  # images at least
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {  # title -> (field of a row, how it is written)
    "images/s": ("images_per_second", "{:.1f}".format),
    "spread": ("spread", "{:.1%}".format),
    "compile": ("compile_seconds", "{:.1f} s".format),
    "MiB": ("memory_bytes", lambda count: f"{count / 2**20:.0f}"),
    "GMACs": ("gmacs", "{:.3f}".format),
    "executed": ("gmacs_executed", "{:.3f}".format),
    "peak": ("peak_share", "{:.1%}".format),
    "/dense": ("over_dense", "{:.2f}x".format),
    "cut": ("gmacs_cut", "{:.2f}x".format),
    "of cut": ("of_cut", "{:.2f}".format),
    "of exec": ("of_executed_cut", "{:.2f}".format),
    "/first": ("over_first", "{:.3f}".format),
    "/timm": ("over_timm", "{:.2f}x".format),
    "max diff": ("max_difference", "{:.1e}".format),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    args = parse(argv)
    keep_freed_memory()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory of a GPU to PyTorch
    if max(args.devices) > 1:
        with suppress(RuntimeError):  # JAX has created its devices already
            jax.config.update("jax_num_cpu_devices", max(args.devices))
    rows: list[dict[str, Any]] = []
    with one_line_errors():
        check_options(args)
        for case in draw_cases(args):
            found = compare(case, args)
            print_table(case, found)
            rows += found
            if args.json:
                write(args.json, "".join(json.dumps(row) + "\n" for row in rows).encode())
            if args.plot:
                write(args.plot, plot(rows))
    print(f"peak resident memory of the process: {rows[-1]['process_peak_bytes'] / 2**20:.0f} MiB")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word.strip() for word in text.split(",")]

    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words, default=["vit_small_patch16_224"], help="named as timm names them")
    parser.add_argument("--image_size", type=int, help="pixels a side, if not those of the name")
    parser.add_argument("--checkpoint", metavar="DIR", help="time this checkpoint instead of --models")
    parser.add_argument("--schedules", default="dense,tome_r13,s2dfe_r18,s2winc7_r16")
    parser.add_argument("--batch_sizes", type=positive_numbers, default=[32])
    parser.add_argument("--dtypes", type=words, default=["float32"], help=f"of {', '.join(PRECISIONS)}")
    told = "of our model: xla, or triton (bfloat16 on NVIDIA GPUs); xla,triton compares them"
    parser.add_argument("--kernels", type=words, default=["xla"], help=told)
    told = "devices that our model is spread over, one or several numbers; a CPU is split into as many (default: 1)"
    parser.add_argument("--devices", type=positive_numbers, default=[1], metavar="N[,N]", help=told)
    parser.add_argument("--blocks", type=int, default=7, help="timed blocks of each contender")
    parser.add_argument("--block_seconds", type=float, default=2.0, help="a block is as many calls as fill this time")
    parser.add_argument("--peer", choices=["timm"], help="time PyTorch too; needs the parity extra")
    told = "the schedules under which PyTorch is timed (default: all)"
    parser.add_argument("--peer_schedules", type=words, help=told)
    modes = ["default", "reduce-overhead", "max-autotune"]
    told = "with --peer: torch.compile too, in this mode (default: default)"
    parser.add_argument("--compile", nargs="?", const="default", choices=modes, help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, a JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw images/s there, as PNG")
    return parser.parse_args(argv)


def positive_numbers(text: str) -> list[int]:
    """Read a list such as 8,32, for `argparse`."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers: write 8,32")
    return [int(number) for number in text.split(",")]


def check_options(args: argparse.Namespace) -> None:
    """Raise InputError, before any long work, for options that cannot work."""
    if odd := [name for name in args.dtypes if name not in PRECISIONS]:
        raise InputError(f"--dtypes: {odd[0]!r} is none of {', '.join(PRECISIONS)}")
    if "tf32" in args.dtypes and jax.default_backend() != "gpu":
        raise InputError("--dtypes: tf32 is a format of NVIDIA GPUs, and there is none here: leave it out")
    if odd := [name for name in args.kernels if name not in OURS]:
        raise InputError(f"--kernels: {odd[0]!r} is none of {', '.join(OURS)}")
    if "triton" in args.kernels and ("bfloat16" not in args.dtypes or jax.default_backend() != "gpu"):
        raise InputError("--kernels: triton requires an NVIDIA GPU and --dtypes bfloat16: leave it out")
    if (most := max(args.devices)) > jax.device_count():
        raise InputError(f"--devices: {most} is not from 1 to {jax.device_count()}, the devices available")
    if odd := [size for size in args.batch_sizes if all(size % count for count in args.devices)]:
        raise InputError(f"--batch_sizes: {odd[0]} images do not spread evenly over {args.devices[0]} devices")
    if args.blocks < 1 or args.block_seconds <= 0:
        raise InputError("--blocks and --block_seconds: both must be positive")
    if args.checkpoint and args.image_size is not None:
        raise InputError("--image_size: the checkpoint has its own: leave it out")
    if (args.compile or args.peer_schedules) and not args.peer:
        raise InputError("--compile and --peer_schedules: these are PyTorch's: pass --peer timm with them")
    for path in filter(None, (args.json, args.plot)):
        writable_directory(path.resolve().parent)
    if args.peer:
        try:
            import pytorch_tome  # noqa: F401
            import torch
        except ImportError as error:
            raise InputError(f'--peer timm: {error}: pip install -e ".[parity]"') from None
        if jax.default_backend() == "gpu" and not torch.cuda.is_available():
            raise InputError("--peer timm: PyTorch sees no GPU, and JAX does: install a PyTorch built for CUDA")


def draw_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Yield one comparison after the other: the weights, the images, and the logits that contenders must give."""
    for name in [args.checkpoint] if args.checkpoint else args.models:
        if args.checkpoint:
            checkpoint = load_checkpoint(name)
            config, params, name = checkpoint.config, checkpoint.params, Path(name).name
        else:
            config = zoo.get(name).config
            if args.image_size is not None:
                config = replace(config, image_size=(args.image_size, args.image_size))
            params = random_params(config)
        schedules = parse_schedules(args.schedules, config.depth)
        for schedule in schedules.values():
            schedule.plan(config)  # raises for windows that do not fit, before anything is compiled
        one = data_mesh(jax.devices()[:1])
        programs: dict[tuple[str, int], Any] = {}  # for the references: few images at a time serve all batch sizes
        for batch_size in args.batch_sizes:
            shape = (ceil(CHECKED / batch_size), batch_size, *config.image_size, 3)
            batches = np.random.default_rng(0).standard_normal(shape, np.float32)
            few = jnp.asarray(batches.reshape(-1, gcd(shape[0] * batch_size, CHECKED), *shape[2:]))
            references = {}
            for key, schedule in tqdm(schedules.items(), desc=f"{name}: reference logits", leave=False):
                if (which := (key, few.shape[1])) not in programs:
                    programs[which] = compile_program(config, schedule, "float32", params, few[0], one)
                references[key] = compute_logits(programs[which], params, few)
            for dtype in args.dtypes:
                yield Case(name, config, params, schedules, batches, references, dtype)


def compare(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Build, check and time the contenders of a case; a row each, with all conditions."""
    kernels = args.kernels if case.dtype == "bfloat16" else ["xla"]
    counts = [count for count in args.devices if case.batch_size % count == 0]
    ours = (prepare_ours(replace(case, kernels=kind, devices=count)) for kind in kernels for count in counts)
    prepared = chain(*ours, prepare_timm(case, args.compile, args.peer_schedules) if args.peer else ())
    contenders = list(tqdm(prepared, f"{case}: compiling and checking", unit=" contenders", leave=False))
    matmuls = prepare_matmuls(case)
    with tqdm(total=args.blocks * (len(contenders) + len(matmuls)), desc=f"{case}: timing", leave=False) as bar:
        runs = [contender.run for contender in contenders] + list(matmuls.values())
        calls_per_second = time_blocks(runs, args.blocks, args.block_seconds, bar.update)
    flops_per_second = {
        shape: 2 * prod(shape) * statistics.median(rates)
        for shape, rates in zip(matmuls, calls_per_second[len(contenders) :], strict=True)
    }
    best = max(flops_per_second, key=lambda shape: flops_per_second[shape])
    conditions = {
        "model": case.model,
        "image_size": case.config.image_size,
        "batch_size": case.batch_size,
        "dtype": case.dtype,
        "weights": args.checkpoint or "random",
        "blocks": args.blocks,
        "block_seconds": args.block_seconds,
        "matmul_gflops": flops_per_second[best] / 1e9,
        "matmul_shape": best,
        **describe_machine(args.peer),
    }
    medians = [statistics.median(rates) * case.batch_size for rates in calls_per_second]
    rates = {(c.label, c.schedule): rate for c, rate in zip(contenders, medians, strict=False)}
    executed = {(c.label, c.schedule): c.executed_gmacs for c in contenders}
    rows = []
    for contender, blocks in zip(contenders, calls_per_second, strict=False):
        schedule = case.schedules[contender.schedule]
        rate = rates[contender.label, contender.schedule]
        cut = flops.gmacs(case.config) / flops.gmacs(case.config, schedule)
        dense = rates.get((contender.label, "dense"))
        cut_executed = executed.get((contender.label, "dense"), 0.0) / contender.executed_gmacs
        cards = 1 if jax.default_backend() == "cpu" else contender.devices  # the matmul runs on one
        key = contender.schedule
        timm = [rates[each] for each in rates if each[0].startswith("timm") and each[1] == key] if cards == 1 else []
        kinds = [(each.name, each.schedule) for each in contenders]  # on any number of devices
        first = kinds.index((contender.name, key))
        over_first, interval = compare_blocks(blocks, calls_per_second[first])
        peak = flops_per_second[best] * cards
        rows.append(
            {
                "contender": contender.label,
                "devices": contender.devices,
                "schedule": contender.schedule,
                "stages": str(schedule),
                "images_per_second": rate,
                "spread": (max(blocks) - min(blocks)) / statistics.median(blocks),
                "compile_seconds": contender.compile_seconds,
                "memory_bytes": contender.bytes,
                "gmacs": flops.gmacs(case.config, schedule),
                "gmacs_executed": contender.executed_gmacs,
                "peak_share": 2e9 * contender.executed_gmacs * rate / peak,
                "over_dense": rate / dense if dense else None,
                "gmacs_cut": cut,
                "of_cut": rate / dense / cut if dense else None,
                "of_executed_cut": rate / dense / cut_executed if dense else None,
                "over_first": over_first if contender is not contenders[first] else None,
                "over_first_interval": interval if contender is not contenders[first] else None,
                "over_timm": rate / max(timm) if timm else None,
                "max_difference": contender.max_difference,
                **conditions,
            }
        )
    return rows


def time_blocks(
    runs: Sequence[Run], blocks: int, block_seconds: float, on_block: Callable[[], object]
) -> list[list[float]]:
    """Measure calls a second in every block of each, with alternating blocks."""

    def seconds(run: Run, calls: int) -> float:
        time.sleep(0.1)  # lets spinning threads of the previous one go to sleep
        started = time.perf_counter()
        run(calls)
        return time.perf_counter() - started

    many = []
    for run in runs:
        run(1)
        calls = 1
        while (elapsed := seconds(run, calls)) < block_seconds / 4:
            calls *= 4
        many.append(max(1, round(calls * block_seconds / elapsed)))
    rates: list[list[float]] = [[] for _ in runs]
    for _ in range(blocks):
        for run, calls, found in zip(runs, many, rates, strict=True):
            found.append(calls / seconds(run, calls))
            on_block()
    return rates


def compare_blocks(rates: Sequence[float], others: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Compute the median ratio of alternating blocks, and its 95 % interval by ranks; None of fewer than 6 blocks."""
    from scipy.stats import quantile_test

    ratios = np.divide(rates, others)
    low, high = quantile_test(ratios).confidence_interval()
    return float(np.median(ratios)), None if np.isnan(low + high) else (float(low), float(high))


def describe_machine(peer: str | None) -> dict[str, Any]:
    """Describe where and with what a row was measured, and the memory used so far; malloc: settings that matter."""
    import resource

    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = platform.processor() or platform.machine()
        found = re.search(r"model name\s*: (.*)", cpu_info())
        name = found[1] if found else name
    malloc = {key: value for key, value in os.environ.items() if re.match("MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$", key)}
    kept = "keeps freed memory in the main thread's heap" if keep_freed_memory() else "default"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"device": name, "platform": device.platform, "cores": cores, "malloc": malloc or kept}
    if peer:
        import torch

        found |= {"torch_threads": torch.get_num_threads()}
    libraries = {key: importlib.metadata.version(key) for key in ("torch", "timm") if peer}
    unit = 1 if sys.platform == "darwin" else 1024
    return found | {
        "versions": versions() | libraries,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device_peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def print_table(case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
    row = rows[0]
    m, k, n = row["matmul_shape"]
    malloc = "malloc default" if row["malloc"] == "default" else "malloc set"
    print(f"{case}: {row['device']}, {row['cores']} cores, {malloc}")
    print(f"matmul: {row['matmul_gflops']:.0f} GFLOP/s, [{m}, {k}] x [{k}, {n}]")
    wide = max(len(row["schedule"]) for row in rows) + 2
    first = max(len(row["contender"]) for row in rows) + 2
    print(f"{'contender':<{first}}{'schedule':<{wide}}" + "".join(f"{title:>10}" for title in COLUMNS))
    for row in rows:
        cells = ("-" if row[field] is None else text(row[field]) for field, text in COLUMNS.values())
        print(f"{row['contender']:<{first}}{row['schedule']:<{wide}}" + "".join(f"{cell:>10}" for cell in cells))
    print(flush=True)


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot images/s as bars, one panel per comparison, as PNG; above a bar, its speed-up over the contender's dense."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['model']}, batch {row['batch_size']}, {row['dtype']}", []).append(row)
    across = min(3, len(panels))
    down = ceil(len(panels) / across)
    figure = Figure(figsize=(6 * across, 3.6 * down + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(down, across, squeeze=False).flatten()
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colours = dict(zip(names, cycle(COLOURS)))
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        schedules = list(dict.fromkeys(row["schedule"] for row in members))
        for row in members:
            place = schedules.index(row["schedule"]) + (names.index(row["contender"]) + 0.5) / (len(names) + 0.5)
            name = row["contender"]
            bars = axes.bar(place, row["images_per_second"], 0.9 / (len(names) + 0.5), color=colours[name], label=name)
            if row["over_dense"] and row["schedule"] != "dense":
                axes.bar_label(bars, [f"{row['over_dense']:.2f}x"], fontsize=7)
        middle = len(names) / 2 / (len(names) + 0.5)
        labels = [schedule.replace(",", "\n") for schedule in schedules]
        axes.set_xticks([index + middle for index in range(len(schedules))], labels, fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel("images/s")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def write(path: Path, content: bytes) -> None:
    """Replace a file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    main()
