"""Published weights through the command line, against the library that they come from.

Each case writes a small random model in its published form. The file is converted, and logits on real photos are
compared with those of the real library. No parameter is 0 or 1, so that none can be left out or mistaken for another.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
import timm.models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.models import deit, vision_transformer  # noqa: E402
from timm.models.vision_transformer import checkpoint_filter_fn  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT  # noqa: E402
from torchvision.models.vision_transformer import interpolate_embeddings  # noqa: E402

from fcvit_jax.convert.__main__ import main  # noqa: E402
from fcvit_jax.convert.sidecar import read_sidecar  # noqa: E402
from real_models import (  # noqa: E402
    TOLERANCE,
    Published,
    State,
    convert,
    load,
    load_photos,
    ours,
    random,
    randomise,
    rename,
    save,
    theirs,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TimmViT: Any = vision_transformer.VisionTransformer
TimmDistilled: Any = deit.VisionTransformerDistilled

SMALL: dict[str, Any] = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=7)
HEADS = ("--num_heads", "4")  # neither keys nor shapes show heads that are not 64 wide
TIMM = (*HEADS, "--preprocess", "timm/augreg")


@pytest.fixture(scope="session")
def photos():
    return load_photos()


# ---- timm, and those who share its keys


def timm_case(folder, suffix=".safetensors", flags=(), wrap=None, build=TimmViT, **changes):
    model = randomise(build(**(SMALL | changes)))
    state = {wrap: model.state_dict(), "epoch": 3} if wrap else model.state_dict()
    size = model.patch_embed.img_size
    return Published(save(folder / f"weights{suffix}", state), (*TIMM, *flags), model, size)


def saved_for_hub(folder, name="vit_tiny_patch16_224", **changes):
    model = randomise(timm.create_model(name, **(SMALL | changes)))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return Published(folder / "model.safetensors", (), model)


def deit3(folder):
    model = randomise(TimmViT(**SMALL, no_embed_class=True, init_values=1e-6))
    state = rename(model.state_dict(), (r"ls(\d)\.gamma", r"gamma_\1"))
    return Published(save(folder / "deit_3.pth", {"model": state}), TIMM, model)


def dinov2(folder, registers=0, image_size=64, flags=()):
    """Facebook's keys; with registers, timm's own filter moves the class token's position into the class token."""
    changes: State = dict(num_classes=0, init_values=1e-5)
    raw = randomise(TimmViT(**(SMALL | changes))).state_dict() | {"mask_token": random(1, 64)}
    if registers:
        raw["register_tokens"] = random(1, registers, 64)
        changes |= dict(reg_tokens=registers, no_embed_class=True)
    model = TimmViT(**(SMALL | changes | dict(img_size=image_size)))
    load(model, checkpoint_filter_fn(dict(raw), model))
    size = model.patch_embed.img_size
    return Published(save(folder / "dinov2_pretrain.pth", raw), (*TIMM, *flags), model, size)


def mae_pretrained(folder):
    model = randomise(TimmViT(**(SMALL | dict(num_classes=0))))
    decoder = TimmViT(**(SMALL | dict(embed_dim=32, depth=1))).state_dict()
    decoder = {f"decoder_{key}": value for key, value in decoder.items() if re.match("blocks|norm|pos_embed", key)}
    pretraining = {
        "mask_token": random(1, 1, 32),
        "decoder_embed.weight": random(32, 64),
        "decoder_pred.bias": random(192),
    }
    state = model.state_dict() | decoder | pretraining
    return Published(save(folder / "mae_pretrain.pth", {"model": state}), TIMM, model)


def resized_timm(folder, image_size, build=TimmViT):
    trained, model = randomise(build(**SMALL)), build(**(SMALL | dict(img_size=image_size)))
    load(model, checkpoint_filter_fn(trained.state_dict(), model))
    height, width = size = model.patch_embed.img_size
    source = save(folder / "weights.safetensors", trained.state_dict())
    return Published(source, (*TIMM, "--image_size", f"{height}x{width}"), model, size)


def averaged(folder, wrap, flags=()):
    """Save a training checkpoint with the weights and their moving average."""
    model, mean = (randomise(TimmViT(**SMALL), seed) for seed in (0, 1))
    average = {"model": "model_ema", "state_dict": "state_dict_ema"}[wrap]
    source = save(folder / "checkpoint.pth", {wrap: model.state_dict(), average: mean.state_dict(), "epoch": 3})
    return Published(source, (*TIMM, *flags), mean if flags else model)


