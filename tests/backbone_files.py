"""Small random backbones in their published forms, beside the real library's model of each.

Files in Meta's, OpenAI's and Google's keys are timm's, renamed by the tables here.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
import timm.models  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from timm.models import eva, vision_transformer  # noqa: E402

from real_models import State, load, random, randomise, rename, save  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

create_model: Any = timm.create_model
SMALL: dict[str, Any] = dict(img_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4)
SIZES = ((64, 64), (96, 96), (48, 80))
PIXELS = ("--preprocess", "timm/augreg")


class Backbone(NamedTuple):
    """SRC, the options that it requires, and a function of images: features of all tokens, normed, and logits."""

    source: Path
    flags: tuple[str, ...]
    run: Callable[[Any], tuple[Any, Any]]


Case = Callable[[Path, tuple[int, int]], Backbone]
CASES: dict[str, Case] = {}


def resized(size):
    return () if size == SIZES[0] else ("--image_size", f"{size[0]}x{size[1]}")


# ---- timm


def run_timm(model):
    def run(images):
        features = model.forward_features(images)
        return features, model.forward_head(features)

    return run


def of_timm(folder, size, name, suffix=None, flags=(), **changes):
    """Save a model of timm by its name: for the hub, or as a state dict alone, whose user names the model."""
    changes = SMALL | changes
    model = randomise(create_model(name, **changes))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    source = folder / "model.safetensors"
    if suffix:
        (folder / "config.json").unlink()
        source = save(folder / f"weights{suffix}", model.state_dict())
    if size != SIZES[0]:
        filtering: Any = eva if isinstance(model, eva.Eva) else vision_transformer
        other = create_model(name, **(changes | dict(img_size=size)))
        model = load(other, filtering.checkpoint_filter_fn(model.state_dict(), other))
    return Backbone(source, (*PIXELS, *flags, *resized(size)), run_timm(model))


CASES |= {
    "DINOv3, timm": partial(of_timm, name="vit_small_patch16_dinov3"),
    "DINOv3, timm, biases": partial(of_timm, name="vit_small_patch16_dinov3_qkvb", num_classes=5),
    "DINOv3, timm, gated": partial(of_timm, name="vit_small_plus_patch16_dinov3_qkvb"),
    "DINOv3, timm, class token": partial(of_timm, name="vit_small_patch16_dinov3", global_pool="token"),
}


# ---- DINOv3


def dinov3(folder, size, gated=False, rounded=True):
    """Meta's keys: a bias with its mask instead of two, `storage_tokens`, periods in bfloat16."""
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    model = randomise(create_model(name, **SMALL, dynamic_img_size=True, global_pool="token"))
    periods = 100 ** (torch.arange(4) / 4)
    state: State = {"mask_token": random(1, 64), "rope_embed.periods": periods.bfloat16()}
    for key, value in model.state_dict().items():
        if key.endswith("v_bias"):
            continue
        if key.endswith("q_bias"):
            block = key.removesuffix("q_bias")
            bias = torch.cat([value, random(64), model.state_dict()[f"{block}v_bias"]])
            state |= {f"{block}qkv.bias": bias, f"{block}qkv.bias_mask": torch.ones(192)}
            state[f"{block}qkv.bias_mask"][64:128] = 0
        else:
            state[key] = value
    table = (("reg_token", "storage_tokens"), (r"gamma_(\d)", r"ls\1.gamma"))
    gates = ((r"fc1_g", "w1"), (r"fc1_x", "w2"), (r"mlp\.fc2", "mlp.w3")) if gated else ()
    source = save(folder / "dinov3_vits16.pth", rename(state, *table, *gates))
    if rounded:
        model.rope.periods.copy_(periods.bfloat16())
        model.rope.feat_shape, model.rope.pos_embed_cached = None, None  # drops what it has cached
    return Backbone(source, (*PIXELS, "--image_size", f"{size[0]}x{size[1]}"), run_timm(model))


