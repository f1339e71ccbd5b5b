from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.models.merging import (
    Matching,
    follow_patches,
    follow_pruned,
    merge_tokens,
    unmerge_tokens,
)
from fcvit_jax.models.rules import Layer, match_tokens, window_order
from matchings import lists, random_matching


def test_window_by_window_equals_each_window_alone():
    layer = Layer(1 + 32, 1 + 32 - 12, 3, 4, ((4, 8), (2, 2)))
    metric = jax.random.normal(jax.random.key(1), (2, 33, 5))
    values = jax.random.normal(jax.random.key(2), (2, 33, 7))
    size = jax.random.uniform(jax.random.key(3), (2, 33), minval=1.0, maxval=4.0)
    merged, new_size = merge_tokens(values, size, match_tokens(metric, layer, 1))
    order = 1 + window_order((4, 8), (2, 2), 32)
    for window in range(4):
        rows = order[8 * window : 8 * window + 8]
        alone = match_tokens(metric[:, rows], Layer(8, 5, 3), 0)
        expected, expected_size = merge_tokens(values[:, rows], size[:, rows], alone)
        block = slice(1 + 5 * window, 6 + 5 * window)
        np.testing.assert_allclose(merged[:, block], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new_size[:, block], expected_size, rtol=1e-6)


