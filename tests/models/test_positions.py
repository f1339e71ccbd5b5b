"""Rotary positions, and merging with them, against a program in float64 that is written from their definition.

In a layer, queries and keys are rotated by the angles of their tokens' coordinates, and tokens attend. Then tokens
merge by the cosine of the keys before rotation, or optionally after it. A merged token is the size-weighted mean of its
members, and lies at the size-weighted mean of their coordinates. The next layer computes its angles from these.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.checkpoint import flat_params
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import Rotary
from fcvit_jax.models.merging import Matching
from fcvit_jax.models.positions import grid_coordinates, merge_coordinates, rotate

DINOV3 = fc.ViTConfig(
    (48, 32), 8, 32, 4, 4, 48, 5, num_registers=2, norm_eps=1e-5, layer_scale=1.0, learned_positions=False,
    rotary=Rotary(), key_bias=False,
)  # fmt: skip
EVA = fc.ViTConfig(
    (48, 32), 8, 32, 4, 2, 42, 5, rotary=Rotary(1e4, "interleaved", "index", reference=(4, 4)), key_bias=False,
    gated=True, mlp_norm=True, attn_norm=True, pool="avg", fc_norm=True,
)  # fmt: skip
PE = fc.ViTConfig(
    (48, 32), 8, 32, 4, 4, 48, 5, pool="map", map_heads=2, map_mlp_dim=64, pre_norm=True, patch_bias=False,
    rotary=Rotary(1e4, "interleaved", "index", offset=1.0, reference=(6, 4), x_first=True), head_bias=False,
)  # fmt: skip
CONFIGS = {"DINOv3": DINOV3, "EVA-02": EVA, "PE": PE}


def random_params(config, seed=0):
    images = jnp.zeros((1, *config.image_size, 3))
    params = jax.eval_shape(fc.ViT(config).init, jax.random.key(0), images)["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [np.float32(0.3 * rng.standard_normal(leaf.shape)) for leaf in leaves])


def draw(config, count=3):
    return np.random.default_rng(1).standard_normal((count, *config.image_size, 3)).astype(np.float32)


class Program:
    """The model in float64, for one image, with tokens in lists."""

    def __init__(self, config, params):
        self.config = config
        self.at = {path: np.asarray(leaf, np.float64) for path, leaf in flat_params(params).items()}

    def norm(self, path, x):
        x = x - x.mean(-1, keepdims=True)
        return (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_eps) * self.at[f"{path}/scale"]
            + self.at[f"{path}/bias"]
        )

    def linear(self, path, x):
        return x @ self.at[f"{path}/kernel"] + self.at.get(f"{path}/bias", 0.0)

    def mlp(self, path, x, gated, normed):
        x = self.linear(f"{path}/fc1", x)
        if gated:
            gate, x = np.split(x, 2, -1)
            x = gate / (1 + np.exp(-gate)) * x
        else:
            x = x * 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
        return self.linear(f"{path}/fc2", self.norm(f"{path}/norm", x) if normed else x)

    def turn(self, x, coordinates):
        """Rotate [heads, n, w], pair by pair, as complex numbers."""
        rotary, width = self.config.rotary, x.shape[-1]
        periods = np.array([rotary.theta ** (4 * j / width) for j in range(width // 4)])
        y, x_ = coordinates[:, :1] / periods, coordinates[:, 1:] / periods
        angles = np.concatenate([x_, y] if rotary.x_first else [y, x_], axis=1)
        half = rotary.rotation == "half"
        first = x[..., : width // 2] if half else x[..., 0::2]
        second = x[..., width // 2 :] if half else x[..., 1::2]
        turned = (first + 1j * second) * np.exp(1j * angles)
        out = np.empty_like(x)
        if half:
            out[..., : width // 2], out[..., width // 2 :] = turned.real, turned.imag
        else:
            out[..., 0::2], out[..., 1::2] = turned.real, turned.imag
        return out

    def attend(self, q, k, v, size):
        logits = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]) + np.log(size)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        y = weights / weights.sum(-1, keepdims=True) @ v
        return y.swapaxes(0, 1).reshape(y.shape[1], -1)

    def coordinates(self):
        config, (rows, columns) = self.config, self.config.grid
        rotary = config.rotary
        places = [[0.0, 0.0]] * config.num_prefix_tokens
        for row in range(rows):
            for column in range(columns):
                if rotary.coordinates == "centred":
                    places.append([2 * np.pi * (2 * (i + 0.5) / n - 1) for i, n in ((row, rows), (column, columns))])
                else:
                    down, across = rotary.reference
                    places.append([(row + rotary.offset) / rows * down, (column + rotary.offset) / columns * across])
        return np.array(places)

    def __call__(self, image, stages, carry="mean", metric="before"):
        config, at, heads = self.config, self.at, self.config.num_heads
        side, width, prefix = config.patch_size, config.embed_dim, config.num_prefix_tokens
        rows, columns = config.grid
        patches = [
            np.tensordot(np.float64(image[i * side : (i + 1) * side, j * side : (j + 1) * side]), at["embed/kernel"], 3)
            for i in range(rows)
            for j in range(columns)
        ]
        x = np.array(patches) + at.get("embed/bias", 0.0)
        tokens = [at[f"embed/{name}_token"][0] for name in ("cls", "reg") if f"embed/{name}_token" in at]
        x = np.concatenate([*tokens, x]) + (at["embed/pos_embed"][0] if config.learned_positions else 0.0)
        x = self.norm("embed/norm_pre", x) if config.pre_norm else x
        place, size = self.coordinates(), np.ones(len(x))
        groups: Any = None  # of patches that are matched together, as lists of positions
        for index, (kind, r, windows) in enumerate(stages):
            block = f"blocks_{index}"
            qkv = self.norm(f"{block}/norm1", x) @ at[f"{block}/attn/qkv/kernel"]
            bias = at[f"{block}/attn/qkv/bias"]
            if not config.key_bias:
                bias = np.concatenate([bias[:width], np.zeros(width), bias[width:]])
            q, k, v = (qkv + bias).reshape(len(x), 3, heads, -1).transpose(1, 2, 0, 3)
            turned = self.turn(k, place)
            y = self.attend(self.turn(q, place), turned, v, size)
            y = self.linear(f"{block}/attn/proj", self.norm(f"{block}/attn/norm", y) if config.attn_norm else y)
            x = x + y * at.get(f"{block}/ls1", 1.0)
            if kind != "dense":
                keys = (k if metric == "before" else turned).mean(0)
                keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
                if kind == "local" and groups is None:
                    groups = [
                        [prefix + i * columns + j for i in range(rows) for j in range(columns)
                         if i * windows[0] // rows == down and j * windows[1] // columns == across]
                        for down in range(windows[0]) for across in range(windows[1])
                    ]  # fmt: skip
                together: Any = groups if kind == "local" else [list(range(len(x)))]
                members, groups = [[i] for i in range(prefix)], []
                for group in together:
                    begin = len(members)
                    free = [(n, i) for n, i in enumerate(group) if i >= prefix]
                    a, b = ([i for n, i in free if n % 2 == parity] for parity in (0, 1))
                    best = {i: max(b, key=lambda j, i=i: keys[i] @ keys[j]) for i in a}
                    gone = sorted(a, key=lambda i: -keys[i] @ keys[best[i]])[: -(-r // len(together))]
                    members += [[i] for i in a if i not in gone] + [[j, *(i for i in gone if best[i] == j)] for j in b]
                    groups.append(list(range(begin, len(members))))

                def mean(values, members=members, size=size):
                    return np.array([np.average(values[m], axis=0, weights=size[m]) for m in members])

                x = mean(x)
                place = mean(place) if carry == "mean" else place[[m[0] for m in members]]
                size = np.array([size[m].sum() for m in members])
            y = self.mlp(f"{block}/mlp", self.norm(f"{block}/norm2", x), config.gated, config.mlp_norm)
            x = x + y * at.get(f"{block}/ls2", 1.0)
        return self.linear("head", self.pool(x, size))

    def pool(self, x, size):
        config, prefix = self.config, self.config.num_prefix_tokens
        if config.fc_norm:
            return self.norm("norm", np.average(x[prefix:], axis=0, weights=size[prefix:]))
        x = self.norm("norm", x)
        if config.pool != "map":
            return x[0]
        width, heads = config.embed_dim, config.map_heads
        kernel, bias = self.at["pool/qkv/kernel"], self.at["pool/qkv/bias"]
        q = self.at["pool/probe"][0] @ kernel[:, :width] + bias[:width]
        k, v = np.split(x @ kernel[:, width:] + bias[width:], 2, -1)
        q, k, v = (part.reshape(len(part), heads, -1).swapaxes(0, 1) for part in (q, k, v))
        y = self.linear("pool/proj", self.attend(q, k, v, size))
        return (y + self.mlp("pool/mlp", self.norm("pool/norm", y), False, False))[0]


SCHEDULES: dict[str, tuple[Any, list]] = {
    "dense": (fc.MergeSchedule.parse("dense", 4), [("dense", 0, None)] * 4),
    "global": (fc.MergeSchedule.parse("tome_r4", 4), [("global", 4, None)] * 4),
    "local": (
        fc.MergeSchedule.parse("dense:1,local:2:r4:w2x2,global:1:r3", 4),
        [("dense", 0, None), *[("local", 4, (2, 2))] * 2, ("global", 3, None)],
    ),
}


@partial(jax.jit, static_argnums=(0, 1))
def logits_of(config, schedule, params, images):
    return fc.ViT(config, schedule).apply({"params": params}, images)[0]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_logits_are_those_of_the_program_in_float64(family, kind):
    config, (schedule, stages) = CONFIGS[family], SCHEDULES[kind]
    params, images = random_params(config), draw(config)
    program = Program(config, params)
    expected = np.array([program(image, stages) for image in images])
    found = np.asarray(logits_of(config, schedule, params, images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    if kind != "dense":  # another position of the merged tokens gives other logits
        other = np.array([program(image, stages, carry="target") for image in images])
        assert np.abs(other - expected).max() > 20 * 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    "rule",
    [
        "tome(turned=true)",
        "nearest(turned=true,features=0.0,checkerboard=false,size=0.0,attention=0.0,keep_norm=false)",
    ],
)
def test_keys_may_be_compared_after_their_rotation(family, rule):
    config = CONFIGS[family]
    params, images = random_params(config), draw(config)
    program, stages = Program(config, params), [("dense", 0, None), *[("local", 4, (2, 2))] * 2, ("global", 4, None)]
    text = f"dense:1,local:2:r4:w2x2@{rule},global:1:r4@{rule}"
    expected, before = (
        np.array([program(image, stages, metric=metric) for image in images]) for metric in ("after", "before")
    )
    found = np.asarray(logits_of(config, fc.MergeSchedule.parse(text, 4), params, images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.abs(before - expected).max() > 20 * 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["tome", "nearest"])
def test_without_rotary_positions_keys_are_compared_as_they_are(name):
    config = fc.ViTConfig((48, 32), 8, 32, 4, 4, 48, 5)
    params, images = random_params(config), draw(config)
    plain, turned = (
        logits_of(config, fc.MergeSchedule.parse(f"tome_r4@{name}{option}", 4), params, images)
        for option in ("", "(turned=true)")
    )
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["tome_r0", "s2winc3_r0"])
def test_without_merging_any_schedule_is_dense(family, name):
    config = CONFIGS[family]
    params, images = random_params(config), draw(config)
    found = logits_of(config, fc.MergeSchedule.parse(name, 4), params, images)
    dense = logits_of(config, fc.MergeSchedule.parse("dense", 4), params, images)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(dense))


def by_every_rule(r, last):
    """Build a schedule of every published rule; sizes before the last one are numbers of patches."""
    rules = ("tofu(prune=0.0)", "tofu(prune=1.0)", "ppt(threshold=0.0)", "ppt(threshold=1.0)", "evit", "random")
    local = [f"local:1:r{4 * r}:w2x2@{rule}" for rule in ("pitome", "random(prune=true)")]
    return ",".join([*local, *(f"global:1:r{r}@{rule}" for rule in rules), f"global:1:r{3 * r}@{last}"])


class Placed(fc.ViT):
    """A ViT whose `out` also has the coordinates of the tokens that leave the last layer."""

    def _run_blocks(self, x, plan, train):
        pooled, layers = super()._run_blocks(x, plan, train)
        self.sow("intermediates", "places", layers[-1].coordinates)
        return pooled, layers


@partial(jax.jit, static_argnums=(0, 1))
def run_placed(config, schedule, params, images):
    (logits, out), seen = Placed(config, schedule).apply({"params": params}, images, mutable="intermediates")
    return logits, out, seen["intermediates"]["places"][0]


@pytest.mark.parametrize("last", ["diffrate", "evit(fuse=true)"])
@pytest.mark.parametrize(
    "config",
    [
        replace(DINOV3, depth=9),
        replace(EVA, depth=9, class_token=False),
        replace(PE, depth=9),
        fc.ViTConfig((48, 32), 8, 32, 9, 4, 48, 5, class_token=False, pool="map", map_heads=2),
    ],
    ids=["class token and registers", "rotary, no class token", "rotary, attention pooling", "no class token, probe"],
)
def test_published_rules_keep_mass_and_merge_positions(config, last):
    params, images, prefix = random_params(config), draw(config), config.num_prefix_tokens
    logits, out, places = run_placed(config, fc.MergeSchedule.parse(by_every_rule(1, last), 9), params, images)
    assert np.isfinite(logits).all()
    before, after = out["layers"][-2:]
    left = np.asarray(~before["pruned"]).sum(axis=1)
    assert (left <= 24 - 4 - 1 - 1 - 1).all()  # pruned tokens take their patches with them
    np.testing.assert_allclose(before["size"][:, prefix:].sum(axis=1), left, rtol=1e-6)
    assert (np.asarray(after["size"])[:, prefix:].sum(axis=1) < left).all()
    if config.rotary:
        grid = Program(config, params).coordinates()[prefix:]
        for image in range(len(images)):
            source, pruned, found = (np.asarray(x[image]) for x in (after["source"], after["pruned"], places))
            np.testing.assert_array_equal(found[:prefix], 0)
            for token in range(prefix, len(found)):
                expected = grid[(source == token) & ~pruned].mean(axis=0)
                np.testing.assert_allclose(found[token], expected, rtol=0, atol=1e-5)
    dense = logits_of(config, fc.MergeSchedule.dense(9), params, images)
    same = logits_of(config, fc.MergeSchedule.parse(by_every_rule(0, last), 9), params, images)
    np.testing.assert_array_equal(np.asarray(same), np.asarray(dense))
    assert np.abs(logits - dense).max() > 1e-2


def test_prefix_tokens_are_not_turned_and_angles_follow_from_differences():
    rotary = DINOV3.rotary
    assert rotary is not None
    x = jax.random.normal(jax.random.key(0), (1, 2, DINOV3.num_tokens, 8))
    coordinates = jnp.asarray(grid_coordinates(DINOV3))
    turned = rotate(x, coordinates, rotary)
    np.testing.assert_array_equal(np.asarray(turned[:, :, :3]), np.asarray(x[:, :, :3]))
    assert np.abs(np.asarray(turned - x)[:, :, 3:]).max(axis=(0, 1, 3)).min() > 0.1
    moved = rotate(x, coordinates + 0.7, rotary)
    products = [np.asarray(jnp.einsum("bhik,bhjk->bhij", part, part)) for part in (turned, moved)]
    np.testing.assert_allclose(products[0][:, :, 3:, 3:], products[1][:, :, 3:, 3:], atol=2e-5)


def test_merged_coordinates_are_weighted_by_size_whatever_the_rule_weighs_by():
    coordinates = jnp.asarray([[[0.0, 0.0], [1.0, 2.0], [4.0, 8.0], [9.0, 9.0]]])
    size = jnp.asarray([[1.0, 3.0, 1.0, 5.0]])
    target = jnp.asarray([[0, 1, 1, 1]])
    expected = [[0.0, 0.0], [52 / 9, 59 / 9]]
    found = merge_coordinates(coordinates, size, Matching(target, 2))
    np.testing.assert_allclose(np.asarray(found)[0], expected, rtol=1e-6)
    weighing = Matching(target, 2, weight=jnp.asarray([[1.0, 0.1, 7.0, 2.0]]), keep_norm=True)
    np.testing.assert_allclose(np.asarray(merge_coordinates(coordinates, size, weighing))[0], expected, rtol=1e-6)
    pruning = Matching(target, 2, weight=jnp.asarray([[1.0, 1.0, 1.0, 0.0]]))
    found = merge_coordinates(coordinates, size, pruning)
    np.testing.assert_allclose(np.asarray(found)[0], [[0.0, 0.0], [7 / 4, 14 / 4]], rtol=1e-6)


def test_a_configuration_without_positions_or_with_odd_heads_is_refused():
    with pytest.raises(InputError, match="needs positions"):
        fc.ViTConfig(learned_positions=False)
    with pytest.raises(InputError, match=r"head width of 4, 8, 12, ...: it is 6"):
        fc.ViTConfig(embed_dim=18, num_heads=3, rotary=Rotary())
    with pytest.raises(InputError, match=r"rotary\.periods has 3 periods: it must be 16"):
        fc.ViTConfig(rotary=Rotary(periods=(1.0, 2.0, 3.0)))
    with pytest.raises(InputError, match=r"rotary\.rotation is 'both'"):
        Rotary(rotation="both")


def test_a_stored_configuration_of_the_first_format_lacks_rotary_positions():
    fields = fc.ViTConfig().to_dict()
    first = list(fields)[: list(fields).index("learned_positions")]
    assert fc.ViTConfig.from_dict({name: fields[name] for name in first}) == fc.ViTConfig()
    for config in CONFIGS.values():
        assert fc.ViTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="theta"):
        fc.ViTConfig.from_dict(DINOV3.to_dict() | {"rotary": {"thetas": 3.0}})
