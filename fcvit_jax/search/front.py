"""The best schedule at each of several budgets: chosen on some images, judged on the others."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.throughput import measure_throughput
from fcvit_jax.models import flops
from fcvit_jax.models.rules import Rule, parse_rule
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.search.budgets import Budget, LayerTimes, measure_layers
from fcvit_jax.search.candidates import (
    Candidate,
    Cost,
    draw_candidates,
    plain_candidates,
    simple_families,
    simple_within,
)
from fcvit_jax.search.findings import Found, SearchReport, judge
from fcvit_jax.search.halving import Choice, Trial, planned_batches
from fcvit_jax.search.scores import Scorer
from fcvit_jax.settings import check_settings, setting

_TRIES = 3  # attempts to meet a speed, each with a stricter budget


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How to search; `search` explains the fields."""

    limit: int = setting(512, low=2, help="images drawn; half of them choose, the others judge")
    candidates: int = setting(96, low=1, help="candidates of all budgets together")
    batch_size: int = setting(16, low=1, help="images per call, over all devices; speeds hold for this number")
    dtype: str = setting("float32", choices=tuple(PRECISIONS), help="of the computation: float32, tf32 or bfloat16")
    rules: str = setting("nearest,tome", help="merge rules to try, the most promising first")
    seed: int = setting(0, low=0, help="of the drawn images and candidates")
    workers: int | None = setting(None, low=1, help="decoding threads; by default as many as cores")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclasses.dataclass(frozen=True)
