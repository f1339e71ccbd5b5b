import jax
import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.convert import layouts
from fcvit_jax.convert.posembed import resample_timm
from fcvit_jax.errors import InputError
from fcvit_jax.models.vit import ViTConfig

# 2 layers, 128 wide (a width whose heads cannot be told), 4x4 patches of 8 pixels.
CONFIG = ViTConfig((32, 32), 8, 128, 2, 2, 256, num_classes=5)


def state_dict(config=CONFIG, seed=0, **drop):
    """A file in timm's layout for a configuration, written from the table of timm's own names and shapes."""
    rng = np.random.default_rng(seed)
    width, mlp = config.embed_dim, config.mlp_dim
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.num_tokens, width),
        "patch_embed.proj.weight": (width, 3, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (config.num_classes, width),
        "head.bias": (config.num_classes,),
    }
    for block in range(config.depth):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (mlp, width),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (width, mlp),
            "mlp.fc2.bias": (width,),
        }.items():
            shapes[f"blocks.{block}.{name}"] = shape
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_geometry_is_read_off_the_shapes():
    assert layouts.infer_config(state_dict(), num_heads=2) == CONFIG


def test_heads_are_64_wide_only_where_all_known_models_of_the_width_agree():
    def heads(width):
        arrays = state_dict()
        arrays["patch_embed.proj.weight"] = np.zeros((width, 3, 8, 8), np.float32)
        return layouts.infer_config(arrays).num_heads

    assert [heads(width) for width in (192, 384, 768, 1024)] == [3, 6, 12, 16]
    for width in (128, 1280):  # ViT-H is 1280 wide with 16 heads, not 20
        with pytest.raises(InputError, match="pass --model or --num_heads"):
            heads(width)


def test_every_leaf_holds_its_source():
    arrays = state_dict()
    converted = layouts.convert_arrays(arrays, CONFIG)
    params = converted.params
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract_params(CONFIG))
    np.testing.assert_array_equal(params["blocks_1"]["mlp"]["fc1"]["kernel"], arrays["blocks.1.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(params["blocks_0"]["attn"]["qkv"]["bias"], arrays["blocks.0.attn.qkv.bias"])
    np.testing.assert_array_equal(params["embed"]["kernel"], arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0))
    assert converted.dropped == {}
    assert converted.remarks == ()


def test_float16_becomes_float32_and_a_mask_token_is_dropped():
    arrays = {name: value.astype(np.float16) for name, value in state_dict().items()}
    arrays["mask_token"] = np.zeros((1, 1, 128), np.float16)
    converted = layouts.convert_arrays(arrays, CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted.params)} == {np.dtype(np.float32)}
    assert converted.dropped == {"mask_token": "used in pre-training only"}


def test_the_head_is_what_was_asked_for():
    arrays = state_dict()
    assert layouts.infer_config(arrays, num_heads=2, num_classes=5) == CONFIG
    with pytest.raises(InputError, match="the head has 5 classes, you asked for 10"):
        layouts.infer_config(arrays, num_heads=2, num_classes=10)
    backbone = layouts.infer_config(arrays, num_heads=2, num_classes=0)
    converted = layouts.convert_arrays(arrays, backbone)
    assert backbone.num_classes == 0
    assert set(converted.dropped) == {"head.weight", "head.bias"}
    assert "head" not in converted.params
    for key in ("head.weight", "head.bias"):
        del arrays[key]
    assert layouts.infer_config(arrays, num_heads=2).num_classes == 0
    with pytest.raises(InputError, match="no head"):
        layouts.infer_config(arrays, num_heads=2, num_classes=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.rel_pos": np.zeros(3, np.float32)}, "'blocks.0.attn.rel_pos' is no key of timm's"),
        ({"norm.weight": None}, "nothing in the file fills norm/scale"),
        ({"fc_norm.weight": np.ones(128, np.float32)}, "'fc_norm.weight' fills norm/scale a second time"),
        ({"blocks.1.mlp.fc2.weight": np.zeros((128, 12), np.float32)}, r"'blocks.1.mlp.fc2.weight' is \(128, 12\)"),
        ({"norm.bias": np.full(128, np.nan, np.float32)}, "'norm.bias' holds values that are not finite"),
        ({"norm.bias": np.zeros(128, np.int8)}, "'norm.bias' holds int8"),
        ({"head.weight": None, "head.fc.weight": np.zeros((5, 128), np.float32)}, "'head.fc.weight' is no key"),
        ({"reg_token": np.zeros((1, 4, 128), np.float32)}, "'reg_token' has no place"),
    ],
)
def test_conversion_is_strict_on_both_sides(change, message):
    arrays = state_dict() | change
    with pytest.raises(InputError, match=message):
        layouts.convert_arrays({name: value for name, value in arrays.items() if value is not None}, CONFIG)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("blocks.0.attn.relative_position_bias_table", "BEiT or Swin"),
        ("attn_pool.latent", "SigLIP"),
        ("vit.encoder.layer.0.layernorm_before.weight", "Hugging Face"),
        ("encoder.layers.encoder_layer_0.ln_1.weight", "torchvision"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("Transformer/encoderblock_0/LayerNorm_0/scale", "Google"),
    ],
)
def test_other_families_are_refused_by_name(key, family):
    with pytest.raises(InputError, match=family):
        layouts.detect_layout(state_dict() | {key: np.zeros(3)})


