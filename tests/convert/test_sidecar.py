import json
import math

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.convert.sidecar import Sidecar, read_sidecar
from fcvit_jax.data.preprocess import Preprocess, preset
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo

HALF = [0.5, 0.5, 0.5]
VIT = {"model_type": "vit", "num_attention_heads": 4}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 48},
    "image_mean": HALF,
    "image_std": HALF,
}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "global_pool": "token",
    "pretrained_cfg": {
        "input_size": [3, 32, 48],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "crop_mode": "squash",
        "mean": HALF,
        "std": [0.25, 0.5, 0.5],
    },
}


@pytest.fixture
def read(tmp_path):
    """Write the two files as given, an object or text, and read them."""

    def write_and_read(config=None, processor=None, **options):
        for name, content in (("config.json", config), ("preprocessor_config.json", processor)):
            if content is not None:
                text = content if isinstance(content, str) else json.dumps(content)
                (tmp_path / name).write_text(text, encoding="utf-8")
        return read_sidecar(tmp_path / "model.safetensors", **options)

    return write_and_read


def smooth(height, width):
    down, across = np.mgrid[:height, :width]
    waves = [np.sin(down / height * 4), np.cos(across / width * 5), np.sin((down + across) / (height + width) * 3)]
    return Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, -1)))


# ---- Hugging Face


GEOMETRY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=8, image_size=[32, 48])
FIELDS = dict(embed_dim=32, depth=2, num_heads=4, mlp_dim=64, patch_size=8, image_size=(32, 48), qkv_bias=True)


@pytest.mark.parametrize(
    ("name", "stated", "expected"),
    [
        ("ViT", {"intermediate_size": 64}, {"norm_eps": 1e-12, "gelu": "exact"}),
        ("DeiT", {"intermediate_size": 64, "hidden_act": "quick_gelu"}, {"norm_eps": 1e-12, "gelu": "quick"}),
        ("Dinov2", {"mlp_ratio": 2, "hidden_act": "gelu_new"}, {"norm_eps": 1e-6, "gelu": "tanh", "gated": False}),
        (
            "Dinov2WithRegisters",
            {"mlp_ratio": 2, "qkv_bias": True},
            {"norm_eps": 1e-6, "gelu": "exact", "gated": False},
        ),
    ],
)
def test_files_that_transformers_saves(name, stated, expected, tmp_path):
    transformers = pytest.importorskip("transformers")
    getattr(transformers, f"{name}Config")(**GEOMETRY, **stated, num_labels=3).save_pretrained(tmp_path)
    sidecar = read_sidecar(tmp_path / "model.safetensors")
    registers = {"num_registers": 4} if name.endswith("Registers") else {}
    assert sidecar == Sidecar("huggingface", ("config.json",), FIELDS | expected | registers)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_with_registers"])
