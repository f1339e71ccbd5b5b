import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from fcvit_jax.models import flops, zoo
from fcvit_jax.models.config import Rotary, ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import Block, Merged, ViT


@pytest.mark.parametrize(
    ("model", "schedule", "published"),
    [
        # arXiv 2303.02331 and arXiv 2210.09461 print these two.
        ("vit_small_patch16_224", "dense", 4.60),
        ("vit_small_patch16_224", "tome_r13", 2.70),
        # Plotted in arXiv 2303.02331; the numbers are those of its curves' formula.
        ("vit_small_patch16_224", "tome_r16", 2.29),
        ("vit_small_patch16_224", "s2dfe_r18", 2.78),
        ("vit_small_patch16_224", "s2winc7_r16", 2.64),
        ("vit_base_patch16_224", "s2winc7_r16", 10.12),
        ("vit_large_patch16_224", "s4dfe_r8", 40.18),
    ],
)
def test_gmacs_of_the_papers_schedules(model, schedule, published):
    config = zoo.get(model).config
    assert round(flops.gmacs(config, MergeSchedule.parse(schedule, config.depth)), 2) == published


def xla_macs(function, *arguments):
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return analysis["flops"] / 2


@pytest.mark.parametrize("text", ["dense", "s2dfe_r18", "s2winc7_r16"])
def test_every_layer_agrees_with_xla(text):
    config = zoo.get("vit_small_patch16_224").config
    schedule = MergeSchedule.parse(text, 12)
    counted = {}  # layers of one kind compile once
    for index, (layer, macs) in enumerate(zip(schedule.plan(config), flops.layer_macs(config, schedule), strict=True)):
        if layer not in counted:
            x: Any = jax.ShapeDtypeStruct((1, layer.tokens_in, 384), jnp.float32)
            size: Any = jax.ShapeDtypeStruct((1, layer.tokens_in), jnp.float32)
            block = Block(config, jnp.float32, 0.0, 0.0)
            before = Merged(x, size)
            params = jax.eval_shape(partial(block.init, layer=layer, train=False), jax.random.key(0), before)

            def run(params, before, layer=layer, block=block):
                return block.apply(params, before, layer, False)[:2]

            counted[layer] = xla_macs(run, params, before)
        assert counted[layer] == pytest.approx(macs, rel=0.03), f"layer {index}"


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(image_size=(64, 96), patch_size=8, embed_dim=128, depth=2, num_heads=2, mlp_dim=512),
        ViTConfig((64, 64), 8, 128, 2, 2, 512, num_classes=10, dist_token=True, pool="dist_avg", num_registers=4),
        ViTConfig(
            (64, 96), 8, 256, 2, 4, 512, rotary=Rotary(), gated=True, key_bias=False, attn_norm=True, mlp_norm=True
        ),
        ViTConfig((64, 96), 8, 256, 2, 4, 512, pool="map", map_heads=2, map_mlp_dim=4096, head_bias=False),
    ],
)
def test_the_whole_model_agrees_with_xla(config):
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    params = jax.eval_shape(ViT(config).init, jax.random.key(0), images)
    logits = xla_macs(lambda params, images: ViT(config).apply(params, images)[0], params, images)
    assert logits == pytest.approx(flops.executed_gmacs(config) * 1e9, rel=0.05)
    if config.pooled_tokens:
        assert flops.executed_gmacs(config) < 0.75 * flops.gmacs(config)  # of two layers


@pytest.mark.parametrize(
    ("schedule", "executed"),
    # By hand: of the last layer's n tokens in and o out, queries, projection, attention and MLP for one alone.
    [("dense", 4.280), ("tome_r12", 2.760), ("s2dfe_r18", 2.749)],
)
def test_the_last_layer_is_executed_for_the_pooled_token(schedule, executed):
    config = zoo.get("deit_small_patch16_224").config
    assert round(flops.executed_gmacs(config, MergeSchedule.parse(schedule, 12)), 3) == executed
    patches = dataclasses.replace(config, pool="avg")
    assert flops.executed_gmacs(patches) == flops.gmacs(patches)
