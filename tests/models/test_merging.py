import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax.models.merging import (
    Matching,
    follow_patches,
    match_tokens,
    merge_tokens,
    unmerge_tokens,
    window_order,
)
from fcvit_jax.models.schedule import Layer


def angles(degrees):
    """Unit vectors in the plane: the similarity of two tokens is the cosine of the angle between them."""
    radians = np.deg2rad(np.asarray(degrees, np.float32))
    return jnp.asarray(np.stack([np.cos(radians), np.sin(radians)], -1))[None]


def random_matching(key, layer, prefix, batch=3, width=8):
    metric = jax.random.normal(key, (batch, layer.tokens_in, width))
    return match_tokens(metric, layer, prefix)


def lists(matching, image=0):
    """Of one image: the tokens that stay, in the order of the output; those that are merged away; where these go."""
    target, order = (np.asarray(part)[image] for part in matching)
    assert sorted(order) == list(range(len(order)))
    kept = target.max() + 1
    assert target[order[:kept]].tolist() == list(range(kept))
    gone = np.sort(order[kept:])
    return order[:kept].tolist(), gone.tolist(), target[gone].tolist()


def test_global_matching_by_hand():
    # Positions:      0(cls)  1    2   3    4   5    6
    metric = angles([0, 0, 90, 100, 10, 180, 172])
    # A: 2, 4, 6 (0 is the prefix); B: 1, 3, 5. Best: 2->3 (10 degrees), 4->1 (10), 6->5 (8).
    matching = match_tokens(metric, Layer(7, 6, 1), prefix=1)
    assert lists(matching) == ([0, 2, 4, 1, 3, 5], [6], [5])
    # Two: 6->5, then, of two equal ones, the lower position.
    matching = match_tokens(metric, Layer(7, 5, 2), prefix=1)
    assert lists(matching) == ([0, 4, 1, 3, 5], [2, 6], [3, 4])


def test_prefix_tokens_count_in_the_alternation_and_never_merge():
    for prefix in range(6):
        tokens = prefix + 9
        removed = 9 // 2
        # All tokens alike: only the prefix is kept from merging.
        matching = match_tokens(jnp.ones((1, tokens, 4)), Layer(tokens, tokens - removed, removed), prefix)
        keep, source, target = lists(matching)
        assert keep[:prefix] == list(range(prefix))
        assert min(source) >= prefix
        assert min(target) >= prefix
        assert {position % 2 for position in source} == {0}  # A: the even positions of the whole sequence
        assert sorted(keep + source) == list(range(tokens))


def test_zero_keys_are_finite():
    matching = match_tokens(jnp.zeros((1, 6, 4)), Layer(6, 4, 2), 0)
    assert sorted(lists(matching)[0] + lists(matching)[1]) == list(range(6))


@pytest.mark.parametrize("layer", [Layer(33, 25, 8), Layer(33, 17, 4, 4, ((4, 8), (2, 2)))])
def test_keys_that_are_not_finite_stay_in_their_image(layer):
    metric = jax.random.normal(jax.random.key(14), (3, 33, 8))
    expected = match_tokens(metric, layer, 1)
    found = match_tokens(metric.at[1, 5:9].set(jnp.nan), layer, 1)
    order = np.asarray(found.order)
    assert order.min() >= 0
    assert order.max() < 33
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours[::2], theirs[::2])


def test_local_matching_stays_inside_its_window():
    # A 4x4 grid in 2x2 windows: window w holds the patches of one quarter.
    layer = Layer(17, 13, 1, 4, ((4, 4), (2, 2)))
    quarter = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    matching = random_matching(jax.random.key(0), layer, 1)
    for image in range(3):
        keep, source, target = map(np.array, lists(matching, image))
        assert sorted([*keep, *source]) == list(range(17))
        assert (quarter[keep[target] - 1] == quarter[source - 1]).all()
        # Windows in row-major order, three tokens left in each: A kept, then B.
        assert (quarter[keep[1:] - 1] == np.repeat(np.arange(4), 3)).all()


def test_window_by_window_equals_each_window_alone():
    layer = Layer(1 + 32, 1 + 32 - 12, 3, 4, ((4, 8), (2, 2)))
    metric = jax.random.normal(jax.random.key(1), (2, 33, 5))
    values = jax.random.normal(jax.random.key(2), (2, 33, 7))
    size = jax.random.uniform(jax.random.key(3), (2, 33), minval=1.0, maxval=4.0)
    merged, new_size = merge_tokens(values, size, match_tokens(metric, layer, 1), 21)
    order = 1 + window_order((4, 8), (2, 2), 32)
    for window in range(4):
        rows = order[8 * window : 8 * window + 8]
        alone = match_tokens(metric[:, rows], Layer(8, 5, 3), 0)
        expected, expected_size = merge_tokens(values[:, rows], size[:, rows], alone, 5)
        block = slice(1 + 5 * window, 6 + 5 * window)
        np.testing.assert_allclose(merged[:, block], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new_size[:, block], expected_size, rtol=1e-6)


