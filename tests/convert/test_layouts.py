from typing import Any

import jax
import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params, leaf_shapes
from fcvit_jax.convert.geometry import infer_config
from fcvit_jax.convert.layouts import LAYOUTS, detect_layout
from fcvit_jax.convert.posembed import sincos_2d
from fcvit_jax.convert.translation import assemble, translate
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from states import in_layout, state_dict

EXTRAS: dict[str, Any] = dict(
    dist_token=True, num_registers=2, layer_scale=1.0, pre_norm=True, representation_size=8, pool="dist_avg"
)
EVERYTHING = ViTConfig((32, 32), 8, 64, 2, 2, **EXTRAS)


def test_every_row_leads_to_a_leaf():
    leaves = {path.split(":")[0].replace("blocks_0", "blocks_#") for path in leaf_shapes(abstract_params(EVERYTHING))}
    for layout in LAYOUTS:
        targets = {path.split(":")[0] for path, _ in layout.table.values()}
        assert targets <= leaves, layout.name
        assert {"embed/kernel", "blocks_#/attn/qkv/kernel", "head/bias"} <= targets


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("blocks.0.attn.relative_position_bias_table", "BEiT or Swin"),
        ("attn_pool.latent", "SigLIP"),
        ("MAPHead_0/probe", "SigLIP"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("encoder.layer.0.mlp.weights_in.weight", "SwiGLU"),
        ("blocks.0.attn.q_norm.weight", "normalises queries"),
        ("blocks.0.attn.rope.freqs", "rotary"),
        ("rope_embed.periods", "rotary"),
        ("visual.transformer.resblocks.0.ln_1.weight", "CLIP in OpenAI's layout"),
        ("mask_decoder.iou_token.weight", "Segment Anything"),
        ("layers.0.blocks.0.norm1.weight", "Swin"),
        ("layer1.0.conv1.weight", "ResNet"),
        ("conv_root/kernel", "hybrid"),
    ],
)
def test_other_families_are_refused_by_name(key, family):
    with pytest.raises(InputError, match=family):
        detect_layout(state_dict() | {key: np.zeros(3)})


def test_an_unknown_layout_names_the_nearest_and_what_differs():
    assert detect_layout(state_dict()).name == "timm"
    with pytest.raises(
        InputError,
        match=r"first keys: conv1.weight.*nearest is .* \(missing: patch_embed.proj.weight; unknown: conv1.weight\)",
    ):
        detect_layout({"conv1.weight": np.zeros(3)})
    arrays = state_dict()
    del arrays["blocks.0.attn.qkv.weight"]
    arrays["blocks.0.attn.in_proj"] = np.zeros(3)
    with pytest.raises(
        InputError, match=r"nearest is timm \(missing: blocks.0.attn.qkv.weight; unknown: blocks.0.attn.in_proj\)"
    ):
        detect_layout(arrays)


def test_a_mask_token_tells_of_dinov2_unless_there_is_a_decoder():
    arrays = state_dict() | {"mask_token": np.zeros((1, 128), np.float32)}
    assert detect_layout(arrays).name == "DINOv2"
    assert translate(arrays).dropped == {"mask_token": "used in pre-training only"}
    arrays["decoder_embed.weight"] = np.zeros((3, 3), np.float32)
    assert detect_layout(arrays).name == "timm"
    assert set(translate(arrays).dropped) == {"mask_token", "decoder_embed.weight"}


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_a_file_of_every_layout_is_told_and_fills_every_leaf(layout):
    registers = 2 if "registers" in layout else 0
    scale = 1.0 if "DINOv2" in layout else None
    positions = bool(registers) or layout in ("big_vision", "big_vision, scanned")
    config = ViTConfig(
        (32, 32), 8, 64, 2, 4, 128, 5, num_registers=registers, layer_scale=scale, no_embed_class=positions
    )
    arrays = in_layout(layout, config)
    if layout == "DINOv2 with registers":
        arrays["register_tokens"] = arrays.pop("reg_token")
    if layout == "DINOv2":
        arrays["mask_token"] = np.zeros((1, 64), np.float32)
    translation = translate(arrays)
    assert translation.layout.name == layout
    assert translation.layout.missing(arrays) == []
    assert translation.num_heads == (4 if "vision" in layout and layout != "torchvision" else None)
    inferred, grid = infer_config(translation, {"": {"layer_scale": scale}}, {"num_heads": 4})
    assert inferred == config
    converted = assemble(translation, config, grid)
    assert {mapped.key for mapped in converted.keys} == arrays.keys() - {"mask_token"}
    total = sum(value.size for key, value in arrays.items() if key != "mask_token")
    assert total == sum(leaf.size for leaf in jax.tree.leaves(converted.params))


def test_a_big_vision_file_without_positions_means_the_fixed_ones():
    config = ViTConfig((32, 32), 8, 64, 2, 4, 128, 5, class_token=False, pool="avg", representation_size=16)
    arrays = in_layout("big_vision", config)
    del arrays["pos_embedding"]
    translation = translate(arrays)
    inferred, grid = infer_config(translation, {}, {"image_size": (32, 32)})
    assert (inferred, grid) == (config, None)
    converted = assemble(translation, config, grid)
    np.testing.assert_array_equal(converted.params["embed"]["pos_embed"], sincos_2d((4, 4), 64))
    assert any("sincos2d" in remark for remark in converted.remarks)
    arrays = state_dict()
    del arrays["pos_embed"]
    with pytest.raises(InputError, match="holds no position embedding"):
        infer_config(translate(arrays), {}, {})
