import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.models.rules import RULES, Attended, Layer, Nearest, Rule, ToMe, match_tokens, parse_rule, window_order
from fcvit_jax.settings import setting
from matchings import lists, random_matching


def angles(degrees):
    """Make unit vectors in the plane: the similarity of two tokens is the cosine of the angle between them."""
    radians = np.deg2rad(np.asarray(degrees, np.float32))
    return jnp.asarray(np.stack([np.cos(radians), np.sin(radians)], -1))[None]


def test_global_matching_by_hand():
    # Positions:      0(cls)  1    2   3    4   5    6
    metric = angles([0, 0, 90, 100, 10, 180, 172])
    # A: 2, 4, 6 (0 is the prefix); B: 1, 3, 5. Best: 2->3 (10 degrees), 4->1 (10), 6->5 (8).
    matching = match_tokens(metric, Layer(7, 6, 1), prefix=1)
    assert lists(matching) == ([0, 2, 4, 1, 3, 5], [6], [5])
    # Two: 6->5, then the lower position of two equal ones.
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
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
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


def test_window_order():
    assert window_order((2, 4), (1, 2), 8).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert window_order((2, 2), (2, 1), 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # Cells of two tokens each, 2x4 cells into 2x2 windows: cells 0 1 | 2 3 over 4 5 | 6 7 stay in pairs.
    assert window_order((2, 4), (1, 2), 16).tolist() == [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15]


def test_bfloat16_matches_as_its_float32_copy():
    metric = jax.random.normal(jax.random.key(5), (2, 33, 8)).astype(jnp.bfloat16)
    layer = Layer(33, 23, 10)
    for low, full in zip(
        *(jax.tree.leaves(match_tokens(each, layer, 1)) for each in (metric, metric.astype(jnp.float32))), strict=True
    ):
        np.testing.assert_array_equal(low, full)


def test_tome_matches_by_the_mean_of_the_keys():
    layer = Layer(17, 12, 5)
    y, q, k, v = jax.random.normal(jax.random.key(3), (4, 2, 3, 17, 6))
    found = ToMe()(Attended(y, q, k, v), y, jnp.ones((2, 17)), layer, 1)
    expected = match_tokens(k.mean(axis=1), layer, 1)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@dataclasses.dataclass(frozen=True)
class Optioned(Rule):
    fuse: bool = False
    power: float = setting(1.0, above=0)
    count: int = 3
    by: str = setting("keys", choices=("keys", "values"))


@pytest.fixture
def optioned(monkeypatch):
    monkeypatch.setitem(RULES, "optioned", Optioned)


@pytest.mark.parametrize(
    ("text", "rule", "printed"),
    [
        ("tome", ToMe(), "tome"),
        ("tome()", ToMe(), "tome"),
        ("tome(turned=true)", ToMe(turned=True), "tome(turned=true)"),
        ("optioned", Optioned(), "optioned"),
        ("optioned(fuse=true)", Optioned(fuse=True), "optioned(fuse=true)"),
        (
            " optioned ( by = values, power=2, fuse=false,count=7) ",
            Optioned(False, 2.0, 7, "values"),
            "optioned(power=2.0,count=7,by=values)",
        ),
    ],
)
@pytest.mark.usefixtures("optioned")
def test_a_rule_is_read_from_text_and_printed_back(text, rule, printed):
    assert parse_rule(text) == rule
    assert str(rule) == printed
    assert parse_rule(printed) == rule
    assert hash(parse_rule(text)) == hash(rule)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tme", "unknown merge rule 'tme': choose tome"),
        ("optined(fuse=true)", "unknown merge rule 'optined': choose optioned"),
        ("", "unknown merge rule ''"),
        ("tome(x=1)", r"'x=1' is not one of its options; there are: turned=..."),
        ("optioned(power)", "'power' is not one of its options; there are: fuse=..., power=..., count=..., by=..."),
        ("optioned(fuse=yes)", "fuse is 'yes': it must be true or false"),
        ("optioned(count=1.5)", "count is '1.5': it must be a whole number"),
        ("optioned(power=0)", "power is 0.0: it must be a number, above 0"),
        ("optioned(by=heads)", "by is 'heads': choose one of keys, values"),
    ],
)
@pytest.mark.usefixtures("optioned")
def test_rules_that_cannot_be_read(text, says):
    with pytest.raises(fc.InputError, match=says.replace("(", r"\(") if "\\" not in says else says):
        parse_rule(text)


