"""Images a second of merged ViTs, side by side with timm in one run.

    python benchmarks/inference.py
    python benchmarks/inference.py --model vit_base_patch16_224 --batch_size 8 --schedules dense,s2winc7_r16

Blocks of all contenders alternate, so that what else the machine does falls on all alike; the median counts. Weights
are random: speed does not depend on them. Every contender starts from normalised float32 images on its device.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.checkpoint import abstract_params, versions
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.schedule import parse_schedules
from fcvit_jax.models.vit import ViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="architecture, by timm's name")
    parser.add_argument("--schedules", default="dense,tome_r13,s2dfe_r18,s2winc7_r16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=7, help="timed blocks of each contender")
    parser.add_argument("--block_seconds", type=float, default=2.0, help="a block is as many calls as fill this time")
    parser.add_argument("--no_timm", action="store_true", help="leave out timm, which needs the parity extra")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too, a JSON object a line")
    args = parser.parse_args()

    config = zoo.get(args.model).config
    schedules = parse_schedules(args.schedules, config.depth)
    images = np.random.default_rng(0).standard_normal((args.batch_size, *config.image_size, 3)).astype(np.float32)
    contenders: dict[str, Callable[[], None]] = {}
    params = random_params(config)
    for name, schedule in schedules.items():
        contenders[name] = ours(ViT(config, schedule), params, jnp.asarray(images))
    if not args.no_timm:
        contenders["timm dense"] = timm_dense(args.model, images)

    rates = measure(contenders, args.batch_size, args.blocks, args.block_seconds)
    threads = os.cpu_count()
    print(f"{args.model}, batch {args.batch_size}, float32, {jax.devices()[0].device_kind} ({threads} cores)")
    print(f"{'contender':<14}{'images/s':>10}{'spread':>9}{'GMACs':>8}{'/ dense':>9}{'GMACs cut':>11}{'/ timm':>9}")
    rows = []
    for name, values in rates.items():
        rate = statistics.median(values)
        row = {
            "contender": name,
            "model": args.model,
            "batch_size": args.batch_size,
            "images_per_second": rate,
            "spread": (max(values) - min(values)) / rate,
            "gmacs": flops.gmacs(config, schedules.get(name)),
            "over_dense": rate / statistics.median(rates["dense"]) if "dense" in rates else None,
            "gmacs_cut": flops.gmacs(config) / flops.gmacs(config, schedules.get(name)),
            "over_timm": rate / statistics.median(rates["timm dense"]) if "timm dense" in rates else None,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
        rows.append(row)
        ratios = [f"{row[key]:.2f}x" if row[key] else "-" for key in ("over_dense", "gmacs_cut", "over_timm")]
        print(
            f"{name:<14}{rate:>10.2f}{row['spread']:>9.1%}{row['gmacs']:>8.2f}{ratios[0]:>9}{ratios[1]:>11}{ratios[2]:>9}"
        )
    if args.json:
        with open(args.json, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def ours(model: ViT, params: dict, images: jax.Array) -> Callable[[], None]:
    """One call of the jitted model, logits only, waited for."""
    call = jax.jit(lambda params, images: model.apply({"params": params}, images)[0]).lower(params, images).compile()
    return lambda: call(params, images).block_until_ready()


def timm_dense(name: str, images: np.ndarray) -> Callable[[], None]:
    """One call of timm's model in inference mode: PyTorch's fused attention, all cores."""
    import timm
    import torch

    model = timm.create_model(name, pretrained=False).eval()
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def call() -> None:
        with torch.inference_mode():
            model(batch)

    return call


def measure(
    contenders: dict[str, Callable[[], None]], batch_size: int, blocks: int, block_seconds: float
) -> dict[str, list[float]]:
    """Images a second of every block of every contender, the blocks alternating."""
    calls = {}
    for name, call in contenders.items():
        call()
        started = time.perf_counter()
        call()
        calls[name] = max(1, round(block_seconds / (time.perf_counter() - started)))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, call in contenders.items():
            time.sleep(0.1)  # threads that the one before left spinning go to sleep
            started = time.perf_counter()
            for _ in range(calls[name]):
                call()
            rates[name].append(batch_size * calls[name] / (time.perf_counter() - started))
    return rates


def random_params(config) -> dict:
    """Parameters of a trained model's magnitude."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.0, 0.02, leaf.shape), jnp.float32), abstract_params(config)
    )


if __name__ == "__main__":
    main()