def test_merging_is_the_size_weighted_mean():
    x = jnp.asarray([[[1.0], [10.0], [100.0], [1000.0]]])
    size = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    # Tokens 0 and 2 both go into token 3, which is first in the output.
    matching = Matching(jnp.asarray([[0, 1, 0, 0]]), 2, jnp.asarray([[3, 1, 0, 2]]))
    merged, new_size = merge_tokens(x, size, matching)
    np.testing.assert_allclose(merged, [[[(1 + 300 + 4000) / 8], [10.0]]], rtol=1e-6)
    np.testing.assert_allclose(new_size, [[8.0, 2.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("layer", "prefix"),
    [(Layer(33, 25, 8), 1), (Layer(34, 24, 10), 2), (Layer(33, 17, 4, 4, ((4, 8), (2, 2))), 1)],
)
def test_mass_is_conserved_and_jit_changes_nothing(layer, prefix, dtype):
    key = jax.random.key(4)
    metric = jax.random.normal(key, (2, layer.tokens_in, 8)).astype(dtype)
    x = jax.random.normal(key, (2, layer.tokens_in, 16)).astype(dtype)
    size = jax.random.randint(key, (2, layer.tokens_in), 1, 5).astype(jnp.float32)

    def run(metric, x, size):
        matching = match_tokens(metric, layer, prefix)
        return matching, *merge_tokens(x, size, matching)

    matching, merged, new_size = run(metric, x, size)
    assert merged.dtype == dtype
    assert merged.shape == (2, layer.tokens_out, 16)
    np.testing.assert_allclose(new_size.sum(1), size.sum(1))
    weighted = lambda x, size: (np.asarray(x, np.float64) * np.asarray(size)[..., None]).sum(1)  # noqa: E731
    tolerance = 1e-4 if dtype == jnp.float32 else 0.3
    np.testing.assert_allclose(weighted(merged, new_size), weighted(x, size), atol=tolerance)
    for eager, jitted in zip(
        jax.tree.leaves((matching, merged, new_size)), jax.tree.leaves(jax.jit(run)(metric, x, size)), strict=True
    ):
        np.testing.assert_allclose(np.asarray(eager, np.float64), np.asarray(jitted, np.float64), atol=1e-2)


def test_source_map_and_unmerge_follow_every_patch():
    # Tokens hold their number of patches, and which: the merged means show exactly where each patch went.
    layers = [Layer(33, 25, 2, 4, ((4, 8), (2, 2))), Layer(25, 17, 2, 4), Layer(17, 12, 5)]
    x = jnp.broadcast_to(jnp.eye(33)[None], (2, 33, 33))
    size, source = jnp.ones((2, 33)), jnp.broadcast_to(jnp.arange(1, 33, dtype=jnp.int32), (2, 32))
    for index, layer in enumerate(layers):
        metric = jax.random.normal(jax.random.key(index), (2, layer.tokens_in, 6))
        matching = match_tokens(metric, layer, 1)
        x, size = merge_tokens(x, size, matching)
        source = follow_patches(source, matching)
        assert source.dtype == jnp.int32
    held = np.asarray(x) > 0  # [image, token, patch of the start]
    for image in range(2):
        for patch in range(32):
            assert held[image, :, patch + 1].nonzero()[0].tolist() == [int(source[image, patch])]
    np.testing.assert_allclose(held.sum(2), size)
    back = unmerge_tokens(x, source)
    for image in range(2):
        for patch in range(32):
            np.testing.assert_array_equal(back[image, patch], x[image, int(source[image, patch])])


def test_gradient_and_vmap():
    layer = Layer(17, 11, 6)
    metric, x = jax.random.normal(jax.random.key(6), (2, 4, 17, 5)), jax.random.normal(jax.random.key(7), (2, 4, 17, 3))

    sizes = jax.random.randint(jax.random.key(8), (4, 17), 1, 5).astype(jnp.float32)

    def merged_sum(metric, x):
        merged, size = merge_tokens(x, sizes, match_tokens(metric, layer, 1))
        return (merged * size[..., None]).sum()

    # The weighted sum does not depend on what merges: its gradient is the sizes, and none goes to the metric.
    to_metric, to_x = jax.grad(merged_sum, argnums=(0, 1))(metric[0], x[0])
    np.testing.assert_allclose(to_x, np.broadcast_to(sizes[..., None], (4, 17, 3)), rtol=1e-6)
    np.testing.assert_array_equal(to_metric, np.zeros((4, 17, 5)))

    run = lambda metric, x: merge_tokens(x, jnp.ones(x.shape[:2]), match_tokens(metric, layer, 1))  # noqa: E731
    for mapped, single in zip(jax.vmap(run)(metric, x), run(metric[1], x[1]), strict=True):
        np.testing.assert_allclose(mapped[1], single, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_that_nothing_is_merged_into_keeps_its_value_bit_for_bit(dtype):
    layer = Layer(33, 25, 8)
    matching = random_matching(jax.random.key(8), layer, 1)
    x = jax.random.normal(jax.random.key(9), (3, 33, 16)).astype(dtype)
    size = jax.random.randint(jax.random.key(10), (3, 33), 1, 9).astype(jnp.float32)
    merged, sizes = merge_tokens(x, size, matching)
    for image in range(3):
        keep, _, into = map(np.array, lists(matching, image))
        alone = np.setdiff1d(np.arange(25), into)
        assert len(alone) >= 17
        np.testing.assert_array_equal(merged[image, alone], x[image, keep[alone]])
        np.testing.assert_array_equal(sizes[image, alone], size[image, keep[alone]])


@pytest.mark.parametrize("keep_norm", [False, True, "max"])
def test_where_nothing_merges_tokens_and_sizes_are_unchanged(keep_norm):
    x, size = jax.random.normal(jax.random.key(5), (2, 7, 4)), jnp.arange(1.0, 15.0).reshape(2, 7)
    nothing = replace(match_tokens(x, Layer(7, 7, 0), 1), keep_norm=keep_norm)
    merged, new_size = merge_tokens(x, size, nothing)
    assert nothing.order is not None
    np.testing.assert_array_equal(merged, np.take_along_axis(np.asarray(x), np.asarray(nothing.order)[..., None], 1))
    np.testing.assert_array_equal(new_size, np.take_along_axis(np.asarray(size), np.asarray(nothing.order), 1))


def test_bfloat16_merges_as_its_float32_copy():
    layer = Layer(33, 25, 8)
    matching = random_matching(jax.random.key(11), layer, 1)
    x = jax.random.normal(jax.random.key(12), (3, 33, 16)).astype(jnp.bfloat16)
    size = jax.random.randint(jax.random.key(13), (3, 33), 1, 9).astype(jnp.float32)
    low, low_sizes = merge_tokens(x, size, matching)
    full, full_sizes = merge_tokens(x.astype(jnp.float32), size, matching)
    np.testing.assert_array_equal(low_sizes, full_sizes)
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=0.02)


X = jnp.asarray([[[3.0, 0.0], [0.0, 4.0], [6.0, 8.0], [5.0, 12.0]]])
SIZE = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
TARGET, ORDER = jnp.asarray([[0, 1, 0, 0]]), jnp.asarray([[3, 1, 0, 2]])


@pytest.mark.parametrize("order", [ORDER, None])
def test_weights_and_gains_replace_sizes(order):
    weight, gain = jnp.asarray([[0.5, 1.0, 0.0, 1.5]]), jnp.asarray([[1.0, 2.0, 0.25, 4.0]])
    merged, size = merge_tokens(X, SIZE, Matching(TARGET, 2, order, weight, gain))
    np.testing.assert_allclose(merged, [[[(0.5 * 3 + 1.5 * 5) / 2, 1.5 * 12 / 2], [0.0, 4.0]]], rtol=1e-6)
    np.testing.assert_allclose(size, [[5.25, 2.0]])


@pytest.mark.parametrize("order", [ORDER, None])
def test_a_pruned_token_adds_neither_value_nor_size(order):
    matching = Matching(TARGET, 2, order, weight=SIZE.at[0, 2].set(0.0))
    merged, size = merge_tokens(X, SIZE, matching)
    np.testing.assert_allclose(merged, [[[(3 + 4 * 5) / 5, 4 * 12 / 5], [0.0, 4.0]]], rtol=1e-6)
    np.testing.assert_allclose(size, [[5.0, 2.0]])
    source = jnp.asarray([[2, 1, 0, 3, 2]])  # patches 0 and 4 are in the pruned token
    assert follow_patches(source, matching).tolist() == [[0, 1, 0, 0, 0]]
    before = jnp.asarray([[False, True, False, False, False]])
    assert follow_pruned(before, source, matching).tolist() == [[True, True, False, False, True]]
    assert follow_pruned(before, source, Matching(TARGET, 2, order)) is before


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", [ORDER, None])
def test_the_mean_may_keep_the_norm(order, dtype):
    merged, size = merge_tokens(X.astype(dtype), SIZE, Matching(TARGET, 2, order, keep_norm=True))
    mean = np.array([(3 + 3 * 6 + 4 * 5) / 8, (3 * 8 + 4 * 12) / 8])
    norm = (1 * 3 + 3 * 10 + 4 * 13) / 8
    expected = mean / np.linalg.norm(mean) * norm
    np.testing.assert_allclose(merged[0, 0].astype(jnp.float32), expected, rtol=1e-6 if dtype == jnp.float32 else 1e-2)
    np.testing.assert_array_equal(merged[0, 1], X[0, 1].astype(dtype))  # alone: bit for bit
    np.testing.assert_allclose(size, [[8.0, 2.0]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", [ORDER, None])
def test_the_largest_norm_or_the_sum(order, dtype):
    weight = SIZE.at[0, 3].set(0.0)  # pruned: its norm of 13 does not count
    mean = np.array([(3 + 3 * 6) / 4, 3 * 8 / 4])
    rtol = 1e-6 if dtype == jnp.float32 else 1e-2
    merged, _ = merge_tokens(X.astype(dtype), SIZE, Matching(TARGET, 2, order, weight, keep_norm="max"))
    np.testing.assert_allclose(merged[0, 0].astype(jnp.float32), mean / np.linalg.norm(mean) * 10, rtol=rtol)
    np.testing.assert_array_equal(merged[0, 1], X[0, 1].astype(dtype))
    merged, size = merge_tokens(X.astype(dtype), SIZE, Matching(TARGET, 2, order, weight / 8, summed=True))
    np.testing.assert_allclose(merged[0, 0].astype(jnp.float32), mean / 2, rtol=rtol)
    np.testing.assert_array_equal(merged[0, 1], X[0, 1].astype(dtype))  # alone: its weight does not count
    np.testing.assert_allclose(size, [[4.0, 2.0]])
    opposite = jnp.asarray([[[1.0, 0.0], [-1.0, 0.0]]])
    largest = Matching(jnp.asarray([[0, 0]]), 1, keep_norm="max")
    assert np.isfinite(jax.grad(lambda x: merge_tokens(x, jnp.ones((1, 2)), largest)[0].sum())(opposite)).all()


def test_a_norm_that_cannot_be_kept_leaves_the_mean():
    opposite = jnp.asarray([[[1.0, 0.0], [-1.0, 0.0]]])
    matching = Matching(jnp.asarray([[0, 0]]), 1, keep_norm=True)
    merged, _ = merge_tokens(opposite, jnp.ones((1, 2)), matching)
    np.testing.assert_array_equal(merged, [[[0.0, 0.0]]])
    gradient = jax.grad(lambda x: merge_tokens(x, jnp.ones((1, 2)), matching)[0].sum())(opposite)
    assert np.isfinite(gradient).all()


def test_the_order_does_not_change_the_result():
    layer = Layer(33, 25, 8)
    matching = random_matching(jax.random.key(15), layer, 1)
    x = jax.random.normal(jax.random.key(16), (3, 33, 16))
    size = jax.random.randint(jax.random.key(17), (3, 33), 1, 9).astype(jnp.float32)
    for ours, theirs in zip(
        merge_tokens(x, size, matching), merge_tokens(x, size, Matching(matching.target, 25)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
