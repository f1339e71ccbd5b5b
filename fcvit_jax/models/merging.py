"""Bipartite matching and merging of tokens: pure functions of fixed shapes.

Token Merging, arXiv 2210.09461, section 3; in windows, as LGTM, arXiv 2303.02331. A matching is three index arrays over
the whole sequence, and everything else (merging values, following patches, copying values back) is written in terms of
them, so that global and windowed merging differ in nothing but how the matching is found.

Shape letters: b batch, n tokens in, r tokens removed, k width of the metric, d width, p patches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.models.schedule import Layer


class Matching(NamedTuple):
    """Which tokens of a sequence become one; all positions are int32.

    keep: [b, n - r], the position in the input of every token of the output, in the output's order.
    source: [b, r], the positions in the input of the tokens that are merged away.
    target: [b, r], the position in the *output* of the token that each of them is merged into.
    """

    keep: jax.Array
    source: jax.Array
    target: jax.Array


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
    order = prefix + np.arange(patches, dtype=np.int32)
    if layer.regroup:
        order = prefix + window_order(*layer.regroup, patches)
        metric = metric[:, order]
    else:
        metric = metric[:, prefix:]
    length = patches // windows
    found = _match_alternating(metric.reshape(batch * windows, length, width), layer.removed, 0)

    def across_windows(positions: jax.Array, stride: int) -> jax.Array:
        """From positions inside a window, [b * windows, _], to positions among all patch tokens, [b, windows * _]."""
        start = stride * np.arange(windows, dtype=np.int32)[None, :, None]
        return (positions.reshape(batch, windows, -1) + start).reshape(batch, -1)

    order = jnp.asarray(order)
    keep = order[across_windows(found.keep, length)]
    source = order[across_windows(found.source, length)]
    target = across_windows(found.target, length - layer.removed) + prefix
    return Matching(jnp.concatenate([_rows(range(prefix), batch), keep], axis=1), source, target)


def _rows(positions: range, batch: int) -> jax.Array:
    """The same positions for every image: int32 [batch, len(positions)]."""
    return jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (batch, len(positions)))


def _match_alternating(metric: jax.Array, r: int, prefix: int) -> Matching:
    """Bipartite soft matching (arXiv 2210.09461, section 3) of [b, n, k] float32; the first `prefix` tokens stay.

    Even positions are A, odd ones B; each A proposes the B with the most similar metric (cosine), the r best proposals
    are merged, and the output is [prefix][A kept, in order][B]. Equal similarities go to the lower position.
    """
    batch, tokens, _ = metric.shape
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2
    norm = jnp.sqrt(jnp.maximum(jnp.sum(metric * metric, axis=-1, keepdims=True), 1e-30))
    metric = metric / norm
    a, b = metric[:, first_a::2], metric[:, first_b::2]
    similarity = jnp.einsum("bik,bjk->bij", a, b, precision=jax.lax.Precision.HIGHEST)

    best = jnp.argmax(similarity, axis=-1).astype(jnp.int32)
    ranked = jnp.argsort(jnp.max(similarity, axis=-1), axis=-1, descending=True, stable=True).astype(jnp.int32)
    merged, kept = ranked[:, :r], jnp.sort(ranked[:, r:], axis=-1)

    keep = jnp.concatenate(
        [_rows(range(prefix), batch), first_a + 2 * kept, _rows(range(first_b, tokens, 2), batch)], axis=1
    )
    target = jnp.take_along_axis(best, merged, axis=1) + (prefix + a.shape[1] - r)
    return Matching(keep, first_a + 2 * merged, target)


def window_order(cells: tuple[int, int], windows: tuple[int, int], patches: int) -> np.ndarray:
    """The permutation, int32 [patches], that brings patch tokens from row-major cells into window-by-window order.

    Cells hold equal numbers of tokens, which stay together; windows are row-major, and so are the cells inside one.
    """
    (rows, columns), (down, across) = cells, windows
    index = np.arange(rows * columns, dtype=np.int32)
    index = index.reshape(down, rows // down, across, columns // across).transpose(0, 2, 1, 3).reshape(-1)
    tokens = np.arange(patches, dtype=np.int32).reshape(rows * columns, -1)
    return tokens[index].reshape(-1)


def merge_tokens(x: jax.Array, size: jax.Array, matching: Matching) -> tuple[jax.Array, jax.Array]:
    """Replace matched tokens by their size-weighted mean.

    x: [b, n, d], any float dtype; size: [b, n] float32. Returns the same for n - r tokens. Sums run in float32.
    """
    weighted = jnp.concatenate([x.astype(jnp.float32) * size[..., None], size[..., None]], axis=-1)
    total = _add_merged(weighted, matching)
    return (total[..., :-1] / total[..., -1:]).astype(x.dtype), total[..., -1]


def _add_merged(x: jax.Array, matching: Matching) -> jax.Array:
    """[b, n, d] -> [b, n - r, d]: every kept token plus the sum of those merged into it."""
    kept = jnp.take_along_axis(x, matching.keep[..., None], axis=1, mode="clip")
    gone = jnp.take_along_axis(x, matching.source[..., None], axis=1, mode="clip")
    # A one-hot product instead of a scatter: fast on every backend, deterministic, and its gradient is a product too.
    onehot = jax.nn.one_hot(matching.target, kept.shape[1], dtype=x.dtype)
    return kept + jnp.einsum("brn,brd->bnd", onehot, gone, precision=jax.lax.Precision.HIGHEST)


def follow_patches(source_map: jax.Array, matching: Matching) -> jax.Array:
    """Update the source map: for each patch [b, p], int32, the index of the token it is in after this matching."""
    batch, kept = matching.keep.shape
    removed = matching.source.shape[1]
    moved = jnp.zeros((batch, kept + removed), jnp.int32)
    moved = jnp.put_along_axis(moved, matching.keep, _rows(range(kept), batch), axis=1, inplace=False)
    moved = jnp.put_along_axis(moved, matching.source, matching.target, axis=1, inplace=False)
    return jnp.take_along_axis(moved, source_map, axis=1)


def unmerge_tokens(x: jax.Array, source_map: jax.Array) -> jax.Array:
    """Copy every token's value back to its patches: [b, n, d] and [b, p] -> [b, p, d], patches in row-major order."""
    return jnp.take_along_axis(x, source_map[..., None], axis=1)
