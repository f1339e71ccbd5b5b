"""Candidates with few parameters, and the schedules that they become at a budget.

A coordinate search over all rates overfits the images it chooses by; five numbers hardly do.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import Rule
from fcvit_jax.models.schedule import Dense, Global, Local, MergeSchedule, Stage
from fcvit_jax.search.simulate import WINDOWS

Cost = Callable[[MergeSchedule], float]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A schedule without its mean rate.

    dense: the first layers, which merge nothing. switch: merging layers before this one are local, later ones global.
    slope: how much more the last merging layer removes than the first, over the mean. hump: how much more the middle
    removes than the ends, over the mean.
    """

    rule: Rule
    dense: int = 0
    switch: int = 0
    slope: float = 0.0
    hump: float = 0.0

    def at(self, rate: float, config: ViTConfig) -> MergeSchedule:
        """Build the schedule that removes `rate` tokens a layer on average.

        A remainder from rounding is carried to the next layer, so that small changes of the rate count.
        """
        merging, cell = config.depth - self.dense, math.prod(WINDOWS)
        along = np.linspace(0.0, 1.0, merging) if merging > 1 else np.full(merging, 0.5)
        share = 1 + self.slope * (along - 0.5) + self.hump * (1 / 3 - 4 * (along - 0.5) ** 2)
        stages: list[Stage] = [Dense(1)] * self.dense
        owed = 0.0
        for layer, wanted in enumerate(rate * np.maximum(share, 0.0), self.dense):
            local = layer < self.switch
            unit = cell if local else 1
            owed += float(wanted)
            r = unit * int(owed / unit + 0.5)
            owed -= r
            stages.append(Local(1, r, WINDOWS, self.rule) if local else Global(1, r, self.rule))
        plan = MergeSchedule(tuple(stages)).plan(config)
        stages = [
            Dense(1)
            if isinstance(stage, Dense) or not layer.removed
            else dataclasses.replace(stage, r=layer.removed * (layer.windows or 1))
            for stage, layer in zip(stages, plan, strict=True)
        ]
        return MergeSchedule(_joined(stages))

    def within(self, limit: float, cost: Cost, config: ViTConfig) -> MergeSchedule | None:
        """Find the schedule of the lowest rate that costs no more than the limit; None if none does."""
        low, high = 0.0, 2.0 * config.num_patches
        if cost(self.at(high, config)) > limit:
            return None
        while high - low > 1e-2:
            middle = (low + high) / 2
            low, high = (low, middle) if cost(self.at(middle, config)) <= limit else (middle, high)
        return self.at(high, config)

    def neighbours(self, config: ViTConfig, step: float) -> Iterator["Candidate"]:
        """Yield candidates that differ in one number."""
        for field, by in itertools.product(("slope", "hump"), (step, -step)):
            yield dataclasses.replace(self, **{field: round(getattr(self, field) + by, 3)})
        for dense in (self.dense - 1, self.dense + 1):
            if 0 <= dense < config.depth - 1:
                yield dataclasses.replace(self, dense=dense, switch=self.switch if self.switch > dense else 0)
        if windows_fit(config):
            for switch in (self.switch - 2, self.switch + 2) if self.switch else (config.depth // 2,):
                if switch < config.depth:
                    yield dataclasses.replace(self, switch=switch if switch > self.dense else 0)


def _joined(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Join neighbouring stages that differ only in their number of layers."""
    alike = itertools.groupby(stages, key=lambda stage: dataclasses.replace(stage, layers=1))
    return tuple(dataclasses.replace(stage, layers=sum(one.layers for one in group)) for stage, group in alike)


def windows_fit(config: ViTConfig) -> bool:
    return all(cells % windows == 0 for cells, windows in zip(config.grid, WINDOWS, strict=True))


def plain_candidates(rule: Rule) -> list[Candidate]:
    """List candidates of a constant, a rising and a humped rate."""
    return [Candidate(rule, slope=slope, hump=hump) for slope, hump in ((0.0, 0.0), (0.8, 0.0), (0.0, 0.8))]


def draw_candidates(count: int, rules: Sequence[Rule], config: ViTConfig, seed: Sequence[int]) -> list[Candidate]:
    """Draw candidates without repetition; the first are a constant, a rising and a humped rate for each rule."""
    found = dict.fromkeys(each for plain in zip(*map(plain_candidates, rules), strict=True) for each in plain)
    generator = np.random.default_rng(seed)
    deepest = min(4, config.depth - 1)
    while len(found) < count:
        # The first rule is expected to be the best.
        rule = rules[0] if generator.random() < 0.75 else rules[int(generator.integers(len(rules)))]
        dense = int(generator.integers(deepest)) if generator.random() < 0.5 else 0
        local = windows_fit(config) and dense + 1 < config.depth and generator.random() < 0.25
        switch = int(generator.integers(dense + 1, config.depth)) if local else 0
        slope, hump = generator.uniform(-0.5, 2.0), generator.uniform(-0.4, 1.6)
        found[Candidate(rule, dense, switch, round(slope, 2), round(hump, 2))] = None
    return list(found)[:count]


def simple_families(config: ViTConfig) -> dict[str, str]:
    """List the families to compare with, as names with a gap for the rate; layers scale from a ViT of 12 layers."""
    early, late = max(1, round(config.depth / 6)), max(2, round(config.depth * 7 / 12))
    families = {"tome": "tome_r{}"}
    if early < config.depth:
        families["s2dfe"] = f"s{early}dfe_r{{}}"
    if windows_fit(config) and late < config.depth:
        families["s2winc7"] = f"s2winc{late}_r{{}}"
    return families


def simple_within(form: str, limit: float, cost: Cost, config: ViTConfig) -> str | None:
    """Find the name with the lowest rate that costs no more than the limit; None if none does."""
    rates = range(config.num_patches + 1)
    schedules = (form.format(rate) for rate in rates)
    return next((name for name in schedules if cost(MergeSchedule.parse(name, config.depth)) <= limit), None)


def check_reachable(limit: float, cheapest: float, dense: float, text: str, unit: str) -> None:
    """Raise InputError for a budget that no schedule meets, or that restricts nothing."""
    if limit > dense * (1 + 1e-9):
        raise InputError(f"budget {text}: the dense model needs only {dense:.4g} {unit}; choose less")
    if limit < cheapest:
        raise InputError(f"budget {text}: the cheapest schedule needs {cheapest:.4g} {unit}; choose at least that")
