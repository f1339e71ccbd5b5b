import json

import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.models.schedule import MergeSchedule, fit_schedules, parse_schedules
from fcvit_jax.search.findings import FEWEST, judge


def noisy(count, ratio, seed=0):
    """Draw heavy-tailed scores of two schedules; the first are `ratio` of the second, with noise in both."""
    generator = np.random.default_rng(seed)
    found, simple = generator.lognormal(0, 1, count) * generator.lognormal(0, 0.5, (2, count))
    return ratio * found, simple


def test_half_the_score_is_better_and_the_interval_holds_it():
    judgement = judge(*noisy(256, 0.5), seed=0)
    assert judgement.better
    assert judgement.low < 0.5 < judgement.high < 1
    assert judge(*noisy(256, 0.5), seed=0) == judgement


def test_chance_is_rarely_taken_for_better():
    assert sum(judge(*noisy(64, 1.0, seed), seed=0).better for seed in range(200)) < 12  # 2.5 % of 200 are 5
    assert sum(judge(*noisy(64, 0.6, seed), seed=0).better for seed in range(50)) > 40


def test_few_images_are_too_few_to_judge():
    judgement = judge([0.1] * (FEWEST - 1), [1.0] * (FEWEST - 1), seed=0)
    assert not judgement.better
    assert "too few to judge" in judgement.reason
    assert judge([0.1] * FEWEST, [1.0] * FEWEST, seed=0).better


def test_equal_scores_are_no_better():
    assert not judge([0.0] * FEWEST, [0.0] * FEWEST, seed=0).better


CONFIG = fc.ViTConfig((32, 32), 4, 32, 2, 2, 64)
FORMS = {"0.6": "global:2:r3@nearest", "0.5": "global:1:r1,global:1:r9"}


def test_a_list_of_schedules_may_name_a_search(tmp_path):
    (tmp_path / "search.json").write_text(json.dumps({"recommended": FORMS}))
    named = parse_schedules(f"dense,search:{tmp_path},tome_r3", 2)
    assert list(named) == ["dense", f"search:{tmp_path}:0.6", f"search:{tmp_path}:0.5", "tome_r3"]
    assert [str(schedule) for schedule in named.values()][1:3] == list(FORMS.values())
    assert list(parse_schedules(f"search:{tmp_path}:0.5", 2)) == [f"search:{tmp_path}:0.5"]
    (tmp_path / "search.json").write_text(json.dumps({"recommended": {"0.6": FORMS["0.6"]}}))
    assert list(parse_schedules(f"search:{tmp_path}", 2)) == [f"search:{tmp_path}"]


def test_a_list_of_schedules_may_name_what_the_checkpoint_recommends():
    named = fit_schedules("dense,recommended", CONFIG, FORMS)[0]
    assert list(named) == ["dense", "recommended:0.6", "recommended:0.5"]
    assert str(fit_schedules("recommended:0.5", CONFIG, FORMS)[0]["recommended:0.5"]) == FORMS["0.5"]
    assert list(fit_schedules("recommended", CONFIG, {"0.6": FORMS["0.6"]})[0]) == ["recommended"]


def test_one_schedule_may_be_named_too(tmp_path):
    (tmp_path / "search.json").write_text(json.dumps({"recommended": FORMS}))
    for text in (f"search:{tmp_path}:0.6", "recommended:0.6"):
        assert str(MergeSchedule.parse(text, 2, FORMS)) == FORMS["0.6"]
    assert str(MergeSchedule.parse("recommended", 2, {"0.6": FORMS["0.6"]})) == FORMS["0.6"]
    for text in (f"search:{tmp_path}", "recommended"):
        with pytest.raises(fc.InputError, match=f"{text} stands for 2 schedules: choose {text}:0.6 or {text}:0.5"):
            MergeSchedule.parse(text, 2, FORMS)
    with pytest.raises(fc.InputError, match="the checkpoint recommends none"):
        MergeSchedule.parse("recommended", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recommended", "the checkpoint recommends none: run python -m fcvit_jax.search with --write"),
        ("search:nowhere", "there is no nowhere/search.json: run python -m fcvit_jax.search first"),
        ("search:HERE:0.7", "there is no budget '0.7': choose one of 0.6, 0.5"),
        ("search:HERE/odd", "is not the file of a search"),
    ],
)
def test_a_missing_recommendation_is_a_one_line_error(text, message, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "search.json").write_text(json.dumps({"recommended": FORMS}))
    (tmp_path / "odd" / "search.json").write_text('{"recommended": [1]}')
    with pytest.raises(fc.InputError) as error:
        parse_schedules(text.replace("HERE", str(tmp_path)), 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
