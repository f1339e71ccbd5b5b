"""Published rules, and Nearest, against plain NumPy in float64, one window of one image at a time."""

import argparse
import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax import parallel
from fcvit_jax.convert.__main__ import main
from fcvit_jax.models.merging import merge_tokens
from fcvit_jax.models.published import DIFFRATE_KEPT, PPT, DiffRate, EViT, PiToMe, Random, ToFu, attention_to_patches
from fcvit_jax.models.rules import Attended, Layer, Nearest, Rule, window_order

RULES = {
    "nearest": Nearest(),
    "evit": EViT(),
    "evit(fuse=true)": EViT(fuse=True),
    "tofu, pruning": ToFu(prune=1.0),
    "tofu, merging": ToFu(prune=0.0),
    "pitome": PiToMe(),
    "pitome(open=1.0)": PiToMe(margin=0.3, open=1.0),
    "diffrate": DiffRate(),
    "diffrate(prune=1.0)": DiffRate(prune=1.0),
    "diffrate(prune=0.0)": DiffRate(prune=0.0),
    "ppt, merging": PPT(threshold=1.0),
    "ppt, pruning": PPT(threshold=0.0),
    "random": Random(),
    "random(prune=true)": Random(prune=True),
}
PRUNING = {"evit", "tofu, pruning", "diffrate(prune=1.0)", "ppt, pruning", "random(prune=true)"}
PLACES: dict[str, tuple[Layer, int]] = {  # a layer and its prefix
    "global": (Layer(22, 15, 7, index=3, depth=12), 1),
    "distilled": (Layer(18, 13, 5, index=3, depth=12), 2),
    "windows": (Layer(33, 25, 2, 4, ((4, 8), (2, 2)), index=3, depth=12), 1),
    "registers alone": (Layer(21, 14, 7, class_token=False, index=3, depth=12), 3),
    "no prefix": (Layer(16, 10, 6, index=3, depth=12), 0),
    "grid": (Layer(22, 15, 7, grid=(3, 7), index=3, depth=12), 1),
    "grids in windows": (Layer(33, 25, 2, 4, ((4, 8), (2, 2)), grid=(2, 4), index=3, depth=12), 1),
}
HEADS, WIDTH = 2, 4


class Tokens(NamedTuple):
    """The inputs of a rule, for a batch of 3 images."""

    attended: Attended
    x: jax.Array
    size: jax.Array

    @classmethod
    def random(cls, layer: Layer, prefix: int, dtype=jnp.float32) -> "Tokens":
        keys = jax.random.split(jax.random.key(layer.tokens_in), 3)
        shape = (3, HEADS, layer.tokens_in, WIDTH)
        q, k, v = jax.random.normal(keys[0], (3, *shape)).astype(dtype)
        x = jax.random.normal(keys[1], (3, layer.tokens_in, HEADS * WIDTH)).astype(dtype)
        size = jax.random.randint(keys[2], x.shape[:2], 1, 5).astype(jnp.float32).at[:, :prefix].set(1.0)
        return cls(Attended(x, 2 * q, k, v, size), x, size)


@partial(jax.jit, static_argnums=(0, 2, 3))
def merged(rule: Rule, tokens: Tokens, layer: Layer, prefix: int):
    matching = rule(*tokens, layer, prefix)
    return matching, *merge_tokens(tokens.x, tokens.size, matching)


@pytest.fixture(params=PLACES)
def place(request):
    return PLACES[request.param]


class Window(NamedTuple):
    """The patch tokens of one window in float64.

    key: mean over heads. seen: attention of the class token, or of the mean query. parity: of the position of its
    first token. even: the cells, row by row, that are A in a checkerboard; all others are B.
    """

    x: np.ndarray
    size: np.ndarray
    key: np.ndarray
    attention: np.ndarray
    score: np.ndarray
    seen: np.ndarray
    parity: int
    even: np.ndarray


