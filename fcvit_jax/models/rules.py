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

from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.merging import Matching, norms
from fcvit_jax.settings import check_settings, setting


class Attended(NamedTuple):
    """What attention hands on: its output y [b, n, d], and queries, keys and values, [b, h, n, w] each.

    size: float32 [b, n], what attention was proportional to; None if it was not.
    turned: queries and keys as attention compared them, if rotary positions turned them; q and k are those before.
    """

    y: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    size: jax.Array | None = None
    turned: tuple[jax.Array, jax.Array] | None = None

    def keys(self, turned: bool = False) -> jax.Array:
        """Keys [b, h, n, w]; with `turned`, as rotary positions have turned them, if the model has any."""
        return self.turned[1] if turned and self.turned else self.k


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

    def limit(self, patches: int) -> int:
        """How many of the patch tokens of a window, or of the whole sequence, one layer can remove at most."""
        return patches // 2

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
    """Token Merging's own rule: bipartite soft matching by the cosine of the keys, averaged over heads.

    turned: compare keys as rotary positions have turned them; models without such positions are not affected.
    """

    turned: bool = False

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: "Layer", prefix: int) -> Matching:
        pairs = propose_pairs(self.directions(attended, x), layer, prefix)
        return merge_ranked(pairs, rank_pairs(pairs.similarity), layer)

    def directions(self, attended: Attended, x: jax.Array) -> jax.Array:
        """Return the keys, of length 1, float32 [b, n, w]: products are what tokens are compared by."""
        return directions(mean_over_heads(attended.keys(self.turned)))


@dataclasses.dataclass(frozen=True)
class Nearest(Rule):
    """Merge the pairs that cost least: the rule that we recommend.

    It has Token Merging's shapes and one matching a layer. Each option is one change from Token Merging; docs/rules.md
    has what each is worth.

    features: weight of the cosine of the tokens' features beside that of their keys, which has weight 1.
    checkerboard: split the grid of the first merging layer by row + column, so that all neighbours can merge.
    size, attention: a pair is ranked by its cost, (1 - similarity) w_i w_j, with w = s^size c^attention of a token's
        size s and the class token's attention c to it: clusters stay small, and what the class token looks at stays
        apart.
    keep_norm: the merged token has the mean of its members' norms (in the spirit of MLERP, arXiv 2312.01026).
    turned: compare keys as rotary positions have turned them, as in `ToMe`.
    """

    features: float = setting(1.0, low=0)
    checkerboard: bool = True
    size: float = setting(0.25, low=0)
    attention: float = setting(0.15, low=0)
    keep_norm: bool = True
    turned: bool = False

    def __call__(self, attended: Attended, x: jax.Array, size: jax.Array, layer: "Layer", prefix: int) -> Matching:
        pairs = propose_pairs(self.directions(attended, x), layer, prefix, self.checkerboard)
        cost = self.cost(pairs.similarity, *pairs.take(self.weights(attended, size, layer, prefix)))
        matching = merge_ranked(pairs, rank_pairs(-cost), layer)
        return dataclasses.replace(matching, keep_norm=self.keep_norm)

    def weights(self, attended: Attended, size: jax.Array, layer: "Layer", prefix: int) -> jax.Array:
        """Weigh tokens in the cost of a pair: float32 [b, n]."""
        return jax.lax.stop_gradient(size**self.size * class_attention(attended, layer, prefix) ** self.attention)

    def directions(self, attended: Attended, x: jax.Array) -> jax.Array:
        """Return keys and features side by side, float32 [b, n, w + d]: products are the weighted mean of cosines."""
        keys = directions(mean_over_heads(attended.keys(self.turned)))
        if not self.features:
            return keys
        share = self.features / (1.0 + self.features)
        return jnp.concatenate([keys * (1.0 - share) ** 0.5, directions(x) * share**0.5], axis=-1)

    def cost(self, similarity: jax.Array, own: jax.Array, other: jax.Array) -> jax.Array:
        """Return the cost of pairs by their similarity and the `weights` of both tokens, float32 of one shape."""
        return (1.0 - similarity) * own * other

    def macs(self, layer: "Layer", config: ViTConfig) -> int:
        """Count those of the features' similarities, and of the class token's attention."""
        a, b = split_tokens(layer, config.num_prefix_tokens, self.checkerboard)
        similarity = config.embed_dim * a.size * b.shape[1] if self.features else 0
        return similarity + (layer.tokens_in * config.embed_dim if self.attention else 0)


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
    class_token: whether the first prefix token, if there is any, is a class token.
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
    class_token: bool = True


