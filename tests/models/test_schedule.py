import dataclasses
import re
from typing import NamedTuple

import pytest

from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import RULES, Layer, Rule
from fcvit_jax.models.schedule import Dense, Global, Local, MergeSchedule, cross_rules, fit_schedules, parse_schedules

VIT_S = ViTConfig(embed_dim=384, num_heads=6, mlp_dim=1536)
SMALL = ViTConfig(image_size=(64, 96), patch_size=8, embed_dim=8, depth=4, num_heads=2, mlp_dim=16)  # 8x12 patches


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("dense", (Dense(12),)),
        ("tome_r13", (Global(12, 13),)),
        ("s2dfe_r18", (Dense(2), Global(10, 18))),
        ("s2winc7_r16", (Dense(1), Local(6, 16), Global(5, 16))),
        ("s1winc3_r8", (Local(3, 8), Global(9, 8))),
        ("s2winc12_r4", (Dense(1), Local(11, 4))),
        ("dense:2,local:5:r16:w2x7,global:5:r16", (Dense(2), Local(5, 16, (2, 7)), Global(5, 16))),
    ],
)
def test_parse_gives_the_stages_and_str_parses_back(text, stages):
    schedule = MergeSchedule.parse(text, 12)
    assert schedule == MergeSchedule(stages)
    assert MergeSchedule.parse(str(schedule), 12) == schedule
    assert hash(schedule) == hash(MergeSchedule(stages))


def test_tokens_leaving_each_layer_of_vit_s():
    tokens = lambda text: MergeSchedule.parse(text, 12).tokens(VIT_S)  # noqa: E731
    assert tokens("dense") == (197,) * 12
    assert tokens("tome_r16") == (*(197 - 16 * layer for layer in range(1, 12)), 11)  # 21 - 16 caps at 21 // 2
    assert tokens("s2dfe_r18")[:4] == (197, 197, 179, 161)
    # The paper's plotted schedule: 25 tokens a window after the local stage, 21 tokens at the end.
    assert tokens("s2winc7_r16")[6] == 1 + 4 * 25
    assert tokens("s2winc7_r16")[-1] == 21
    assert tokens("s2winc7_r5") == (197, *(197 - 8 * layer for layer in range(1, 7)), *range(144, 123, -5))


def test_windows_regroup_once_and_finer_windows_become_coarser():
    plan = MergeSchedule((Local(1, 8, (4, 4)), Dense(1), Local(2, 8, (2, 2)))).plan(SMALL)
    assert plan == (
        Layer(97, 81, 1, 16, ((8, 12), (4, 4)), grid=(2, 3), index=0, depth=4),
        Layer(81, 81, index=1, depth=4),
        Layer(81, 73, 2, 4, ((4, 4), (2, 2)), index=2, depth=4),
        Layer(73, 65, 2, 4, None, index=3, depth=4),
    )


def test_local_rate_is_capped_at_half_a_window():
    assert MergeSchedule((Local(4, 1000, (2, 2)),)).tokens(SMALL) == (49, 25, 13, 9)
    assert MergeSchedule((Local(4, 10**400, (2, 2)),)).tokens(SMALL) == (49, 25, 13, 9)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("dense:3", ("3 layers", "12")),
        ("s14dfe_r2", ("12 layers", "-2 global")),
        ("s2winc13_r2", ("12 layers", "-1 global")),
        ("s9winc7_r2", ("-1 local",)),
        ("s0winc7_r2", ("-1 dense",)),
        ("global:2:r4,local:10:r4:w2x2", ("local:10:r4:w2x2", "global")),
        ("tome_13", ("tome_r13",)),
        ("local:12:r4", ("local:5:r16:w2x2",)),
        ("local:12:r4:w0x2", ("at least one window",)),
        ("", ("not a schedule",)),
        ("tome_r" + "9" * 5000, ("not a schedule",)),
    ],
)
def test_errors_of_schedules_that_do_not_fit_have_the_numbers(text, numbers):
    with pytest.raises(ValueError, match=r"schedule|stage") as caught:
        MergeSchedule.parse(text, 12)
    assert isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    for number in numbers:
        assert number in str(caught.value)


def test_grid_and_depth_of_the_model_are_checked():
    with pytest.raises(InputError, match="8x12 grid does not divide into 3x2 windows"):
        MergeSchedule((Local(4, 4, (3, 2)),)).plan(SMALL)
    with pytest.raises(InputError, match="2x2 grid does not divide into 4x4 windows"):
        MergeSchedule((Local(2, 4, (2, 2)), Local(2, 4, (4, 4)))).plan(SMALL)
    with pytest.raises(InputError, match="covers 12 layers, the model has 4"):
        MergeSchedule.dense(12).plan(SMALL)
    with pytest.raises(InputError, match="negative"):
        MergeSchedule((Dense(-1), Dense(5)))


class Odd(NamedTuple):
    """A model of 7x7 patches of 32 pixels, and 6 layers."""

    grid: tuple[int, int] = (7, 7)
    depth: int = 6
    num_prefix_tokens: int = 1
    patch_size: int = 32