def run_hf(model, norm=None):
    """Make the function. norm: the last one, if the model returns tokens before it."""

    def run(images):
        out = model(images)
        return norm(out.last_hidden_state) if norm else out.last_hidden_state, out.pooler_output

    return run


HF_SMALL: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, intermediate_size=128
)


def hf_dinov3(folder, size, **changes):
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**HF_SMALL, num_register_tokens=4, **changes))
    randomise(model).save_pretrained(folder)
    return Backbone(folder, (*PIXELS, *resized(size)), run_hf(model))


CASES |= {
    "DINOv3": dinov3,
    "DINOv3, gated": partial(dinov3, gated=True),
    "DINOv3, Hugging Face": hf_dinov3,
    "DINOv3, Hugging Face, gated": partial(hf_dinov3, use_gated_mlp=True, hidden_act="silu"),
    "DINOv3, Hugging Face, keys biased": partial(hf_dinov3, key_bias=True, rope_theta=50.0),
}


# ---- SigLIP


def hf_siglip(folder, size, kind="SiglipVisionModel", strip=False, hidden_act="gelu_pytorch_tanh"):
    """Save a SigLIP. strip: leave the class's defaults out of the configuration, as older files do."""
    vision = HF_SMALL | dict(hidden_act=hidden_act)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    text |= dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=8)
    if kind == "SiglipVisionModel":
        config = transformers.SiglipVisionConfig(**vision)
    else:
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    model = randomise(getattr(transformers, kind)(config))
    model.save_pretrained(folder)
    if strip:
        stated = json.loads((folder / "config.json").read_text())
        for key in ("hidden_act", "layer_norm_eps", "num_channels", "model_type"):
            del stated["vision_config"][key]
        (folder / "config.json").write_text(json.dumps(stated))

    def run(images):
        if kind == "SiglipForImageClassification":
            return model.vision_model(images, interpolate_pos_encoding=True).last_hidden_state, model(
                images, interpolate_pos_encoding=True
            ).logits
        out = getattr(model, "vision_model", model)(images, interpolate_pos_encoding=True)
        return out.last_hidden_state, out.pooler_output

    return Backbone(folder, (*PIXELS, *resized(size)), run)


def big_vision(folder, size, scanned=False):
    """Save in big_vision's names, from timm's by the table here; with a text tower beside the image's."""
    name = "vit_base_patch16_siglip_224"
    model = randomise(create_model(name, **SMALL))
    heads = (4, 16)
    arrays: dict[str, Any] = {}

    def put(target, source):
        weight, bias = (model.get_parameter(f"{source}.{kind}").detach() for kind in ("weight", "bias"))
        if weight.ndim == 1:
            arrays[f"{target}/scale"] = weight
        else:
            arrays[f"{target}/kernel"] = weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        arrays[f"{target}/bias"] = bias

    def put_attention(target, source, parts, out):
        weight, bias = (torch.cat([model.get_parameter(f"{source}.{part}.{kind}").detach() for part in parts])
                        for kind in ("weight", "bias"))  # fmt: skip
        for part, (w, b) in zip(
            ("query", "key", "value"), zip(weight.chunk(3), bias.chunk(3), strict=True), strict=True
        ):
            arrays[f"{target}/{part}/kernel"] = w.T.reshape(-1, *heads)
            arrays[f"{target}/{part}/bias"] = b.reshape(heads)
        put(f"{target}/out", out)
        arrays[f"{target}/out/kernel"] = arrays[f"{target}/out/kernel"].reshape(*heads, -1)

    put("embedding", "patch_embed.proj")
    arrays["pos_embedding"] = model.pos_embed.detach()
    put("Transformer/encoder_norm", "norm")
    for index in range(2):
        ours, timms = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        put(f"{ours}/LayerNorm_0", f"{timms}.norm1")
        put_attention(f"{ours}/MultiHeadDotProductAttention_0", f"{timms}.attn", ["qkv"], f"{timms}.attn.proj")
        put(f"{ours}/LayerNorm_1", f"{timms}.norm2")
        put(f"{ours}/MlpBlock_0/Dense_0", f"{timms}.mlp.fc1")
        put(f"{ours}/MlpBlock_0/Dense_1", f"{timms}.mlp.fc2")
    arrays["MAPHead_0/probe"] = model.attn_pool.latent.detach()
    put_attention("MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool", ["q", "kv"], "attn_pool.proj")
    put("MAPHead_0/LayerNorm_0", "attn_pool.norm")
    put("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1")
    put("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2")
    if scanned:
        first = "Transformer/encoderblock_0/"
        for key in [key for key in arrays if key.startswith(first)]:
            pair = [arrays.pop(key), arrays.pop(key.replace("_0/", "_1/", 1))]
            arrays[key.replace("_0/", "/", 1)] = torch.stack(pair)
    arrays = {f"params/img/{key}": value.numpy() for key, value in arrays.items()}
    arrays |= {"params/txt/Encoder_0/encoder_norm/scale": np.ones(3, np.float32), "params/t": np.ones(1, np.float32)}
    arrays["params/b"] = np.ones(1, np.float32)
    np.savez(folder / "siglip.npz", **arrays)
    if size != SIZES[0]:
        other = create_model(name, **(SMALL | dict(img_size=size)))
        model = load(other, vision_transformer.checkpoint_filter_fn(model.state_dict(), other))
    return Backbone(folder / "siglip.npz", (*PIXELS, "--pos_embed", "timm", *resized(size)), run_timm(model))


