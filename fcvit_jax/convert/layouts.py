"""The key layouts of published ViT weights, a declarative table each, and the detection of a file's layout.

A table maps a source key to (path in the parameter tree, transform). "#" in a key stands for a block's number; a path
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

import numpy as np

from fcvit_jax.errors import InputError

Arrays = Mapping[str, np.ndarray]
Target = tuple[str, str]
Table = Mapping[str, Target]

# A key with the number of its block.
_NUMBERED = re.compile(r"(.*?\b(?:blocks|layers?|encoder_layer|encoderblock)[._])(\d{1,4})(\D.*)")
_BLOCK = ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")
# Single arrays by the last part of their path; other paths are modules.
_ARRAYS: dict[str, str] = dict.fromkeys(("cls_token", "dist_token", "reg_token"), "token")
_ARRAYS |= {"pos_embed": "grid", "ls1": "copy", "ls2": "copy"}


def _block(block: str, *names: str | tuple[str, ...]) -> dict[str, str]:
    """A block's modules, named in the order of `_BLOCK`; three names stand for the queries', keys' and values'."""
    paths = {}
    for path, name in zip(_BLOCK, names, strict=True):
        parts = {name: ""} if isinstance(name, str) else dict(zip(name, (":q", ":k", ":v"), strict=True))
        paths |= {f"{block}{source}": f"blocks_#/{path}{part}" for source, part in parts.items()}
    return paths


def _table(paths: Mapping[str, str], flax: bool = False) -> Table:
    """The table of a layout of torch or Flax, from the path of each array or module, which has a weight and a bias."""
    table = {}
    for source, path in paths.items():
        if transform := _ARRAYS.get(path.rpartition("/")[2]):
            table[source] = (path, transform)
            continue
        module, colon, part = path.partition(":")
        weight = "scale" if "norm" in module else "kernel"
        if flax:
            names = (f"{source}/{weight}", f"{source}/bias")
            bias = "heads" if part else "copy"
            transforms = ("merge" if module.endswith("attn/proj") else bias, bias)
        else:
            dot = "" if source.endswith("_") else "."
            names = (f"{source}{dot}weight", f"{source}{dot}bias")
            transforms = ("conv" if module == "embed" else "copy" if weight == "scale" else "linear", "copy")
        for name, leaf, transform in zip(names, (weight, "bias"), transforms, strict=True):
            table[name] = (f"{module}/{leaf}{colon}{part}", transform)
    return table


# timm's ViT, and with it DeiT, DeiT-III, DINO, MAE and timm's CLIP towers.
TIMM = _table(
    {
        "cls_token": "embed/cls_token",
        "dist_token": "embed/dist_token",
        "reg_token": "embed/reg_token",
        "register_tokens": "embed/reg_token",  # DINOv2
        "pos_embed": "embed/pos_embed",
        "patch_embed.proj": "embed",
        "norm_pre": "embed/norm_pre",
        **_block("blocks.#.", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"),
        "blocks.#.ls1.gamma": "blocks_#/ls1",
        "blocks.#.gamma_1": "blocks_#/ls1",  # DeiT-III
        "blocks.#.ls2.gamma": "blocks_#/ls2",
        "blocks.#.gamma_2": "blocks_#/ls2",
        "norm": "norm",
        "fc_norm": "norm",  # after the pooling
        "pre_logits.fc": "pre_logits",  # timm before 0.8
        "head": "head",
        "head_dist": "head_dist",
    }
)

_HF_OUTSIDE = {
    "embeddings.cls_token": "embed/cls_token",
    "embeddings.distillation_token": "embed/dist_token",
    "embeddings.register_tokens": "embed/reg_token",
    "embeddings.position_embeddings": "embed/pos_embed",
    "embeddings.patch_embeddings.projection": "embed",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",  # DeiT with both heads
    "distillation_classifier": "head_dist",
}
# In files, and in the memory of transformers 5, which renamed its modules but not yet its files.
_SAVED = (tuple(f"attention.attention.{name}" for name in ("query", "key", "value")), "attention.output.dense")
_HELD = (tuple(f"attention.{name}_proj" for name in "qkv"), "attention.o_proj")
HF_VIT = _table(
    _HF_OUTSIDE
    | _block("encoder.layer.#.", "layernorm_before", *_SAVED, "layernorm_after", "intermediate.dense", "output.dense")
    | _block("layers.#.", "layernorm_before", *_HELD, "layernorm_after", "mlp.fc1", "mlp.fc2")
)
HF_DINOV2 = _table(
    _HF_OUTSIDE
    | _block("encoder.layer.#.", "norm1", *_SAVED, "norm2", "mlp.fc1", "mlp.fc2")
    | _block("encoder.layer.#.", "norm1", *_HELD, "norm2", "mlp.fc1", "mlp.fc2")
    | {f"encoder.layer.#.layer_scale{index}.lambda1": f"blocks_#/ls{index}" for index in (1, 2)}
)

_TV = "encoder.layers.encoder_layer_#."
_TV_ATTENTION = ("self_attention.in_proj_", "self_attention.out_proj")
TORCHVISION = _table(
    {
        "class_token": "embed/cls_token",
        "encoder.pos_embedding": "embed/pos_embed",
        "conv_proj": "embed",
        **_block(_TV, "ln_1", *_TV_ATTENTION, "ln_2", "mlp.0", "mlp.3"),
        **_block(_TV, "ln_1", *_TV_ATTENTION, "ln_2", "mlp.linear_1", "mlp.linear_2"),  # torchvision 0.12
        "encoder.ln": "norm",
        "heads.pre_logits": "pre_logits",
        "heads.head": "head",
    }
)


def _google(positions: str, block: str, attention: int, norm2: int, mlp: int) -> Table:
    """Google's two code bases number the modules of a block differently: one counts every module, one each kind."""
    heads, dense = f"MultiHeadDotProductAttention_{attention}/", f"MlpBlock_{mlp}/Dense_"
    qkv = (f"{heads}query", f"{heads}key", f"{heads}value")
    paths = {
        "cls": "embed/cls_token",
        positions: "embed/pos_embed",
        "embedding": "embed",
        **_block(f"{block}/", "LayerNorm_0", qkv, f"{heads}out", f"LayerNorm_{norm2}", f"{dense}0", f"{dense}1"),
        "Transformer/encoder_norm": "norm",
        "pre_logits": "pre_logits",
        "head": "head",
    }
    return _table(paths, flax=True)


