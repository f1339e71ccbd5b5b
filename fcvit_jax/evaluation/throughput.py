"""Images per second of the model alone: compiled, warm, without decoding and transfer."""

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.evaluation.accuracy import CompiledStep


class Rate(NamedTuple):
    """A speed. images_per_second: the median over the blocks; spread: (fastest - slowest) / median."""

    images_per_second: float
    spread: float


def measure_throughput(
    steps: Mapping[str, CompiledStep],
    params: Any,
    batch: Batch,
    blocks: int = 5,
    block_seconds: float = 0.05,
) -> dict[str, Rate]:
    """Time every schedule on one batch that lies on the device.

    Blocks of the schedules alternate, so that other load on the machine affects all of them alike. A block has as many
    calls as fill `block_seconds`, at least one.
    """

    def seconds(step: CompiledStep, calls: int) -> float:
        started = time.perf_counter()
        outcome: Any = None
        for _ in range(calls):
            outcome, _ = step(params, batch)
        jax.block_until_ready(outcome)
        return time.perf_counter() - started

    calls = {}
    for name, step in steps.items():
        seconds(step, 1)
        calls[name] = max(1, round(block_seconds / seconds(step, 1)))
    # All processes must make the same calls.
    calls = {name: int(many) for name, many in multihost_utils.broadcast_one_to_all(calls).items()}
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in parallel.progress(range(blocks), desc="timing", unit="block"):
        for name, step in steps.items():
            rates[name].append(len(batch.mask) * calls[name] / seconds(step, calls[name]))
    return {
        name: Rate(median := statistics.median(values), (max(values) - min(values)) / median)
        for name, values in rates.items()
    }