def test_the_defaults_are_those_of_transformers(name, read):
    transformers = pytest.importorskip("transformers")
    default = transformers.AutoConfig.for_model(name)
    assert default.hidden_act == "gelu"
    assert read({"model_type": name}).fields == {"norm_eps": default.layer_norm_eps, "gelu": "exact"}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({str(index): name for index, name in enumerate("abcdefghijkl")}, tuple("abcdefghijkl")),
        ({"1": "crane", "0": "crane"}, ("crane", "crane")),
        ({"0": "LABEL_0", "1": "LABEL_1"}, None),
        ({"0": "ant", "2": "bee"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_class_names_are_in_the_order_of_their_index(labels, names, read):
    assert read(VIT | {"id2label": labels}).class_names == names


@pytest.mark.parametrize(
    ("name", "stated", "geometry"),
    [
        ("ViT", {}, "bilinear 224->224 squash"),
        ("ViT", {"size": {"height": 32, "width": 48}, "resample": 3}, "bicubic 32x48->32x48 squash"),
        ("ViT", {"size": 40}, "bilinear 40->40 squash"),
        ("ViT", {"do_normalize": False}, "bilinear 224->224 squash"),
        ("DeiT", {}, "bicubic 256->224 squash"),
        ("DeiT", {"size": 56, "crop_size": 48, "resample": 1}, "lanczos 56->48 squash"),
        ("DeiT", {"do_center_crop": False}, "bicubic 256->256 squash"),
        ("DeiT", {"size": 32, "crop_size": 48}, "bicubic 32->48 squash"),
        ("Bit", {}, "bicubic 224->224 center"),
        ("Bit", {"size": {"shortest_edge": 255}, "resample": 2}, "bilinear 255->224 center"),
        ("Bit", {"size": 257, "crop_size": {"height": 225, "width": 225}}, "bicubic 257->225 center"),
        ("CLIP", {"size": 40, "crop_size": 40}, "bicubic 40->40 center"),
    ],
)
def test_pixels_equal_those_of_the_image_processor(name, stated, geometry, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor")(**stated)
    processor.save_pretrained(tmp_path)
    sidecar = read_sidecar(tmp_path / "model.safetensors")
    assert (sidecar.kind, sidecar.files) == (None, ("preprocessor_config.json",))
    preprocess = sidecar.preprocess
    assert preprocess is not None
    assert str(preprocess).startswith(f"{geometry}, mean ")
    for height, width in ((97, 131), (300, 211), (64, 64)):
        image = smooth(height, width)
        theirs = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        ours = preprocess(image)
        assert ours.shape == theirs.transpose(1, 2, 0).shape
        assert np.abs(ours.astype(float) - theirs.transpose(1, 2, 0)).mean() < 2
        normalized = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(preprocess.normalize(ours) - normalized).mean() < 0.04


def test_files_from_before_transformers_4_25(read):
    old = {"size": 224, "image_mean": HALF, "image_std": HALF}
    assert read(VIT, old).preprocess == preset("hf/vit", (224, 224))  # google/vit-base-patch16-224, as first published
    cropped = old | {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "crop_size": 224, "resample": 3}
    found = read(VIT, cropped)
    assert found.files == ("config.json", "preprocessor_config.json")
    assert found.preprocess is not None
    assert str(found.preprocess) == "bicubic 256->224 squash, mean .5 std .5"
    fitted = read(VIT, cropped | {"feature_extractor_type": "CLIPFeatureExtractor"}).preprocess
    assert str(fitted) == "bicubic 256->224 center, mean .5 std .5"


def test_every_resized_size_is_met_exactly(read):
    for crop in (32, 224, 336):
        for resized in range(crop, 2 * crop, 7):
            stated = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": resized}}
            found = read(None, PROCESSOR | stated | {"crop_size": crop}).preprocess
            assert found is not None
            assert found.resize_size == (resized, resized)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "beit"}, "config.json says model_type 'beit', supported are vit, deit, ijepa, dinov2, dinov2_"),
        ({"model_type": "siglip2"}, "model_type 'siglip2', supported are "),
        ({"model_type": "swin"}, "model_type 'swin', supported are "),
        ({"model_type": "siglip", "vision_config": {"hidden_size": "64"}}, "hidden_size '64', expected int"),
        ({"model_type": "clip", "vision_config": []}, "vision_config [], expected dict"),
        ({"model_type": ["vit"]}, "says model_type ['vit']"),
        ({"model_type": "dinov3_vit", "use_gated_mlp": True}, "use_gated_mlp with a hidden_act other than silu"),
        (VIT | {"hidden_act": "relu"}, "config.json says hidden_act 'relu', supported are gelu, "),
        (VIT | {"hidden_act": 3}, "hidden_act 3, expected str"),
        (VIT | {"num_attention_heads": "12"}, "num_attention_heads '12', expected int"),
        (VIT | {"num_attention_heads": True}, "num_attention_heads True, expected int"),
        (VIT | {"layer_norm_eps": "1e-6"}, "layer_norm_eps '1e-6', expected int or float"),
        (VIT | {"patch_size": [8, 16]}, "patch_size [8, 16], supported are squares"),
        (VIT | {"image_size": [32, 32.5]}, "image_size [32, 32.5], expected a size in pixels"),
        (VIT | {"id2label": {"0": 1}}, "id2label [1], expected names"),
        (VIT | {"id2label": "ant"}, "id2label 'ant', expected names"),
        (TIMM | {"architecture": 3}, "architecture 3, expected str"),
        (TIMM | {"pretrained_cfg": []}, "pretrained_cfg [], expected dict"),
        (TIMM | {"model_args": {"act_layer": "silu"}}, "act_layer 'silu', supported are gelu"),
        ("[1]", "config.json holds no JSON object"),
        ('{"model_type": ', "config.json is damaged"),
        ("[" * 100_000, "config.json is damaged"),
    ],
)
def test_a_config_that_is_not_supported(config, says, read):
    with pytest.raises(InputError) as raised:
        read(config)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (
            {"image_processor_type": "BeitImageProcessor"},
            "image_processor_type 'BeitImageProcessor', supported are ViT",
        ),
        ({"image_processor_type": None}, "image_processor_type None"),
        ({"resample": 0}, "resample 0, supported are 1, 2, 3"),
        ({"resample": [3]}, "resample [3], expected int"),
        ({"do_resize": False}, "do_resize False, supported is True"),
        ({"do_rescale": False}, "do_rescale False"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078"),
        ({"do_pad": True}, "do_pad True"),
        ({"size": None}, "size None, expected a size in pixels"),
        ({"size": {"longest_edge": 224}}, "size {'longest_edge': 224}"),
        ({"size": {"shortest_edge": 224}}, "shortest_edge without do_center_crop"),
        (
            {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": {"height": 32, "width": 48}},
            "shortest_edge with crop_size (32, 48), supported are squares",
        ),
        ({"do_center_crop": True, "crop_size": 32}, "another share of size (32, 48) in height than in width"),
        ({"do_center_crop": True}, "crop_size None, expected a size in pixels"),
        ({"image_mean": None}, "image_mean None, expected list"),
        ({"image_std": [127.5] * 3}, "preprocess.std is [127.5, 127.5, 127.5]: it must be 3 numbers, above 0"),
    ],
)
def test_pixels_that_cannot_be_expressed(stated, says, read):
    with pytest.raises(InputError) as raised:
        read(None, PROCESSOR | stated)
    told = str(raised.value)
    assert "preprocessor_config.json says " in told
    assert told.endswith(": pass --preprocess")
    assert says in told
    assert read(VIT, PROCESSOR | stated, pixels=False).preprocess is None


