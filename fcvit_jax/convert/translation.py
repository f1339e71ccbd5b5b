"""From the keys of a file to the leaves of the parameter tree, strictly, by the table of the file's layout.

Every source key is used or dropped for a reason, every leaf is filled once, every shape is checked. Until `assemble`,
arrays are views of the file: nothing is read or copied.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fcvit_jax.checkpoint import abstract_params, leaf_shapes
from fcvit_jax.convert.layouts import Arrays, Layout, detect_layout, image_tower
from fcvit_jax.convert.posembed import RESAMPLINGS, resample, resample_patch, sincos_2d
from fcvit_jax.convert.wrappers import find_body, find_head, leftover, outside
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig

_TRANSFORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda x: x,
    "linear": lambda x: x.T if x.ndim == 2 else x,
    "masked": lambda x: np.delete(x, slice(len(x) // 3, len(x) // 3 * 2)) if x.ndim == 1 else x,
    "conv": lambda x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x,
    "token": lambda x: x.reshape(1, -1, x.shape[-1]) if 1 <= x.ndim <= 3 and x.size else x,
    "grid": lambda x: x.reshape(1, -1, x.shape[-1]) if x.ndim == 2 or (x.ndim == 3 and 1 in x.shape[:2]) else x,
    "heads": lambda x: x.reshape(*x.shape[:-2], -1) if x.ndim > 1 and x.size else x,
    "merge": lambda x: x.reshape(-1, x.shape[-1]) if x.ndim == 3 and x.size else x,
}
_HEADS = re.compile(r"head(_dist)?/|pre_logits/")
_ORDER = ("", "q", "k", "v", "kv", "g", "x")  # of parts in a leaf
_WHOLES = ([""], ["q", "k", "v"], ["q", "kv"], ["g", "x"])


class Piece(NamedTuple):
    """A source array, or one block's share of a stacked one, with the axes of its leaf, in the file's dtype."""

    key: str
    source_shape: tuple[int, ...]
    array: np.ndarray
    transform: str


class MappedKey(NamedTuple):
    """How a source key is mapped: one line of the report."""

    key: str
    shape: tuple[int, ...]
    path: str  # of the leaf; ":q" and the like for a part of it
    leaf_shape: tuple[int, ...]  # of what the key contributes
    transform: str


@dataclass(frozen=True)
class Translation:
    """The meaning of a file's keys: leaf path -> part ("" for a whole leaf) -> piece; and the keys that are dropped."""

    layout: Layout
    leaves: dict[str, dict[str, Piece]]
    dropped: dict[str, str]
    num_heads: int | None  # if the file's shapes show it
    remarks: tuple[str, ...] = ()  # warnings for the user
    prefix: str = ""  # in front of the body's keys, removed

    def shape(self, path: str, rank: int) -> tuple[int, ...]:
        """Return the shape of a leaf, its parts side by side along the last axis."""
        parts = list(self.leaves[path].values())
        first = parts[0].array.shape
        if len(first) != rank or not all(first):
            raise InputError(f"{parts[0].key!r} is {parts[0].source_shape} in the file: not the shape of a ViT's")
        return (*first[:-1], sum(part.array.shape[-1] for part in parts))

    @property
    def periods(self) -> tuple[float, ...] | None:
        """The periods of rotary positions, if the file stores them."""
        pieces = self.leaves.get("rotary/periods")
        return tuple(map(float, pieces[""].array.reshape(-1).astype(np.float32))) if pieces else None

    @property
    def keys(self) -> tuple[MappedKey, ...]:
        keys = []
        for path, pieces in self.leaves.items():
            for part, (key, shape, array, transform) in pieces.items():
                keys.append(MappedKey(key, shape, f"{path}:{part}".rstrip(":"), array.shape, transform))
        return tuple(keys)

    @property
    def num_blocks(self) -> int:
        """The number of blocks. Raises InputError if their numbers leave gaps."""
        blocks = {int(found[1]) for path in self.leaves if (found := re.match(r"blocks_(\d+)/", path))}
        if blocks != set(range(len(blocks))):
            raise InputError(
                f"blocks are numbered {min(blocks)} to {max(blocks)}, and there are {len(blocks)}: some are missing"
            )
        return len(blocks)


@dataclass(frozen=True)
class Converted:
    """A converted model. params: the tree, float32. dropped: {key: reason}. remarks: warnings for the user."""

    params: dict[str, Any]
    keys: tuple[MappedKey, ...]
    dropped: dict[str, str]
    remarks: tuple[str, ...]


