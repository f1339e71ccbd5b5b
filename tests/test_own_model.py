"""The examples of docs/own_model.md, run as written, against the library's own model with the same weights."""

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import fcvit_jax as fc

LINEN, NNX, RULE = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "own_model.md").read_text(), flags=re.DOTALL
)
CONFIG = fc.ViTConfig((32, 32), 4, 48, 4, 3, 192, num_classes=10)
SCHEDULES = ["dense", "tome_r9", "s2winc3_r12"]


@functools.cache
def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "example"}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as for users
        exec(text, names)
    return names


def draw(shape, key):
    return 0.2 * jax.random.normal(key, shape)


def ours(leaves: dict[str, jax.Array]) -> dict[str, Any]:
    """Convert {"path": leaf} of the examples to parameters of `fc.ViT`."""
    params = {}
    for path, leaf in leaves.items():
        path = re.sub(r"^blocks?/?(\d+)/", r"blocks_\1/", path)
        path = re.sub(r"^(blocks_\d+)/(qkv|proj)/", r"\1/attn/\2/", path)
        path = re.sub(r"^(blocks_\d+)/(fc\d)/", r"\1/mlp/\2/", path)
        path = re.sub(r"^patch/", "embed/", path)
        path = {"cls": "embed/cls_token", "pos": "embed/pos_embed"}.get(path, path)
        params[path] = leaf
    return traverse_util.unflatten_dict(params, sep="/")


def check(logits, features, leaves, schedule, images):
    model = fc.ViT(CONFIG, fc.MergeSchedule.parse(schedule, 4))
    expected, out = jax.jit(model.apply)({"params": ours(leaves)}, images)
    assert float(jnp.abs(expected).max()) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_allclose(features, fc.unmerge_tokens(out["tokens"], out["source"]), atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_linen_model_merges_as_ours(schedule):
    names = run(LINEN)
    assert names["logits"].shape == (2, 10)
    assert names["features"].shape == (2, 64, 48)
    flat: Any = traverse_util.flatten_dict(names["params"]["params"], sep="/")
    leaves = {path: draw(leaf.shape, jax.random.key(i)) for i, (path, leaf) in enumerate(flat.items())}
    images = jax.random.normal(jax.random.key(99), (2, 32, 32, 3))
    model = names["ViT"](fc.MergeSchedule.parse(schedule, 4))
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        logits, features = jax.jit(model.apply)({"params": traverse_util.unflatten_dict(leaves, sep="/")}, images)
    check(logits, features, leaves, schedule, images)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_nnx_model_merges_as_ours(schedule):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        names = run(NNX)
        assert names["logits"].shape == (2, 10)
        assert names["features"].shape == (2, 64, 48)
        model = names["ViT"](fc.MergeSchedule.parse(schedule, 4), rngs=nnx.Rngs(0))
        state = nnx.state(model, nnx.Param)
        flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
        leaves = {path: draw(leaf.shape, jax.random.key(i)) for i, (path, leaf) in enumerate(flat.items())}
        nnx.update(model, jax.tree.unflatten(jax.tree.structure(state), list(leaves.values())))
        images = jax.random.normal(jax.random.key(99), (2, 32, 32, 3))
        logits, features = nnx.jit(model)(images)
    check(logits, features, leaves, schedule, images)


@pytest.mark.parametrize("example", [LINEN, NNX])
def test_merging_adds_about_ten_lines(example):
    assert 8 <= len(re.findall(r"# \+", example)) <= 12


def test_the_rule_counts_its_macs_and_takes_its_options(monkeypatch):
    names = run(RULE)
    rule = names["ByValue"]
    config = replace(CONFIG, num_classes=0)
    plain, own = (fc.MergeSchedule((fc.Global(4, 8, rule=each),)) for each in (fc.rules.ToMe(), rule()))
    extra = sum(2 * (layer.tokens_in // 2) ** 2 * 16 for layer in own.plan(config))
    assert round(1e9 * (fc.flops.gmacs(config, own) - fc.flops.gmacs(config, plain))) == extra
    monkeypatch.setitem(fc.rules.RULES, "by_value", rule)
    assert fc.MergeSchedule.parse("tome_r8@by_value(heads=2)", 4).stages == (fc.Global(4, 8, rule=rule(heads=2)),)
