"""Bipartite matching and merging of tokens: pure functions of fixed shapes.

Token Merging, arXiv 2210.09461, section 3; in windows, as LGTM, arXiv 2303.02331. A matching says for every token
where it goes, and everything else (merging values, following patches) is written in terms of that, so that global and
windowed merging differ in nothing but how the matching is found. Nothing is sorted: a rank is a count of comparisons.

Shape letters: b batch, n tokens in, r tokens removed, k width of the metric, d width, p patches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.compiling import einsum, in_one_axis
from fcvit_jax.models.schedule import Layer


class Matching(NamedTuple):
    """Which tokens of a sequence become one.

    target: int32 [b, n], the position in the output of every token of the input.
    order: int32 [b, n], the tokens, first those that stay, as in the output, then those that are merged away, window by
        window, the most similar first: each of 0 to n - 1 once, unless keys are not finite.
    """

    target: jax.Array
    order: jax.Array


def match_tokens(metric: jax.Array, layer: Layer, prefix: int) -> Matching:
    """Find the tokens to merge in one layer of a schedule.

    metric: [b, n, k], any float dtype, what tokens are compared by; the matching is done in float32.
    layer: with `layer.removed > 0`. prefix: leading tokens, never merged; they count in the alternation of a global
    matching and not in that of windows.
    """
    metric = jax.lax.stop_gradient(metric).astype(jnp.float32)
    windows = layer.windows
    if windows is None:
        return _match_alternating(metric, layer.removed, prefix)
    batch, tokens, width = metric.shape
    patches = tokens - prefix
    length, metric = patches // windows, metric[:, prefix:]
    grouped = window_order(*layer.regroup, patches) if layer.regroup else None
    if grouped is not None:
        metric = metric[:, grouped]
    found = _match_alternating(metric.reshape(batch * windows, length, width), layer.removed, 0)

    kept = length - layer.removed
    target, order = (part.reshape(batch, windows, length) for part in found)
    window = np.arange(windows, dtype=np.int32)[None, :, None]
    target, order = target + kept * window, order + length * window
    target, stay, go = (part.reshape(batch, -1) for part in (target, order[:, :, :kept], order[:, :, kept:]))
    order = jnp.concatenate([stay, go], axis=1)
    if grouped is not None:
        target, order = target[:, np.argsort(grouped)], jnp.asarray(grouped)[order]
    staying = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    return Matching(*(jnp.concatenate([staying, prefix + part], axis=1) for part in (target, order)))


def _match_alternating(metric: jax.Array, r: int, prefix: int) -> Matching:
    """Bipartite soft matching (arXiv 2210.09461, section 3) of [b, n, k] float32; the first `prefix` tokens stay.

    Even positions are A, odd ones B; each A proposes the B with the most similar metric (cosine), the r best proposals
    are merged, and the output is [prefix][A kept, in order][B]. Equal similarities go to the lower position.
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
    return Matching(spread + fixed[None], order)


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


def merge_tokens(x: jax.Array, size: jax.Array, matching: Matching, tokens_out: int) -> tuple[jax.Array, jax.Array]:
    """Replace matched tokens by their size-weighted mean.

    x: [b, n, d], any float dtype; size: [b, n] float32. Returns the same for tokens_out tokens. Sums run in float32.

    In float32 the tokens are gathered, and a product adds those that are merged. In other dtypes all of it is one
    product with the weights of the means, rounded to that dtype: matrix units do this faster than memory moves what is
    gathered. In both, a token that nothing is merged into keeps its value to the last bit.
    """
    slots = np.arange(tokens_out)[None, :, None]
    if x.dtype != jnp.float32:
        into = jnp.where(matching.target[:, None, :] == slots, size[:, None, :], 0.0)
        total = into.sum(axis=-1)
        return einsum("bjn,bnd->bjd", (into / total[..., None]).astype(x.dtype), x), total
    order = matching.order
    staying, leaving = order[:, :tokens_out], order[:, tokens_out:]
    kept, gone = _take_rows(x, staying), _take_rows(x, leaving)
    sizes, goals = _take_rows(size, order), _take_rows(matching.target, leaving)
    into = jnp.where(goals[:, None] == slots, sizes[:, None, tokens_out:], 0.0)
    added = into.sum(axis=-1)
    sums = jnp.einsum("bjr,brd->bjd", into, gone, precision=jax.lax.Precision.HIGHEST)
    total = sizes[:, :tokens_out] + added
    return kept + (sums - kept * added[..., None]) / total[..., None], total


def _take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows [b, m, ...] of [b, n, ...], by an index [b, m]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1, mode="clip")


def follow_patches(source_map: jax.Array, matching: Matching) -> jax.Array:
    """Update the source map: for each patch [b, p], int32, the index of the token it is in after this matching."""
    return jnp.take_along_axis(matching.target, source_map, axis=1)


def unmerge_tokens(x: jax.Array, source_map: jax.Array) -> jax.Array:
    """Copy every token's value back to its patches: [b, n, d] and [b, p] -> [b, p, d], patches in row-major order."""
    return jnp.take_along_axis(x, source_map[..., None], axis=1)
