"""The key layouts of published ViT weights, a declarative table each, and the detection of a file's layout.

An entry is `source key -> (path in the parameter tree, transform)`. "#" in a key stands for a block's number; a path
with "#" under a key without one is that of an array stacked over the blocks. A path that ends in ":q", ":k" or ":v" is
a part of the packed projection. Transforms are those of `translation.py`:

    copy     unchanged
    linear   [out, in] -> [in, out]
    conv     [d, 3, p, p] -> [p, p, 3, d]
    token    [d], [1, d] or [1, n, d] -> [1, n, d]
    grid     [n, d], [n, 1, d] or [1, n, d] -> [1, n, d], a position embedding: resampled where the grids differ
    heads    [..., h, k] -> [..., h k], Flax's projection into heads; this gives the number of heads
    merge    [h, k, d] -> [h k, d], Flax's projection out of the heads
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fcvit_jax.errors import InputError

Arrays = Mapping[str, np.ndarray]
Target = tuple[str, str]


def _torch(source: str, path: str, transform: str) -> dict[str, Target]:
    """A module of torch: weight and bias of a norm ("copy") or of a dense or convolutional layer."""
    weight = "scale" if transform == "copy" else "kernel"
    return {f"{source}.weight": (f"{path}/{weight}", transform), f"{source}.bias": (f"{path}/bias", "copy")}


def _flax(source: str, path: str, weight: str) -> dict[str, Target]:
    """A module of Flax: a norm ("scale") or a dense layer ("kernel")."""
    return {f"{source}/{name}": (f"{path}/{name}", "copy") for name in (weight, "bias")}


def _torch_block(block: str, norm1: str, proj: str, norm2: str, fc1: str, fc2: str) -> dict[str, Target]:
    """A block's modules of torch by their names, but for the projections to queries, keys and values."""
    names = {"norm1": norm1, "attn/proj": proj, "norm2": norm2, "mlp/fc1": fc1, "mlp/fc2": fc2}
    entries = {}
    for path, name in names.items():
        entries |= _torch(f"{block}.{name}", f"blocks_#/{path}", "copy" if "norm" in path else "linear")
    return entries


