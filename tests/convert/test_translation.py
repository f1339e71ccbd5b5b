import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16

from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.convert.geometry import infer_config
from fcvit_jax.convert.translation import assemble, translate
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo
from fcvit_jax.models.config import ViTConfig
from states import CONFIG, in_layout, state_dict


def infer(arrays, known=None, **asked):
    return infer_config(translate(arrays), {"a model": known or {}}, asked)[0]


def convert(arrays, config=CONFIG, grid=(4, 4)):
    return assemble(translate(arrays), config, grid)


def test_geometry_is_read_off_the_shapes():
    assert infer(state_dict(), num_heads=2) == CONFIG


def test_heads_are_64_wide_only_where_all_known_models_of_the_width_agree():
    def heads(width):
        arrays = state_dict()
        arrays["patch_embed.proj.weight"] = np.zeros((width, 3, 8, 8), np.float32)
        return infer(arrays).num_heads

    assert [heads(width) for width in (192, 384, 768, 1024)] == [3, 6, 12, 16]
    for width in (128, 1280):  # ViT-H is 1280 wide with 16 heads, not 20
        with pytest.raises(InputError, match="pass --model or --num_heads"):
            heads(width)


def test_every_leaf_holds_its_source():
    arrays = state_dict()
    converted = convert(arrays)
    params = converted.params
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract_params(CONFIG))
    np.testing.assert_array_equal(params["blocks_1"]["mlp"]["fc1"]["kernel"], arrays["blocks.1.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(params["blocks_0"]["attn"]["qkv"]["bias"], arrays["blocks.0.attn.qkv.bias"])
    np.testing.assert_array_equal(params["embed"]["kernel"], arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0))
    assert converted.dropped == {}
    assert converted.remarks == ()
    assert sorted(mapped.key for mapped in converted.keys) == sorted(arrays)
    assert ("head.weight", (5, 128), "head/kernel", (128, 5), "linear") in converted.keys


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float64])
def test_other_floats_become_float32(dtype):
    arrays = {name: value.astype(dtype) for name, value in state_dict().items()}
    converted = convert(arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves(converted.params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(converted.params["norm"]["bias"], arrays["norm.bias"].astype(np.float32))


def test_the_head_is_the_requested_one():
    arrays = state_dict()
    assert infer(arrays, num_heads=2, num_classes=5) == CONFIG
    with pytest.raises(InputError, match="the head has 5 classes, you asked for 10"):
        infer(arrays, num_heads=2, num_classes=10)
    backbone = infer(arrays, num_heads=2, num_classes=0)
    converted = convert(arrays, backbone)
    assert backbone.num_classes == 0
    assert converted.dropped == dict.fromkeys(("head.weight", "head.bias"), "the head was not asked for")
    assert "head" not in converted.params
    assert not any(mapped.key.startswith("head") for mapped in converted.keys)
    for key in ("head.weight", "head.bias"):
        del arrays[key]
    assert infer(arrays, num_heads=2).num_classes == 0
    with pytest.raises(InputError, match="no head"):
        infer(arrays, num_heads=2, num_classes=5)
    with pytest.raises(InputError, match=r"21843 classes \(ImageNet-21k\), you asked for 1000"):
        infer(arrays | {"head.weight": np.zeros((21843, 128), np.float32)}, num_heads=2, num_classes=1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.attn.rel_pos": np.zeros(3, np.float32)}, "'blocks.0.attn.rel_pos' is not a key of the timm layout"),
        ({"norm.weight": None}, "nothing in the file fills norm/scale"),
        ({"fc_norm.weight": np.ones(128, np.float32)}, "'fc_norm.weight' fills norm/scale a second time"),
        ({"blocks.1.mlp.fc2.weight": np.zeros((128, 12), np.float32)}, r"'blocks.1.mlp.fc2.weight' is \(128, 12\)"),
        ({"norm.bias": np.full(128, np.nan, np.float32)}, "'norm.bias' holds values that are not finite"),
        ({"norm.bias": np.zeros(128, np.int8)}, "'norm.bias' holds int8"),
        ({"norm.bias": np.float32(1)}, r"'norm.bias' is \(\) in the file"),
        ({"head.weight": None, "head.fc.weight": np.zeros((5, 128), np.float32)}, "'head.fc.weight' is not a key"),
        ({"reg_token": np.zeros((1, 4, 128), np.float32)}, "'reg_token' has no place"),
        ({"cls_token": np.zeros((1, 0, 128), np.float32)}, r"'cls_token' is \(1, 0, 128\)"),
    ],
)
def test_conversion_is_strict_on_both_sides(change, message):
    arrays = state_dict() | change
    with pytest.raises(InputError, match=message):
        convert({name: value for name, value in arrays.items() if value is not None})


def huggingface(arrays):
    """Rename to the keys of transformers, to test the parts; its own files are in the parity tests."""
    renamed = {}
    for key, value in arrays.items():
        block = key.replace("blocks.", "vit.encoder.layer.")
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                renamed[block.replace("attn.qkv", f"attention.attention.{name}")] = part
            continue
        for old, new in {
            "attn.proj": "attention.output.dense",
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense",
            "mlp.fc2": "output.dense",
            "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "cls_token": "vit.embeddings.cls_token",
            "pos_embed": "vit.embeddings.position_embeddings",
            "head.": "classifier.",
        }.items():
            block = block.replace(old, new)
        renamed[f"vit.layer{block}" if block.startswith("norm.") else block] = value
    return renamed


def test_parts_of_a_leaf_come_together_in_any_order():
    arrays = state_dict()
    there = huggingface(arrays)
    for items in (there.items(), reversed(there.items())):
        np.testing.assert_array_equal(
            convert(dict(items)).params["blocks_1"]["attn"]["qkv"]["kernel"], arrays["blocks.1.attn.qkv.weight"].T
        )
    del there["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(InputError, match="nothing in the file fills blocks_1/attn/qkv/kernel:k, beside"):
        convert(there)


def test_a_hugging_face_file_needs_its_config_json():
    with pytest.raises(InputError, match=r"without config.json.*pass --model"):
        infer(huggingface(state_dict()))
    assert infer(huggingface(state_dict()), {"num_heads": 2}).num_heads == 2


def test_a_file_that_is_not_the_named_model_is_refused():
    known = {"patch_size": 16}
    with pytest.raises(InputError, match="not a model: patch_size is 8 in the file, 16 there"):
        infer(state_dict(), known)
    with pytest.raises(InputError, match="not a model: layer_scale is False in the file, 1e-05 there"):
        infer(state_dict(), {"layer_scale": 1e-5})
    with pytest.raises(InputError, match="a model has 4 heads, you asked for 2"):
        infer(state_dict(), {"num_heads": 4}, num_heads=2)


def test_norm_pre_requires_the_options_in_which_clip_models_differ():
    arrays = state_dict() | {f"norm_pre.{name}": np.ones(128, np.float32) for name in ("weight", "bias")}
    with pytest.raises(InputError, match=r"--gelu .*--norm_eps 1e-5"):
        infer(arrays, num_heads=2)
    config = infer(arrays, num_heads=2, gelu="quick", norm_eps=1e-5)
    assert (config.pre_norm, config.gelu, config.norm_eps) == (True, "quick", 1e-5)
    assert infer(arrays, {"gelu": "quick", "norm_eps": 1e-5, "num_heads": 2}) == config


def test_a_grid_that_is_not_square_must_be_given():
    arrays = state_dict(ViTConfig((32, 56), 8, 128, 2, 2, 256, num_classes=5))
    with pytest.raises(InputError, match="no square grid: pass --image_size"):
        infer(arrays, num_heads=2)
    assert infer(arrays, num_heads=2, image_size=(32, 56)).grid == (4, 7)
    assert infer(arrays, {"image_size": (32, 56)}, num_heads=2).grid == (4, 7)
    # 4x6 patches and a class entry, or 5x5 without: the requested size decides.
    arrays = state_dict(ViTConfig((32, 48), 8, 128, 2, 2, 256, num_classes=5))
    config = infer(arrays, num_heads=2, image_size=(32, 48))
    assert (config.grid, config.no_embed_class) == ((4, 6), False)
    assert infer(arrays, num_heads=2).no_embed_class


def test_a_requested_size_does_not_count_registers_as_positions():
    # 8x8 patches and a class entry: 65 entries, as many as 6x10 patches, a class token and four registers.
    arrays = state_dict(ViTConfig((64, 64), 8, 128, 2, 2, 256, num_classes=5))
    arrays |= {"register_tokens": np.ones((1, 4, 128), np.float32), "mask_token": np.ones((1, 128), np.float32)}
    for known in ({}, {"image_size": (64, 64)}):
        translation = translate(arrays)
        config, grid = infer_config(translation, {"a model": known}, {"num_heads": 2, "image_size": (48, 80)})
        assert (grid, config.no_embed_class, config.grid) == ((8, 8), True, (6, 10))


def test_the_requested_one_of_two_grids_with_as_many_patches_is_taken():
    config, grid = infer_config(translate(state_dict()), {}, {"num_heads": 2, "image_size": (16, 64)})
    assert (grid, config.grid) == ((2, 8), (2, 8))
    known = {"": {"image_size": (32, 32)}}  # unless another is known
    config, grid = infer_config(translate(state_dict()), known, {"num_heads": 2, "image_size": (16, 64)})
    assert (grid, config.grid) == ((4, 4), (2, 8))


def test_blocks_must_be_numbered_without_gaps():
    arrays = state_dict()
    arrays["blocks.3000.norm1.weight"] = arrays["blocks.0.norm1.weight"]
    with pytest.raises(InputError, match="blocks are numbered 0 to 3000, and there are 3"):
        infer(arrays, num_heads=2)


def test_another_image_size_resamples_the_positions_and_reports_it():
    arrays = state_dict()
    config = infer(arrays, num_heads=2, image_size=(48, 64))
    converted = convert(arrays, config)
    assert converted.params["embed"]["pos_embed"].shape == (1, 1 + 6 * 8, 128)
    np.testing.assert_array_equal(converted.params["embed"]["pos_embed"][:, 0], arrays["pos_embed"][:, 0])
    assert "position embedding 4x4, the model's grid 6x8: resampled (bicubic, antialiased" in converted.remarks[0]
    assert ("pos_embed", (1, 17, 128), "embed/pos_embed", (1, 49, 128), "grid, resampled") in converted.keys


def test_another_patch_size_resamples_the_kernel_and_reports_it():
    config = infer(state_dict(), num_heads=2, patch_size=16)
    assert (config.grid, config.image_size) == ((2, 2), (32, 32))
    converted = convert(state_dict(), config)
    assert converted.params["embed"]["kernel"].shape == (16, 16, 3, 128)
    assert any("patches of 8 pixels, the model's of 16" in remark for remark in converted.remarks)


def test_the_position_of_the_class_token_goes_into_it_where_registers_have_none():
    arrays = state_dict() | {"register_tokens": np.ones((1, 3, 128), np.float32), "mask_token": np.ones((1, 128))}
    translation = translate(arrays)
    assert translation.layout.name == "DINOv2 with registers"
    config, grid = infer_config(translation, {}, {"num_heads": 2})
    assert (config.num_registers, config.no_embed_class, grid) == (3, True, (4, 4))
    embed = assemble(translation, config, grid).params["embed"]
    np.testing.assert_array_equal(embed["pos_embed"], arrays["pos_embed"][:, 1:])
    np.testing.assert_array_equal(embed["cls_token"], arrays["cls_token"] + arrays["pos_embed"][:, :1])


def test_facts_of_the_zoo_fit_a_file_of_the_model():
    config = zoo.get("deit_tiny_patch16_224").config
    known = {name: value for name, value in config.to_dict().items() if name not in ("image_size", "num_classes")}
    assert infer(state_dict(config), known) == config


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_arrays_need_not_be_aligned(dtype):
    def shift(array):
        memory = np.zeros(array.nbytes + 1, np.uint8)
        memory[1:] = np.frombuffer(array.tobytes(), np.uint8)
        return memory[1:].view(array.dtype).reshape(array.shape)

    arrays = {name: value.astype(dtype) for name, value in state_dict().items()}
    shifted = {name: shift(value) for name, value in arrays.items()}
    assert not shifted["norm.bias"].flags.aligned
    jax.tree.map(np.testing.assert_array_equal, convert(shifted).params, convert(arrays).params)


def test_a_known_size_is_preferred_to_a_square():
    arrays = state_dict(ViTConfig((16, 64), 8, 128, 2, 2, 256, num_classes=5))  # 2x8 patches, as many as 4x4
    assert infer(arrays, {"image_size": (16, 64)}, num_heads=2).grid == (2, 8)


def test_each_of_two_sources_must_agree_with_the_file():
    translation = translate(state_dict())
    with pytest.raises(InputError, match="not a small model: embed_dim is 128 in the file, 64 there"):
        infer_config(translation, {"a small model": {"embed_dim": 64}, "config.json": {"embed_dim": 128}}, {})


def test_a_file_without_a_final_norm_or_with_half_a_head_is_incomplete():
    arrays = state_dict()
    del arrays["head.weight"]
    with pytest.raises(InputError, match="the head has a bias, but no weight"):
        infer(arrays, num_heads=2)
    assert infer(arrays, num_heads=2, num_classes=0).num_classes == 0
    arrays = {key: value for key, value in state_dict().items() if not key.startswith("norm.")}
    with pytest.raises(InputError, match="nothing in the file fills norm/bias, norm/scale"):
        convert(arrays, infer(arrays, num_heads=2))


def prefixed(prefix, arrays=None):
    return {f"{prefix}{key}": value for key, value in (arrays or state_dict()).items()}


def pieces(translation):
    return {path: each[""].array for path, each in translation.leaves.items() if "" in each}


def assert_same_leaves(translation, expected):
    found, wanted = pieces(translation), pieces(expected)
    assert found.keys() == wanted.keys()
    for path, array in wanted.items():
        np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize(
    "prefix", ["module.", "vit.", "a.b.c.", "net.visual.trunk.", "_forward_module.model.", "teacher.backbone."]
)
@pytest.mark.parametrize("layout", ["timm", "torchvision", "Hugging Face ViT"])
def test_any_prefix_of_the_model_is_removed(prefix, layout):
    config = ViTConfig((32, 32), 8, 64, 2, 4, 128, 5)
    arrays = in_layout(layout, config)
    translation = translate(prefixed(prefix, arrays))
    assert (translation.layout.name, translation.dropped) == (layout, {})
    assert translation.prefix == ("" if (layout, prefix) == ("Hugging Face ViT", "vit.") else prefix)
    assert_same_leaves(translation, translate(arrays))


def test_leftovers_of_self_supervised_training_are_dropped():
    heads = ("module.head.mlp.0.weight", "module.head.last_layer.weight_g", "dino_head.mlp.0.bias", "n_averaged")
    arrays = prefixed("module.backbone.") | dict.fromkeys(heads, np.ones(3))
    translation = translate(arrays)
    assert translation.prefix == "module.backbone."
    assert set(translation.dropped) == set(heads)
    assert_same_leaves(translation, translate(state_dict()))


def test_several_models_in_one_file_are_listed():
    arrays = prefixed("student.backbone.") | prefixed("teacher.")
    with pytest.raises(InputError, match=r"several models \(student\.backbone, teacher\): choose one with --key NAME"):
        translate(arrays)


BODY = {key: value for key, value in state_dict().items() if not key.startswith("head.")}
HEAD = {key: value for key, value in state_dict().items() if key.startswith("head.")}
RENAMED = ("fc", "classifier", "head.1", "classifier.0.1", "heads.weight_of.linear", "mlp_head")


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_head_of_another_name_is_recognised_by_its_shape(name, prefix):
    head = {f"{name}.weight": HEAD["head.weight"], f"{name}.bias": HEAD["head.bias"]}
    translation = translate(prefixed(prefix, BODY) | head)
    assert_same_leaves(translation, translate(state_dict()))
    (remark,) = translation.remarks
    assert f"the head is '{name}.weight', recognised by its shape" in remark
    backbone = translate(prefixed(prefix, BODY) | head, num_classes=0)
    assert_same_leaves(backbone, translate(BODY))
    assert backbone.dropped == dict.fromkeys(head, "not part of the backbone")


def test_a_head_of_googles_layout_is_transposed():
    config = ViTConfig((32, 32), 8, 64, 2, 4, 128, 5)
    arrays = in_layout("big_vision", config)
    renamed = {key.replace("head/", "classifier/"): value for key, value in arrays.items()}
    assert_same_leaves(translate(renamed), translate(arrays))


def layer(name, outputs, inputs):
    return {f"{name}.weight": np.ones((outputs, inputs), np.float32), f"{name}.bias": np.zeros(outputs, np.float32)}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            layer("head.0", 128, 128) | layer("head.3", 5, 128),
            "several layers .*head.0.weight with 128 outputs, head.3",
        ),
        (layer("head.0", 256, 128) | layer("head.3", 5, 256), "several layers"),
        (layer("head.0", 99, 128) | layer("head.3", 5, 99), "'head.3.weight' is not a key .* of shape .classes, 128."),
        (
            layer("head.1", 5, 128) | {"head.0.weight": np.ones(128)},
            "'head.0.weight' is not a key of the timm layout, nor",
        ),
        (layer("a", 5, 128) | layer("b", 7, 128), "several heads .a.weight with 5 outputs, b.weight with 7 outputs."),
        ({"head.1.weight": np.ones((5, 128))}, "'head.1.weight' is not a key"),
        ({"criterion.weight": np.ones(3)}, "'criterion.weight' is not a key"),
    ],
)
def test_other_heads_are_refused_and_the_backbone_is_rescued(head, message):
    for prefix in ("", "net.vit."):
        arrays = prefixed(prefix, BODY) | head
        with pytest.raises(InputError, match=f"{message}.*--num_classes"):
            translate(arrays)
        assert_same_leaves(translate(arrays, num_classes=0), translate(BODY))


def test_the_number_of_classes_chooses_a_head():
    arrays = BODY | layer("a", 5, 128) | layer("b", 7, 128)
    translation = translate(arrays, num_classes=7)
    assert translation.leaves["head/kernel"][""].key == "b.weight"
    assert translation.dropped == dict.fromkeys(("a.weight", "a.bias"), "another head")


def test_an_unknown_key_inside_a_backbone_is_never_dropped():
    for prefix in ("", "backbone."):
        arrays = prefixed(prefix, BODY | {"blocks.0.attn.gate": np.ones(2)})
        with pytest.raises(
            InputError, match=r"blocks\.0\.attn\.gate' is not a key of the timm layout: .* architecture"
        ):
            translate(arrays, num_classes=0)