CASES |= {
    "SigLIP, timm": partial(of_timm, name="vit_base_patch16_siglip_224"),
    "SigLIP, timm, tanh": partial(of_timm, name="vit_so400m_patch16_siglip_256", mlp_ratio=3.7362),
    "SigLIP, timm, gap": partial(of_timm, name="vit_base_patch16_siglip_gap_224"),
    "SigLIP, timm, classes": partial(of_timm, name="vit_so400m_patch14_siglip_378", num_classes=5),
    "SigLIP, Hugging Face": hf_siglip,
    "SigLIP, Hugging Face, both towers": partial(hf_siglip, kind="SiglipModel"),
    "SigLIP, Hugging Face, older": partial(hf_siglip, kind="SiglipModel", strip=True),
    "SigLIP, Hugging Face, classes": partial(hf_siglip, kind="SiglipForImageClassification"),
    "SigLIP, big_vision": big_vision,
    "SigLIP, big_vision, scanned": partial(big_vision, scanned=True),
}


# ---- CLIP


TEXT: dict[str, Any] = {
    "positional_embedding": random(8, 32),
    "text_projection": random(32, 24),
    "logit_scale": random(),
    "token_embedding.weight": random(50, 32),
    "transformer.resblocks.0.attn.in_proj_weight": random(96, 32),
    "transformer.resblocks.0.ln_1.weight": random(32),
    "ln_final.weight": random(32),
}
OPENAI = (
    (r"^cls_token", "class_embedding"),
    (r"^pos_embed", "positional_embedding"),
    (r"^patch_embed\.proj", "conv1"),
    (r"^norm_pre", "ln_pre"),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm(\d)", r".ln_\1"),
    (r"^(.*\.)attn\.qkv\.", r"\1attn.in_proj_"),
    (r"attn\.proj", "attn.out_proj"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)


def in_openai(model) -> State:
    """Rename the state of a tower of timm to OpenAI's keys; its head's bias is 0."""
    state = rename(model.state_dict(), *OPENAI)
    state["class_embedding"] = state["class_embedding"].reshape(-1)
    state["positional_embedding"] = state["positional_embedding"][0]
    assert not state.pop("head.bias").any()
    state["proj"] = state.pop("head.weight").T.contiguous()
    return state


def timm_pair(name, size, filtering: Any = vision_transformer, **changes):
    """Make a model of timm as trained, without a bias in its head, and the same for images of a size."""
    changes = SMALL | dict(num_classes=24) | changes
    model = randomise(create_model(name, **changes))
    model.head.bias.data.zero_()
    if size == SIZES[0]:
        return model, model
    other = create_model(name, **(changes | dict(img_size=size)))
    return model, load(other, filtering.checkpoint_filter_fn(model.state_dict(), other))


def openai(folder, size, towers=True, name="vit_base_patch16_clip_quickgelu_224", flags=("--gelu", "quick"), **changes):
    model, other = timm_pair(name, size, **changes)
    state = in_openai(model)
    if towers:
        state = {f"visual.{key}": value for key, value in state.items()} | TEXT
    source = save(folder / "ViT-B-16.pt", state)
    return Backbone(source, (*PIXELS, "--num_heads", "4", *flags, *resized(size)), run_timm(other))


def open_clip(
    folder, size, name="vit_base_patch16_clip_224", flags=("--gelu", "exact", "--norm_eps", "1e-5"), **changes
):
    """Save a tower of timm in a model of open_clip, which puts a projection beside it."""
    model, other = timm_pair(name, size, **changes)
    state = {f"visual.trunk.{key}": value for key, value in model.state_dict().items() if not key.startswith("head.")}
    state["visual.head.proj.weight"] = model.state_dict()["head.weight"]
    text = {f"text.{key}": value for key, value in TEXT.items() if key != "logit_scale"}
    source = save(folder / "open_clip_model.safetensors", state | text | {"logit_scale": TEXT["logit_scale"]})
    return Backbone(source, (*PIXELS, *flags, *resized(size)), run_timm(other))


def open_clip_headed(folder, size, name, **changes):
    """Save the same with timm's own head as the projection, or without one; timm's config.json lies beside it."""
    backbone = of_timm(folder, size, name, **changes)
    state = {f"visual.trunk.{key}": value for key, value in load_file(backbone.source).items()}
    text = {f"text.{key}": value for key, value in TEXT.items() if key != "logit_scale"}
    source = save(folder / "open_clip_model.safetensors", state | text | {"logit_scale": TEXT["logit_scale"]})
    return backbone._replace(source=source)


def hf_clip(folder, size, kind="CLIPVisionModel", act="quick_gelu"):
    vision, text = HF_SMALL | dict(hidden_act=act), dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    if kind == "CLIPModel":
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)
    else:
        config = transformers.CLIPVisionConfig(**vision, projection_dim=24)
    model = randomise(getattr(transformers, kind)(config))
    model.save_pretrained(folder)
    tower, projection = getattr(model, "vision_model", model), getattr(model, "visual_projection", None)

    def run(images):
        out = tower(images, interpolate_pos_encoding=True)
        pooled = projection(out.pooler_output) if projection else out.pooler_output
        return tower.post_layernorm(out.last_hidden_state), pooled

    return Backbone(folder, (*PIXELS, *resized(size)), run)