def test_errors_name_a_schedule_as_it_was_typed():
    for typed, message in (
        (
            "tome_r8,s2winc5_r8",
            "schedule s2winc5_r8: a 7x7 grid does not divide into 2x2 windows; use tome_rN or sNdfe_rN",
        ),
        ("s2winc5:1-3", "schedule s2winc5_r1 of s2winc5:1-3: a 7x7 grid"),
        ("dense:1,local:2:r4:w3x3,global:3:r2", "schedule dense:1,local:2:r4:w3x3,global:3:r2: a 7x7 grid does not"),
        ("s2winc7_r16", "schedule 's2winc7_r16' does not fit a model of 6 layers"),
        ("s2winc7_r16,s2winc5_r8?", "schedule 's2winc7_r16' does not fit a model of 6 layers"),
        ("s2winc5_r8?", "no schedule fits this model: s2winc5_r8 (a 7x7 grid does not divide into 2x2 windows)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as caught:
            fit_schedules(typed, Odd())
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"or convert with --image_size 256$"):
        fit_schedules("s2winc5_r8", Odd())
    with pytest.raises(
        InputError, match="use tome_rN or sNdfe_rN, or windows of 3x3, or convert with --image_size 320x384"
    ):
        fit_schedules("s2winc5_r8", Odd(grid=(9, 12)))
    with pytest.raises(InputError, match="schedule mine: a 7x7 grid"):
        fit_schedules({"mine": MergeSchedule((Local(6, 4),))}, Odd())


def test_schedules_with_a_question_mark_are_left_out_if_they_do_not_fit():
    typed = "dense,s2winc5_r8?,tome_r2,s9dfe_r4?,s2winc5:1-3?,dense:1,local:5:r4:w2x2?,global:5:r2?,s2dfe_r3?"
    named, lines = fit_schedules(typed, Odd())
    assert [*named] == ["dense", "tome_r2", "s2dfe_r3"]
    (line,) = lines
    assert line.startswith(
        "schedules left out, as they do not fit this model: s2winc5_r8, s2winc5_r1, s2winc5_r2, s2wi"
    )
    assert "dense:1,local:5:r4:w2x2 (a 7x7 grid does not divide into 2x2 windows)" in line
    assert "s9dfe_r4 (it needs 9 dense, -3 global layers)" in line
    even = Odd(grid=(8, 8))
    named, _ = fit_schedules(typed, even)
    assert {"s2winc5_r8", "s2winc5_r1", "s2winc5_r2", "s2winc5_r3", "dense:1,local:5:r4:w2x2"} <= named.keys()
    assert fit_schedules("dense,s2winc5_r8?", even)[1] == ()
    assert [*parse_schedules("dense,s2winc7_r8?,s2winc5_r8?", 6)] == ["dense", "s2winc5_r8"]  # by the depth alone


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (MergeSchedule.dense(6), ["dense"]),
        ([MergeSchedule((Global(6, 3),)), "tome_r4"], ["global:6:r3", "tome_r4"]),
        ({"a": MergeSchedule((Global(6, 3),)), "b": MergeSchedule.dense(6)}, ["a", "b"]),
        (("dense", "tome_r1,tome_r2"), ["dense", "tome_r1", "tome_r2"]),
    ],
)
def test_schedules_are_given_in_several_forms(given, names):
    assert [*fit_schedules(given, Odd())[0]] == names


def test_a_list_of_schedules_may_mix_names_and_explicit_forms():
    text = "dense, tome_r2,dense:1,global:3:r2,dense:4,s2winc3_r4"
    assert parse_schedules(text, 4) == {
        "dense": MergeSchedule.dense(4),
        "tome_r2": MergeSchedule((Global(4, 2),)),
        "dense:1,global:3:r2": MergeSchedule((Dense(1), Global(3, 2))),
        "dense:4": MergeSchedule.dense(4),
        "s2winc3_r4": MergeSchedule((Dense(1), Local(2, 4), Global(1, 4))),
    }
    with pytest.raises(InputError, match="covers 1 layers, the model has 4"):
        parse_schedules("tome_r2,dense:1", 4)
    with pytest.raises(InputError, match="no schedule"):
        parse_schedules(" , ", 4)


def test_a_range_of_rates_stands_for_its_names():
    names = [*(f"tome_r{r}" for r in range(17)), *(f"s2dfe_r{r}" for r in range(2, 21, 2))]
    assert list(parse_schedules("tome:0-16,s2dfe:2-20:2", 12)) == names
    assert parse_schedules("dense, s2winc7:1-3 ,tome_r5,tome:4-6,dense:12", 12) == parse_schedules(
        "dense,s2winc7_r1,s2winc7_r2,s2winc7_r3,tome_r5,tome_r4,tome_r6,dense:12", 12
    )
    assert list(parse_schedules("tome:3-3,s2dfe:1-6:4", 12)) == ["tome_r3", "s2dfe_r1", "s2dfe_r5"]
    assert parse_schedules("tome:0-0", 12)["tome_r0"].plan(VIT_S) == MergeSchedule.dense(12).plan(VIT_S)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tome:16-0", "the range 'tome:16-0' is empty"),
        ("tome:0-16:0", "the range 'tome:0-16:0' is empty"),
        ("tome:0-1000", "has 1,001 schedules, more than 1,000"),
        ("tome:0-9999999999", "is not a range of schedules"),
        ("tome:4", "is not a range of schedules: write tome:0-16"),
        ("s2dfe:2-", "is not a range of schedules"),
        ("s2winc13:1-4", "does not fit a model of 12 layers"),
        ("s3:1-4", "is not a stage of a schedule"),
    ],
)
def test_ranges_that_make_no_sense(text, says):
    with pytest.raises(InputError, match=says):
        parse_schedules(f"dense,{text}", 12)