def test_a_rule_without_a_name_prints_its_class():
    assert str(Optioned(fuse=True)) == "Optioned(fuse=true)"


def test_each_part_of_nearest_changes_the_pairs():
    def pairs(rule, keys, layer, size=None, seen=None, features=None):
        """Return which tokens move where. keys, features: degrees, [h, n] and [n]. seen: attention, apart from keys."""
        angles = np.deg2rad(np.asarray(keys, np.float32))
        k = jnp.asarray(np.stack([np.cos(angles), np.sin(angles), 0 * angles], -1))[None]
        if seen is not None:  # a third dimension of the class token alone, too small to change a cosine
            k = k.at[..., 2].set(1e-3 * jnp.log(jnp.asarray(seen)))
        q = jnp.zeros_like(k).at[..., 2].set(1e3 * 3**0.5)
        size = jnp.ones(k.shape[0:1] + k.shape[2:3]) if size is None else jnp.asarray([size], jnp.float32)
        x = np.deg2rad(np.zeros(k.shape[2]) if features is None else features)
        x = jnp.stack([jnp.cos(x), jnp.sin(x)], -1)[None]
        matching = rule(Attended(k[:, 0], q, k, k, None), x, size, layer, 1)
        order = np.asarray(matching.order)[0]
        return {int(i): int(order[matching.target[0, i]]) for i in order[layer.tokens_out :]}

    rule, layer = Nearest(), Layer(7, 6, 1)  # A: 2, 4, 6; B: 1, 3, 5
    # Two heads: their mean counts. It is alike for 2 and 3, whose keys differ; the first head is alike for 4 and 5.
    assert pairs(rule, [[0, 90, 0, 60, 30, 30, 250], [0, 90, 60, 0, 200, 330, 290]], layer) == {2: 3}
    # A 2x3 grid: tokens 1 and 4, one above the other, are alike. In the sequence both 2 and 4 are A, and 1 is B.
    keys, grid = [[0, 10, 100, 190, 10, 280, 325]], layer._replace(grid=(2, 3))
    assert pairs(rule, keys, grid) == {1: 4}
    keys = [[0, 10, 100, 190, 60, 100, 325]]  # 2 and 5: on the board 5 is A, in the sequence 2
    assert pairs(rule, keys, grid) == {5: 2}
    assert pairs(dataclasses.replace(rule, checkerboard=False), keys, grid) == {2: 5}
    # Two pairs of the same angle, 2 -> 3 and 4 -> 5: the smaller merges, then the less attended.
    keys = [[0, 300, 100, 110, 200, 210, 20]]
    assert pairs(rule, keys, layer, size=[1, 1, 4, 4, 2, 2, 1]) == {4: 5}
    assert pairs(rule, keys, layer, size=[1, 1, 2, 2, 4, 4, 1]) == {2: 3}
    assert pairs(rule, keys, layer, seen=[0.1, 0.1, 0.3, 0.2, 0.1, 0.1, 0.1]) == {4: 5}
    assert pairs(rule, keys, layer, seen=[0.1, 0.1, 0.1, 0.1, 0.3, 0.2, 0.1]) == {2: 3}
    # The pair with similar features, whose weight is that of the keys.
    keys = [[0, 300, 100, 109, 200, 210, 20]]
    assert pairs(rule, keys, layer, features=[0, 0, 0, 90, 45, 45, 0]) == {4: 5}
    assert pairs(rule, keys, layer, features=[0, 0, 45, 45, 0, 90, 0]) == {2: 3}
    assert pairs(dataclasses.replace(rule, features=0.0), keys, layer, features=[0, 0, 0, 90, 45, 45, 0]) == {2: 3}
    keys = [[0, 300, 100, 140, 200, 220, 20]]  # 1 - cosine: 0.234 and 0.060
    assert pairs(rule, keys, layer, features=[0, 0, 0, 0, 0, 30, 300]) == {4: 5}  # 0.234 and 0.060 + 0.134
    assert pairs(rule, keys, layer, features=[0, 0, 0, 0, 0, 38, 300]) == {2: 3}  # 0.234 and 0.060 + 0.212
