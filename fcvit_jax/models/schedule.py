"""Merge schedules: which layers stay dense, merge inside windows, or merge globally, and by which rule.

Hashable, so that a schedule is a static argument of a jitted function: every token count is known before anything is
traced. DFE (dense first layers) and LGTM (local, then global merging) follow arXiv 2303.02331; a global stage alone is
Token Merging, arXiv 2210.09461.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from fcvit_jax.errors import InputError
from fcvit_jax.models.rules import DEFAULT, Layer, Rule, parse_rule


@dataclass(frozen=True)
class Dense:
    """`layers` layers that merge nothing."""

    layers: int

    def __str__(self) -> str:
        return f"dense:{self.layers}"


@dataclass(frozen=True)
class Local:
    """`layers` layers, each merging `ceil(r / windows)` tokens inside each of `windows` (rows, columns) windows."""

    layers: int
    r: int
    windows: tuple[int, int] = (2, 2)
    rule: Rule = DEFAULT

    def __str__(self) -> str:
        return f"local:{self.layers}:r{self.r}:w{self.windows[0]}x{self.windows[1]}{_suffix(self.rule)}"


@dataclass(frozen=True)
class Global:
    """`layers` layers, each merging `r` tokens of the whole sequence."""

    layers: int
    r: int
    rule: Rule = DEFAULT

    def __str__(self) -> str:
        return f"global:{self.layers}:r{self.r}{_suffix(self.rule)}"


Stage = Dense | Local | Global


def _suffix(rule: Rule) -> str:
    """What follows a stage in text; Token Merging's own rule is not written."""
    return "" if rule == DEFAULT else f"@{rule}"