def test_window_order():
    assert window_order((2, 4), (1, 2), 8).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert window_order((2, 2), (2, 1), 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # Cells of two tokens each, 2x4 cells into 2x2 windows: cells 0 1 | 2 3 over 4 5 | 6 7 stay in pairs.
    assert window_order((2, 4), (1, 2), 16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


def test_merging_is_the_size_weighted_mean():
    x = jnp.asarray([[[1.0], [10.0], [100.0], [1000.0]]])
    size = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    # Tokens 0 and 2 both go into token 3, which stands first in the output.
    matching = Matching(jnp.asarray([[0, 1, 0, 0]]), jnp.asarray([[3, 1, 0, 2]]))
    merged, new_size = merge_tokens(x, size, matching, 2)
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
        return matching, *merge_tokens(x, size, matching, layer.tokens_out)

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


def test_bfloat16_matches_as_its_float32_copy():
    metric = jax.random.normal(jax.random.key(5), (2, 33, 8)).astype(jnp.bfloat16)
    layer = Layer(33, 23, 10)
    for low, full in zip(
        match_tokens(metric, layer, 1), match_tokens(metric.astype(jnp.float32), layer, 1), strict=True
    ):
        np.testing.assert_array_equal(low, full)


def test_source_map_and_unmerge_follow_every_patch():
    # Tokens hold the number of patches in them and which: merged means say exactly who went where.
    layers = [Layer(33, 25, 2, 4, ((4, 8), (2, 2))), Layer(25, 17, 2, 4), Layer(17, 12, 5)]
    x = jnp.broadcast_to(jnp.eye(33)[None], (2, 33, 33))
    size, source = jnp.ones((2, 33)), jnp.broadcast_to(jnp.arange(1, 33, dtype=jnp.int32), (2, 32))
    for index, layer in enumerate(layers):
        metric = jax.random.normal(jax.random.key(index), (2, layer.tokens_in, 6))
        matching = match_tokens(metric, layer, 1)
        x, size = merge_tokens(x, size, matching, layer.tokens_out)
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
        merged, size = merge_tokens(x, sizes, match_tokens(metric, layer, 1), 11)
        return (merged * size[..., None]).sum()

    # The weighted sum does not depend on what merges: its gradient is the sizes, and none goes to the metric.
    to_metric, to_x = jax.grad(merged_sum, argnums=(0, 1))(metric[0], x[0])
    np.testing.assert_allclose(to_x, np.broadcast_to(sizes[..., None], (4, 17, 3)), rtol=1e-6)
    np.testing.assert_array_equal(to_metric, np.zeros((4, 17, 5)))

    run = lambda metric, x: merge_tokens(x, jnp.ones(x.shape[:2]), match_tokens(metric, layer, 1), 11)  # noqa: E731
    for mapped, single in zip(jax.vmap(run)(metric, x), run(metric[1], x[1]), strict=True):
        np.testing.assert_allclose(mapped[1], single, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_nothing_is_merged_into_keeps_its_value_to_the_last_bit(dtype):
    layer = Layer(33, 25, 8)
    matching = random_matching(jax.random.key(8), layer, 1)
    x = jax.random.normal(jax.random.key(9), (3, 33, 16)).astype(dtype)
    size = jax.random.randint(jax.random.key(10), (3, 33), 1, 9).astype(jnp.float32)
    merged, sizes = merge_tokens(x, size, matching, 25)
    for image in range(3):
        keep, _, into = map(np.array, lists(matching, image))
        alone = np.setdiff1d(np.arange(25), into)
        assert len(alone) >= 17
        np.testing.assert_array_equal(merged[image, alone], x[image, keep[alone]])
        np.testing.assert_array_equal(sizes[image, alone], size[image, keep[alone]])


def test_bfloat16_merges_as_its_float32_copy():
    layer = Layer(33, 25, 8)
    matching = random_matching(jax.random.key(11), layer, 1)
    x = jax.random.normal(jax.random.key(12), (3, 33, 16)).astype(jnp.bfloat16)
    size = jax.random.randint(jax.random.key(13), (3, 33), 1, 9).astype(jnp.float32)
    low, low_sizes = merge_tokens(x, size, matching, 25)
    full, full_sizes = merge_tokens(x.astype(jnp.float32), size, matching, 25)
    np.testing.assert_array_equal(low_sizes, full_sizes)
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=0.02)
