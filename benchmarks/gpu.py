"""Fill the GPU table of docs/performance.md within 15 minutes, the most important part first.

    python benchmarks/gpu.py OUT
    python benchmarks/gpu.py OUT --dry_run        the same steps on tiny models, on any machine

Needs pip install -e ".[cuda,parity]". Steps that do not fit into the time are left out and named. Every step is a
command, which is printed: benchmarks/inference.py in bfloat16 at batches 1, 64 and 256 (ours; timm's dense model, eager
and compiled), benchmarks/training.py, and the tests of the kernels. The table is printed at the end; --minutes 0 prints
it again from the files in OUT. Goals: dense at least 1.15 x compiled timm; of cut at least 0.92, ViT-L 0.95; `nearest`
within 3 % of `tome`.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fcvit_jax.errors import OneLineParser, one_line_errors
from fcvit_jax.files import local_path, writable_directory

ROOT = Path(__file__).parents[1]


class Step(NamedTuple):
    """A command, as arguments of Python, and the seconds after which it is ended."""

    name: str
    arguments: tuple[str, ...]
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the rows and the output of every step")
    parser.add_argument("--minutes", type=float, default=14.5, help="time limit of all steps (default: %(default)s)")
    parser.add_argument("--dry_run", action="store_true", help="tiny models and few blocks, on a CPU too")
    args = parser.parse_args(argv)
    with one_line_errors():
        out = writable_directory(local_path(args.out).resolve())
        deadline = time.monotonic() + 60 * args.minutes
        for step in steps(out, args.dry_run):
            print(f"{step.name}: python {shlex.join(step.arguments)}", flush=True)
            print(f"  {run(step, out, deadline)}", flush=True)
        print_table(out)


def steps(out: Path, dry_run: bool) -> Iterator[Step]:
    """Yield all steps, the most important first."""
    models = {
        "base": ("vit_base_patch16_224", "dense,tome_r8,tome_r8@nearest,tome_r13,tome_r13@nearest", 220),
        "small": ("vit_small_patch16_224", "dense,tome_r8,tome_r8@nearest,tome_r13,tome_r13@nearest", 200),
        "large": ("vit_large_patch16_224", "dense,tome_r8,tome_r8@nearest", 200),
    }
    sizes, kernels, blocks = "256,64,1", "triton", ("--blocks", "5", "--block_seconds", "0.25")
    size, batch, merged_batch = (), "64", "64"
    if dry_run:
        models = {"tiny": ("vit_tiny_patch16_224", "dense,tome_r2,tome_r2@nearest", 600)}
        sizes, kernels, blocks = "2,1", "xla", ("--blocks", "1", "--block_seconds", "0.01")
        size, batch, merged_batch = ("--image_size", "64"), "4", "1"

    def inference(name: str, *options: str, seconds: float) -> Step:
        common = ("--dtypes", "bfloat16", "--kernels", kernels, "--peer", "timm", "--compile", *size, *blocks)
        written = ("--json", str(out / f"{name}.jsonl"))
        return Step(name, ("benchmarks/inference.py", *common, *options, *written), seconds)

    def dense_peer(name: str) -> Step:
        model, schedules, seconds = models[name]
        what = ("--models", model, "--batch_sizes", sizes, "--schedules", schedules, "--peer_schedules", "dense")
        return inference(name, *what, seconds=seconds)

    first, *others = models
    yield dense_peer(first)
    yield Step("kernels", ("-m", "pytest", "-x", "-q", "-m", "", "tests/models/test_fused.py"), 120)
    train = ("--model", models[first][0], "--batch_size", batch, "--methods", "AdamW,SAM", "--blocks", "3", *size)
    yield Step("training", ("benchmarks/training.py", *train), 120)
    yield from map(dense_peer, others)
    what = ("--models", models[others[0] if others else first][0], "--batch_sizes", merged_batch)
    rate = models[first][1].split(",")[1]
    yield inference("merged_peer", *what, "--schedules", f"dense,{rate}", seconds=300)


def run(step: Step, out: Path, deadline: float) -> str:
    """Run a step, with its output in a file of OUT; returns how it ended."""
    left = min(step.seconds, deadline - time.monotonic())
    if left < 20:
        return "left out: no time left"
    started, log = time.monotonic(), out / f"{step.name}.log"
    with log.open("wb") as file:
        try:
            command = [sys.executable, *step.arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=left)
        except subprocess.TimeoutExpired:
            return f"ended after {left:.0f} s: {log} has its output until then"
    took = f"{time.monotonic() - started:.0f} s"
    return f"done in {took}" if not done.returncode else f"failed after {took}: see {log}"


def print_table(out: Path) -> None:
    """Print the rows of all steps as Markdown."""
    titles = ("model", "batch", "contender", "schedule", "images/s", "spread", "peak", "/dense", "of cut")
    titles += ("/timm dense", "/timm dense compiled")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for path in sorted(out.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        peers = {(row["model"], row["batch_size"], row["contender"]): row for row in rows if row["schedule"] == "dense"}
        for row in rows:
            print(f"| {' | '.join(_cells(row, peers))} |")


def _cells(row: dict[str, Any], peers: dict[tuple[str, int, str], dict[str, Any]]) -> Iterator[str]:
    yield from (row["model"], str(row["batch_size"]), row["contender"], f"`{row['schedule']}`")
    yield f"{row['images_per_second']:,.0f}"
    yield from (f"{row[field]:.1%}" for field in ("spread", "peak_share"))
    yield from ("-" if row[field] is None else f"{row[field]:.2f}" for field in ("over_dense", "of_cut"))
    for name in ("timm", "timm compiled"):
        peer = peers.get((row["model"], row["batch_size"], name))
        if peer is None or row["contender"].startswith("timm"):
            yield "-"
        else:
            yield f"{row['images_per_second'] / peer['images_per_second']:.2f}"


if __name__ == "__main__":
    main()