CASES |= {
    "CLIP, OpenAI": openai,
    "CLIP, OpenAI, image tower": partial(openai, towers=False),
    "CLIP, OpenAI, exact GELU": partial(openai, name="vit_base_patch16_clip_224", flags=("--gelu", "exact")),
    "CLIP, timm": partial(of_timm, name="vit_base_patch16_clip_quickgelu_224", num_classes=24),
    "CLIP, open_clip, timm": partial(open_clip, flags=("--gelu", "exact", "--norm_eps", "1e-5", "--num_heads", "4")),
    "SigLIP, open_clip": partial(
        open_clip, name="vit_base_patch16_siglip_224", flags=("--gelu", "exact", "--num_heads", "4")
    ),
    "EVA-02 CLIP, open_clip": partial(open_clip_headed, name="eva02_base_patch16_clip_224", num_classes=24),
    "PE, open_clip": partial(open_clip_headed, name="vit_pe_core_base_patch16_224", embed_dim=128, num_classes=24),
    "SigLIP, open_clip, no projection": partial(open_clip_headed, name="vit_base_patch16_siglip_224"),
    "CLIP, Hugging Face": hf_clip,
    "CLIP, Hugging Face, projected": partial(hf_clip, kind="CLIPVisionModelWithProjection"),
    "CLIP, Hugging Face, both towers": partial(hf_clip, kind="CLIPModel"),
    "CLIP, Hugging Face, exact GELU": partial(hf_clip, act="gelu"),
}