# ---- timm


def test_files_that_timm_saves(tmp_path):
    timm = pytest.importorskip("timm")
    chosen = dict(reg_tokens=2, act_layer="quick_gelu", global_pool="avg", embed_dim=96, num_heads=6, init_values=1e-5)
    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 32), depth=2, num_classes=3, **chosen)
    timm.models.save_for_hf(model, tmp_path, model_config={"label_names": ["ant", "bee", "cat"]})
    sidecar = read_sidecar(tmp_path / "pytorch_model.bin")
    fields = dict(image_size=(64, 32), depth=2, embed_dim=96, num_heads=6, num_registers=2, layer_scale=1e-5)
    assert sidecar == Sidecar(
        kind="timm",
        files=("config.json",),
        fields=fields | dict(gelu="quick", pool="avg"),
        preprocess=preset("timm/augreg", (64, 32)),
        class_names=("ant", "bee", "cat"),
        architecture="vit_tiny_patch16_224",
    )


def test_a_distilled_model_averages_its_heads(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1)
    timm.models.save_for_hf(model, tmp_path)
    sidecar = read_sidecar(tmp_path / "pytorch_model.bin")
    assert "pool" not in sidecar.fields
    assert sidecar.preprocess == preset("timm/deit", (32, 32))


@pytest.mark.parametrize("stated", [TIMM["pretrained_cfg"], {"input_size": [3, 40, 40]}, {"crop_pct": None, "mean": 0}])
def test_pixels_are_what_timm_resolves(stated, read):
    data = pytest.importorskip("timm.data")
    expected = data.resolve_data_config({}, pretrained_cfg=dict(stated))
    expected["image_size"] = expected.pop("input_size")[1:]
    found = read(TIMM | {"pretrained_cfg": stated}).preprocess
    assert found == Preprocess(**expected)


def test_an_old_file_has_all_on_one_level(read):
    flat = {"architecture": "vit_tiny_patch16_224", "labels": ["ant", "bee"], **TIMM["pretrained_cfg"]}
    found, nested = read(flat), read(TIMM)
    assert found.class_names == ("ant", "bee")
    assert found.preprocess == nested.preprocess
    assert nested.preprocess == Preprocess((32, 48), 0.9, "squash", "bilinear", (0.5, 0.5, 0.5), (0.25, 0.5, 0.5))
    assert nested.fields == {"image_size": (32, 48), "pool": "token"}


