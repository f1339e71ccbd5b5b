"""Budgets: a share of the dense model's GMACs, GMACs, or a speed measured on this device."""

import functools
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import compiling, parallel
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import StepConfig
from fcvit_jax.models import flops
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import Layer, Rule
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import Block, Merged

FORMS = "0.6 (of the dense GMACs), 2.8G (GMACs), 1.7x (speed-up here) or 900/s (images/s here)"
_COUNTS = 6  # numbers of tokens at which a layer is timed
_BLOCKS, _SECONDS = 7, 0.05


@dataclass(frozen=True)
class Budget:
    """What a schedule may cost, as given. unit: "", "G", "x" or "/s"."""

    text: str
    number: float
    unit: str

    @property
    def timed(self) -> bool:
        return self.unit in ("x", "/s")

    def seconds(self, dense: float) -> float:
        """Compute how long an image may take, from the dense model's seconds."""
        return dense / self.number if self.unit == "x" else 1 / self.number


def parse_budgets(text: str | float | Sequence[str | float]) -> list[Budget]:
    """Read budgets separated by commas; a number is a share. Raises InputError for other text."""
    parts = [text] if isinstance(text, str | int | float) else list(text)
    budgets = []
    for part in filter(None, (piece.strip() for whole in parts for piece in str(whole).split(","))):
        found = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(G|x|/s|)", part)
        if not found or not float(found[1]):
            raise InputError(f"budget {part!r} is not one: write {FORMS}")
        budgets.append(Budget(part, float(found[1]), found[2]))
    if not budgets:
        raise InputError(f"no budget given: write {FORMS}")
    return list(dict.fromkeys(budgets))


def share_cost(config: ViTConfig) -> Callable[[MergeSchedule], float]:
    """Make a function that computes the GMACs of a schedule, and caches them."""
    return functools.cache(lambda schedule: flops.gmacs(config, schedule))


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a layer for one image, by its number of tokens, at one dtype and batch size on this device.

    counts: numbers of tokens, rising. dense: seconds of a layer that merges nothing. merging: seconds that merging
    adds, by the text of the rule. whole: seconds of the dense model.
    """

    counts: list[int]
    dense: list[float]
    merging: dict[str, list[float]]
    whole: float

    def seconds(self, schedule: MergeSchedule, config: ViTConfig) -> float:
        """Predict the seconds of one image: the dense model's time less what the layers save.

        Attention sees the tokens before merging; the MLP, about half of a layer, those after it.
        """
        total = self.whole - config.depth * float(np.interp(config.num_tokens, self.counts, self.dense))
        for layer in schedule.plan(config):
            before, after = np.interp((layer.tokens_in, layer.tokens_out), self.counts, self.dense)
            total += float(before + after) / 2
            if layer.removed:
                total += float(np.interp(layer.tokens_in, self.counts, self.merging[str(layer.rule)]))
        return total


def measure_layers(
    config: ViTConfig, params: Any, rules: Sequence[Rule], step: StepConfig, dense: Callable[[], Any]
) -> LayerTimes:
    """Time the first block at several numbers of tokens, alone and with merging, on one device; calls alternate.

    dense: computes a batch of the dense model, on all devices.
    """
    batch_size, dtype = step.batch_size // step.mesh.size, step.dtype
    compute, precision = compiling.computation(dtype)
    prefix, most = config.num_prefix_tokens, config.num_tokens
    counts = sorted({prefix + int(n) for n in np.linspace(4, most - prefix, _COUNTS)})
    key = jax.random.key(0)
    calls: dict[Any, tuple[Callable[[], Any], int]] = {"whole": (dense, 0)}
    bar = parallel.progress(counts, desc="timing layers", unit="size")
    for count in bar:
        x = jax.random.normal(key, (batch_size, count, config.embed_dim), jnp.float32).astype(compute)
        coordinates = jnp.zeros((1, count, 2), jnp.float32) if config.rotary else None
        before = Merged(x, jnp.ones((batch_size, count), jnp.float32), coordinates=coordinates)
        removed = max(1, (count - prefix) // 8)
        for rule in (None, *rules):
            layer = Layer(count, count, index=1, depth=config.depth)
            if rule:
                # Later layers have no grid any more.
                layer = layer._replace(tokens_out=count - removed, removed=removed, rule=rule)
            block = Block(config, compute, 0.0, 0.0)

            def apply(params: Any, before: Merged, block: Block = block, layer: Layer = layer) -> Any:
                return block.apply({"params": params}, before, layer, False)[:2]  # pyright: ignore[reportIndexIssue]

            program = jax.jit(apply, compiler_options=compiling.options(batch_size, count, compute))
            with jax.default_matmul_precision(precision):
                compiled = program.lower(params["blocks_0"], before).compile()
            calls[rule and str(rule), count] = functools.partial(compiled, params["blocks_0"], before), removed
    found: dict[Any, list[float]] = {name: [] for name in calls}
    repeats = {name: max(1, round(_SECONDS / _seconds(call, 2))) for name, (call, _) in calls.items()}
    for _ in range(_BLOCKS):
        for name, (call, _) in calls.items():
            found[name].append(_seconds(call, repeats[name]))
    # Per image: every device computes its own at the same time.
    took = {name: statistics.median(values) / step.batch_size for name, values in found.items()}
    plain = [took[None, count] for count in counts]
    merging = {}
    for rule in map(str, rules):
        # Without merging, the MLP would have computed the removed tokens too.
        after = [np.interp(count - calls[rule, count][1], counts, plain) for count in counts]
        means = [(here + float(less)) / 2 for here, less in zip(plain, after, strict=True)]
        merging[rule] = [max(0.0, took[rule, count] - mean) for count, mean in zip(counts, means, strict=True)]
    return LayerTimes(counts, plain, merging, took["whole"])


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Measure the seconds of one call."""
    jax.block_until_ready(call())
    started = time.perf_counter()
    for _ in range(repeats):
        found = call()
    jax.block_until_ready(found)
    return (time.perf_counter() - started) / repeats
