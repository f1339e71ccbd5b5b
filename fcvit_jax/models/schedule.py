"""Merge schedules: which layers stay dense, merge inside windows, or merge globally, and by which rule.

DFE (dense first layers) and LGTM (local, then global merging) follow arXiv 2303.02331; a global stage alone is Token
Merging, arXiv 2210.09461. Schedules are hashable, as static arguments of jitted functions must be.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fcvit_jax.errors import InputError, naming
from fcvit_jax.files import local_path
from fcvit_jax.models.published import DIFFRATE_KEPT, diffrate_layers
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
    """Return what follows a stage in text; Token Merging's own rule is not written."""
    return "" if rule == DEFAULT else f"@{rule}"


class Geometry(Protocol):
    """What a schedule needs to know about a model; `ViTConfig` is one."""

    @property
    def depth(self) -> int: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def num_prefix_tokens(self) -> int: ...


@dataclass(frozen=True)
class MergeSchedule:
    """Stages that together cover all layers of a model.

    Raises InputError (a ValueError) for a stage with negative numbers or without a rule. A Local stage after a Global
    one, which loses the order of the grid, raises it too.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        merged_globally = False
        for stage in self.stages:
            dense = isinstance(stage, Dense)
            if stage.layers < 0 or (not dense and stage.r < 0):
                raise InputError(f"stage {stage}: the number of layers and r must not be negative")
            if not dense and not isinstance(stage.rule, Rule):
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

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The different rules of the stages that are not dense, in order."""
        return tuple(dict.fromkeys(stage.rule for stage in self.stages if not isinstance(stage, Dense)))

    @classmethod
    def dense(cls, depth: int) -> "MergeSchedule":
        """Return the schedule that merges nothing."""
        return cls((Dense(depth),))

    @classmethod
    def parse(cls, text: str, depth: int, recommended: Mapping[str, str] | None = None) -> "MergeSchedule":
        """Read a name (`dense`, `tome_r13`, `s2dfe_r18`, `s2winc7_r16`) or an explicit form, for `depth` layers.

        The explicit form is what `str` gives: `dense:2,local:5:r16:w2x2,global:5:r16`. `@RULE` after a name or a stage
        chooses a merge rule of `rules.RULES`. `search:DIR` and `recommended` are as in `parse_schedules`, if they stand
        for one schedule. Raises InputError for other text, unknown rules, and stages that do not add up to the depth.
        """
        text = text.strip()
        if is_reference(text):
            found = _offers(text, recommended)
            if len(found) > 1:
                raise InputError(f"{text} stands for {len(found)} schedules: choose {' or '.join(found)}")
            return cls.parse(next(iter(found.values())), depth)
        schedule = cls(tuple(map(_parse_stage, re.split(_COMMA, text))) if ":" in text else _named_stages(text, depth))
        if schedule.depth != depth:
            raise InputError(f"schedule {text!r} covers {schedule.depth} layers, the model has {depth}")
        return schedule

    def plan(self, config: Geometry, name: str = "") -> tuple[Layer, ...]:
        """Resolve the schedule on a model, layer by layer.

        name: what a user calls it, for messages. Raises InputError if the stages do not add up to the depth or the grid
        does not divide by the windows.
        """
        if self.depth != config.depth:
            raise InputError(f"schedule {name or self} covers {self.depth} layers, the model has {config.depth}")
        with naming(f"schedule {name or self}"):
            layers = [*self._layers(config)]
        known = {"depth": self.depth, "class_token": getattr(config, "class_token", True)}
        return tuple(layer._replace(index=index, **known) for index, layer in enumerate(layers))

    def tokens(self, config: Geometry) -> tuple[int, ...]:
        """Count the tokens, prefix tokens included, that leave each layer."""
        return tuple(layer.tokens_out for layer in self.plan(config))

    def _layers(self, config: Geometry) -> Iterator[Layer]:
        prefix = config.num_prefix_tokens
        # The order of the patch tokens: `cells` (rows, columns), row-major, with as many tokens in each cell.
        cells = config.grid
        patches = math.prod(cells)
        for stage in self.stages:
            if isinstance(stage, Local) and (cells[0] % stage.windows[0] or cells[1] % stage.windows[1]):
                raise InputError(_no_windows(cells, stage.windows, getattr(config, "patch_size", None)))
            for _ in range(stage.layers):
                before, intact = prefix + patches, patches == math.prod(config.grid)
                match stage:
                    case Dense():
                        yield Layer(before, before)
                    case Local(r=r, windows=windows, rule=rule):
                        count = math.prod(windows)
                        removed = min(-(-r // count), rule.limit(patches // count))
                        regroup = (cells, windows) if removed and cells != windows else None
                        grid = (cells[0] // windows[0], cells[1] // windows[1]) if removed and intact else None
                        cells = windows if removed else cells
                        patches -= removed * count
                        yield Layer(before, prefix + patches, removed, count, regroup, rule, grid)
                    case Global(r=r, rule=rule):
                        removed = min(r, rule.limit(patches))
                        patches -= removed
                        yield Layer(
                            before, prefix + patches, removed, rule=rule, grid=cells if removed and intact else None
                        )


Schedules = str | MergeSchedule | Iterable[str | MergeSchedule] | Mapping[str, MergeSchedule]


def fit_schedules(
    schedules: Schedules, config: Geometry, recommended: Mapping[str, str] | None = None
) -> tuple[dict[str, MergeSchedule], tuple[str, ...]]:
    """Give schedules names, in order, and check that each fits a model.

    schedules: text as `parse_schedules` reads it; a schedule, named by its explicit form, or `dense` if it merges
    nothing; several of either; or a mapping from names. A schedule in text that ends in `?` is left out if it does not
    fit, and a line that reports it is returned too. Raises InputError if another does not fit.
    recommended: the checkpoint's, by budget.
    """
    given = [*schedules.items()] if isinstance(schedules, Mapping) else schedules
    named: dict[str, MergeSchedule] = {}
    unfit: dict[str, list[str]] = {}
    for each in [given] if isinstance(given, str | MergeSchedule) else [*given] or [""]:
        if isinstance(each, str):
            _read(each, config, named, unfit, recommended)
            continue
        dense = "dense" if each == MergeSchedule.dense(config.depth) else str(each)
        name, schedule = (dense, each) if isinstance(each, MergeSchedule) else (str(each[0]), each[1])
        schedule.plan(config, name)
        named[name] = schedule
    listed = "; ".join(f"{', '.join(names)} ({why})" for why, names in unfit.items())
    if not named:
        raise InputError(f"no schedule fits this model: {listed}")
    return named, (f"schedules left out, as they do not fit this model: {listed}",) if unfit else ()


def cross_rules(schedules: Mapping[str, MergeSchedule], rules: str) -> dict[str, MergeSchedule]:
    """Run every schedule that merges under each of several rules, unless it names a rule itself.

    rules: `tome,nearest,evit(fuse=true)`; empty changes nothing. `tome` keeps a schedule's name; other rules are
    appended to it. Raises InputError for an unknown rule.
    """
    chosen = [parse_rule(rule) for rule in re.split(_COMMA, rules)] if rules.strip() else [DEFAULT]
    crossed: dict[str, MergeSchedule] = {}
    for rule in chosen:
        for name, schedule in schedules.items():
            swapped = _swap_rule(schedule, rule)
            if "@" in name or swapped == schedule:
                crossed[name] = schedule
            else:
                crossed[str(swapped) if ":" in name else f"{name}@{rule}"] = swapped
    return crossed


def _swap_rule(schedule: MergeSchedule, rule: Rule) -> MergeSchedule:
    """Put this rule into all stages that merge; return the schedule unchanged if one of them has a rule already."""
    merging = [stage for stage in schedule.stages if not isinstance(stage, Dense) and stage.r]
    if any(stage.rule != DEFAULT for stage in merging):
        return schedule
    return MergeSchedule(tuple(replace(stage, rule=rule) if stage in merging else stage for stage in schedule.stages))


def parse_schedules(text: str, depth: int, recommended: Mapping[str, str] | None = None) -> dict[str, MergeSchedule]:
    """Read a comma-separated list of schedules into {name: schedule}, in order; a name given twice counts once.

    A range of rates, LOW-HIGH or LOW-HIGH:STEP with both ends included, stands for the names that it spells:
    `tome:0-16` for `tome_r0` to `tome_r16`, `s2dfe@RULE:2-20:2` for `s2dfe_r2@RULE`, `s2dfe_r4@RULE` and so on. An
    explicit form contains commas itself: it ends where its layers reach the depth. A `?` after a schedule or a range
    leaves out what does not fit the depth.

    `search:DIR` stands for what the search in DIR recommends, and `recommended` for what the checkpoint recommends: one
    schedule for each budget. `search:DIR:BUDGET` and `recommended:BUDGET` choose one of them. recommended: explicit
    forms, by budget.
    """
    schedules: dict[str, MergeSchedule] = {}
    _read(text, depth, schedules, {}, recommended)
    return schedules


def _read(
    text: str,
    model: Geometry | int,
    schedules: dict[str, MergeSchedule],
    unfit: dict[str, list[str]],
    recommended: Mapping[str, str] | None,
) -> None:
    """Add a text's schedules to `schedules`; to `unfit` those that end in `?` and do not fit a model, or its depth."""
    depth = model if isinstance(model, int) else model.depth
    pending: list[str] = []
    parts = [*filter(None, map(str.strip, re.split(_COMMA, text)))]
    for typed in parts:
        optional, part = typed.endswith("?"), typed.removesuffix("?")
        if is_reference(part):
            for name, form in _offers(part, recommended).items():
                schedules[name] = MergeSchedule.parse(form, depth)
                if not isinstance(model, int):
                    schedules[name].plan(model, name)
            continue
        for name in _expand(part):
            pending.append(name)
            if ":" in name and sum(_parse_stage(stage).layers for stage in pending) < depth and not optional:
                continue
            name, pending = ",".join(pending), []
            try:
                schedule = MergeSchedule.parse(name, depth)
                if not isinstance(model, int):
                    schedule.plan(model, name if name.endswith(part) else f"{name} of {part}")
                schedules[name] = schedule
            except InputError as error:
                if not optional:
                    raise
                why = str(error).split(": ", 1)[-1].partition(";")[0]
                unfit.setdefault(why, []).append(name)
    if pending:
        MergeSchedule.parse(",".join(pending), depth)  # raises: its layers do not reach the depth
    if not parts:
        raise InputError("no schedule given: name at least one, such as dense,tome_r13")


def _no_windows(cells: tuple[int, int], windows: tuple[int, int], patch_size: int | None) -> str:
    """Say why a stage does not fit, and what would."""
    (rows, columns), (down, across) = cells, windows
    fixes = ["use tome_rN or sNdfe_rN"]
    sides = [side for side in range(2, min(cells) // 2 + 1) if rows % side == columns % side == 0]
    fixes += [f"windows of {' or '.join(f'{side}x{side}' for side in sides[:3])}"] if sides else []
    if patch_size:
        height, width = (-(-cell // count) * count * patch_size for cell, count in zip(cells, windows, strict=True))
        fixes.append(f"convert with --image_size {height if height == width else f'{height}x{width}'}")
    return f"a {rows}x{columns} grid does not divide into {down}x{across} windows; {', or '.join(fixes)}"


_COMMA = r",(?![^(]*\))"  # not one between a rule's options
_LONGEST_RANGE = 1000
# Text of a stage or a name -> what its numbers N and its rule, which is optional, make.
_STAGES: dict[str, Callable[..., Stage]] = {
    "dense:N": Dense,
    "local:N:rN:wNxN@RULE": lambda layers, r, rows, columns, rule: Local(layers, r, (rows, columns), rule),
    "global:N:rN@RULE": Global,
}
# The paper's legend counts differently in its two families: s2dfe leaves two layers dense, s2winc7 merges from the
# second layer on. The multiply-accumulates of its figure admit no other reading.
_NAMES: dict[str, Callable[..., tuple[Stage, ...]]] = {
    "dense": lambda depth: (Dense(depth),),
    "tome_rN@RULE": lambda depth, r, rule: (Global(depth, r, rule),),
    "sNdfe_rN@RULE": lambda depth, s, r, rule: (Dense(s), Global(depth - s, r, rule)),
    "sNwincN_rN@RULE": lambda depth, s, c, r, rule: (
        Dense(s - 1), Local(c - s + 1, r, rule=rule), Global(depth - c, r, rule)
    ),
    **{
        re.escape(name): lambda depth, name=name: tuple(
            Global(1, r, rule) if r else Dense(1) for r, rule in diffrate_layers(name)
        )
        for name in DIFFRATE_KEPT
    },
}  # fmt: skip


def _expand(text: str) -> list[str]:
    """List the names that a range of rates stands for; any other text stands for itself."""
    family = re.match(r"(tome|s\d+dfe|s\d+winc\d+)(@[^:]+)?:", text)
    if not family:
        return [text]
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})(?::(\d{1,9}))?", text[family.end() :])
    if not found:
        raise InputError(f"{text!r} is not a range of schedules: write tome:0-16, or s2dfe:2-20:2 with a step")
    low, high, step = int(found[1]), int(found[2]), int(found[3] or 1)
    rates = range(low, high + 1, step) if step else ()
    if not 0 < len(rates) <= _LONGEST_RANGE:
        why = f"has {len(rates):,} schedules, more than {_LONGEST_RANGE:,}" if rates else "is empty"
        raise InputError(f"the range {text!r} {why}: write LOW-HIGH or LOW-HIGH:STEP, such as tome:0-16")
    return [f"{family[1]}_r{r}{family[2] or ''}" for r in rates]


def is_reference(text: str) -> bool:
    """Return whether a text refers to what a search has found, which may change, instead of naming a schedule."""
    return bool(re.match(r"search:|recommended(:|$)", text))


def _offers(text: str, recommended: Mapping[str, str] | None) -> dict[str, str]:
    """Look up the explicit forms that `search:DIR` or `recommended` stands for, by name; a budget may follow."""
    name, budget, found = text, "", recommended
    if text.startswith("search:"):
        if not (local_path(text.removeprefix("search:")) / "search.json").is_file():
            name, _, budget = text.rpartition(":")
        place = local_path(name.removeprefix("search:") if name != "search" else budget) / "search.json"
        try:
            found = json.loads(place.read_text())["recommended"]
            assert all(isinstance(form, str) for form in found.values())
        except OSError:
            raise InputError(f"{text}: there is no {place}: run python -m fcvit_jax.search first") from None
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError):
            raise InputError(f"{text}: {place} is not the file of a search: run python -m fcvit_jax.search") from None
    elif ":" in text:
        name, _, budget = text.partition(":")
    if not found:
        raise InputError(f"{text}: the checkpoint recommends none: run python -m fcvit_jax.search with --write")
    if budget and budget not in found:
        raise InputError(f"{text}: there is no budget {budget!r}: choose one of {', '.join(found)}")
    chosen = {budget: found[budget]} if budget else found
    return {name if len(found) == 1 else f"{name}:{each}": form for each, form in chosen.items()}


def _parse_stage(text: str) -> Stage:
    if stage := _made_by(_STAGES, text.strip()):
        return stage
    raise InputError(f"{text!r} is not a stage of a schedule: write dense:2, local:5:r16:w2x2 or global:5:r16")


def _named_stages(text: str, depth: int) -> tuple[Stage, ...]:
    stages = _made_by(_NAMES, text, depth)
    if not stages:
        forms = "dense, tome_r13, s2dfe_r18, s2winc7_r16 or dense:2,local:5:r16:w2x2,global:5:r16"
        raise InputError(f"{text!r} is not a schedule: write {forms}")
    if min(stage.layers for stage in stages) < 0:
        needed = ", ".join(f"{stage.layers} {type(stage).__name__.lower()}" for stage in stages)
        raise InputError(f"schedule {text!r} does not fit a model of {depth} layers: it needs {needed} layers")
    return tuple(stage for stage in stages if stage.layers)


def _made_by(table: Mapping[str, Callable[..., Any]], text: str, *first: int) -> Any:
    """Call the form that fits with `first`, the numbers in the text and its rule; None if none fits."""
    for form, make in table.items():
        if found := re.fullmatch(form.replace("N", r"(\d{1,9})").replace("@RULE", "(@.+)?"), text):
            return make(*first, *map(_argument, found.groups()))
    return None


def _argument(text: str | None) -> int | Rule:
    if text is None:
        return DEFAULT
    return parse_rule(text[1:]) if text.startswith("@") else int(text)
