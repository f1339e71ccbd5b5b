import math
import re
from dataclasses import replace

import jax
import pytest

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo


def test_all_families_and_sizes_are_named():
    for name in (
        *(
            f"vit_{size}_patch16_{pixels}"
            for size in ("tiny", "small", "base", "large", "huge")
            for pixels in (224, 384)
        ),
        *(f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")),
        *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
        *(f"deit3_{size}_patch16_224" for size in ("small", "medium", "base", "large")),
        "deit3_huge_patch14_224",
        *(f"vit_{size}_patch14{kind}_dinov2" for size in ("small", "base", "large") for kind in ("", "_reg4")),
        "vit_base_patch8_224",
        "vit_base_patch32_384",
        "vit_huge_patch14_224",
    ):
        assert zoo.get(name).config.depth in (12, 24, 32)


def test_an_architecture_alone_has_no_preprocessing():
    assert zoo.get("vit_small_patch16_224").preprocess is None
    model = zoo.get("vit_small_patch16_224.augreg_in21k_ft_in1k")
    assert str(model.preprocess) == "bicubic 248->224 center, mean .5 std .5"
    assert model.top1 == 0.81402
    assert model.source is not None
    assert model.source == f"hf-hub:timm/{model.name}"


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(
        InputError, match="unknown model 'vit_smal_patch16_224'; the nearest names are vit_small_patch16"
    ):
        zoo.get("vit_smal_patch16_224")
    with pytest.raises(InputError, match=r"deit_small_patch16_224\.fb_in1k"):
        zoo.get("deit_small_patch16_224.fb")


def check_rotary(rotary, rope, attention, name):
    """Compare ours with timm's module, which keeps the sines and cosines of its grid, or computes them."""
    assert (rotary is None) == (rope is None), name
    if rope is None:
        return
    assert (rotary.rotation == "half") == bool(getattr(attention, "rotate_half", False)), name
    assert (rotary.theta, rotary.offset, rotary.x_first) == (
        rope.temperature, rope.grid_offset, rope.grid_indexing == "xy"
    ), name  # fmt: skip
    assert (rotary.coordinates == "centred") == (type(rope).__name__ == "RotaryEmbeddingDinoV3"), name
    assert rotary.coordinates == "centred" or list(rotary.reference) == list(rope.ref_feat_shape), name


@pytest.mark.filterwarnings("ignore")
def test_every_name_agrees_with_timm():
    timm = pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    from timm.models import get_pretrained_cfg

    there, missing = set(timm.list_models()), []
    for name, config in zoo.ARCHITECTURES.items():
        if name not in there:
            missing.append(name)
            continue
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        block = model.blocks[0]
        qkv = block.attn.qkv if block.attn.qkv is not None else block.attn.q_proj
        scale = getattr(block, "gamma_1", None) if hasattr(block, "gamma_1") else getattr(block.ls1, "gamma", None)
        positions = model.pos_embed
        assert config.image_size == model.patch_embed.img_size or "dinov3" in name, name  # which takes any size
        assert (config.patch_size, config.patch_size) == model.patch_embed.patch_size
        assert config.embed_dim == model.embed_dim
        assert config.depth == len(model.blocks)
        assert config.num_heads == block.attn.num_heads
        assert config.mlp_dim == block.mlp.fc2.in_features, name
        assert config.norm_eps == block.norm1.eps
        assert config.num_prefix_tokens == model.num_prefix_tokens
        assert config.num_registers == (0 if model.reg_token is None else model.reg_token.shape[1])
        assert config.learned_positions == (positions is not None)
        assert positions is None or config.no_embed_class == (
            config.num_prefix_tokens > 0 and positions.shape[1] == config.num_patches
        )
        biased = qkv.bias is not None or getattr(block.attn, "q_bias", None) is not None
        assert config.qkv_bias == biased, name
        assert not biased or config.key_bias == (block.attn.qkv is not None and qkv.bias is not None), name
        assert config.patch_bias == (model.patch_embed.proj.bias is not None)
        assert config.pre_norm == isinstance(model.norm_pre, torch.nn.LayerNorm)
        assert (config.layer_scale is None) == (scale is None), name
        activation = {"QuickGELU": "quick", "GELUTanh": "tanh", "GELU": "exact"}.get(type(block.mlp.act).__name__)
        assert config.gated == (activation is None), name
        assert config.gated or config.gelu == activation, name
        assert config.dist_token == hasattr(model, "head_dist")
        assert config.dist_token or config.pool == model.global_pool, name
        assert config.fc_norm == isinstance(model.fc_norm, torch.nn.LayerNorm), name
        check_rotary(config.rotary, getattr(model, "rope", None), block.attn, name)
        classes = model.num_classes  # from the weights of the name, if timm and the zoo differ
        ours = abstract_params(replace(config, num_classes=classes, head_bias=True))
        counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(ours))
        assert counted == sum(parameter.numel() for parameter in model.parameters()), name
    # Only sizes that timm leaves out of the ViT grid.
    assert len(missing) == 19
    assert all(re.fullmatch(r"vit_(tiny|small|base|large|huge)_patch\d+_(224|384|512|518)", name) for name in missing)

    for name in zoo.names():
        if "." not in name or ".tv_" in name:
            continue
        known, model = get_pretrained_cfg(name), zoo.get(name)
        assert known is not None, name
        assert model.preprocess is not None
        assert model.preprocess.image_size == known.input_size[1:]
        if "siglip" not in name:  # timm states a centre crop, Google trained on squashed images
            assert model.preprocess.crop_pct == known.crop_pct, name
            assert model.preprocess.crop_mode == known.crop_mode
        assert model.preprocess.interpolation == known.interpolation
        assert model.preprocess.mean == pytest.approx(known.mean)
        assert model.preprocess.std == pytest.approx(known.std)
        assert model.source == (f"hf-hub:{known.hf_hub_id}" if known.hf_hub_id else known.url), name


def test_torchvision_names_agree_with_torchvision():
    transformer = pytest.importorskip("torchvision.models.vision_transformer")
    published = {
        weights.url: weights
        for name in ("ViT_B_16", "ViT_B_32", "ViT_L_16", "ViT_L_32", "ViT_H_14")
        for weights in getattr(transformer, f"{name}_Weights")
    }
    named = {model.source: model for model in map(zoo.get, zoo.names()) if model.name.split(".")[-1].startswith("tv_")}
    assert named.keys() == published.keys()
    for url, weights in published.items():
        pixels, transforms = named[url].preprocess, weights.transforms()
        assert pixels is not None
        assert [pixels.image_size, pixels.resize_size] == [
            tuple(transforms.crop_size * 2),
            tuple(transforms.resize_size * 2),
        ]
        assert (pixels.interpolation, pixels.crop_mode) == (transforms.interpolation.value, "center")
        assert (list(pixels.mean), list(pixels.std)) == (transforms.mean, transforms.std)
        assert named[url].top1 == pytest.approx(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100)
        assert named[url].config.patch_size == int(url.split("_")[2].split("-")[0])
