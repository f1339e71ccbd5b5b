"""Merge rules: who merges with whom in a layer, and what the merged token is.

A rule is a frozen dataclass that is called with what a layer knows and returns a `Matching`. It stands in a stage of a
schedule, `Global(10, 16, rule=ToMe())`, or behind a name in text, `tome_r16@NAME(option=value)`. A new rule is one
class; an entry in `RULES` gives it a name in text.

Token Merging, arXiv 2210.09461, section 3; in windows, as LGTM, arXiv 2303.02331.

Shape letters: b batch, n tokens, h heads, w head width, k width of the metric, i and j tokens of the sets A and B.
"""

import dataclasses
import difflib
import functools
import operator
import re
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.compiling import in_one_axis
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.merging import Matching
from fcvit_jax.settings import check_settings


class Attended(NamedTuple):
    """What attention hands on: its output y [b, n, d], and queries, keys and values, [b, h, n, w] each."""

    y: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array


@dataclasses.dataclass(frozen=True)
class Rule:
    """Base class of merge rules: frozen dataclasses, whose fields are the rule's options.

    Rules are hashable and compare by value: models with equal schedules share compiled programs.
    """

    def __post_init__(self) -> None:
        check_settings(self, f"rule {type(self).__name__}: ")

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: "Layer", prefix: int) -> Matching:
        """Match the tokens of one layer.

        attended: of this layer's attention. x: [b, n, d], the tokens, attention added. size: float32 [b, n].
        layer: of the schedule, with `removed` above 0. prefix: how many leading tokens must stay as they are.
        """
        raise NotImplementedError

    def macs(self, layer: "Layer", config: ViTConfig) -> int:
        """Count multiply-accumulates of one layer and image beyond Token Merging's, which the papers leave out."""
        return 0

    def __str__(self) -> str:
        name = next((name for name, rule in RULES.items() if rule is type(self)), type(self).__name__)
        options = [(field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self)]
        told = ",".join(f"{option}={_write(value)}" for option, value, default in options if value != default)
        return f"{name}({told})" if told else name


@dataclasses.dataclass(frozen=True)
class ToMe(Rule):
    """Token Merging's own rule: bipartite soft matching by the cosine of the keys, averaged over heads."""

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: "Layer", prefix: int) -> Matching:
        return match_tokens(mean_over_heads(attended.k), layer, prefix)


DEFAULT = ToMe()  # the rule of names and stages that mention none


class Layer(NamedTuple):
    """One layer of a schedule on a given model, with every number resolved.

    tokens_in, tokens_out: length of the sequence, prefix tokens included, before and after merging.
    removed: tokens merged away in every window (in the whole sequence if `windows` is None).
    windows: in how many windows the patch tokens are matched; None for global matching.
    regroup: (cells, windows), both (rows, columns), if this layer has to reorder the patch tokens first, from row-major
        cells to window by window; None if they are in order already.
    rule: how they are matched.
    grid: (rows, columns) of the grid on which the matched tokens lie in row-major order, in each window or in the
        sequence; None once tokens have merged, or if none do here.
    index, depth: of this layer, from 0, and of the model.
    """

    tokens_in: int
    tokens_out: int
    removed: int = 0
    windows: int | None = None
    regroup: tuple[tuple[int, int], tuple[int, int]] | None = None
    rule: Rule = DEFAULT
    grid: tuple[int, int] | None = None
    index: int = 0
    depth: int = 1


RULES: dict[str, type[Rule]] = {"tome": ToMe}