RULES: dict[str, type[Rule]] = {"tome": ToMe, "nearest": Nearest}


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


def class_attention(attended: Attended, layer: "Layer", prefix: int) -> jax.Array:
    """Return the class token's attention to each token, the mean over heads: float32 [b, n], constant to gradients.

    Without a class token, the attention of the mean query.
    """
    q, k = (jax.lax.stop_gradient(part).astype(jnp.float32) for part in attended.turned or (attended.q, attended.k))
    query = q[:, :, :1] if prefix and layer.class_token else q.mean(axis=2, keepdims=True)
    logits = (query * k).sum(axis=-1) * q.shape[-1] ** -0.5
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    if attended.size is not None:
        weights *= attended.size[:, None]
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1)


def match_tokens(metric: jax.Array, layer: Layer, prefix: int) -> Matching:
    """Match tokens by bipartite soft matching, arXiv 2210.09461, section 3.

    metric: [b, n, k], any float dtype; tokens are compared by its cosine, in float32. layer: of a schedule, with
    `removed` above 0; its windows are matched separately. prefix: how many leading tokens never merge; they count in
    the alternation of global matching, and not in that of windows.
    """
    pairs = propose_pairs(directions(metric), layer, prefix)
    return merge_ranked(pairs, rank_pairs(pairs.similarity), layer)


