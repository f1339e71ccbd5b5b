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

from fcvit_jax.models.schedule import Layer


class Matching(NamedTuple):
    """Which tokens of a sequence become one.

    target: int32 [b, n], the position in the output of every token of the input.
    merged: bool [b, n], whether it is merged into the token there, instead of being that token; true r times,
        unless keys are not finite.
    """

    target: jax.Array
    merged: jax.Array


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
    order = window_order(*layer.regroup, patches) if layer.regroup else None
    if order is not None:
        metric = metric[:, order]
    found = _match_alternating(metric.reshape(batch * windows, length, width), layer.removed, 0)

    start = (length - layer.removed) * jnp.arange(windows, dtype=jnp.int32)[None, :, None]
    target = (found.target.reshape(batch, windows, length) + start).reshape(batch, patches) + prefix
    merged = found.merged.reshape(batch, patches)
    if order is not None:
        back = np.argsort(order)
        target, merged = target[:, back], merged[:, back]
    staying = jnp.broadcast_to(jnp.arange(prefix, dtype=jnp.int32), (batch, prefix))
    return Matching(jnp.concatenate([staying, target], axis=1), jnp.concatenate([staying < 0, merged], axis=1))


def _match_alternating(metric: jax.Array, r: int, prefix: int) -> Matching:
    """Bipartite soft matching (arXiv 2210.09461, section 3) of [b, n, k] float32; the first `prefix` tokens stay.

    Even positions are A, odd ones B; each A proposes the B with the most similar metric (cosine), the r best proposals
    are merged, and the output is [prefix][A kept, in order][B]. Equal similarities go to the lower position.
    """
    tokens = metric.shape[1]
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    norm = jnp.sqrt(jnp.maximum(jnp.sum(metric * metric, axis=-1, keepdims=True), 1e-30))
    metric = metric / norm
    a, b = metric[:, first_a::2], metric[:, first_b::2]
    similarity = jnp.einsum("bik,bjk->bij", a, b, precision=jax.lax.Precision.HIGHEST)

    best, proposal = jnp.argmax(similarity, axis=-1).astype(jnp.int32), jnp.max(similarity, axis=-1)
    mine, other = proposal[:, :, None], proposal[:, None, :]
    before = np.tri(a.shape[1], k=-1, dtype=bool)[None]  # [_, i, j]: j stands before i
    rank = jnp.sum((other > mine) | ((other == mine) & before), axis=-1, dtype=jnp.int32)
    merged = rank < r
    kept_before = jnp.sum(~merged[:, None, :] & before, axis=-1, dtype=jnp.int32)
    behind_a = prefix + a.shape[1] - r  # where B begins in the output
    target_a = jnp.where(merged, behind_a + best, prefix + kept_before)

    def in_place(x: jax.Array, first: int, step: int) -> jax.Array:
        """[b, _] at every step-th position from the first on, zeros elsewhere: [b, n]."""
        last = first + step * (x.shape[1] - 1)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (first, tokens - 1 - last, step - 1)))

    fixed = np.zeros((1, tokens), np.int32)
    fixed[0, :prefix] = np.arange(prefix)
    fixed[0, first_b::2] = behind_a + np.arange(b.shape[1])
    return Matching(jnp.asarray(fixed) + in_place(target_a, first_a, 2), in_place(merged, first_a, 2))


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
    into = matching.target[:, None, :] == np.arange(tokens_out)[None, :, None]
    total = jnp.sum(jnp.where(into, size[:, None, :], 0.0), axis=-1)
    if x.dtype != jnp.float32:
        weights = jnp.where(into, size[:, None, :] / total[..., None], 0.0).astype(x.dtype)
        return jnp.einsum("bjn,bnd->bjd", weights, x), total
    keep, source, target = positions(matching, tokens_out)
    weighted = x * (size / jnp.take_along_axis(total, matching.target, axis=1, mode="clip"))[..., None]
    kept = jnp.take_along_axis(weighted, keep[..., None], axis=1, mode="clip")
    gone = jnp.take_along_axis(weighted, source[..., None], axis=1, mode="clip")
    onehot = jax.nn.one_hot(target, tokens_out, dtype=x.dtype)
    return kept + jnp.einsum("brn,brd->bnd", onehot, gone, precision=jax.lax.Precision.HIGHEST), total


def positions(matching: Matching, tokens_out: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A matching the other way round, all int32: where every token of the output lies in the input, [b, n - r]; where
    those do that are merged away, [b, r]; and where in the output these go, [b, r].
    """
    target, merged = matching
    keep = _inverse(jnp.where(merged, -1, target), tokens_out)
    source = _inverse(jnp.where(merged, jnp.cumsum(merged, axis=1) - 1, -1), target.shape[1] - tokens_out)
    return keep, source, jnp.take_along_axis(target, source, axis=1, mode="clip")


def _inverse(slots: jax.Array, count: int) -> jax.Array:
    """Which token is in each slot: slots int32 [b, n], -1 for none, every other number once -> [b, count]."""
    found = slots[:, None, :] == np.arange(count)[None, :, None]
    return jnp.sum(jnp.where(found, np.arange(slots.shape[1], dtype=np.int32)[None, None], 0), axis=-1, dtype=jnp.int32)


def follow_patches(source_map: jax.Array, matching: Matching) -> jax.Array:
    """Update the source map: for each patch [b, p], int32, the index of the token it is in after this matching."""
    return jnp.take_along_axis(matching.target, source_map, axis=1)


def unmerge_tokens(x: jax.Array, source_map: jax.Array) -> jax.Array:
    """Copy every token's value back to its patches: [b, n, d] and [b, p] -> [b, p, d], patches in row-major order."""
    return jnp.take_along_axis(x, source_map[..., None], axis=1)