class Front:
    """A search over all budgets. half: how many of the scorer's batches choose; the others judge."""

    scorer: Scorer
    config: SearchConfig
    rules: Sequence[Rule]
    budgets: Sequence[Budget]
    half: int
    gmacs: Cost

    def report(self, conditions: Mapping[str, Any]) -> SearchReport:
        """Choose at every budget, then judge."""
        many, model = math.ceil(self.config.candidates / len(self.budgets)), self.scorer.config
        plain = plain_candidates(self.rules[0])
        total = len(self.budgets) * planned_batches(many, len(plain), self.half)
        found, rows, best = [], [], []
        with parallel.progress(desc="searching", total=total, unit="batch") as bar:
            for number, budget in enumerate(self.budgets):
                cost, limit = self._limit(budget)
                drawn = draw_candidates(many, self.rules, model, (self.config.seed, number))
                trials = Choice(self.scorer, self.half, cost, limit, bar)(drawn, [*best, *plain])
                best.append(trials[0].candidate)
                rows += [self._row(trial, budget) for trial in trials]
                found.append(self._judge(budget, trials[0], cost, limit))
        measure = "1 - cosine" if model.headless else "KL"
        return SearchReport(conditions, measure, tuple(found), tuple(rows))

    def _row(self, trial: Trial, budget: Budget) -> dict[str, Any]:
        candidate = dataclasses.asdict(trial.candidate) | {"rule": str(trial.candidate.rule)}
        score = {"schedule": str(trial.schedule), "gmacs": self.gmacs(trial.schedule), "score": trial.score}
        return {"budget": budget.text, **score, "images": trial.images, **candidate}

    def _limit(self, budget: Budget) -> tuple[Cost, float]:
        """Return the cost that a budget limits, and the limit."""
        if not budget.timed:
            dense = flops.gmacs(self.scorer.config) if not budget.unit else 1.0
            return self.gmacs, budget.number * dense
        times = self._layer_times()
        limit = budget.seconds(times.whole)
        model = self.scorer.config

        def seconds(schedule: MergeSchedule) -> float:
            return times.seconds(schedule, model)

        cheapest = min(seconds(Candidate(rule).at(2.0 * model.num_patches, model)) for rule in self.rules)
        if limit > times.whole:
            raise InputError(f"budget {budget.text}: the dense model has {1 / times.whole:.4g} images/s; choose more")
        if limit < cheapest:
            least = f"{times.whole / cheapest:.2f}x, {1 / cheapest:.4g} images/s"
            raise InputError(f"budget {budget.text}: the fastest schedule reaches about {least} here; choose less")
        return seconds, limit

    def _layer_times(self) -> LayerTimes:
        memory, scorer = self.scorer.memory, self.scorer
        texts = [str(rule) for rule in dict.fromkeys([*self.rules, parse_rule("tome")])]
        if "layers" not in memory.known:
            rules = [parse_rule(text) for text in texts]
            local = jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), jax.devices()[0]), scorer.params)
            dense = scorer.compiled(MergeSchedule.dense(scorer.config.depth))
            whole = functools.partial(dense, scorer.params, scorer.batches[0])
            times = measure_layers(scorer.config, local, rules, scorer.step_config, whole)
            memory.keep("counts", times.counts)
            for text in texts:
                memory.keep(f"merging {text}", times.merging[text])
            memory.keep("dense", times.dense)
            memory.keep("layers", [times.whole])
        known = memory.known
        merging = {text: known[f"merging {text}"] for text in texts}
        return LayerTimes([int(n) for n in known["counts"]], known["dense"], merging, known["layers"][0])

    def _speeds(self, schedules: Mapping[str, MergeSchedule]) -> dict[str, float]:
        """Measure images/s of the real programs and the dense model's, in alternating blocks; cached."""
        named = {"dense": MergeSchedule.dense(self.scorer.config.depth), **schedules}
        key = "images/s " + " ".join(map(str, named.values()))
        known = self.scorer.memory.known.get(key)
        if known is None:
            steps = {name: self.scorer.compiled(schedule) for name, schedule in named.items()}
            timed = measure_throughput(steps, self.scorer.params, self.scorer.batches[0], blocks=7)
            known = self.scorer.memory.keep(key, [timed[name].images_per_second for name in named])
        return dict(zip(named, known, strict=True))

    def _judge(self, budget: Budget, trial: Trial, cost: Cost, limit: float) -> Found:
        """Judge a choice by real programs, on the images that did not choose."""
        named, speeds = self._contenders(budget, trial.candidate, cost, limit)
        scores = {name: self._scores(schedule) for name, schedule in named.items()}
        means = {name: float(np.mean(values)) for name, values in scores.items()}
        simple = min((name for name in named if name != "found"), key=lambda name: means[name])
        judgement = judge(scores["found"], scores[simple], self.config.seed)
        chosen = "found" if judgement.better else simple
        costs = {name: self.gmacs(schedule) for name, schedule in named.items()}
        return Found(
            budget=budget.text,
            recommended=str(named[chosen]),
            schedule=str(named["found"]),
            score=means["found"],
            simple=simple,
            simple_score=means[simple],
            families={name: mean for name, mean in means.items() if name != "found"},
            judgement=judgement,
            costs=costs,
            gmacs=costs[chosen],
            share=costs[chosen] / flops.gmacs(self.scorer.config),
            speedup=speeds.get(chosen),
            images_per_second=speeds[chosen] * self._speeds({})["dense"] if speeds else None,
        )

    def _scores(self, schedule: MergeSchedule) -> list[float]:
        last = len(self.scorer.batches)
        return [score for batch in range(self.half, last) for score in self.scorer(schedule, batch, compiled=True)]

    def _contenders(
        self, budget: Budget, candidate: Candidate, cost: Cost, limit: float
    ) -> tuple[dict[str, MergeSchedule], dict[str, float]]:
        """Return schedules within the budget, by name: the candidate's, "found", and one of each simple family.

        Each has the lowest rate that meets the budget; speeds are measured. Returns their speed-ups too, if they were
        timed.
        """
        model = self.scorer.config

        def fit(kind: str, limit: float) -> tuple[str, MergeSchedule] | None:
            if kind == "found":
                found = candidate.within(limit, cost, model)
                return found and ("found", found)
            name = simple_within(forms[kind], limit, cost, model)
            return (name, MergeSchedule.parse(name, model.depth)) if name else None

        forms = simple_families(model)
        limits, met, speeds = dict.fromkeys(["found", *forms], limit), {}, {}
        for _ in range(_TRIES):
            fitted = {kind: pair for kind in limits if kind not in met and (pair := fit(kind, limits[kind]))}
            if not budget.timed or not fitted:
                met |= fitted
                break
            measured = self._speeds(dict(fitted.values()))
            wanted = 1 / budget.seconds(1 / measured["dense"])
            for kind, (name, schedule) in fitted.items():
                if measured[name] >= 0.99 * wanted:
                    met[kind], speeds[name] = (name, schedule), measured[name] / measured["dense"]
                else:
                    limits[kind] *= 0.99 * measured[name] / wanted
        if "found" not in met or len(met) < 2:
            raise InputError(f"budget {budget.text}: no schedule reached it when it was timed; choose less speed")
        return dict(met.values()), speeds
