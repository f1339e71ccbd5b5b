"""The key layouts of published ViT weights, a declarative table each, and the detection of a file's layout.

A table maps a source key to (path in the parameter tree, transform). "#" in a key stands for a block's number; a path
with "#" under a key without one is that of an array stacked over the blocks. A path that ends in ":q", ":k", ":v" or
":kv" is a part of the packed projection; ":g" and ":x" are the gate and the other part of a gated MLP. Transforms are
those of `translation.py`:

    copy     unchanged
    linear   [out, in] -> [in, out]
    masked   a bias of queries, keys and values, without the keys'
    conv     [d, 3, p, p] -> [p, p, 3, d]
    token    [d], [1, d] or [1, n, d] -> [1, n, d]
    grid     [n, d], [n, 1, d] or [1, n, d] -> [1, n, d], a position embedding: resampled if the grids differ
    heads    [..., h, k] -> [..., h k], Flax's projection into heads; this gives the number of heads
    merge    [h, k, d] -> [h k, d], Flax's projection out of the heads
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.models.config import Rotary

Arrays = Mapping[str, np.ndarray]
Target = tuple[str, str]
Table = dict[str, Target]

# A key with the number of its block.
_NUMBERED = re.compile(r"(.*?\b(?:blocks|resblocks|layers?|encoder_layer|encoderblock)[._])(\d{1,4})(\D.*)")
_BLOCK = ("norm1", "attn/qkv", "attn/proj", "norm2", "mlp/fc1", "mlp/fc2")
# Single arrays by the last part of their path; other paths are modules.
_ARRAYS: dict[str, str] = dict.fromkeys(("cls_token", "dist_token", "reg_token", "probe"), "token")
_ARRAYS |= {"pos_embed": "grid", "ls1": "copy", "ls2": "copy", "periods": "copy"}

Names = str | tuple[str, ...]


def _parts(path: str, names: Names) -> dict[str, str]:
    """Map a module, or its parts, to paths: queries, keys, values; queries and the others; gate and the other part."""
    if isinstance(names, str):
        return {names: path}
    parts = "qkv" if len(names) == 3 else ("q", "kv") if path.endswith("qkv") else "gx"
    return {name: f"{path}:{part}" for name, part in zip(names, parts, strict=True)}


def _block(block: str, *names: Names) -> dict[str, str]:
    """Map a block's modules, named in the order of `_BLOCK`."""
    paths = {}
    for path, each in zip(_BLOCK, names, strict=True):
        paths |= {f"{block}{name}": target for name, target in _parts(f"blocks_#/{path}", each).items()}
    return paths


def _pool(pool: str, *names: Names) -> dict[str, str]:
    """Map the modules of attention pooling: probe, qkv, proj, norm, fc1, fc2."""
    paths = {}
    for path, each in zip(("probe", "qkv", "proj", "norm", "mlp/fc1", "mlp/fc2"), names, strict=True):
        paths |= {f"{pool}{name}": target for name, target in _parts(f"pool/{path}", each).items()}
    return paths


def _table(paths: Mapping[str, str], flax: bool = False) -> Table:
    """Make the table of a layout of torch or Flax from the paths of arrays, and of modules with a weight and a bias."""
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
            transforms = ("merge" if module in ("blocks_#/attn/proj", "pool/proj") else bias, bias)
        else:
            dot = "" if source.endswith("_") else "."
            names = (f"{source}{dot}weight", f"{source}{dot}bias")
            transforms = ("conv" if module == "embed" else "copy" if weight == "scale" else "linear", "copy")
        for name, leaf, transform in zip(names, (weight, "bias"), transforms, strict=True):
            table[name] = (f"{module}/{leaf}{colon}{part}", transform)
    return table