@dataclasses.dataclass(frozen=True)
class Other(Rule):
    fuse: bool = False
    k: int = 1


@pytest.fixture
def other(monkeypatch):
    monkeypatch.setitem(RULES, "other", Other)


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("tome_r13@tome", (Global(12, 13),)),
        ("tome_r13@other", (Global(12, 13, Other()),)),
        ("s2dfe_r18@other(k=2)", (Dense(2), Global(10, 18, Other(k=2)))),
        (
            "s2winc7_r16@other(fuse=true,k=2)",
            (Dense(1), Local(6, 16, rule=Other(True, 2)), Global(5, 16, Other(True, 2))),
        ),
        (
            "dense:2,local:5:r16:w2x7@other(fuse=true,k=2),global:5:r16",
            (Dense(2), Local(5, 16, (2, 7), Other(True, 2)), Global(5, 16)),
        ),
        ("dense:11,global:1:r3@other", (Dense(11), Global(1, 3, Other()))),
    ],
)
@pytest.mark.usefixtures("other")
def test_rules_follow_names_and_stages(text, stages):
    schedule = MergeSchedule.parse(text, 12)
    assert schedule == MergeSchedule(stages)
    assert MergeSchedule.parse(str(schedule), 12) == schedule
    assert str(schedule).count("@") == sum(
        getattr(stage, "rule", None) not in (None, Global(1, 1).rule) for stage in stages
    )
    rules = [layer.rule for layer in schedule.plan(VIT_S) if layer.removed]
    assert rules == [stage.rule for stage in stages if not isinstance(stage, Dense) for _ in range(stage.layers)]


@pytest.mark.usefixtures("other")
def test_lists_and_ranges_take_rules():
    text = (
        "dense,tome@other(fuse=true,k=2):1-3:2,s2dfe@other:4-4,tome_r5@other,dense:11,global:1:r3@other(k=2,fuse=true)"
    )
    assert list(parse_schedules(text, 12)) == [
        "dense",
        "tome_r1@other(fuse=true,k=2)",
        "tome_r3@other(fuse=true,k=2)",
        "s2dfe_r4@other",
        "tome_r5@other",
        "dense:11,global:1:r3@other(k=2,fuse=true)",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tome_r3@oter", "unknown merge rule 'oter': choose other"),
        ("tome_r3@", "is not a schedule"),
        ("dense@other", "is not a schedule"),
        ("dense:12@other", "is not a stage"),
        ("tome@other:3", "is not a range of schedules"),
        ("tome_r3@other(k=x)", "k is 'x': it must be a whole number"),
    ],
)
@pytest.mark.usefixtures("other")
def test_rules_that_do_not_fit(text, says):
    with pytest.raises(InputError, match=says):
        parse_schedules(text, 12)


def test_a_rule_is_an_instance_of_a_rule_class():
    with pytest.raises(InputError, match=r"its rule must be an instance of a class derived from rules\.Rule"):
        MergeSchedule((Global(12, 3, rule=Other),))  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("other")
def test_rules_cross_the_schedules_that_merge_and_name_none():
    named = parse_schedules("dense,tome_r0,tome_r2,tome_r3@other,dense:1,global:3:r2,s2winc3_r4", 4)
    crossed = cross_rules(named, "tome, other(fuse=true,k=2)")
    other = Other(True, 2)
    assert crossed == named | {
        "tome_r2@other(fuse=true,k=2)": MergeSchedule((Global(4, 2, other),)),
        "dense:1,global:3:r2@other(fuse=true,k=2)": MergeSchedule((Dense(1), Global(3, 2, other))),
        "s2winc3_r4@other(fuse=true,k=2)": MergeSchedule((Dense(1), Local(2, 4, rule=other), Global(1, 4, other))),
    }
    assert list(crossed)[: len(named)] == list(named)
    for name, schedule in crossed.items():
        assert MergeSchedule.parse(name, 4) == schedule
    assert list(cross_rules(named, "other"))[:4] == ["dense", "tome_r0", "tome_r2@other", "tome_r3@other"]
    assert cross_rules(named, " ") == named
    own = {"mine": MergeSchedule((Global(4, 2),)), "ours": MergeSchedule((Global(2, 2, other), Global(2, 2)))}
    assert list(cross_rules(own, "tome,other")) == ["mine", "ours", "mine@other"]
    with pytest.raises(InputError, match="unknown merge rule 'othr': choose other"):
        cross_rules(named, "tome,othr")