REGISTERS = dict(reg_tokens=4, no_embed_class=True, init_values=1e-5)
CLIP = dict(pre_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
CASES: dict[str, Callable[[Path], Published]] = {
    "timm": timm_case,
    "timm, .pth": partial(timm_case, suffix=".pth"),
    "timm, not square": partial(timm_case, img_size=(48, 64), flags=("--image_size", "48x64")),
    "timm, registers": partial(timm_case, **REGISTERS),
    "timm, average of patches": partial(timm_case, global_pool="avg", fc_norm=False, flags=("--pool", "avg")),
    "timm, no class token": partial(timm_case, class_token=False, global_pool="avg", fc_norm=False),
    "timm, no qkv bias": partial(timm_case, qkv_bias=False),
    "timm, tanh GELU": partial(timm_case, act_layer="gelu_tanh", flags=("--gelu", "tanh")),
    "timm, quick GELU": partial(timm_case, act_layer="quick_gelu", flags=("--gelu", "quick")),
    "timm, CLIP tower": partial(timm_case, **CLIP, flags=("--gelu", "exact", "--norm_eps", "1e-5")),
    "timm, hub": saved_for_hub,
    "timm, hub, average of patches": partial(saved_for_hub, global_pool="avg", fc_norm=False, act_layer="quick_gelu"),
    "timm, hub, CLIP tower": partial(saved_for_hub, name="vit_base_patch16_clip_quickgelu_224"),
    "timm, hub, distilled": partial(saved_for_hub, name="deit_tiny_distilled_patch16_224"),
    "DeiT": partial(timm_case, suffix=".pth", wrap="model"),
    "DeiT, distilled": partial(timm_case, suffix=".pth", wrap="model", build=TimmDistilled),
    "DeiT-III": deit3,
    "DINO": partial(timm_case, suffix=".pth", num_classes=0),
    "DINOv2": dinov2,
    "DINOv2, registers": partial(dinov2, registers=4),
    "MAE, fine-tuned": partial(timm_case, suffix=".pth", wrap="model", global_pool="avg"),
    "MAE, pretrained": mae_pretrained,
    "model beside model_ema": partial(averaged, wrap="model"),
    "model_ema": partial(averaged, wrap="model", flags=("--ema",)),
    "state_dict_ema": partial(averaged, wrap="state_dict", flags=("--ema",)),
    "timm at 48 pixels": partial(resized_timm, image_size=48),
    "timm at 96 pixels": partial(resized_timm, image_size=96),
    "timm at 48x96 pixels": partial(resized_timm, image_size=(48, 96)),
    "DeiT, distilled at 96 pixels": partial(resized_timm, image_size=96, build=TimmDistilled),
    "DINOv2 at 96 pixels, as timm": partial(dinov2, image_size=96, flags=("--image_size", "96", "--pos_embed", "timm")),
    "DINOv2, registers at 48 pixels": partial(dinov2, registers=4, image_size=48, flags=("--image_size", "48")),
}


# ---- Hugging Face


MODELS = (
    "ViTForImageClassification",
    "ViTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2Model",
    "Dinov2WithRegistersForImageClassification",
)
PROCESSORS: dict[str, tuple[str, State]] = {
    "ViT": ("ViTImageProcessor", dict(size=64)),
    "DeiT": ("DeiTImageProcessor", dict(size=72, crop_size=64)),
    "Dinov2": ("BitImageProcessor", dict(size=72, crop_size=64)),
    "Dinov2WithRegisters": ("BitImageProcessor", dict(size=72, crop_size=64)),
}


def huggingface(folder, name="ViTForImageClassification", way="saved", flags=(), image_size=(64, 64), **changes):
    """Save a model. way: by `save_pretrained`, the same in several shards, or under the modules' names in memory."""
    family = re.split("For|Model", name)[0]
    shape = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, num_labels=7)
    shape |= dict(mlp_ratio=2) if family.startswith("Dinov2") else dict(intermediate_size=128)
    model = randomise(getattr(transformers, name)(getattr(transformers, f"{family}Config")(**shape, **changes)))
    processor, fields = PROCESSORS[family]
    getattr(transformers, processor)(**fields).save_pretrained(folder)
    if way == "in memory":
        model.config.save_pretrained(folder)
        source = save(folder / "pytorch_model.bin", model.state_dict())
    else:
        model.save_pretrained(folder, max_shard_size="50KB" if way == "sharded" else "5GB")
        source = folder / "model.safetensors.index.json" if way == "sharded" else folder
    assert source.exists()
    # DINOv2 resamples its positions by default.
    options = {} if image_size == (64, 64) or "Dinov2" in name else dict(interpolate_pos_encoding=True)

    def logits(images):
        out = model(images, **options)
        return out.logits if "Classification" in name else out.last_hidden_state[:, 0]

    return Published(source, flags, logits, image_size)