# timm's ViT, for DeiT, DeiT-III, DINO, DINOv2, MAE and timm's CLIP and SigLIP towers; timm's EVA, for EVA-02, PE and
# DINOv3.
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
        "blocks.#.attn.norm": "blocks_#/attn/norm",
        "blocks.#.mlp.norm": "blocks_#/mlp/norm",
        "blocks.#.ls1.gamma": "blocks_#/ls1",
        "blocks.#.gamma_1": "blocks_#/ls1",  # DeiT-III, EVA
        "blocks.#.ls2.gamma": "blocks_#/ls2",
        "blocks.#.gamma_2": "blocks_#/ls2",
        "norm": "norm",
        "fc_norm": "norm",  # after the pooling
        "pre_logits.fc": "pre_logits",  # timm before 0.8
        "head": "head",
        "head_dist": "head_dist",
        **_parts("blocks_#/mlp/fc1", ("blocks.#.mlp.fc1_g", "blocks.#.mlp.fc1_x")),
        **_parts("blocks_#/mlp/fc1", ("blocks.#.mlp.w1", "blocks.#.mlp.w2")),  # DINOv3
        "blocks.#.mlp.w12": "blocks_#/mlp/fc1",  # DINOv2
        "blocks.#.mlp.w3": "blocks_#/mlp/fc2",
        "blocks.#.mlp.c_fc": "blocks_#/mlp/fc1",  # TIPS v2, as transformers saves it
        "blocks.#.mlp.c_proj": "blocks_#/mlp/fc2",
        **_pool("attn_pool.", "latent", ("q", "kv"), "proj", "norm", "mlp.fc1", "mlp.fc2"),
    }
) | {
    **{f"blocks.#.attn.{part}_proj.weight": (f"blocks_#/attn/qkv/kernel:{part}", "linear") for part in "qkv"},
    **{f"blocks.#.attn.{part}_proj.bias": (f"blocks_#/attn/qkv/bias:{part}", "copy") for part in "qv"},
    **{f"blocks.#.attn.{part}_bias": (f"blocks_#/attn/qkv/bias:{part}", "copy") for part in "qv"},
}
# Meta's files have a mask that is zero for the keys' bias.
DINOV3 = TIMM | _table({"storage_tokens": "embed/reg_token", "rope_embed.periods": "rotary/periods"})
DINOV3_MASKED = DINOV3 | {"blocks.#.attn.qkv.bias": ("blocks_#/attn/qkv/bias", "masked")}
# open_clip's model around a tower of timm: a projection, which has no bias.
OPEN_CLIP = {key: target for key, target in TIMM.items() if not target[0].startswith("head")}
OPEN_CLIP |= {"head.proj.weight": ("head/kernel", "linear")}
# CLIP's own, and PE's.
OPENAI = _table(
    {
        "class_embedding": "embed/cls_token",
        "positional_embedding": "embed/pos_embed",
        "conv1": "embed",
        "ln_pre": "embed/norm_pre",
        **_block(
            "transformer.resblocks.#.", "ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"
        ),
        "transformer.resblocks.#.ls_1.gamma": "blocks_#/ls1",
        "transformer.resblocks.#.ls_2.gamma": "blocks_#/ls2",
        "ln_post": "norm",
        **_pool("attn_pool.", "probe", "attn.in_proj_", "attn.out_proj", "layernorm", "mlp.c_fc", "mlp.c_proj"),
    }
) | {"proj": ("head/kernel", "copy")}

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
    | _parts("blocks_#/mlp/fc1", ("encoder.layer.#.mlp.gate_proj", "encoder.layer.#.mlp.up_proj"))  # in memory
    | {"encoder.layer.#.mlp.down_proj": "blocks_#/mlp/fc2"}
    | {f"encoder.layer.#.mlp.weights_{way}": f"blocks_#/mlp/fc{index}" for way, index in (("in", 1), ("out", 2))}
)


def _hf_dinov3(fc1: Names) -> Table:
    block = _block("layer.#.", "norm1", _HELD[0], _HELD[1], "norm2", fc1, "mlp.down_proj")
    scales = {f"layer.#.layer_scale{index}.lambda1": f"blocks_#/ls{index}" for index in (1, 2)}
    tokens = {"embeddings.cls_token": "embed/cls_token", "embeddings.register_tokens": "embed/reg_token"}
    return _table({**tokens, "embeddings.patch_embeddings": "embed", **block, **scales, "norm": "norm"})


HF_DINOV3, HF_DINOV3_GATED = _hf_dinov3("mlp.up_proj"), _hf_dinov3(("mlp.gate_proj", "mlp.up_proj"))