def test_pixels_of_timm_that_cannot_be_expressed(read):
    config = TIMM | {"pretrained_cfg": TIMM["pretrained_cfg"] | {"interpolation": "nearest"}}
    with pytest.raises(InputError, match=r"config.json says preprocess.interpolation is 'nearest'.*--preprocess$"):
        read(config)
    assert read(config, pixels=False).architecture == "vit_tiny_patch16_224"


# ---- neither


@pytest.mark.parametrize("config", [None, {}, {"learning_rate": 0.1}, {"architecture": "vit", "learning_rate": 0.1}])
def test_another_config_is_ignored(config, read):
    assert read(config) == Sidecar()


def test_the_folder_is_that_of_the_link(tmp_path, read):
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.touch()
    (tmp_path / "model.safetensors").symlink_to(blob)
    assert read(VIT).fields["num_heads"] == 4
    assert math.isclose(read(VIT | {"layer_norm_eps": 1e-5}).fields["norm_eps"], 1e-5)


def test_files_of_another_model_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert read_sidecar(tmp_path / "vit.pth", ("timm",)) == Sidecar()
    assert read_sidecar(tmp_path / "vit.pth", ()) == Sidecar()
    with pytest.raises(InputError, match="model_type 'bert'"):
        read_sidecar(tmp_path / "vit.pth", ("huggingface",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "vit_small_patch16_rope_224"}, "rotary positions in a way that the zoo does not know"),
        ({"architecture": "vit_small_patch16_rope_mixed_224"}, "rotary frequencies of its own in each layer"),
        ({"architecture": "naflexvit_base_patch16_siglip"}, "images of sizes of their own"),
        ({"architecture": "vit_base_patch16_rpn_224"}, "norms behind its branches"),
        ({"global_pool": "avgmax"}, "global_pool 'avgmax'"),
        ({"model_args": {"pool_include_prefix": True}}, "pool_include_prefix"),
    ],
)
def test_unsupported_features_of_timm_are_refused_by_name(changes, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM | changes))
    with pytest.raises(InputError, match=says):
        read_sidecar(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("vit_base_patch16_clip_384", {"gelu": "exact", "norm_eps": 1e-5}),
        ("vit_base_patch16_clip_quickgelu_224", {"gelu": "quick", "norm_eps": 1e-5}),
        ("vit_base_patch16_siglip_gap_224", {}),
        ("vit_base_patch32_siglip_gap_256", {"gelu": "tanh"}),
        ("vit_base_patch16_224", {}),
    ],
)
def test_a_name_of_timm_implies_gelu_and_epsilon(name, fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TIMM | {"architecture": name}))
    found = read_sidecar(tmp_path / "model.safetensors").fields
    assert {key: found[key] for key in ("gelu", "norm_eps") if key in found} == fields


def test_the_gelu_of_each_siglip_is_that_of_timm(tmp_path):
    """timm trained none of them: some of its models approximate GELU by tanh, as Google's do, and some do not."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    names = timm.list_models("vit_*siglip*")
    assert len(names) > 30
    for name in names:
        with torch.device("meta"):
            activation = timm.create_model(name).blocks[0].mlp.act
        (tmp_path / "config.json").write_text(json.dumps(TIMM | {"architecture": name}))
        expected = "tanh" if type(activation).__name__ == "GELUTanh" else "exact"
        assert read_sidecar(tmp_path / "model.safetensors").fields.get("gelu", "exact") == expected, name
        assert name not in zoo.ARCHITECTURES or zoo.ARCHITECTURES[name].gelu == expected, name


def test_each_name_of_the_zoo_agrees_with_its_published_config(read):
    """A name of the zoo is downloaded from timm's repository on the hub, whose config.json must not contradict it."""
    models = pytest.importorskip("timm.models")
    for name in zoo.names():
        if "." not in name or ".tv_" in name:
            continue
        cfg, model = models.get_pretrained_cfg(name).to_dict(), zoo.get(name)
        published = {"architecture": cfg["architecture"], "global_pool": "token", "pretrained_cfg": cfg}
        found = read(published)
        fields = {field: value for field, value in found.fields.items() if field != "pool"}
        assert fields == {field: getattr(model.config, field) for field in fields}, name
        if "siglip" in name:  # timm states a centre crop, Google trained on squashed images
            assert model.preprocess is not None
            assert (model.preprocess.crop_mode, model.preprocess.image_size) == ("squash", found.preprocess.image_size)
        else:
            assert found.preprocess == model.preprocess, name