RESIZED = dict(flags=("--image_size", "48x96", "--preprocess", "hf/vit"), image_size=(48, 96))
CASES |= {
    f"{name}, {way}": partial(huggingface, name=name, way=way)
    for name in MODELS
    for way in ("saved", "sharded", "in memory")
}
CASES |= {
    f"ViTForImageClassification, {act}": partial(huggingface, hidden_act=act)
    for act in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu")
}
CASES |= {f"{name} at 48x96 pixels": partial(huggingface, name=name, **RESIZED) for name in MODELS if "For" in name}
CASES["ViTForImageClassification, no qkv bias"] = partial(huggingface, qkv_bias=False)


# ---- torchvision


def torchvision_case(folder, image_size=64, old=False, resized=None, **changes):
    shape: State = dict(patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=7) | changes
    model = randomise(TorchvisionViT(image_size=image_size, **shape))
    state: Any = model.state_dict()
    keys = rename(state, (r"mlp\.0", "mlp.linear_1"), (r"mlp\.3", "mlp.linear_2")) if old else state
    source, flags = save(folder / "vit_b_16.pth", keys), (*HEADS, "--preprocess", "torchvision/v1")
    if resized:
        model = load(TorchvisionViT(image_size=resized, **shape), interpolate_embeddings(resized, 8, state))
        flags = (*flags, "--image_size", str(resized))
    return Published(source, flags, model, (model.image_size, model.image_size))


CASES |= {
    "torchvision": torchvision_case,
    "torchvision 0.12": partial(torchvision_case, old=True),
    "torchvision, representation layer": partial(torchvision_case, representation_size=32),
    "torchvision, SWAG": partial(torchvision_case, image_size=96),
    "torchvision at 48 pixels": partial(torchvision_case, resized=48),
    "torchvision at 96 pixels": partial(torchvision_case, resized=96),
}


# ---- Google


def google_arrays(big_vision: bool, class_token: bool, pre_logits: int) -> dict[str, np.ndarray]:
    """Make a small model in Flax's names: vision_transformer counts all modules of a block, big_vision each kind."""
    width, heads, mlp, patches, classes = 64, 4, 128, 64, 7
    attention, norm2, dense = (0, 1, 0) if big_vision else (1, 2, 3)
    shapes: dict[str, tuple[int, ...]] = {"embedding/kernel": (8, 8, 3, width), "embedding/bias": (width,)}
    positions = "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"
    shapes[positions] = (1, patches + (class_token and not big_vision), width)
    shapes |= {"cls": (1, 1, width)} if class_token else {}
    norms = ["Transformer/encoder_norm"]
    for index in range(2):
        block = f"Transformer/encoderblock_{index}"
        norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_{norm2}"]
        for part in ("query", "key", "value"):
            module = f"{block}/MultiHeadDotProductAttention_{attention}/{part}"
            shapes |= {f"{module}/kernel": (width, heads, 16), f"{module}/bias": (heads, 16)}
        module = f"{block}/MultiHeadDotProductAttention_{attention}/out"
        shapes |= {f"{module}/kernel": (heads, 16, width), f"{module}/bias": (width,)}
        module = f"{block}/MlpBlock_{dense}/Dense"
        shapes |= {f"{module}_0/kernel": (width, mlp), f"{module}_0/bias": (mlp,)}
        shapes |= {f"{module}_1/kernel": (mlp, width), f"{module}_1/bias": (width,)}
    shapes |= {f"{norm}/{name}": (width,) for norm in norms for name in ("scale", "bias")}
    shapes |= {"pre_logits/kernel": (width, pre_logits), "pre_logits/bias": (pre_logits,)} if pre_logits else {}
    shapes |= {"head/kernel": (pre_logits or width, classes), "head/bias": (classes,)}
    arrays = {name: random(*shape, seed=seed).numpy() for seed, (name, shape) in enumerate(shapes.items())}
    return {name: array + 1 if name.endswith("/scale") else array for name, array in arrays.items()}