_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
_HF_TOWER = {
    "embeddings.patch_embedding": "embed",
    **_block("encoder.layers.#.", "layer_norm1", _QKV, "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    "post_layernorm": "norm",
}
_HF_POSITIONS = {"embeddings.position_embedding.weight": ("embed/pos_embed", "grid")}
_HF_CLIP = {
    "embeddings.class_embedding": "embed/cls_token",
    "pre_layrnorm": "embed/norm_pre",  # the misspelling is theirs
}
HF_CLIP = _table(_HF_CLIP | _HF_TOWER) | _HF_POSITIONS | {"visual_projection.weight": ("head/kernel", "linear")}
_HF_HEAD = _pool("head.", "probe", "attention.in_proj_", "attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
HF_SIGLIP = _table(_HF_TOWER | _HF_HEAD | {"classifier": "head"}) | _HF_POSITIONS

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
    """Make a table of Google's: its two code bases number a block's modules differently, all together or each kind."""
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
    if attention == 0:  # big_vision's
        heads, parts = "MultiHeadDotProductAttention_0/", ("query", "key", "value")
        names = ("probe", tuple(heads + part for part in parts), f"{heads}out", "LayerNorm_0")
        paths |= _pool("MAPHead_0/", *names, "MlpBlock_0/Dense_0", "MlpBlock_0/Dense_1")
    return _table(paths, flax=True)


GOOGLE = _google("Transformer/posembed_input/pos_embedding", "Transformer/encoderblock_#", 1, 2, 3)
BIG_VISION = _google("pos_embedding", "Transformer/encoderblock_#", 0, 1, 0)
BIG_VISION_SCAN = _google("pos_embedding", "Transformer/encoderblock", 0, 1, 0)
# A checkpoint of this library: the leaves under their own names.
OWN: Table = {path.split(":")[0]: (path.split(":")[0], "copy") for path, _ in TIMM.values()}


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
    implies: Mapping[str, Any] = field(default_factory=dict)  # fields of `ViTConfig`
    note: str | None = None  # a warning for the user

    def find(self, key: str) -> tuple[Target | None, str]:
        """Look up the target of a key, and the number of its block ("" if it has none)."""
        key = re.sub(f"^({self.prefix})", "", key)
        if not (found := _NUMBERED.match(key)):
            return self.table.get(key), ""
        return self.table.get(f"{found[1]}#{found[3]}"), found[2]

    def knows(self, key: str) -> bool:
        return self.find(key)[0] is not None or self.reason(key) is not None

    def fills(self, path: str) -> bool:
        """Return whether a key of the layout leads to a path, such as "blocks_#/attn/qkv/bias:k" or "head/bias"."""
        return any(target == path for target, _ in self.table.values())

    def reason(self, key: str) -> str | None:
        """Return why a key is dropped, None if it is not."""
        key = re.sub(f"^({self.prefix})", "", key)
        return next((reason for pattern, reason in self.dropped.items() if re.match(pattern, key)), None)

    def missing(self, names: Iterable[str]) -> list[str]:
        """List the first key of each leaf that every ViT has and nothing in the file fills."""
        found = map(self.find, names)
        filled = {target[0].split(":")[0] for target, number in found if target and number in ("", "0")}
        keys = {target[0].split(":")[0]: key for key, target in reversed([*self.table.items()])}
        needed = ("embed/kernel", *(f"blocks_#/{module}/kernel" for module in ("attn/qkv", "mlp/fc1", "mlp/fc2")))
        return [keys[path].replace("#", "0") for path in needed if path not in filled]


_BV = r"params/img/|params/"
_TRAINING = {r"(opt|opt_state|extra|state)/": "the state of the training"}
_BV_DROPPED = _TRAINING | {r"txt/|[tb]$": "of the text tower"}
_PRETRAINING = {r"mask_token$": "used in pre-training only"}
_MAE = {r"decoder_": "the decoder of masked pre-training"}
_MASK = {r".*\.qkv\.bias_mask$": "zero for the keys, whose bias is left out"}
_LOCAL = {r"local_cls_norm\.": "the norm of local crops in pre-training"}
_ROPE = {r"(.*\.)?rope(_embed)?\.": "constants, computed from the configuration"}
_HF_DROPPED = {
    r"embeddings\.mask_token$": "used in pre-training only",
    r"pooler\.": "the pooler is not used for classification",
    r"decoder\.": "the decoder of masked pre-training",
    r"embeddings\.position_ids$": "a constant",
}
_HF = (r"(vit|deit|ijepa|vision_model|dinov2|dinov2_with_registers)\.", _HF_DROPPED)
_HF_TEXT = {r"text_model\.|text_encoder\.|text_projection|logit_scale$|logit_bias$|temperature$": "of the text tower"}
_HF_TWO = (r"vision_model\.", _HF_DROPPED | _HF_TEXT, "torch-bicubic")
_HF_REGISTERS = r"embeddings\.register_tokens$"
_TANH = "GELU is taken as exact, as timm runs these weights; Google's own code approximates it: --gelu tanh"
PERIODS = (
    "rotary periods are taken as the file stores them, rounded to bfloat16; timm and transformers compute them again, "
    "and their features differ by about 4e-4"
)
_DINOV3 = dict(norm_eps=1e-5, gelu="exact", pool="token", rotary=Rotary())
_PE = dict(map_heads=8, rotary=Rotary(1e4, "interleaved", "index", offset=1.0, x_first=True))

# The layout that knows most of a file's keys is taken, the first of several.
LAYOUTS = (
    Layout("DINOv2 with registers", TIMM, dropped=_PRETRAINING, sign=r"^register_tokens$", config_json="timm"),
    Layout("DINOv2", TIMM, "", _PRETRAINING, "dino", sign=r"^mask_token$", config_json="timm"),
    Layout(
        "DINOv3", DINOV3_MASKED, "", _PRETRAINING | _MASK | _LOCAL, sign=r"\.bias_mask$", implies=_DINOV3, note=PERIODS
    ),
    Layout(
        "DINOv3, keys biased",
        DINOV3,
        "",
        _PRETRAINING | _LOCAL,
        sign="^storage_tokens$",
        implies=_DINOV3,
        note=PERIODS,
    ),
    Layout("timm", TIMM, r"trunk\.", _PRETRAINING | _MAE | _ROPE, config_json="timm"),  # open_clip's, with timm's head
    Layout("open_clip", OPEN_CLIP, r"trunk\.", _PRETRAINING | _ROPE, sign=r"^head\.proj\.weight$"),
    Layout("PE", OPENAI, dropped=_ROPE, sign=r"^attn_pool\.probe$", implies=_PE | {"norm_eps": 1e-5, "gelu": "exact"}),
    Layout("OpenAI CLIP", OPENAI, implies={"norm_eps": 1e-5}),
    Layout("Hugging Face DINOv2 with registers", HF_DINOV2, *_HF, sign=_HF_REGISTERS, config_json="huggingface"),
    Layout("Hugging Face DINOv2", HF_DINOV2, *_HF, "torch-bicubic", config_json="huggingface"),
    Layout("Hugging Face ViT", HF_VIT, *_HF, "torch-bicubic", config_json="huggingface"),
    Layout(
        "Hugging Face DINOv3, gated",
        HF_DINOV3_GATED,
        r"model\.",
        _HF_DROPPED,
        sign="gate_proj",
        config_json="huggingface",
    ),
    Layout("Hugging Face DINOv3", HF_DINOV3, r"model\.", _HF_DROPPED, config_json="huggingface"),
    Layout("Hugging Face CLIP", HF_CLIP, *_HF_TWO, sign=r"pre_layrnorm", config_json="huggingface"),
    Layout("Hugging Face SigLIP", HF_SIGLIP, *_HF_TWO, config_json="huggingface"),
    Layout("torchvision", TORCHVISION, resampling="align-corners"),
    Layout("Google vision_transformer", GOOGLE, r"opt/target/|params/", resampling="zoom", note=_TANH),
    Layout("big_vision", BIG_VISION, _BV, _BV_DROPPED, "zoom", sincos2d=True, note=_TANH),
    Layout("big_vision, scanned", BIG_VISION_SCAN, _BV, _BV_DROPPED, "zoom", sincos2d=True, note=_TANH),
    Layout("fcvit_jax", OWN),
)
# Prefixes of the image tower's keys, in a file with a text tower too: open_clip's and PE's; TIPS v2's.
_TOWERS = ("visual.", "vision_encoder.")
_TEXT = re.compile(
    r"(text|text_encoder|transformer|token_embedding|ln_final)\.|(positional_embedding|text_projection|temperature)"
    r"|logit_(scale|bias)|(input_resolution|context_length|vocab_size|attn_mask)$"
)

# Keys that identify a family with another architecture, or a layout that is not read.
_FOREIGN = {
    r"(prompt_en|mask_de)coder\.": "Segment Anything, a SAM that has nothing to do with sharpness-aware minimisation",
    r"relative_position|rel_pos_": "BEiT or Swin, whose attention has other terms",
    r"(attn|attention)\.(q|k|query|key)_?norm\.": "a model that normalises queries and keys",
    r"(^|\.)rope\.freqs$": "a model with rotary frequencies of its own in each layer (RoPE-Mixed)",
    r"(^|\.)embeds\.proj\.": "NaFlexViT, whose images have sizes of their own",
    r"patchifier\.": "AIMv2, which has RMSNorm and SwiGLU",
    r"patch_generator\.": "RADIO, whose patches are embedded otherwise",
    r"conv_root/|patch_embed\.backbone\.|gn_root/": "a hybrid of ResNet and ViT",
    r"beit\.|blocks\.0\.norm1\.A\.": "BEiT, whose attention has other terms",
    r"cls_token_.*pvt|patch_embed[1-4]\.": "a pyramid (PVT), whose stages have grids of their own",
    r"(^|\.)layers\.0\.blocks\.0\.|stages\.0\.": "a pyramid (Swin, ConvNeXt), whose stages have grids of their own",
    r"(^|\.)layer1\.0\.": "a convolutional network (ResNet)",
    r"token_mix|tokens_mlp|MixerBlock": "an MLP-Mixer, which has no attention",
}
SUPPORTED = (
    "timm, DeiT, DINO, DINOv2, DINOv3, MAE, I-JEPA, EVA-02, PE, CLIP, SigLIP, TIPS, Hugging Face ViT/DeiT/DINOv2/"
    "DINOv3/CLIP/SigLIP, torchvision, Google's .npz"
)


def check_family(keys: Iterable[str]) -> None:
    """Raise InputError that names the unsupported family that a key belongs to."""
    keys = list(keys)
    for pattern, family in _FOREIGN.items():
        if found := next((key for key in keys if re.search(pattern, key)), None):
            raise InputError(f"{found!r} is a key of {family}; supported are {SUPPORTED}")


def before_tower(prefix: str) -> str:
    """Return the part of a prefix before the name of an image tower."""
    return re.split(rf"(?<![^.])({'|'.join(map(re.escape, _TOWERS))})", prefix)[0]


def image_tower(keys: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Find the keys that may be the image model's, each with its name inside the image tower; and why others are not.

    In a file of one tower all keys are their own names.
    """
    keys = list(keys)
    tower = next((tower for tower in _TOWERS if any(key.startswith(tower) for key in keys)), "")
    others = [key for key in keys if tower and not key.startswith(tower) and _TEXT.match(key)]
    dropped = dict.fromkeys(others, "of the text tower")
    return {key: key.removeprefix(tower) for key in keys if key not in dropped}, dropped


def detect_layout(keys: Iterable[str]) -> Layout:
    """Find the layout that knows most keys of a file.

    Raises InputError that names the family that a key belongs to, or the nearest layout and what differs.
    """
    keys = [*keys]
    check_family(keys)
    known = {layout.name: sum(layout.knows(key) for key in keys) for layout in LAYOUTS}
    fitting = [layout for layout in LAYOUTS if not layout.sign or any(re.search(layout.sign, key) for key in keys)]
    layout = max(fitting, key=lambda layout: known[layout.name])
    if missing := layout.missing(keys):
        first = ", ".join(keys[:3])
        extra = [key for key in keys if not layout.knows(key)]
        differs = f"missing: {missing[0]}" + (f"; unknown: {extra[0]}" if extra else "")
        raise InputError(f"unknown layout (first keys: {first}); the nearest is {layout.name} ({differs})")
    return layout
