import dataclasses
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

import fcvit_jax as fc
from fcvit_jax.models import flops
from fcvit_jax.models.rules import Nearest
from fcvit_jax.search.candidates import Candidate
from fcvit_jax.search.halving import Choice, rounds

CONFIG = dataclasses.replace(fc.zoo.get("vit_tiny_patch16_224").config, depth=4)


def test_every_round_has_fewer_candidates_and_more_images():
    assert rounds(32, 16) == [(32, 1), (8, 4), (3, 16)]
    assert rounds(2, 1) == [(2, 1)]


@pytest.mark.parametrize(("ahead", "chosen"), [(0.1, "plain"), (0.4, "other")])
def test_a_complicated_candidate_is_chosen_if_it_is_ahead_beyond_chance(ahead, chosen):
    """Differences of 64 images alternate by 2 around the lead: their standard error is 0.25."""
    candidates = {"other": Candidate(Nearest(), dense=1, slope=0.5), "plain": Candidate(Nearest())}
    limit = 0.7 * flops.gmacs(CONFIG)
    cost = lambda schedule: flops.gmacs(CONFIG, schedule)  # noqa: E731
    schedules = {name: each.within(limit, cost, CONFIG) for name, each in candidates.items()}

    def score(schedule: fc.MergeSchedule, batch: int) -> list[float]:
        near = {schedules["other"]: 5 - ahead + np.tile([2.0, -2.0], 2), schedules["plain"]: np.full(4, 5.0)}
        return near.get(schedule, np.full(4, 9.0)).tolist()

    scorer: Any = type("Scorer", (), {"config": CONFIG, "__call__": lambda self, *args: score(*args)})()
    trials = Choice(scorer, 16, cost, limit, tqdm(disable=True))(list(candidates.values()))
    assert trials[0].candidate == candidates[chosen]
    assert trials[0].images == 64
    assert min(trial.score for trial in trials) == pytest.approx(5 - ahead)
