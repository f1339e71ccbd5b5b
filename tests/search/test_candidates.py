from dataclasses import replace

import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.models import flops
from fcvit_jax.models.rules import Nearest, ToMe
from fcvit_jax.models.schedule import Global, Local, MergeSchedule
from fcvit_jax.search.candidates import Candidate, draw_candidates, simple_families, simple_within

CONFIG = fc.zoo.get("vit_small_patch16_224").config
ODD = replace(CONFIG, image_size=(240, 240))  # a grid of 15x15


def cost(schedule):
    return flops.gmacs(CONFIG, schedule)


def test_a_constant_rate_is_token_merging():
    assert Candidate(ToMe()).at(13, CONFIG) == MergeSchedule.parse("tome_r13", 12)
    assert Candidate(ToMe(), dense=2).at(13, CONFIG) == MergeSchedule.parse("s2dfe_r13", 12)
    assert Candidate(ToMe(), dense=1, switch=7).at(16, CONFIG) == MergeSchedule.parse("s2winc7_r16", 12)


def test_a_fraction_of_a_rate_alternates():
    (first, second, *_) = Candidate(Nearest()).at(8.5, CONFIG).stages
    assert (first, second) == (Global(1, 9, Nearest()), Global(1, 8, Nearest()))


def test_slope_and_hump_are_in_units_of_the_mean():
    def removed(**changes):
        return [layer.removed for layer in Candidate(ToMe(), **changes).at(10, CONFIG).plan(CONFIG)]

    np.testing.assert_allclose(removed(slope=1.0), 5 + 10 * np.arange(12) / 11, atol=1)
    rising = removed(hump=0.9)
    assert (rising[0], max(rising), rising[-1]) == (4, 13, 4)
    assert sum(removed(slope=1.5)) == 120


def test_text_has_the_rates_that_are_really_removed():
    schedule = Candidate(ToMe(), switch=6).at(90, CONFIG)
    assert MergeSchedule.parse(str(schedule), 12) == schedule
    # 196 patches; each layer can merge half of them.
    assert schedule.stages[:3] == (Local(1, 92), Local(1, 52), Local(1, 24))
    assert sum(stage.layers * stage.r for stage in schedule.stages if hasattr(stage, "r")) == 195  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("candidate", [Candidate(Nearest()), Candidate(ToMe(), 1, 5, 1.5, -0.4), Candidate(ToMe(), 3)])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_the_budget_is_kept_and_used(candidate, share):
    limit = share * cost(MergeSchedule.dense(12))
    found = candidate.within(limit, cost, CONFIG)
    if found is None:
        assert cost(candidate.at(400, CONFIG)) > limit
    else:
        assert 0.985 * limit < cost(found) <= limit


def test_a_budget_that_a_candidate_cannot_meet():
    assert Candidate(ToMe(), dense=11).within(0.5 * cost(MergeSchedule.dense(12)), cost, CONFIG) is None


def test_simple_families_have_the_lowest_rate_within_the_budget():
    families = simple_families(CONFIG)
    assert list(families.values()) == ["tome_r{}", "s2dfe_r{}", "s2winc7_r{}"]
    for name in ("tome_r13", "s2dfe_r18", "s2winc7_r16"):
        exact = cost(MergeSchedule.parse(name, 12))
        form = next(form for form in families.values() if form.startswith(name.split("_")[0]))
        assert simple_within(form, exact, cost, CONFIG) == name
    assert "s2winc7" not in simple_families(ODD)


def test_drawn_candidates_depend_on_the_seed_alone():
    drawn = draw_candidates(40, [Nearest(), ToMe()], CONFIG, (0, 1))
    assert drawn == draw_candidates(40, [Nearest(), ToMe()], CONFIG, (0, 1))
    assert drawn != draw_candidates(40, [Nearest(), ToMe()], CONFIG, (1, 1))
    assert len(set(drawn)) == 40
    assert drawn[:2] == [Candidate(Nearest()), Candidate(ToMe())]
    assert not any(candidate.switch for candidate in draw_candidates(40, [ToMe()], ODD, (0,)))
    for candidate in [*drawn, *(near for each in drawn for near in each.neighbours(CONFIG, 0.4))]:
        candidate.at(10, CONFIG).plan(CONFIG)  # raises if it is not a schedule of the model
