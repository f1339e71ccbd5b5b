"""Choosing a candidate at a budget: successive halving over images, then a local refinement.

Jamieson and Talwalkar, arXiv 1502.07943; all candidates are scored on the same images, so that they are compared in
pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from tqdm import tqdm

from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.search.candidates import Candidate, Cost
from fcvit_jax.search.scores import Scorer

_SHARE = 4  # a round keeps a fourth of the candidates, and scores them on four times the images
_FEWEST = 3  # candidates that the last round scores
STEPS = (0.4, 0.2)  # of the refinement, in slope and hump
_BY_SCORE = attrgetter("score")


@dataclass(frozen=True)
class Trial:
    """A candidate at a budget: its schedule, and its mean score over the first `images` images that choose."""

    candidate: Candidate
    schedule: MergeSchedule
    score: float
    images: int


def rounds(candidates: int, batches: int) -> list[tuple[int, int]]:
    """Return how many candidates each round scores, and on how many batches; the last has all batches."""
    found, seen = [], max(1, batches // _SHARE**2)
    while seen < batches:
        found.append((candidates, seen))
        candidates, seen = max(min(_FEWEST, candidates), candidates // _SHARE), min(batches, _SHARE * seen)
    return [*found, (candidates, batches)]


def planned_batches(candidates: int, others: int, batches: int) -> int:
    """Estimate how many batches `Choice` computes, for a progress bar."""
    halving = sum(count * seen for count, seen in rounds(candidates, batches)) + others * batches
    return halving + 10 * len(STEPS) * batches // 2


@dataclass(frozen=True)
class Choice:
    """The choice among candidates at one budget, on the first `batches` batches of a scorer."""

    scorer: Scorer
    batches: int
    cost: Cost
    limit: float
    bar: tqdm

    def __call__(self, candidates: Sequence[Candidate], others: Sequence[Candidate] = ()) -> list[Trial]:
        """Return all trials: first those that were scored on all images that choose, the best of them ahead.

        others: more candidates, which enter the last round.
        """
        trials: dict[MergeSchedule, Trial] = {}
        left = list(candidates)
        for index, (count, batches) in enumerate(plan := rounds(len(left), self.batches)):
            left = left[:count] + (list(others) if index == len(plan) - 1 else [])
            found = list(self._try(left, batches, trials))
            left = [trial.candidate for trial in sorted(found, key=_BY_SCORE)]
        best = min(found, key=_BY_SCORE)
        some = max(1, self.batches // 2)
        for step in STEPS:
            here = best
            near = list(self._try(here.candidate.neighbours(self.scorer.config, step), some, trials))
            near.sort(key=_BY_SCORE)
            for trial in self._try([trial.candidate for trial in near[:2]], self.batches, trials):
                best = min(best, trial, key=_BY_SCORE)
        complete = sorted((trial for trial in trials.values() if trial.images == best.images), key=_BY_SCORE)
        return [*complete, *(trial for trial in trials.values() if trial.images != best.images)]

    def _try(
        self, candidates: Sequence[Candidate] | Iterator[Candidate], batches: int, trials: dict[MergeSchedule, Trial]
    ) -> Iterator[Trial]:
        """Score the candidates that meet the budget, each schedule once."""
        seen = set()
        for candidate in candidates:
            schedule = candidate.within(self.limit, self.cost, self.scorer.config)
            if schedule is None or schedule in seen:
                continue
            seen.add(schedule)
            scores = []
            for batch in range(batches):
                scores += self.scorer(schedule, batch)
                self.bar.update(1)
            trial = Trial(candidate, schedule, float(np.mean(scores)), len(scores))
            if schedule not in trials or trials[schedule].images < trial.images:
                trials[schedule] = trial
            yield trial