def translate(arrays: Arrays, num_classes: int | None = None) -> Translation:
    """Find the layout and the meaning of every key. With 0 classes, keys outside the backbone are dropped.

    Raises InputError that names the first key that is unknown or fills a leaf twice, or the unsupported family.
    """
    arrays, prefix, beside = find_body(arrays)
    names, dropped = image_tower(arrays)
    layout, unknown = detect_layout(names.values()), {**beside}
    leaves: dict[str, dict[str, Piece]] = {}
    num_heads = None
    for key, name in names.items():
        array = arrays[key]
        if reason := layout.reason(name):
            dropped[key] = reason
            continue
        target, number = layout.find(name)
        if target is None:
            unknown[prefix + key] = array
            continue
        pattern, transform = target
        if transform == "heads" and array.ndim > 1 and not pattern.startswith("pool/"):
            num_heads = array.shape[-2]
        stacked = "#" in pattern and not number
        if stacked and not array.ndim:
            raise InputError(f"{key!r} is a single number: the arrays of all blocks were expected, one upon the other")
        for index, block in enumerate(array) if stacked else [(number, array)]:
            path, _, part = pattern.replace("#", str(index)).partition(":")
            pieces = leaves.setdefault(path, {})
            if part in pieces or "" in pieces or (pieces and not part):
                raise InputError(f"{key!r} fills {path} a second time: the file holds two versions of one tensor")
            pieces[part] = Piece(key, array.shape, _TRANSFORMS[transform](block), transform)
    beyond = outside(names.values(), layout)
    outer = beside.keys() | {prefix + key for key, name in names.items() if name in beyond}
    more, remarks = _place_unknown(unknown, outer, layout, leaves, num_classes)
    return Translation(layout, leaves, dropped | more, num_heads, remarks, prefix)


