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
from fcvit_jax.models.config import Rotary, ViTConfig
from states import in_layout, state_dict

EXTRAS: dict[str, Any] = dict(
    dist_token=True, num_registers=2, layer_scale=1.0, pre_norm=True, representation_size=8, attn_norm=True,
    mlp_norm=True,
)  # fmt: skip
EVERYTHING = [ViTConfig((32, 32), 8, 64, 2, 2, pool=pool, **EXTRAS) for pool in ("dist_avg", "map")]


def test_every_row_leads_to_a_leaf():
    leaves = {
        path.replace("blocks_0", "blocks_#") for each in EVERYTHING for path in leaf_shapes(abstract_params(each))
    }
    for layout in LAYOUTS:
        targets = {path.split(":")[0] for path, _ in layout.table.values()} - {"rotary/periods"}
        assert targets <= leaves, layout.name
        assert {"embed/kernel", "blocks_#/attn/qkv/kernel", "blocks_#/mlp/fc2/bias"} <= targets


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("blocks.0.attn.relative_position_bias_table", "BEiT or Swin"),
        ("blocks.0.attn.q_norm.weight", "normalises queries"),
        ("mask_decoder.iou_token.weight", "Segment Anything"),
        ("rope.freqs", "rotary frequencies of its own in each layer"),
        ("embeds.proj.weight", "NaFlexViT"),
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
        match=r"first keys: stem.weight.*nearest is .* \(missing: patch_embed.proj.weight; unknown: stem.weight\)",
    ):
        detect_layout({"stem.weight": np.zeros(3)})
    arrays = state_dict()
    del arrays["blocks.0.attn.qkv.weight"]
    arrays["blocks.0.attn.in_proj"] = np.zeros(3)
    with pytest.raises(
        InputError, match=r"nearest is timm \(missing: blocks.0.attn.qkv.weight; unknown: blocks.0.attn.in_proj\)"
    ):
        detect_layout(arrays)


def test_a_mask_token_means_dinov2_unless_there_is_a_decoder():
    arrays = state_dict() | {"mask_token": np.zeros((1, 128), np.float32)}
    assert detect_layout(arrays).name == "DINOv2"
    assert translate(arrays).dropped == {"mask_token": "used in pre-training only"}
    arrays["decoder_embed.weight"] = np.zeros((3, 3), np.float32)
    assert detect_layout(arrays).name == "timm"
    assert set(translate(arrays).dropped) == {"mask_token", "decoder_embed.weight"}


POSITIONS, REGISTERS = dict(no_embed_class=True), dict(num_registers=2, no_embed_class=True, layer_scale=1.0)
V3: dict[str, Any] = dict(
    num_registers=2, layer_scale=1.0, learned_positions=False, rotary=Rotary(), num_classes=0, norm_eps=1e-5
)
CLIP: dict[str, Any] = dict(pre_norm=True, patch_bias=False, norm_eps=1e-5)
PE: dict[str, Any] = dict(
    pool="map", map_heads=8, rotary=Rotary(1e4, "interleaved", "index", 1.0, (4, 4), x_first=True)
)
FIELDS: dict[str, dict[str, Any]] = {
    "DINOv2": dict(layer_scale=1.0),
    "DINOv2 with registers": REGISTERS,
    "DINOv3": V3 | dict(key_bias=False, rotary=Rotary(periods=(0.5, 1.0, 2.0, 3.0))),
    "DINOv3, keys biased": V3 | dict(rotary=Rotary(periods=(0.5, 1.0, 2.0, 3.0))),
    "open_clip": CLIP | dict(head_bias=False),
    "PE": CLIP | PE | dict(head_bias=False),
    "OpenAI CLIP": CLIP | dict(head_bias=False),
    "Hugging Face DINOv2": dict(layer_scale=1.0),
    "Hugging Face DINOv2 with registers": REGISTERS,
    "Hugging Face DINOv3": V3,
    "Hugging Face DINOv3, gated": V3 | dict(gated=True),
    "Hugging Face CLIP": CLIP | dict(head_bias=False),
    "Hugging Face SigLIP": dict(class_token=False, pool="map"),
    "big_vision": POSITIONS,
    "big_vision, scanned": POSITIONS,
}


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS])
def test_a_file_of_every_layout_is_reported_and_fills_every_leaf(layout):
    usual: dict[str, Any] = dict(
        image_size=(32, 32), patch_size=8, embed_dim=64, depth=2, num_heads=4, mlp_dim=128, num_classes=5
    )
    config = ViTConfig(**(usual | FIELDS.get(layout, {})))
    scale = config.layer_scale
    arrays = in_layout(layout, config)
    if layout == "DINOv2 with registers":
        arrays["register_tokens"] = arrays.pop("reg_token")
    if layout == "DINOv2":
        arrays["mask_token"] = np.zeros((1, 64), np.float32)
    dropped = {"mask_token"}
    if layout.startswith("DINOv3"):
        arrays["storage_tokens"] = arrays.pop("reg_token", arrays.get("storage_tokens"))
        arrays["rope_embed.periods"] = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
        dropped.add("rope_embed.periods")
    if layout == "DINOv3":
        for index in range(2):
            bias = arrays[f"blocks.{index}.attn.qkv.bias"]
            arrays[f"blocks.{index}.attn.qkv.bias"] = np.concatenate([bias, bias[:64]])
            arrays[f"blocks.{index}.attn.qkv.bias_mask"] = np.zeros(192, np.float32)
    translation = translate(arrays)
    assert translation.layout.name == layout
    assert translation.layout.missing(arrays) == []
    assert translation.num_heads == (4 if layout.startswith(("big_vision", "Google")) else None)
    known: dict[str, Any] = {"layer_scale": scale, "norm_eps": config.norm_eps, "gelu": "exact"}
    if layout.startswith("Hugging Face DINOv3"):
        known["rotary"] = Rotary()
    inferred, grid = infer_config(translation, {"": known}, {"num_heads": 4, "image_size": (32, 32)})
    assert inferred == config
    converted = assemble(translation, config, grid)
    used = {key for key in arrays if key not in dropped and not key.endswith("bias_mask")}
    assert {mapped.key for mapped in converted.keys} - dropped == used
    total = sum(arrays[key].size for key in used) - (2 * 64 if layout == "DINOv3" else 0)
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