# ---- DINOv2 giant, TIPS


def dinov2_giant(folder, size, registers=4, name="vit_giant_patch14_reg4_dinov2", prefix="", flags=()):
    """Meta's keys; with registers, timm's own filter moves the class token's position into the class token."""
    ratio = dict(mlp_ratio=4) if "giant" in name else {}
    changes: dict[str, Any] = SMALL | ratio | dict(reg_tokens=registers, no_embed_class=registers > 0)
    model = create_model(name, **(changes | dict(img_size=size)))
    whole: Any = create_model(name, **(changes | dict(reg_tokens=0, no_embed_class=False)))
    state = randomise(whole).state_dict() | {"mask_token": random(1, 64)}
    state = rename(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")) if "giant" in name else state
    if registers:
        state["register_tokens"] = random(1, registers, 64)
    load(model, vision_transformer.checkpoint_filter_fn(dict(state), model))
    state = {f"{prefix}{key}": value for key, value in state.items()}
    if prefix:
        state |= {"text_encoder.token_embedding.weight": random(50, 32), "temperature": random()}
    source = save(folder / "dinov2_vitg14.pth", state)
    return Backbone(source, (*PIXELS, "--num_heads", "4", *flags, *resized(size)), run_timm(model))


def hf_dinov2(folder, size, registers=False, way="saved"):
    shape: dict[str, Any] = {key: value for key, value in HF_SMALL.items() if key != "intermediate_size"}
    family = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{family}Config")(**shape, use_swiglu_ffn=True)
    model = randomise(getattr(transformers, f"{family}Model")(config))
    if way == "saved":
        model.save_pretrained(folder)
        source = folder
    else:
        model.config.save_pretrained(folder)
        source = save(folder / "pytorch_model.bin", model.state_dict())
    return Backbone(source, (*PIXELS, *resized(size)), run_hf(model))


def hf_tips(folder, size, both=False, **changes):
    shape = {key: value for key, value in HF_SMALL.items() if key != "intermediate_size"} | changes
    if both:
        text = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
        model = transformers.Tipsv2Model(transformers.Tipsv2Config(vision_config=shape, text_config=text))
    else:
        model = transformers.Tipsv2VisionModel(transformers.Tipsv2VisionConfig(**shape))
    randomise(model).save_pretrained(folder)
    return Backbone(folder, (*PIXELS, *resized(size)), run_hf(getattr(model, "vision_model", model)))


CASES |= {
    "DINOv2 giant": partial(dinov2_giant, registers=0, name="vit_giant_patch14_dinov2", flags=("--pos_embed", "timm")),
    "DINOv2 giant, registers": dinov2_giant,
    "DINOv2 giant, timm": partial(of_timm, name="vit_giant_patch14_reg4_dinov2", mlp_ratio=4),
    "DINOv2 giant, Hugging Face": hf_dinov2,
    "DINOv2 giant, Hugging Face, in memory": partial(hf_dinov2, way="in memory"),
    "DINOv2 giant, Hugging Face, registers": partial(hf_dinov2, registers=True),
    "TIPS": partial(dinov2_giant, registers=1, name="vit_base_patch14_reg1_tipsv2", prefix="vision_encoder."),
    "TIPS, giant": partial(dinov2_giant, registers=1, name="vit_giant_patch14_reg1_tipsv2", prefix="vision_encoder."),
    "TIPS, Hugging Face": hf_tips,
    "TIPS, Hugging Face, gated": partial(hf_tips, use_swiglu_ffn=True),
    "TIPS, Hugging Face, both towers": partial(hf_tips, both=True),
    "TIPS, timm": partial(of_timm, name="vit_base_patch14_reg1_tipsv2"),
}


# ---- EVA-02, PE


def perception_encoder(folder, size, name="vit_pe_core_base_patch16_224", towers=True, **changes):
    """Meta's keys, of the encoder alone or beside a text tower; it counts positions in units of its own grid."""
    model, other = timm_pair(name, size, eva, ref_feat_shape=(8, 8), **changes)
    state: State = dict(model.state_dict())
    q, kv = ([state.pop(f"attn_pool.{part}.{kind}") for kind in ("weight", "bias")] for part in ("q", "kv"))
    head, bias = state.pop("head.weight"), state.pop("head.bias")
    assert not bias.any()
    table = (
        (r"attn_pool\.proj", "attn_pool.attn.out_proj"),
        (r"attn_pool\.latent", "attn_pool.probe"),
        (r"attn_pool\.norm", "attn_pool.layernorm"),
    )
    # Ours first: the tables of OpenAI would take `attn_pool.norm` for the last one.
    state = rename(state, *table, *OPENAI)
    state["positional_embedding"] = state["positional_embedding"][0]
    if "class_embedding" in state:
        state["class_embedding"] = state["class_embedding"].reshape(-1)
    state["proj"] = head.T.contiguous()
    for kind, one, two in zip(("weight", "bias"), q, kv, strict=True):
        state[f"attn_pool.attn.in_proj_{kind}"] = torch.cat([one, two])
    if towers:
        state = {f"visual.{key}": value for key, value in state.items()} | TEXT
    source = save(folder / "PE-Core-B16-224.pt", state)
    return Backbone(source, (*PIXELS, "--num_heads", "4", *resized(size)), run_timm(other))


CASES |= {
    "EVA-02, timm, packed": partial(of_timm, name="eva02_tiny_patch14_224", num_classes=5),
    "EVA-02, timm, apart": partial(of_timm, name="eva02_base_patch14_224", num_classes=5),
    "EVA-02, timm, backbone": partial(of_timm, name="eva02_large_patch14_448", num_classes=0),
    "EVA-02, timm, reference": partial(of_timm, name="eva02_base_patch14_448", ref_feat_shape=(4, 5)),
    "EVA-02 CLIP, timm": partial(of_timm, name="eva02_base_patch16_clip_224", num_classes=24),
    "PE, timm": partial(of_timm, name="vit_pe_core_base_patch16_224", embed_dim=128, num_classes=24),
    "PE, timm, no class token": partial(of_timm, name="vit_pe_core_gigantic_patch14_448", embed_dim=128, num_classes=0),
    "PE": partial(perception_encoder, embed_dim=128),
    "PE, vision only, no class token": partial(
        perception_encoder, name="vit_pe_core_gigantic_patch14_448", towers=False, embed_dim=128
    ),
}


# ---- I-JEPA


def ijepa(folder, size, way="original"):
    model, other = create_model("vit_huge_patch14_gap_224", **SMALL), None
    randomise(model)
    if way == "original":
        encoder = {f"module.{key}": value for key, value in model.state_dict().items()}
        source = save(folder / "IN1K-vit.h.14-300e.pth.tar", {"encoder": encoder, "predictor": {}, "epoch": 300})
    if size != SIZES[0]:
        other = create_model("vit_huge_patch14_gap_224", **(SMALL | dict(img_size=size)))
        other = load(other, vision_transformer.checkpoint_filter_fn(model.state_dict(), other))
    return Backbone(source, (*PIXELS, "--num_heads", "4", *resized(size)), run_timm(other or model))


def hf_ijepa(folder, size):
    model = randomise(transformers.IJepaModel(transformers.IJepaConfig(**HF_SMALL)))
    model.save_pretrained(folder)

    def run(images):
        features = model(images, interpolate_pos_encoding=True).last_hidden_state
        return features, features.mean(dim=1)

    return Backbone(folder, (*PIXELS, *resized(size)), run)


CASES |= {
    "I-JEPA, timm": partial(of_timm, name="vit_huge_patch14_gap_224"),
    "I-JEPA, Hugging Face": hf_ijepa,
    "I-JEPA": ijepa,
}