def _place_unknown(
    unknown: Arrays, outer: set[str], layout: Layout, leaves: dict[str, dict[str, Piece]], num_classes: int | None
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Find a head of another name among the keys that the layout does not know, and enter it in `leaves`.

    outer: the keys outside the backbone. Returns the keys that are dropped, and the warnings. Raises InputError for a
    key that is neither.
    """
    dropped = {key: reason for key in unknown if (reason := leftover(key))}
    if num_classes == 0:
        dropped |= dict.fromkeys((key for key in unknown if key in outer), "not part of the backbone")
    rest = {key: array for key, array in unknown.items() if key not in dropped}
    remarks, width = [], leaves["embed/kernel"][""].array.shape[-1]
    heads = {key: array for key, array in rest.items() if key in outer}
    transforms = {"head/kernel": "linear", "head/bias": "copy"} | dict(layout.table.values())
    projects = layout.fills("head/kernel") and not layout.fills("head/bias")  # classifiers on CLIP pool otherwise
    sought = "head/kernel" not in leaves and not projects
    if sought and (head := find_head(heads, layout, width, num_classes)):
        for key, name in ((head.weight, "kernel"), (head.bias, "bias")):
            transform = transforms[f"head/{name}"]
            leaves[f"head/{name}"] = {"": Piece(key, rest[key].shape, _TRANSFORMS[transform](rest.pop(key)), transform)}
        dropped |= dict.fromkeys(head.others, "another head")
        rest = {key: array for key, array in rest.items() if key not in dropped}
        remarks.append(f"the head is {head.weight!r}, recognised by its shape; pass --num_classes 0 to leave it out")
    if key := next((key for key in rest if key not in outer), None):
        raise InputError(
            f"{key!r} is not a key of the {layout.name} layout: this is another architecture, or a damaged file"
        )
    if key := next(iter(rest), None):
        raise InputError(
            f"{key!r} is not a key of the {layout.name} layout, nor of a head of shape [classes, {width}]: pass "
            "--num_classes 0 to convert the backbone alone"
        )
    return dropped, tuple(remarks)


def assemble(
    translation: Translation, config: ViTConfig, grid: tuple[int, int] | None, resampling: str | None = None
) -> Converted:
    """Build the parameter tree of a configuration.

    grid: (rows, columns) of the file's position embedding; None if it has none and the fixed sine-cosine one is
    computed. resampling: a convention of `posembed.RESAMPLINGS`, by default that of the layout.
    Raises InputError naming the first key that has no place, another shape or values that are not finite, or the first
    leaves that nothing fills.
    """
    wanted = leaf_shapes(abstract_params(config))
    filled: dict[str, jax.Array] = {}
    dropped, remarks, resampled, class_position = dict(translation.dropped), [*translation.remarks], {}, None
    for path, pieces in translation.leaves.items():
        if _HEADS.match(path) and not config.num_classes:
            dropped |= {piece.key: "the head was not asked for" for piece in pieces.values()}
            continue
        if path.startswith("pool/") and config.pool != "map":
            dropped |= {piece.key: f"the pooling is {config.pool!r}" for piece in pieces.values()}
            continue
        if path.startswith("rotary/"):  # in the configuration
            continue
        parts = sorted(pieces, key=_ORDER.index)
        first = pieces[parts[0]]
        if path not in wanted:
            raise InputError(f"{first.key!r} has no place in a {config.depth}-layer model with {config.pool} pooling")
        no_keys = parts == ["q", "v"] and path.endswith("attn/qkv/bias") and not config.key_bias
        if parts not in _WHOLES and not no_keys:
            lacking = next(part for part in ("gx" if parts[0] in "gx" else "qkv") if part not in parts)
            raise InputError(f"nothing in the file fills {path}:{lacking}, beside {first.key!r}: it is incomplete")
        value, remark = _numbers([pieces[part] for part in parts]), None
        if path == "embed/pos_embed" and grid is not None:
            value, class_position, remark = _positions(value, grid, config, resampling or translation.layout.resampling)
        elif path == "embed/kernel" and value.ndim == 4 and value.shape[0] != config.patch_size:
            sizes = f"patches of {value.shape[0]} pixels, the model's of {config.patch_size}"
            remark = f"{sizes}: kernel resampled by pseudo-inverse (FlexiViT)"
            value = resample_patch(value, config.patch_size)
        if value.shape != wanted[path]:
            raise InputError(f"{first.key!r} is {first.source_shape} in the file; the model's {path} is {wanted[path]}")
        filled[path] = jnp.asarray(value)
        if remark:
            remarks.append(remark)
            resampled[path] = value.shape
    if class_position is not None and "embed/cls_token" in filled:
        filled["embed/cls_token"] = filled["embed/cls_token"] + class_position
    if translation.layout.note:
        remarks.append(translation.layout.note)
    if "embed/pos_embed" in wanted and "embed/pos_embed" not in filled and grid is None:
        filled["embed/pos_embed"] = jnp.asarray(sincos_2d(config.grid, config.embed_dim))
        height, width = config.image_size
        remarks.append(
            "the file holds no position embedding: filled with big_vision's fixed one (sincos2d) for "
            f"{height}x{width} pixels; pass --image_size if the weights are for others"
        )
    if missing := [path for path in wanted if path not in filled]:
        raise InputError(f"nothing in the file fills {', '.join(missing[:3])}: it is incomplete, or not this model's")
    keys = [mapped for mapped in translation.keys if mapped.key not in dropped]
    for index, mapped in enumerate(keys):
        if shape := resampled.get(mapped.path):
            keys[index] = mapped._replace(leaf_shape=shape, transform=f"{mapped.transform}, resampled")
    return Converted(traverse_util.unflatten_dict(filled, sep="/"), tuple(keys), dropped, tuple(remarks))


def _numbers(pieces: list[Piece]) -> np.ndarray:
    """Join the pieces along the last axis, contiguous float32."""
    for piece in pieces:
        if "float" not in piece.array.dtype.name:
            name = piece.array.dtype.name
            raise InputError(f"{piece.key!r} holds {name}, not floating-point weights: quantised files are not read")
        if piece.array.shape[:-1] != pieces[0].array.shape[:-1]:
            raise InputError(f"{piece.key!r} is {piece.source_shape} in the file, {pieces[0].key!r} is not")
    if not pieces[0].array.ndim:
        return pieces[0].array.astype(np.float32)
    aligned = [np.require(piece.array, requirements="A") for piece in pieces]
    value = np.concatenate(aligned, axis=-1, dtype=np.float32, casting="unsafe")
    if not np.isfinite(value).all():
        bad = next(piece.key for piece in pieces if not np.isfinite(piece.array.astype(np.float32)).all())
        raise InputError(f"{bad!r} holds values that are not finite: the file is damaged")
    return value


def _positions(
    value: np.ndarray, grid: tuple[int, int], config: ViTConfig, convention: str
) -> tuple[np.ndarray, np.ndarray | None, str | None]:
    """Return positions on the model's grid; the class token's, if it is added to the token; and a remark.

    DINOv2 with registers has a position for the class token and none for the registers, which come after the sum. This
    equals a class token with its position added to it, and positions of the patches only.
    """
    prefix = value.shape[1] - grid[0] * grid[1]
    head, patches, remark = value[:, :prefix], value[:, prefix:], None
    if grid != config.grid:
        width = value.shape[-1]
        patches = resample(patches.reshape(*grid, width), config.grid, convention).reshape(1, -1, width)
        remark = (
            f"position embedding {grid[0]}x{grid[1]}, the model's grid {config.grid[0]}x{config.grid[1]}: resampled "
            f"({RESAMPLINGS[convention]}); weights lose accuracy away from the size that they were trained at"
        )
    if config.no_embed_class and prefix:
        return patches, head[:, :1], remark
    return np.concatenate([head, patches], axis=1), None, remark