# timm's ViT, and with it DeiT, DeiT-III, DINO, MAE and timm's CLIP towers.
TIMM: dict[str, Target] = {
    "cls_token": ("embed/cls_token", "token"),
    "dist_token": ("embed/dist_token", "token"),
    "reg_token": ("embed/reg_token", "token"),
    "register_tokens": ("embed/reg_token", "token"),  # DINOv2
    "pos_embed": ("embed/pos_embed", "grid"),
    **_torch("patch_embed.proj", "embed", "conv"),
    **_torch("norm_pre", "embed/norm_pre", "copy"),
    **_torch_block("blocks.#", "norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
    **_torch("blocks.#.attn.qkv", "blocks_#/attn/qkv", "linear"),
    "blocks.#.ls1.gamma": ("blocks_#/ls1", "copy"),
    "blocks.#.gamma_1": ("blocks_#/ls1", "copy"),  # DeiT-III
    "blocks.#.ls2.gamma": ("blocks_#/ls2", "copy"),
    "blocks.#.gamma_2": ("blocks_#/ls2", "copy"),
    **_torch("norm", "norm", "copy"),
    **_torch("fc_norm", "norm", "copy"),  # after the pooling
    **_torch("pre_logits.fc", "pre_logits", "linear"),  # timm before 0.8
    **_torch("head", "head", "linear"),
    **_torch("head_dist", "head_dist", "linear"),
}

_HF_EMBEDDINGS: dict[str, Target] = {
    "embeddings.cls_token": ("embed/cls_token", "token"),
    "embeddings.distillation_token": ("embed/dist_token", "token"),
    "embeddings.register_tokens": ("embed/reg_token", "token"),
    "embeddings.position_embeddings": ("embed/pos_embed", "grid"),
    **_torch("embeddings.patch_embeddings.projection", "embed", "conv"),
    **_torch("layernorm", "norm", "copy"),
    **_torch("classifier", "head", "linear"),
    **_torch("cls_classifier", "head", "linear"),  # DeiT with both heads
    **_torch("distillation_classifier", "head_dist", "linear"),
}


def _hf_qkv(attention: str, names: tuple[str, str, str]) -> dict[str, Target]:
    entries = {}
    for part, name in zip("qkv", names, strict=True):
        entries[f"{attention}.{name}.weight"] = (f"blocks_#/attn/qkv/kernel:{part}", "linear")
        entries[f"{attention}.{name}.bias"] = (f"blocks_#/attn/qkv/bias:{part}", "copy")
    return entries


# In files, and in the memory of transformers 5, which renamed its modules but not yet its files.
_HF_SAVED = _hf_qkv("encoder.layer.#.attention", ("attention.query", "attention.key", "attention.value"))
_HF_QKV = ("q_proj", "k_proj", "v_proj")
_SAVED_PROJ, _BEFORE, _AFTER = "attention.output.dense", "layernorm_before", "layernorm_after"
HF_VIT: dict[str, Target] = {
    **_HF_EMBEDDINGS,
    **_HF_SAVED,
    **_torch_block("encoder.layer.#", _BEFORE, _SAVED_PROJ, _AFTER, "intermediate.dense", "output.dense"),
    **_hf_qkv("layers.#.attention", _HF_QKV),
    **_torch_block("layers.#", _BEFORE, "attention.o_proj", _AFTER, "mlp.fc1", "mlp.fc2"),
}
HF_DINOV2: dict[str, Target] = {
    **_HF_EMBEDDINGS,
    **_HF_SAVED,
    **_torch_block("encoder.layer.#", "norm1", _SAVED_PROJ, "norm2", "mlp.fc1", "mlp.fc2"),
    **_hf_qkv("encoder.layer.#.attention", _HF_QKV),
    **_torch("encoder.layer.#.attention.o_proj", "blocks_#/attn/proj", "linear"),
    "encoder.layer.#.layer_scale1.lambda1": ("blocks_#/ls1", "copy"),
    "encoder.layer.#.layer_scale2.lambda1": ("blocks_#/ls2", "copy"),
}

_TV_BLOCK = "encoder.layers.encoder_layer_#"
TORCHVISION: dict[str, Target] = {
    "class_token": ("embed/cls_token", "token"),
    "encoder.pos_embedding": ("embed/pos_embed", "grid"),
    **_torch("conv_proj", "embed", "conv"),
    **_torch_block(_TV_BLOCK, "ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3"),
    f"{_TV_BLOCK}.self_attention.in_proj_weight": ("blocks_#/attn/qkv/kernel", "linear"),
    f"{_TV_BLOCK}.self_attention.in_proj_bias": ("blocks_#/attn/qkv/bias", "copy"),
    **_torch(f"{_TV_BLOCK}.mlp.linear_1", "blocks_#/mlp/fc1", "linear"),  # torchvision 0.12
    **_torch(f"{_TV_BLOCK}.mlp.linear_2", "blocks_#/mlp/fc2", "linear"),
    **_torch("encoder.ln", "norm", "copy"),
    **_torch("heads.pre_logits", "pre_logits", "linear"),
    **_torch("heads.head", "head", "linear"),
}


def _google(positions: str, block: str, attention: int, norm2: int, mlp: int) -> dict[str, Target]:
    """Google's two code bases number the modules of a block differently: one counts every module, one each kind."""
    heads = f"{block}/MultiHeadDotProductAttention_{attention}"
    rows = {
        "cls": ("embed/cls_token", "token"),
        positions: ("embed/pos_embed", "grid"),
        **_flax("embedding", "embed", "kernel"),
        **_flax(f"{block}/LayerNorm_0", "blocks_#/norm1", "scale"),
        f"{heads}/out/kernel": ("blocks_#/attn/proj/kernel", "merge"),
        f"{heads}/out/bias": ("blocks_#/attn/proj/bias", "copy"),
        **_flax(f"{block}/LayerNorm_{norm2}", "blocks_#/norm2", "scale"),
        **_flax(f"{block}/MlpBlock_{mlp}/Dense_0", "blocks_#/mlp/fc1", "kernel"),
        **_flax(f"{block}/MlpBlock_{mlp}/Dense_1", "blocks_#/mlp/fc2", "kernel"),
        **_flax("Transformer/encoder_norm", "norm", "scale"),
        **_flax("pre_logits", "pre_logits", "kernel"),
        **_flax("head", "head", "kernel"),
    }
    for part, source in zip("qkv", ("query", "key", "value"), strict=True):
        for name in ("kernel", "bias"):
            rows[f"{heads}/{source}/{name}"] = (f"blocks_#/attn/qkv/{name}:{part}", "heads")
    return rows


GOOGLE: dict[str, Target] = _google("Transformer/posembed_input/pos_embedding", "Transformer/encoderblock_#", 1, 2, 3)
BIG_VISION: dict[str, Target] = _google("pos_embedding", "Transformer/encoderblock_#", 0, 1, 0)
BIG_VISION_SCAN: dict[str, Target] = _google("pos_embedding", "Transformer/encoderblock", 0, 1, 0)
# A checkpoint of this library: the leaves under their own names.
OWN: dict[str, Target] = {path: (path, "copy") for path, _ in TIMM.values()}


@dataclass(frozen=True)
class Layout:
    """One published layout.

    prefix: pattern of what may precede the keys. dropped: patterns of keys that inference does not need, with the
    reason. resampling: the convention of `posembed.py` by which its authors resize position embeddings. sign: pattern
    of a key that every file of this layout has. config_json: whose config.json may be beside the file, "timm" or
    "huggingface"; the latter is required unless a model is named. sincos2d: a file without a position embedding means
    the fixed one. note: a warning for the user.
    """

    name: str
    table: Mapping[str, Target]
    prefix: str = ""
    dropped: Mapping[str, str] = field(default_factory=dict)
    resampling: str = "timm"
    sign: str | None = None
    config_json: str | None = None
    sincos2d: bool = False
    note: str | None = None

    def find(self, key: str) -> tuple[Target | None, str]:
        """The target of a key, and the number of its block ("" if it has none)."""
        key = re.sub(f"^({self.prefix})", "", key)
        for head in self._numbered:
            if found := re.match(rf"{re.escape(head)}(\d{{1,4}})(\D.*)", key):
                return self.table.get(f"{head}#{found[2]}"), found[1]
        return self.table.get(key), ""

    def knows(self, key: str) -> bool:
        return self.find(key)[0] is not None or self.reason(key) is not None

    def reason(self, key: str) -> str | None:
        """Why a key is dropped, if it is."""
        key = re.sub(f"^({self.prefix})", "", key)
        return next((reason for pattern, reason in self.dropped.items() if re.match(pattern, key)), None)

    @cached_property
    def _numbered(self) -> list[str]:
        """What precedes the number of a block."""
        return sorted({key.split("#")[0] for key in self.table if "#" in key})

    def missing(self, arrays: Iterable[str]) -> list[str]:
        """For each leaf that every ViT has and nothing in the file fills: its first key."""
        found = map(self.find, arrays)
        filled = {target[0].split(":")[0] for target, number in found if target and number in ("", "0")}
        keys = {target[0].split(":")[0]: key for key, target in reversed([*self.table.items()])}
        needed = ("embed/kernel", "blocks_#/attn/qkv/kernel", "blocks_#/mlp/fc1/kernel")
        return [keys[path].replace("#", "0") for path in needed if path not in filled]


_BV = r"params/img/|params/"
_TRAINING = {r"(opt|opt_state|extra|state)/": "the state of the training"}
_PRETRAINING = {r"mask_token$": "used in pre-training only"}
_MAE = {r"decoder_": "the decoder of masked pre-training"}
_HF_DROPPED = {
    r"embeddings\.mask_token$": "used in pre-training only",
    r"pooler\.": "the pooler is not used for classification",
    r"decoder\.": "the decoder of masked pre-training",
    r"embeddings\.position_ids$": "a constant",
}
_HF_PREFIX = r"(vit|deit|dinov2|dinov2_with_registers)\."
_TANH = "GELU is taken as exact, as timm runs these weights; Google's own code approximates it: --gelu tanh"

# The one that knows most of a file's keys is taken; where two know as many, the first.
LAYOUTS = (
    Layout("DINOv2 with registers", TIMM, dropped=_PRETRAINING, sign=r"^register_tokens$", config_json="timm"),
    Layout("DINOv2", TIMM, "", _PRETRAINING, "dino", sign=r"^mask_token$", config_json="timm"),
    Layout("timm", TIMM, dropped=_PRETRAINING | _MAE, config_json="timm"),
    Layout(
        "Hugging Face DINOv2 with registers",
        HF_DINOV2,
        _HF_PREFIX,
        _HF_DROPPED,
        sign=r"embeddings\.register_tokens$",
        config_json="huggingface",
    ),
    Layout("Hugging Face DINOv2", HF_DINOV2, _HF_PREFIX, _HF_DROPPED, "torch-bicubic", config_json="huggingface"),
    Layout("Hugging Face ViT", HF_VIT, _HF_PREFIX, _HF_DROPPED, "torch-bicubic", config_json="huggingface"),
    Layout("torchvision", TORCHVISION, resampling="align-corners"),
    Layout("Google vision_transformer", GOOGLE, r"opt/target/|params/", resampling="zoom", note=_TANH),
    Layout("big_vision", BIG_VISION, _BV, _TRAINING, "zoom", sincos2d=True, note=_TANH),
    Layout("big_vision, scanned", BIG_VISION_SCAN, _BV, _TRAINING, "zoom", sincos2d=True, note=_TANH),
    Layout("fcvit_jax", OWN),
)

# Keys that identify a family with another architecture, or a layout that is not read.
_FOREIGN = {
    r"image_encoder\.blocks\.": "Segment Anything, a SAM that has nothing to do with sharpness-aware minimisation",
    r"relative_position|rel_pos_|attn\.q_bias$": "BEiT or Swin, whose attention has other terms",
    r"attn_pool\.|MAPHead_0/|vision_model\.head\.probe": "a model with an attention-pooling head (SigLIP)",
    r"mlp\.(w12|w1|fc1_g|swiglu|weights_in)\b": "a SwiGLU model (DINOv2 giant, EVA-02)",
    r"(attn|attention)\.(q|k|query|key)_?norm\.": "a model that normalises queries and keys",
    r"rope_embed|rope\.(freqs|periods)|storage_tokens": "a model with rotary positions (EVA-02, DINOv3)",
    r"patchifier\.": "AIMv2, which has RMSNorm and SwiGLU",
    r"patch_generator\.": "RADIO, whose patches are embedded otherwise",
    r"conv_root/|patch_embed\.backbone\.|gn_root/": "a hybrid of ResNet and ViT",
    r"resblocks\.0\.": "CLIP in OpenAI's layout: take timm's file, such as vit_base_patch16_clip_224.openai_ft_in1k",
    r"(vision_model|encoder)\.encoder\.layers\.0\.self_attn": "CLIP or SigLIP in Hugging Face's layout",
    r"beit\.|blocks\.0\.norm1\.A\.": "BEiT, whose attention has other terms",
    r"cls_token_.*pvt|patch_embed[1-4]\.": "a pyramid (PVT), whose stages have grids of their own",
    r"(^|\.)layers\.0\.blocks\.0\.|stages\.0\.": "a pyramid (Swin, ConvNeXt), whose stages have grids of their own",
    r"(^|\.)layer1\.0\.": "a convolutional network (ResNet)",
    r"token_mix|tokens_mlp|MixerBlock": "an MLP-Mixer, which has no attention",
}
SUPPORTED = "timm, DeiT, DINO, DINOv2, MAE, Hugging Face ViT/DeiT/DINOv2, torchvision, Google's .npz"


def detect_layout(arrays: Arrays) -> Layout:
    """The layout that knows most keys of a file.

    Raises InputError that names the family that a key belongs to, or the nearest layout and what differs.
    """
    for pattern, family in _FOREIGN.items():
        if found := next((key for key in arrays if re.search(pattern, key)), None):
            raise InputError(f"{found!r} is a key of {family}; supported are {SUPPORTED}")
    known = {layout.name: sum(layout.knows(key) for key in arrays) for layout in LAYOUTS}
    fitting = [layout for layout in LAYOUTS if not layout.sign or any(re.search(layout.sign, key) for key in arrays)]
    layout = max(fitting, key=lambda layout: known[layout.name])
    if missing := layout.missing(arrays):
        first = ", ".join(list(arrays)[:3])
        extra = [key for key in arrays if not layout.knows(key)]
        differs = f"missing: {missing[0]}" + (f"; unknown: {extra[0]}" if extra else "")
        if inside := next((key for key in arrays if key.endswith(f".{missing[0]}")), None):
            wrapper = inside.removesuffix(missing[0])
            odd = next((key for key in arrays if not key.startswith(wrapper)), "others")
            differs = f"its keys begin with {wrapper!r}, and {odd!r} does not: save the inner model's state_dict"
        raise InputError(f"unknown layout (first keys: {first}); the nearest is {layout.name} ({differs})")
    return layout