class Pairs(NamedTuple):
    """Proposals: each token of a set A proposes to move into the most similar token of a set B of its window.

    a, b: int32 NumPy arrays [v, i] and [v, j], the positions of the tokens in the sequence; v is 1 for global matching.
    best: int32 [b, v, i], the index in `b` of the token proposed to; of equal ones the first.
    similarity: float32 [b, v, i], see `compare`. prefix: how many tokens lead the sequence, in neither set.
    """

    a: np.ndarray
    b: np.ndarray
    best: jax.Array
    similarity: jax.Array
    prefix: int

    def take(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the values of x, [b, n], of both tokens of each pair: [b, v, i] twice."""
        return _pick(x, self.a), jnp.take_along_axis(_pick(x, self.b), self.best, axis=2, mode="clip")

    def place(self, in_a: jax.Array, in_b: jax.typing.ArrayLike, leading: jax.typing.ArrayLike) -> jax.Array:
        """Bring values of A, [b, v, i], and, broadcast, of B and of the prefix, into sequence: [b, n]."""
        images, sequence = len(in_a), [np.arange(self.prefix), self.a.ravel(), self.b.ravel()]
        shapes = (self.prefix,), self.a.shape, self.b.shape
        parts = (
            jnp.broadcast_to(jnp.asarray(part, in_a.dtype), (images, *shape)).reshape(images, -1)
            for part, shape in zip((leading, in_a, in_b), shapes, strict=True)
        )
        return jnp.concatenate(list(parts), axis=1)[:, np.argsort(np.concatenate(sequence))]


def directions(metric: jax.Array) -> jax.Array:
    """Scale the metric of each token, [b, n, k], to length 1, float32: products are cosines, constant to gradients."""
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    return metric / norms(metric)[:, :, None]


def propose_pairs(metric: jax.Array, layer: Layer, prefix: int, checkerboard: bool = False) -> Pairs:
    """Split the tokens of every window into A and B, and propose pairs by similarity, see `compare`.

    Even positions are A, odd ones B. With `checkerboard`, if the tokens still lie on their grid, A are the cells whose
    row and column add up to an even number: all four neighbours of a token are then in the other set.
    """
    a, b = split_tokens(layer, prefix, checkerboard)
    similarity = compare(metric, a, b)
    return Pairs(a, b, jnp.argmax(similarity, axis=-1).astype(jnp.int32), jnp.max(similarity, axis=-1), prefix)


def compare(metric: jax.Array, a: np.ndarray, b: np.ndarray) -> jax.Array:
    """Compute the inner products of the tokens at positions a, [v, i], and b, [v, j], of a float32 metric, [b, n, k].

    Returns float32 [b, v, i, j].
    """
    tokens = _pick(metric, a), _pick(metric, b)
    return jnp.einsum("bvik,bvjk->bvij", *tokens, precision=jax.lax.Precision.HIGHEST)


def _pick(x: jax.Array, positions: np.ndarray) -> jax.Array:
    """[b, n, ...] at positions [v, i]: [b, v, i, ...]. Every other token is sliced, which is cheaper than a gather."""
    if len(positions) == 1 and (np.diff(positions) == 2).all():
        return x[:, positions[0, 0] : positions[0, -1] + 1 : 2][:, None]
    return x[:, positions]


def split_tokens(layer: Layer, prefix: int, checkerboard: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Split the tokens of a layer, see `propose_pairs`: the positions of A and B, int32 [v, i] and [v, j]."""
    tokens = np.arange(prefix, layer.tokens_in, dtype=np.int32)
    if layer.regroup:
        tokens = prefix + window_order(*layer.regroup, len(tokens))
    tokens = tokens.reshape(layer.windows or 1, -1)
    if checkerboard and layer.grid:
        in_a = (np.add.outer(*map(np.arange, layer.grid)) % 2 == 0).reshape(-1)
    else:
        in_a = np.arange(tokens.shape[1]) % 2 == (0 if layer.windows else prefix % 2)
    return tokens[:, in_a], tokens[:, ~in_a]


def rank_pairs(score: jax.Array) -> jax.Array:
    """Rank the pairs of every window by score, float32 [b, v, i]: int32, 0 for the highest.

    Of equal scores the first ranks higher. Nothing is sorted: a rank is a count of comparisons.
    """
    mine, other = score[..., :, None], score[..., None, :]
    return _total((other > mine) | ((other == mine) & _before(score.shape[-1])))


def merge_ranked(pairs: Pairs, rank: jax.Array, layer: Layer) -> Matching:
    """Merge the first `layer.removed` pairs of every window by rank, int32 [b, v, i].

    The output is the prefix, then window by window the kept tokens of A, in order, and B.
    """
    a, b, prefix, images = pairs.a, pairs.b, pairs.prefix, len(rank)
    keep = a.shape[1] - layer.removed
    length = keep + b.shape[1]
    first = prefix + length * np.arange(len(a), dtype=np.int32)[None, :, None]  # of each window in the output
    in_b = first + keep + np.arange(b.shape[1], dtype=np.int32)
    leading = np.arange(prefix, dtype=np.int32)

    stays = rank >= layer.removed
    position = _total(stays[..., None, :] & _before(a.shape[1]))  # of A, where it stays
    target = pairs.place(first + jnp.where(stays, position, keep + pairs.best), in_b, leading)

    ordered = _inverse(jnp.where(stays, position, keep + rank), a)
    kept, gone = ordered[..., :keep], ordered[..., keep:].reshape(images, -1)
    kept = jnp.concatenate([kept, jnp.broadcast_to(b, (images, *b.shape))], axis=2).reshape(images, -1)
    order = jnp.concatenate([jnp.broadcast_to(leading, (images, prefix)), kept, gone], axis=1)
    return Matching(target, layer.tokens_out, order)


def _before(count: int) -> np.ndarray:
    """[_, _, i, j]: j stands before i."""
    return np.tri(count, k=-1, dtype=bool)[None, None]


def _inverse(place: jax.Array, tokens: np.ndarray) -> jax.Array:
    """Which of the tokens [v, i] has each place, int32 [b, v, i]; one of the sequence whatever the places are."""
    found = place[..., None, :] == np.arange(tokens.shape[1])[None, None, :, None]
    return jnp.minimum(_total(jnp.where(found, tokens[None, :, None], 0)), tokens.max())


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