def stack_blocks(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stack the blocks as `nn.scan` does: one array with the depth in front."""
    first = re.compile("(Transformer/encoderblock)_0(.*)")
    stacked = {
        f"{found[1]}{found[2]}": np.stack([arrays[f"{found[1]}_{index}{found[2]}"] for index in range(2)])
        for found in map(first.fullmatch, arrays)
        if found
    }
    return {name: array for name, array in arrays.items() if "encoderblock" not in name} | stacked


def google(
    folder, big_vision=False, prefix="", pre_logits=0, scanned=False, dtype: Any = np.float32, image_size=64, **changes
):
    arrays = google_arrays(big_vision, changes.get("class_token", True), pre_logits)
    published: State = {name: array.astype(dtype) for name, array in arrays.items()}
    # timm gets the loop form in float32, from which the others are made.
    arrays = {name: array.astype(np.float32) for name, array in published.items()}
    reference: State = {f"params/{name}" if big_vision else name: array for name, array in arrays.items()}
    np.savez(folder / "reference.npz", **reference)
    shape = SMALL | dict(mlp_ratio=2, img_size=image_size, num_classes=0 if pre_logits else 7) | changes
    model = TimmViT(**shape).eval()
    model.load_pretrained(folder / "reference.npz")

    def logits(images):
        x = model(images)
        for layer in ("pre_logits", "head") if pre_logits else ():  # timm leaves out the first, and so the second
            x = (torch.tanh(x) if layer == "head" else x) @ torch.from_numpy(arrays[f"{layer}/kernel"])
            x = x + torch.from_numpy(arrays[f"{layer}/bias"])
        return x

    published = stack_blocks(published) if scanned else published
    np.savez(folder / "weights.npz", **{f"{prefix}{name}": array for name, array in published.items()})
    flags = ("--preprocess", "timm/augreg")
    if image_size != 64:
        flags = (*flags, "--image_size", str(image_size), "--pos_embed", "timm-npz")
    return Published(folder / "weights.npz", flags, logits, (image_size, image_size))


big_vision = partial(google, big_vision=True, prefix="params/")
TOKEN = dict(no_embed_class=True)  # big_vision adds positions before the class token
GAP = dict(class_token=False, global_pool="avg", fc_norm=False)
CASES |= {
    "vision_transformer": google,
    "vision_transformer, opt/target": partial(google, prefix="opt/target/"),
    "vision_transformer, pre_logits": partial(google, pre_logits=32),
    "vision_transformer, bfloat16": partial(google, dtype=bfloat16),
    "vision_transformer at 96 pixels, as timm": partial(google, image_size=96),
    "big_vision, class token": partial(big_vision, **TOKEN),
    "big_vision, average of patches": partial(big_vision, **GAP),
    "big_vision, params/img": partial(big_vision, prefix="params/img/", **GAP),
    "big_vision, scanned, class token": partial(big_vision, scanned=True, **TOKEN),
    "big_vision, scanned, average of patches": partial(big_vision, scanned=True, **GAP),
}


# ---- forth


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_real_library(name, tmp_path, photos):
    published = CASES[name](tmp_path)
    images = photos(published.image_size)
    expected = theirs(published.logits, images)
    assert np.abs(expected).max() > 0.1
    checkpoint = convert(published.source, tmp_path / "out", *published.flags)
    np.testing.assert_allclose(ours(checkpoint, images), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("name", "kind"), [("ViT", "squash"), ("DeiT", "squash"), ("Dinov2", "center")])
def test_pixels_and_class_names_come_from_files_beside_the_weights(name, kind, tmp_path):
    names = dict(enumerate("abcdefg"))
    published = huggingface(tmp_path, f"{name}ForImageClassification", id2label=names)
    checkpoint = convert(published.source, tmp_path / "out")
    assert checkpoint.preprocess.crop_mode == kind
    assert checkpoint.preprocess.resize_size == ((64, 64) if name == "ViT" else (72, 72))
    assert checkpoint.meta["class_names"] == list("abcdefg")


def swap_queries_and_keys(state):
    """Exchange queries and keys, whose rows timm packs with the values."""
    parts = {key: value.chunk(3) for key, value in state.items() if ".qkv." in key}
    return state | {key: torch.cat([k, q, v]) for key, (q, k, v) in parts.items()}


def mix_heads(state):
    """Pack the rows head by head, [q k v] in each, as some code bases do."""
    packed = {key: value for key, value in state.items() if ".qkv." in key}
    return state | {
        key: value.unflatten(0, (3, 4, 16)).transpose(0, 1).flatten(0, 2).contiguous() for key, value in packed.items()
    }


@pytest.mark.parametrize("trap", [swap_queries_and_keys, mix_heads])
def test_a_wrong_order_of_the_projections_is_told_apart(trap, tmp_path, photos):
    model = randomise(TimmViT(**SMALL))
    source = save(tmp_path / "weights.safetensors", trap(dict(model.state_dict())))
    logits = ours(convert(source, tmp_path / "out", *TIMM), photos((64, 64)))
    difference = np.abs(logits - theirs(model, photos((64, 64)))).max(axis=1)
    assert difference.min() > 100 * TOLERANCE


def test_a_wrong_epsilon_is_told_apart_if_tokens_vary_little(tmp_path, photos):
    published = huggingface(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    faint = {key: value * 1e-3 if ".embeddings." in key else value for key, value in weights.items()}
    save(tmp_path / "model.safetensors", faint)
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()
    images = photos((64, 64))
    expected = theirs(lambda images: model(images).logits, images)
    right = convert(published.source, tmp_path / "right")
    wrong = convert(published.source, tmp_path / "wrong", "--norm_eps", "1e-6")
    assert (right.config.norm_eps, wrong.config.norm_eps) == (1e-12, 1e-6)
    np.testing.assert_allclose(ours(right, images), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(ours(wrong, images) - expected).max(axis=1).min() > 100 * TOLERANCE


# ---- and back


@pytest.mark.parametrize(
    ("build", "changes", "flags"),
    [
        (TimmViT, {}, ()),
        (TimmViT, dict(num_classes=0), ()),
        (TimmViT, REGISTERS, ()),
        (TimmViT, dict(global_pool="avg"), ()),
        (TimmViT, CLIP, ("--gelu", "exact", "--norm_eps", "1e-5")),
        (TimmDistilled, {}, ()),
    ],
    ids=["vit", "no head", "registers", "fc_norm", "clip", "distilled"],
)
def test_timm_and_back_gives_the_same_bytes(build, changes, flags, tmp_path, photos):
    published = timm_case(tmp_path, build=build, flags=flags, **changes)
    files = [published.source, tmp_path / "once.safetensors", tmp_path / "twice.safetensors"]
    for number, (before, after) in enumerate(pairwise(files)):
        convert(before, tmp_path / f"out{number}", *published.flags)
        main([str(tmp_path / f"out{number}"), str(after), "--to", "timm"])
    assert files[1].read_bytes() == files[0].read_bytes()
    assert files[2].read_bytes() == files[0].read_bytes()
    model = load(build(**(SMALL | changes)), load_file(files[2]))
    images = photos(published.image_size)
    np.testing.assert_array_equal(theirs(model, images), theirs(published.logits, images))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("torchvision", {"mlp_ratio": 2}),
        ("ViTForImageClassification, saved", {"mlp_ratio": 2, "norm_layer": partial(torch.nn.LayerNorm, eps=1e-12)}),
        ("big_vision, scanned, average of patches", {"mlp_ratio": 2, **GAP}),
        ("DINOv2, registers", {"num_classes": 0, **REGISTERS}),
        ("DeiT-III", {"no_embed_class": True, "init_values": 1e-6}),
    ],
)
def test_timm_loads_weights_from_elsewhere(name, changes, tmp_path, photos):
    published = CASES[name](tmp_path)
    convert(published.source, tmp_path / "out", *published.flags)
    main([str(tmp_path / "out"), str(tmp_path / "timm.safetensors"), "--to", "timm"])
    model = load(TimmViT(**(SMALL | changes)), load_file(tmp_path / "timm.safetensors"))
    images = photos(published.image_size)
    np.testing.assert_allclose(theirs(model, images), theirs(published.logits, images), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in MODELS if "For" in name])
def test_transformers_loads_the_written_weights(name, tmp_path, photos):
    published = huggingface(tmp_path, name, id2label=dict(enumerate("abcdefg")))
    checkpoint = convert(published.source, tmp_path / "out")
    main([str(tmp_path / "out"), str(tmp_path / "hf"), "--to", "hf"])
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == name
    assert model.config.id2label == dict(enumerate("abcdefg"))
    images = photos((64, 64))
    logits = theirs(lambda images: model.eval()(images).logits, images)
    np.testing.assert_allclose(logits, theirs(published.logits, images), rtol=0, atol=TOLERANCE)
    assert read_sidecar(tmp_path / "hf" / "model.safetensors").preprocess == checkpoint.preprocess
