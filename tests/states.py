"""Small weight files, and the errors about them."""

from pathlib import Path

import numpy as np
import pytest

from fcvit_jax.checkpoint import abstract_params, leaf_shapes
from fcvit_jax.convert.layouts import LAYOUTS
from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig

# 2 layers, 128 wide (a width from which heads cannot be inferred), 4x4 patches of 8 pixels.
CONFIG = ViTConfig((32, 32), 8, 128, 2, 2, 256, num_classes=5)


def state_dict(config=CONFIG, seed=0):
    """Make a state in timm's layout, from the table of timm's own names and shapes."""
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


def in_layout(name, config, seed=0):
    """Draw arrays under the keys of one of our layouts, as in a file of a configuration.

    It uses the tables, and so tests that a table works in both directions; the tables themselves are tested with the
    real libraries.
    """
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    rng = np.random.default_rng(seed)
    leaves, filled, arrays = leaf_shapes(abstract_params(config)), set(), {}
    for pattern, (target, transform) in layout.table.items():
        path, _, part = target.partition(":")
        shape = leaves.get(path.replace("#", "0"))
        # A file has one of two sets of keys for a module: the first in the table.
        others = {each.partition(":")[2] for each in filled if each.partition(":")[0] == path}
        if shape is None or target in filled or pattern.startswith("norm." if config.fc_norm else "fc_norm."):
            continue
        if "" in others or (others and not part) or set(part) & set("".join(others)):
            continue
        if part:
            shape = (*shape[:-1], shape[-1] // (2 if part in "gx" else 3) * len(part))
        heads = config.num_heads
        shape = {
            "linear": shape[::-1],
            "conv": shape[:1:-1] + shape[:2],
            "heads": (*shape[:-1], heads, shape[-1] // heads),
            "merge": (heads, shape[0] // heads, shape[-1]),
        }.get(transform, shape)
        blocks = range(config.depth) if "#" in pattern else [0]
        stacked = (config.depth,) if "#" in target and "#" not in pattern else ()
        for block in blocks:
            arrays[pattern.replace("#", str(block))] = rng.standard_normal((*stacked, *shape), np.float32) * 0.05
        filled.add(target)
    return arrays


def torch_bytes(torch, tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def refusal(path: Path, ema: bool = False) -> str:
    """Return the one-line error for a file, without the path that it must begin with."""
    with pytest.raises(InputError) as caught:
        read_weights(path, ema)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    return message.removeprefix(f"{path} ")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