def test_an_unknown_layout_names_the_nearest():
    assert layouts.detect_layout(state_dict()) == "timm"
    with pytest.raises(InputError, match=r"first keys: conv1.weight.*'patch_embed.proj.weight'"):
        layouts.detect_layout({"conv1.weight": np.zeros(3)})


def test_a_file_that_is_not_the_named_model_is_refused():
    with pytest.raises(InputError, match="not a vit_small_patch16_224: patch_size is 8 in the file, 16 in that model"):
        layouts.infer_config(state_dict(), model="vit_small_patch16_224")


def test_a_grid_that_is_not_square_is_asked_for():
    arrays = state_dict(ViTConfig((32, 56), 8, 128, 2, 2, 256, num_classes=5))
    with pytest.raises(InputError, match="no square grid: pass --image_size"):
        layouts.infer_config(arrays, num_heads=2)
    assert layouts.infer_config(arrays, num_heads=2, image_size=(32, 56)).grid == (4, 7)
    # 4x6 patches and a class entry, or 5x5 without: the size asked for decides.
    arrays = state_dict(ViTConfig((32, 48), 8, 128, 2, 2, 256, num_classes=5))
    config = layouts.infer_config(arrays, num_heads=2, image_size=(32, 48))
    assert (config.grid, config.no_embed_class) == ((4, 6), False)
    assert layouts.infer_config(arrays, num_heads=2).no_embed_class


def test_blocks_must_be_numbered_without_gaps():
    arrays = state_dict()
    arrays["blocks.3000.norm1.weight"] = arrays["blocks.0.norm1.weight"]
    with pytest.raises(InputError, match="blocks are numbered 0 to 3000, and there are 3"):
        layouts.infer_config(arrays, num_heads=2)


def test_another_image_size_resamples_the_positions_and_says_so():
    arrays = state_dict()
    config = layouts.infer_config(arrays, num_heads=2, image_size=(48, 64))
    converted = layouts.convert_arrays(arrays, config)
    assert converted.params["embed"]["pos_embed"].shape == (1, 1 + 6 * 8, 128)
    assert "4x4, the model's grid 6x8" in converted.remarks[0]


@pytest.mark.parametrize(("old", "new"), [((24, 24), (14, 14)), ((7, 9), (16, 11)), ((14, 14), (14, 14))])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_resampling_equals_timm(old, new, prefix):
    torch = pytest.importorskip("torch")
    timm_layers = pytest.importorskip("timm.layers")
    embedding = np.random.default_rng(0).standard_normal((1, prefix + old[0] * old[1], 32)).astype(np.float32)
    expected = timm_layers.resample_abs_pos_embed(
        torch.from_numpy(embedding), new_size=list(new), old_size=list(old), num_prefix_tokens=prefix
    )
    np.testing.assert_allclose(resample_timm(embedding, prefix, old, new), expected.numpy(), atol=1e-5)