def windows_of(tokens: Tokens, image: int, layer: Layer, prefix: int) -> list[Window]:
    _, q, k, v, size = (np.asarray(part, np.float64)[image] for part in tokens.attended[:5])
    logits = np.einsum("hqw,hnw->hqn", q, k) / WIDTH**0.5 + np.log(size)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    attention = weights[:, 0].mean(axis=0) if prefix and layer.class_token else weights.mean(axis=(0, 1))
    score = (attention * np.linalg.norm(v, axis=(0, 2)))[prefix:]
    order = window_order(*layer.regroup, layer.tokens_in - prefix) if layer.regroup else np.arange(len(score))
    parts = np.asarray(tokens.x[image], np.float64), size, k.mean(axis=0), attention
    seen = np.exp(np.einsum("hw,hnw->hn", q.mean(axis=1), k) / WIDTH**0.5 + np.log(size))
    seen = attention if prefix and layer.class_token else (seen / seen.sum(axis=1, keepdims=True)).mean(axis=0)
    parts = [part[prefix:][order] for part in parts] + [(score / score.sum())[order]]
    parts.append(seen[prefix:][order])
    split = zip(*(np.split(part, layer.windows or 1) for part in parts), strict=True)
    parity = 0 if layer.windows else prefix % 2
    rows, columns = layer.grid or (1, len(order) // (layer.windows or 1))
    even = np.array([(row + column) % 2 == 0 for row in range(rows) for column in range(columns)])
    return [Window(*each, parity=parity, even=even if layer.grid or not parity else ~even) for each in split]


def cosine(x, y):
    return (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


def bipartite(key, r, parity):
    """List Token Merging's pairs from best to worst: (token, the one that it merges into)."""
    a, b = np.arange(parity, len(key), 2), np.arange(1 - parity, len(key), 2)
    similar = cosine(key[a], key[b])
    best = np.argsort(-similar.max(axis=1))[:r]
    return [(a[i], b[similar[i].argmax()]) for i in best]


def mean(window, groups, weight, norm=None):
    """Compute (value, size) of each group of tokens."""
    out = []
    for group in groups:
        value = np.average(window.x[group], axis=0, weights=weight[group])
        if norm and len(group) > 1:
            value *= norm(np.linalg.norm(window.x[group], axis=1), weight[group]) / np.linalg.norm(value)
        out.append((value, window.size[group].sum()))
    return out


def joined(window, pairs):
    gone = [token for token, _ in pairs]
    groups = {token: [token] for token in range(len(window.x)) if token not in gone}
    for token, into in pairs:
        groups[into].append(token)
    return list(groups.values())


def evit(window, r, rule, depth):
    order = np.argsort(-window.attention)
    kept, rest = order[: -r - rule.fuse], order[-r - rule.fuse :]
    out = mean(window, kept[:, None], window.size)
    fused = (window.attention[rest, None] * window.x[rest]).sum(axis=0), 1.0
    return [*out, fused] if rule.fuse else out


def tofu(window, r, rule, depth):
    pairs = bipartite(window.key, r, window.parity)
    if depth < rule.prune:
        return mean(window, np.setdiff1d(np.arange(len(window.x)), [a for a, _ in pairs])[:, None], window.size)
    return mean(window, joined(window, pairs), window.size, norm=lambda norms, _: norms.max())


def pitome(window, r, rule, depth):
    similar = cosine(window.key, window.key)
    over = similar - rule.margin * (1 - depth)
    energy = np.where(over > 0, over, np.expm1(over)).mean(axis=1)
    order = np.argsort(-energy)
    if depth < rule.open:
        pairs = [(order[a], order[b]) for a, b in bipartite(window.key[order], r, 0)]
    else:
        a, b = order[: 2 * r : 2], order[1 : 2 * r : 2]
        pairs = [(i, b[similar[i, b].argmax()]) for i in a]
    return mean(window, joined(window, pairs), window.size)


def diffrate(window, r, rule, depth):
    order = np.argsort(-window.attention)
    pruned = round(rule.prune * r)
    kept, rest = order[:-r], order[len(order) - r : len(order) - pruned]
    similar = cosine(window.x[rest], window.x[kept])
    into = dict(zip(rest, similar.argmax(axis=1), strict=True))
    size = window.size.copy()
    size[rest] *= np.maximum(similar.max(axis=1), 0)
    groups = [[token, *(other for other in rest if into[other] == place)] for place, token in enumerate(kept)]
    return mean(window._replace(size=size), groups, np.ones(len(order)))


def ppt(window, r, rule, depth):
    if rule.threshold:
        return mean(window, joined(window, bipartite(window.key, r, window.parity)), window.size)
    return mean(window, np.argsort(-window.score)[:-r, None], window.size)


def nearest(window, r, rule, depth):
    a, b = np.flatnonzero(window.even), np.flatnonzero(~window.even)
    similar = (cosine(window.key[a], window.key[b]) + cosine(window.x[a], window.x[b])) / 2
    best = b[similar.argmax(axis=1)]
    weight = window.size**0.25 * window.seen**0.15
    cost = (1 - similar.max(axis=1)) * weight[a] * weight[best]
    pairs = [(a[i], best[i]) for i in np.argsort(cost)[:r]]
    return mean(window, joined(window, pairs), window.size, norm=lambda norms, sizes: np.average(norms, weights=sizes))


REFERENCES: dict[type, Any] = {Nearest: nearest, EViT: evit, ToFu: tofu, PiToMe: pitome, DiffRate: diffrate, PPT: ppt}


@pytest.mark.parametrize("name", [name for name in RULES if "random" not in name])
def test_rules_against_numpy(name, place):
    (layer, prefix), rule = place, RULES[name]
    tokens = Tokens.random(layer, prefix)
    _, x, size = merged(rule, tokens, layer, prefix)
    np.testing.assert_array_equal(x[:, :prefix], tokens.x[:, :prefix])
    for image in range(3):
        found = iter(zip(np.asarray(x[image, prefix:]), np.asarray(size[image, prefix:]), strict=True))
        for window in windows_of(tokens, image, layer, prefix):
            expected = REFERENCES[type(rule)](window, layer.removed, rule, layer.index / layer.depth)
            mine = [next(found) for _ in expected]
            for ours, theirs in zip(sort(mine), sort(expected), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def sort(tokens):
    return sorted(([*value, size] for value, size in tokens), key=lambda row: row[0])


@pytest.mark.parametrize("name", RULES)
def test_properties_of_every_matching(name, place):
    (layer, prefix), rule = place, RULES[name]
    tokens = Tokens.random(layer, prefix)
    matching, _, size = merged(rule, tokens, layer, prefix)
    target, order = np.asarray(matching.target), np.asarray(matching.order)
    assert target.dtype == order.dtype == np.int32
    for image in range(3):
        assert sorted(order[image]) == list(range(layer.tokens_in))
        assert target[image, order[image, : layer.tokens_out]].tolist() == list(range(layer.tokens_out))
        gone = target[image, order[image, layer.tokens_out :]]
        assert prefix <= gone.min() <= gone.max() < layer.tokens_out
    # Mass is conserved, except for pruned tokens.
    weight = tokens.size if matching.weight is None else matching.weight
    kept = np.where(weight > 0, tokens.size, 0).sum(axis=1)
    if matching.gain is not None:  # merged and fused tokens count less
        assert (size.sum(axis=1) <= kept).all()
    else:
        np.testing.assert_allclose(size.sum(axis=1), kept)
    dropped = layer.removed * (layer.windows or 1) if name in PRUNING else 0
    if name != "diffrate":
        assert (np.asarray(weight == 0).sum(axis=1) == dropped).all()


@pytest.mark.parametrize("name", [*RULES][::2])
def test_no_image_influences_another_and_bfloat16_is_finite(name):
    (layer, prefix), rule = PLACES["windows"], RULES[name]
    tokens = Tokens.random(layer, prefix)
    _, *expected = merged(rule, tokens, layer, prefix)
    mapped = jax.vmap(lambda tokens: merged(rule, tokens, layer, prefix)[1:])(
        jax.tree.map(lambda x: x[:, None], tokens)
    )
    for whole, each in zip(expected, mapped, strict=True):
        np.testing.assert_allclose(whole, each[:, 0], rtol=1e-5, atol=1e-6)
    _, x, size = merged(rule, Tokens.random(layer, prefix, jnp.bfloat16), layer, prefix)
    assert x.dtype == jnp.bfloat16
    assert jnp.isfinite(x).all()
    assert jnp.isfinite(size).all()


def scripted(attention, x, keys=None):
    """Make a class token with the given attention to itself and to the patches; v of norm 1."""
    k = jnp.log(jnp.asarray(attention, jnp.float32))[None, None, :, None]
    ones = jnp.ones((1, 1, len(attention), 1))
    return Tokens(Attended(ones, ones, k, ones), jnp.asarray(x, jnp.float32)[None], jnp.ones((1, len(attention))))


def test_by_hand():
    x = [[0.0, 1.0], [3.0, 4.0], [10.0, 0.0], [0.0, 2.0], [0.0, -5.0], [6.0, 8.0]]
    tokens, layer = scripted([0.1, 0.3, 0.05, 0.25, 0.1, 0.2], x), Layer(6, 4, 2)
    np.testing.assert_allclose(
        attention_to_patches(tokens.attended, layer, 1), [[0.3, 0.05, 0.25, 0.1, 0.2]], rtol=1e-6
    )
    # By attention: tokens 1, 3, 5, 4, 2.
    _, found, size = merged(EViT(), tokens, layer, 1)
    np.testing.assert_allclose(found[0], [x[0], x[1], x[3], x[5]])
    np.testing.assert_allclose(size, [[1, 1, 1, 1]])
    _, found, size = merged(EViT(fuse=True), tokens, layer, 1)
    np.testing.assert_allclose(found[0], [x[0], x[1], x[3], [0.2 * 6 + 0.05 * 10, 0.2 * 8 - 0.1 * 5]], rtol=1e-6)
    np.testing.assert_allclose(size, [[1, 1, 1, 1]])
    # DiffRate prunes token 2 and merges token 4 with the most similar of 1, 3 and 5: cosines -0.8, -1 and -0.8.
    _, found, size = merged(DiffRate(prune=0.5), tokens, layer, 1)
    np.testing.assert_allclose(found[0], [x[0], [1.5, -0.5], x[3], x[5]], rtol=1e-6)
    np.testing.assert_allclose(size, [[1, 1, 1, 1]])
    _, found, size = merged(DiffRate(prune=0.0), tokens, layer, 1)  # and token 2 with 1 or 5, of cosine 0.6: the first
    np.testing.assert_allclose(found[0], [x[0], [13 / 3, -1 / 3], x[3], x[5]], rtol=1e-6)
    np.testing.assert_allclose(size, [[1, 1.6, 1, 1]], rtol=1e-6)
    # Keys of one dimension: A is 2 and 4, B is 1, 3 and 5; all cosines are 1, and ties go to the first.
    _, found, size = merged(ToFu(prune=0.0), tokens, layer, 1)
    together = np.array([13.0, -1.0]) / 3
    np.testing.assert_allclose(found[0, 1], 10 * together / np.linalg.norm(together), rtol=1e-6)
    np.testing.assert_allclose(size, [[1, 3, 1, 1]])
    # var(0.3, 0.05, 0.25, 0.1, 0.2) / 0.9^2 = 0.01327
    for threshold, expected in ((0.0132, [x[0], x[1], x[3], x[5]]), (0.0134, [x[0], list(together), x[3], x[5]])):
        _, found, _ = merged(PPT(threshold), tokens, layer, 1)
        np.testing.assert_allclose(found[0], expected, rtol=1e-6)


def test_pitome_merges_the_crowd_and_protects_the_others():
    degrees = np.deg2rad([0, 0, 90, 1, 2, 3, 200])  # of the keys: a crowd of four, and two alone
    k = jnp.asarray(np.stack([np.cos(degrees), np.sin(degrees)], -1), jnp.float32)[None, None]
    x = jnp.asarray(1.0 * 2 ** np.arange(7), jnp.float32)[None, :, None]
    _, found, size = merged(PiToMe(), Tokens(Attended(x, k, k, k), x, jnp.ones((1, 7))), Layer(7, 5, 2), 1)
    assert {4.0, 64.0} < set(np.asarray(found)[0, :, 0].tolist())
    assert sorted(np.asarray(size)[0].tolist()) in ([1, 1, 1, 2, 2], [1, 1, 1, 1, 3])


def test_the_random_choice():
    layer, prefix = PLACES["windows"]
    tokens = Tokens.random(layer, prefix)
    order = lambda rule, layer: np.asarray(rule(*tokens, layer, prefix).order)  # noqa: E731
    first = order(Random(), layer)
    assert (first == first[:1]).all()
    np.testing.assert_array_equal(first, order(Random(), layer))
    assert (first != order(Random(seed=1), layer)).any()
    assert (first != order(Random(), layer._replace(index=4))).any()
    # 33 - 25 tokens are removed, two in each of the four windows.
    quarter = np.argsort(window_order((4, 8), (2, 2), 32)) // 8
    assert np.bincount(quarter[first[0, 25:] - 1]).tolist() == [2, 2, 2, 2]


@pytest.fixture(scope="module")
def digits():
    return fc.load_checkpoint("packaged:digits")


def schedules_of(config, r):
    """Build schedules with every rule, alternately in windows and global."""
    names = ["evit", "diffrate", "ppt", "evit(fuse=true)", "tofu", "random"], ["nearest", "pitome", "pitome(open=1.0)"]
    text = [f"local:1:r{r}:w2x2@{name}" for name in names[1]] + [
        f"global:1:r{r}@{name}" for name in ("nearest", *names[0][:2])
    ]
    yield fc.MergeSchedule.parse(",".join(text), config.depth)
    yield fc.MergeSchedule.parse(",".join(f"global:1:r{r}@{name}" for name in names[0]), config.depth)


def test_nothing_removed_is_the_identity_and_gradients_are_finite(digits):
    images = jax.random.normal(jax.random.key(1), (2, *digits.config.image_size, 3))
    dense = fc.ViT(digits.config).apply({"params": digits.params}, images)[0]
    for schedule in schedules_of(digits.config, 0):
        same = fc.ViT(digits.config, schedule).apply({"params": digits.params}, images)[0]
        np.testing.assert_array_equal(same, dense)
    for schedule in schedules_of(digits.config, 4):
        apply = fc.ViT(digits.config, schedule).apply
        run = jax.jit(jax.value_and_grad(lambda params, apply=apply: apply({"params": params}, images)[0].sum()))
        value, gradient = run(digits.params)
        assert abs(value - dense.sum()) > 1e-3
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.devices(8)
def test_one_device_equals_eight(digits):
    assert jax.device_count() == 8
    images = jax.random.normal(jax.random.key(2), (8, *digits.config.image_size, 3))
    everywhere = jax.device_put(images, parallel.batched(parallel.data_mesh()))
    for schedule in schedules_of(digits.config, 4):
        run = jax.jit(partial(fc.ViT(digits.config, schedule).apply, {"params": digits.params}))
        (expected, alone), (found, spread) = run(images), run(everywhere)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        np.testing.assert_array_equal(spread["source"], alone["source"])
        np.testing.assert_array_equal(spread["pruned"], alone["pruned"])


def test_macs_beyond_token_mergings():
    config = dataclasses.replace(fc.zoo.get("vit_small_patch16_224").config)
    layer = Layer(197, 181, 16)
    assert Nearest().macs(layer, config) == 98**2 * 384 + 197 * 384
    assert Nearest(features=0.0, attention=0.0).macs(layer, config) == 0
    assert ToFu().macs(layer, config) == Random().macs(layer, config) == 0
    assert EViT().macs(layer, config) == PPT().macs(layer, config) == 197 * 384
    assert PiToMe().macs(layer, config) == (196**2 - 98**2) * 64
    assert DiffRate(prune=0.0).macs(layer, config) == 197 * 384 + 16 * 180 * 384 - 98**2 * 64
    windows = Layer(197, 181, 4, 4, ((14, 14), (2, 2)))
    assert PiToMe().macs(windows, config) == 4 * (49**2 - 24**2) * 64
    average = dataclasses.replace(config, class_token=False, pool="avg")
    assert EViT().macs(Layer(196, 180, 16), average) == 196**2 * 384


@pytest.mark.parametrize("name", DIFFRATE_KEPT)
def test_published_counts_of_diffrate(name):
    """The remaining tokens are the published ones, and the cost is that in the name."""
    model, gmacs = name.removeprefix("diffrate_").split("_g")
    config = fc.zoo.get({"s": "deit_small_patch16_224", "b": "deit_base_patch16_224"}[model]).config
    schedule = fc.MergeSchedule.parse(name, 12)
    pruned, merged = ([int(count) for count in counts.split()] for counts in DIFFRATE_KEPT[name])
    assert list(schedule.tokens(config)) == merged
    for layer, left in zip(schedule.plan(config), pruned, strict=True):
        if isinstance(layer.rule, DiffRate):
            assert layer.tokens_in - layer.rule.pruned(layer) == min(left, layer.tokens_in)
    assert fc.flops.gmacs(config, schedule) == pytest.approx(float(gmacs), abs=0.055)
    assert fc.MergeSchedule.parse(str(schedule), 12) == schedule


def test_the_rate_is_capped_at_half_the_tokens_unless_diffrate_may_go_further():
    config = fc.zoo.get("vit_small_patch16_224").config
    tokens = lambda rule: fc.MergeSchedule.parse(f"dense:11,global:1:r190@{rule}", 12).tokens(config)[-1]  # noqa: E731
    assert [tokens(rule) for rule in ("tome", "evit", "diffrate", "diffrate(half=false)")] == [99, 99, 99, 7]


def test_trained_weights_of_evit_convert_and_give_what_its_model_gives(tmp_path):
    """A training checkpoint in DeiT's keys; two layers keep 0.6 of the patches and fuse the rest."""
    torch = pytest.importorskip("torch")
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = vision_transformer.VisionTransformer(64, 8, embed_dim=64, depth=3, num_heads=4, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    state = {"model": model.state_dict(), "optimizer": {}, "epoch": 299, "args": argparse.Namespace(fuse_token=True)}
    torch.save(state, tmp_path / "evit.pth")
    options = ("--num_heads", "4", "--preprocess", "timm/deit")
    main([str(tmp_path / "evit.pth"), str(tmp_path / "out"), *options])
    checkpoint = fc.load_checkpoint(tmp_path / "out")

    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        x = model.patch_embed(images)
        x = torch.cat([model.cls_token.expand(3, -1, -1), x], dim=1) + model.pos_embed
        for index, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv(block.norm1(x)).reshape(3, -1, 3, 4, 16).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / 4).softmax(dim=-1)
            x = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
            if index < 2:
                rows = []
                for tokens, attention in zip(x, weights.mean(dim=1)[:, 0, 1:], strict=True):
                    order = attention.argsort(descending=True) + 1
                    kept, rest = order.split([-(-6 * len(order) // 10), len(order) - -(-6 * len(order) // 10)])
                    fused = (attention[rest - 1, None] * tokens[rest]).sum(dim=0)
                    rows.append(torch.cat([tokens[:1], tokens[kept], fused[None]]))
                x = torch.stack(rows)
            x = x + block.mlp(block.norm2(x))
        expected = model.head(model.norm(x)[:, 0]).numpy()
    assert x.shape[1] == 1 + 24 + 1  # 64 -> 39 + 1 -> 24 + 1
    schedule = fc.MergeSchedule.parse("global:1:r24@evit(fuse=true),global:1:r15@evit(fuse=true),dense:1", 3)
    run = jax.jit(fc.ViT(checkpoint.config, schedule).apply)
    logits, _ = run({"params": checkpoint.params}, images.permute(0, 2, 3, 1).numpy())
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())