class Geometry(Protocol):
    """What a schedule needs to know of a model; `ViTConfig` is one."""

    @property
    def depth(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def num_prefix_tokens(self) -> int: ...


@dataclass(frozen=True)
class MergeSchedule:
    """Stages that together cover all layers of a model.

    Raises InputError (a ValueError) for a stage with negative numbers or without a rule, and for a Local stage after a
    Global one, which has lost the order of the grid.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        merged_globally = False
        for stage in self.stages:
            if stage.layers < 0 or (not isinstance(stage, Dense) and stage.r < 0):
                raise InputError(f"stage {stage}: the number of layers and r must not be negative")
            if not isinstance(stage, Dense) and not isinstance(stage.rule, Rule):
                raise InputError(f"stage {stage}: its rule must be an instance of a class derived from rules.Rule")
            if isinstance(stage, Local):
                if min(stage.windows) < 1:
                    raise InputError(f"stage {stage}: there must be at least one window a side")
                if merged_globally:
                    raise InputError(f"schedule {self}: the stage {stage} cannot follow a global stage")
            merged_globally |= isinstance(stage, Global) and stage.layers > 0 and stage.r > 0

    def __str__(self) -> str:
        return ",".join(map(str, self.stages))

    @property
    def depth(self) -> int:
        """The number of layers that the stages cover."""
        return sum(stage.layers for stage in self.stages)

    @classmethod
    def dense(cls, depth: int) -> "MergeSchedule":
        """The schedule that merges nothing."""
        return cls((Dense(depth),))

    @classmethod
    def parse(cls, text: str, depth: int) -> "MergeSchedule":
        """Read a name (`dense`, `tome_r13`, `s2dfe_r18`, `s2winc7_r16`) or an explicit form, for `depth` layers.

        The explicit form is what `str` gives: `dense:2,local:5:r16:w2x2,global:5:r16`. `@RULE` after a name or a stage
        chooses a merge rule of `rules.RULES`. Raises InputError for other text, for unknown rules, and if the stages do
        not add up to the depth.
        """
        text = text.strip()
        schedule = cls(tuple(map(_parse_stage, _split(text))) if ":" in text else _named_stages(text, depth))
        if schedule.depth != depth:
            raise InputError(f"schedule {text!r} covers {schedule.depth} layers, the model has {depth}")
        return schedule

    def plan(self, config: Geometry) -> tuple[Layer, ...]:
        """Resolve the schedule on a model, layer by layer.

        Raises InputError where the stages do not add up to the depth or the grid does not divide by the windows.
        """
        if self.depth != config.depth:
            raise InputError(f"schedule {self} covers {self.depth} layers, the model has {config.depth}")
        return tuple(self._layers(config))

    def tokens(self, config: Geometry) -> tuple[int, ...]:
        """The number of tokens, prefix tokens included, that leave each layer."""
        return tuple(layer.tokens_out for layer in self.plan(config))

    def _layers(self, config: Geometry) -> Iterator[Layer]:
        prefix = config.num_prefix_tokens
        # The order the patch tokens lie in: `cells` (rows, columns), row-major, each cell the same number of tokens.
        cells = config.grid
        patches = math.prod(cells)
        for stage in self.stages:
            if isinstance(stage, Local) and (cells[0] % stage.windows[0] or cells[1] % stage.windows[1]):
                raise InputError(
                    f"schedule {self}: a {cells[0]}x{cells[1]} grid does not divide into "
                    f"{stage.windows[0]}x{stage.windows[1]} windows"
                )
            for _ in range(stage.layers):
                before = prefix + patches
                match stage:
                    case Dense():
                        yield Layer(before, before)
                    case Local(r=r, windows=windows, rule=rule):
                        count = math.prod(windows)
                        removed = min(-(-r // count), patches // count // 2)
                        regroup = (cells, windows) if removed and cells != windows else None
                        if removed:
                            cells = windows
                        patches -= removed * count
                        yield Layer(before, prefix + patches, removed, count, regroup, rule)
                    case Global(r=r, rule=rule):
                        removed = min(r, patches // 2)
                        patches -= removed
                        yield Layer(before, prefix + patches, removed, rule=rule)


Schedules = str | MergeSchedule | Iterable[str | MergeSchedule] | Mapping[str, MergeSchedule]


def name_schedules(schedules: Schedules, depth: int) -> dict[str, MergeSchedule]:
    """Give schedules names, in order.

    schedules: text as `parse_schedules` reads it; a schedule, named by its explicit form, or `dense` if it merges
    nothing; several of either; or a mapping from names.
    """
    if isinstance(schedules, Mapping):
        return {str(name): schedule for name, schedule in schedules.items()}
    named: dict[str, MergeSchedule] = {}
    for each in [schedules] if isinstance(schedules, str | MergeSchedule) else schedules:
        if isinstance(each, str):
            named |= parse_schedules(each, depth)
        else:
            named["dense" if each == MergeSchedule.dense(depth) else str(each)] = each
    if not named:
        raise InputError("no schedule given: name at least one, such as dense,tome_r13")
    return named


def parse_schedules(text: str, depth: int) -> dict[str, MergeSchedule]:
    """Read a comma-separated list of schedules into {name: schedule}, in order; a name given twice counts once.

    A range of rates, LOW-HIGH or LOW-HIGH:STEP with both ends included, stands for the names that it spells:
    `tome:0-16` for `tome_r0` to `tome_r16`, `s2dfe@RULE:2-20:2` for `s2dfe_r2@RULE`, `s2dfe_r4@RULE` and so on. An
    explicit form contains commas itself: it ends where its layers reach the depth.
    """
    schedules: dict[str, MergeSchedule] = {}
    pending: list[str] = []
    parts = filter(None, (part.strip() for part in _split(text)))
    for part in itertools.chain.from_iterable(map(_expand, parts)):
        pending.append(part)
        if ":" in part and sum(_parse_stage(stage).layers for stage in pending) < depth:
            continue
        name = ",".join(pending)
        schedules[name] = MergeSchedule.parse(name, depth)
        pending = []
    if pending:
        MergeSchedule.parse(",".join(pending), depth)  # raises: its layers do not reach the depth
    if not schedules:
        raise InputError("no schedule given: name at least one, such as dense,tome_r13")
    return schedules


_LONGEST_RANGE = 1000
_FORMS = "dense, tome_r13, s2dfe_r18, s2winc7_r16 or dense:2,local:5:r16:w2x2,global:5:r16"
_RULE = r"(?:@(.+))?"
_STAGES = {
    re.compile(r"dense:(\d{1,9})()"): Dense,
    re.compile(r"local:(\d{1,9}):r(\d{1,9}):w(\d{1,9})x(\d{1,9})" + _RULE): (
        lambda layers, r, rows, columns, **rule: Local(layers, r, (rows, columns), **rule)
    ),
    re.compile(r"global:(\d{1,9}):r(\d{1,9})" + _RULE): Global,
}
# The paper's legend counts differently in its two families: s2dfe leaves two layers dense, s2winc7 merges from the
# second layer on. The multiply-accumulates of its figure admit no other reading.
_NAMES = {
    re.compile(r"dense()"): lambda depth: (Dense(depth),),
    re.compile(r"tome_r(\d{1,9})" + _RULE): lambda depth, r, **rule: (Global(depth, r, **rule),),
    re.compile(r"s(\d{1,9})dfe_r(\d{1,9})" + _RULE): (
        lambda depth, s, r, **rule: (Dense(s), Global(depth - s, r, **rule))
    ),
    re.compile(r"s(\d{1,9})winc(\d{1,9})_r(\d{1,9})" + _RULE): (
        lambda depth, s, c, r, **rule: (Dense(s - 1), Local(c - s + 1, r, **rule), Global(depth - c, r, **rule))
    ),
}


def _split(text: str) -> list[str]:
    """Split at commas, but not at those between a rule's options."""
    return re.split(r",(?![^(]*\))", text)


def _expand(text: str) -> list[str]:
    """The names that a range of rates stands for; any other text is its own."""
    found = re.fullmatch(r"(tome|s\d+dfe|s\d+winc\d+)(@[^:]+)?:(\d{1,9})-(\d{1,9})(?::(\d{1,9}))?", text)
    if not found:
        if re.match(r"(tome|s\d+dfe|s\d+winc\d+)(@[^:]+)?:", text):
            raise InputError(f"{text!r} is not a range of schedules: write tome:0-16, or s2dfe:2-20:2 with a step")
        return [text]
    low, high, step = int(found[3]), int(found[4]), int(found[5] or 1)
    rates = range(low, high + 1, step) if step else ()
    if not 0 < len(rates) <= _LONGEST_RANGE:
        why = f"has {len(rates):,} schedules; at most {_LONGEST_RANGE:,} will do" if rates else "is empty"
        raise InputError(f"the range {text!r} {why}: write LOW-HIGH or LOW-HIGH:STEP, such as tome:0-16")
    return [f"{found[1]}_r{r}{found[2] or ''}" for r in rates]


def _parse_stage(text: str) -> Stage:
    for pattern, stage in _STAGES.items():
        if found := pattern.fullmatch(text.strip()):
            *numbers, rule = found.groups()
            return stage(*map(int, numbers), **({"rule": parse_rule(rule)} if rule else {}))
    raise InputError(f"{text!r} is not a stage of a schedule: write dense:2, local:5:r16:w2x2 or global:5:r16")


def _named_stages(text: str, depth: int) -> tuple[Stage, ...]:
    for pattern, make in _NAMES.items():
        if found := pattern.fullmatch(text):
            *numbers, rule = found.groups()
            stages = make(depth, *map(int, numbers), **({"rule": parse_rule(rule)} if rule else {}))
            if min(stage.layers for stage in stages) < 0:
                needed = ", ".join(f"{stage.layers} {type(stage).__name__.lower()}" for stage in stages)
                raise InputError(f"schedule {text!r} does not fit a model of {depth} layers: it needs {needed} layers")
            return tuple(stage for stage in stages if stage.layers)
    raise InputError(f"{text!r} is not a schedule: write {_FORMS}")