def parse_rule(text: str) -> Rule:
    """Read a rule: `NAME` or `NAME(option=value,...)`, a name of `RULES`. Raises InputError that offers the nearest."""
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if not found or found[1] not in RULES:
        name = found[1] if found else text
        near = difflib.get_close_matches(name, RULES, n=3, cutoff=0.4) or list(RULES)
        raise InputError(f"unknown merge rule {name!r}: choose {' or '.join(near)}")
    rule = RULES[found[1]]
    kinds = get_type_hints(rule)
    options = {}
    for part in filter(None, (found[2] or "").split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name not in kinds or not equals:
            known = ", ".join(f"{name}=..." for name in kinds) or "none"
            raise InputError(f"merge rule {text!r}: {part.strip()!r} is not one of its options; there are: {known}")
        options[name] = _read(value, kinds[name])
    return rule(**options)


def _read(text: str, kind: Any) -> Any:
    """An option's value by its annotation; text that does not fit is left for the rule's own check to refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _write(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def mean_over_heads(x: jax.Array) -> jax.Array:
    """[b, h, n, w] -> float32 [b, n, w], as a sum of heads.

    XLA:CPU's reduction over that axis takes 30 times as long, 3 to 6 % of a merged ViT-S/14 at 504 px (2026-11-27).
    """
    x = x.astype(jnp.float32)
    return functools.reduce(operator.add, (x[:, head] for head in range(x.shape[1]))) / x.shape[1]


def match_tokens(metric: jax.Array, layer: Layer, prefix: int) -> Matching:
    """Match tokens by bipartite soft matching, arXiv 2210.09461, section 3.

    metric: [b, n, k], any float dtype; tokens are compared by its cosine, in float32. layer: of a schedule, with
    `removed` above 0; its windows are matched separately. prefix: how many leading tokens never merge; they count in
    the alternation of global matching, and not in that of windows.
    """
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    windows = layer.windows
    if windows is None:
        return Matching(*_match_alternating(metric, layer.removed, prefix))
    batch, tokens, width = metric.shape
    patches = tokens - prefix
    length, metric = patches // windows, metric[:, prefix:]
    grouped = window_order(*layer.regroup, patches) if layer.regroup else None
    if grouped is not None:
        metric = metric[:, grouped]
    target, _, order = _match_alternating(metric.reshape(batch * windows, length, width), layer.removed, 0)

    kept = length - layer.removed
    target, order = (part.reshape(batch, windows, length) for part in (target, order))
    window = np.arange(windows, dtype=np.int32)[None, :, None]
    target, order = target + kept * window, order + length * window
    target, stay, go = (part.reshape(batch, -1) for part in (target, order[:, :, :kept], order[:, :, kept:]))
    order = jnp.concatenate([stay, go], axis=1)
    if grouped is not None:
        target, order = target[:, np.argsort(grouped)], jnp.asarray(grouped)[order]
    leading = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    target, order = (jnp.concatenate([leading, prefix + part], axis=1) for part in (target, order))
    return Matching(target, layer.tokens_out, order)


def _match_alternating(metric: jax.Array, r: int, prefix: int) -> tuple[jax.Array, int, jax.Array]:
    """The target, tokens_out and order of `Matching`, for [b, n, k] float32 of which the first `prefix` tokens stay.

    Even positions are A, odd ones B; each A proposes the B of the highest cosine, the r best proposals are merged, and
    the output is [prefix][A kept, in order][B]. Equal cosines go to the lower position. Nothing is sorted: a rank is a
    count of comparisons.
    """
    batch, tokens, _ = metric.shape
    first_a, first_b = first_positions(prefix)
    squares = jnp.sum(metric * metric, axis=-1)
    metric /= in_one_axis(lambda x: jnp.sqrt(jnp.maximum(x, 1e-30)), squares)[:, :, None]
    a, b = metric[:, first_a::2], metric[:, first_b::2]
    similarity = jnp.einsum("bik,bjk->bij", a, b, precision=jax.lax.Precision.HIGHEST)

    best, proposal = jnp.argmax(similarity, axis=-1).astype(jnp.int32), jnp.max(similarity, axis=-1)
    mine, other = proposal[:, :, None], proposal[:, None, :]
    before = np.tri(a.shape[1], k=-1, dtype=bool)[None]  # [_, i, j]: j stands before i
    rank = _total((other > mine) | ((other == mine) & before))
    stays, keep = rank >= r, a.shape[1] - r
    position = _total(stays[:, None, :] & before)  # of A, where it stays
    into = prefix + jnp.where(stays, position, keep + best)
    order = first_a + 2 * _inverse(jnp.where(stays, position, keep + rank))

    fixed = np.zeros(tokens, np.int32)  # the targets of all but A
    fixed[:prefix] = np.arange(prefix)
    fixed[first_b::2] = prefix + keep + np.arange(b.shape[1])
    last = first_a + 2 * (a.shape[1] - 1)
    spread = jax.lax.pad(into, jnp.zeros((), into.dtype), ((0, 0, 0), (first_a, tokens - 1 - last, 1)))
    leading, behind_a = (
        jnp.broadcast_to(part.astype(np.int32), (batch, len(part)))
        for part in (np.arange(prefix), np.arange(first_b, tokens, 2))
    )
    order = jnp.concatenate([leading, order[:, :keep], behind_a, order[:, keep:]], axis=1)
    return spread + fixed[None], tokens - r, order


def first_positions(prefix: int) -> tuple[int, int]:
    """Where A and B begin, each of which has every second position from there on; the prefix is in neither."""
    return prefix + prefix % 2, prefix + 1 - prefix % 2


def _inverse(place: jax.Array) -> jax.Array:
    """Which of so many tokens has each place, both int32 [b, tokens]; 0 to tokens - 1 whatever the places are."""
    index = np.arange(place.shape[1])
    found = place[:, None, :] == index[None, :, None]
    return jnp.minimum(_total(jnp.where(found, index[None, None], 0)), len(index) - 1)


def _total(x: jax.Array) -> jax.Array:
    """The sum along the last axis, int32, of bools or small integers: in float32, which is faster on CPU."""
    return jnp.sum(x, axis=-1, dtype=jnp.float32).astype(jnp.int32)


def window_order(cells: tuple[int, int], windows: tuple[int, int], patches: int) -> np.ndarray:
    """The permutation, int32 [patches], that brings patch tokens from row-major cells into window-by-window order.

    Cells hold equal numbers of tokens, which stay together; windows are row-major, and so are the cells inside one.
    """
    (rows, columns), (down, across) = cells, windows
    index = np.arange(rows * columns, dtype=np.int32)
    index = index.reshape(down, rows // down, across, columns // across).transpose(0, 2, 1, 3).reshape(-1)
    tokens = np.arange(patches, dtype=np.int32).reshape(rows * columns, -1)
    return tokens[index].reshape(-1)