GOOGLE = _google("Transformer/posembed_input/pos_embedding", "Transformer/encoderblock_#", 1, 2, 3)
BIG_VISION = _google("pos_embedding", "Transformer/encoderblock_#", 0, 1, 0)
BIG_VISION_SCAN = _google("pos_embedding", "Transformer/encoderblock", 0, 1, 0)
# A checkpoint of this library: the leaves under their own names.
OWN: Table = {path: (path, "copy") for path, _ in TIMM.values()}


@dataclass(frozen=True)
class Layout:
    """One published layout."""

    name: str
    table: Table
    prefix: str = ""  # pattern of what may precede the keys
    dropped: Mapping[str, str] = field(default_factory=dict)  # pattern of keys that are not needed -> why
    resampling: str = "timm"  # how its authors resize position embeddings, a key of `RESAMPLINGS`
    sign: str | None = None  # pattern of a key that every file has
    config_json: str | None = None  # whose config.json may be beside the file: "timm", "huggingface" (or a named model)
    sincos2d: bool = False  # a file without a position embedding means the fixed one
    note: str | None = None  # a warning for the user

    def find(self, key: str) -> tuple[Target | None, str]:
        """The target of a key, and the number of its block ("" if it has none)."""
        key = re.sub(f"^({self.prefix})", "", key)
        if not (found := _NUMBERED.match(key)):
            return self.table.get(key), ""
        return self.table.get(f"{found[1]}#{found[3]}"), found[2]

    def knows(self, key: str) -> bool:
        return self.find(key)[0] is not None or self.reason(key) is not None

    def reason(self, key: str) -> str | None:
        """Why a key is dropped, if it is."""
        key = re.sub(f"^({self.prefix})", "", key)
        return next((reason for pattern, reason in self.dropped.items() if re.match(pattern, key)), None)

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
_HF = (r"(vit|deit|dinov2|dinov2_with_registers)\.", _HF_DROPPED)
_HF_REGISTERS = r"embeddings\.register_tokens$"
_TANH = "GELU is taken as exact, as timm runs these weights; Google's own code approximates it: --gelu tanh"

# The one that knows most of a file's keys is taken; where two know as many, the first.
LAYOUTS = (
    Layout("DINOv2 with registers", TIMM, dropped=_PRETRAINING, sign=r"^register_tokens$", config_json="timm"),
    Layout("DINOv2", TIMM, "", _PRETRAINING, "dino", sign=r"^mask_token$", config_json="timm"),
    Layout("timm", TIMM, dropped=_PRETRAINING | _MAE, config_json="timm"),
    Layout("Hugging Face DINOv2 with registers", HF_DINOV2, *_HF, sign=_HF_REGISTERS, config_json="huggingface"),
    Layout("Hugging Face DINOv2", HF_DINOV2, *_HF, "torch-bicubic", config_json="huggingface"),
    Layout("Hugging Face ViT", HF_VIT, *_HF, "torch-bicubic", config_json="huggingface"),
    Layout("torchvision", TORCHVISION, resampling="align-corners"),
    Layout("Google vision_transformer", GOOGLE, r"opt/target/|params/", resampling="zoom", note=_TANH),
    Layout("big_vision", BIG_VISION, _BV, _TRAINING, "zoom", sincos2d=True, note=_TANH),
    Layout("big_vision, scanned", BIG_VISION_SCAN, _BV, _TRAINING, "zoom", sincos2d=True, note=_TANH),
    Layout("fcvit_jax", OWN),
)

# Keys that identify a family with another architecture, or a layout that is not read.
_FOREIGN = {
    r"(prompt_en|mask_de)coder\.": "Segment Anything, a SAM that has nothing to do with sharpness-aware minimisation",
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


def check_family(arrays: Iterable[str]) -> None:
    """Raise InputError that names the unsupported family that a key belongs to."""
    for pattern, family in _FOREIGN.items():
        if found := next((key for key in arrays if re.search(pattern, key)), None):
            raise InputError(f"{found!r} is a key of {family}; supported are {SUPPORTED}")


def detect_layout(arrays: Arrays) -> Layout:
    """The layout that knows most keys of a file.

    Raises InputError that names the family that a key belongs to, or the nearest layout and what differs.
    """
    check_family(arrays)
    known = {layout.name: sum(layout.knows(key) for key in arrays) for layout in LAYOUTS}
    fitting = [layout for layout in LAYOUTS if not layout.sign or any(re.search(layout.sign, key) for key in arrays)]
    layout = max(fitting, key=lambda layout: known[layout.name])
    if missing := layout.missing(arrays):
        first = ", ".join(list(arrays)[:3])
        extra = [key for key in arrays if not layout.knows(key)]
        differs = f"missing: {missing[0]}" + (f"; unknown: {extra[0]}" if extra else "")
        raise InputError(f"unknown layout (first keys: {first}); the nearest is {layout.name} ({differs})")
    return layout
