"""The content of a weight file, how each key is mapped, and the resulting model, as a value that prints a report."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fcvit_jax.convert.readers import WeightFile
from fcvit_jax.convert.translation import Converted, MappedKey
from fcvit_jax.convert.weight_source import WeightSource
from fcvit_jax.errors import InputError
from fcvit_jax.models import flops
from fcvit_jax.models.config import ViTConfig


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`; `str()` gives the report of `--inspect`.

    source: None if the keys are not understood. config, converted: None if the model does not follow from them.
    problem: why either is None.
    """

    weights: WeightFile
    source: WeightSource | None = None
    config: ViTConfig | None = None
    converted: Converted | None = None
    problem: InputError | None = None

    def __str__(self) -> str:
        weights = self.weights
        count = sum(math.prod(array.shape) for array in weights.arrays.values())
        dtypes = Counter(array.dtype.name for array in weights.arrays.values())
        lines = [f"{weights.path.name}: {weights.format}"]
        lines += [f"sha256 {sha256}  {name}" for name, sha256 in weights.files.items()]
        held = ", ".join(f"{number} {dtype}" for dtype, number in dtypes.items())
        lines.append(f"{len(weights.arrays)} tensors, {count:,} numbers: {held}")
        prefix = self.source.translation.prefix if self.source else ""
        if wrapper := ", ".join(filter(None, (weights.wrapper, prefix))):
            lines.append(f"unwrapped from {wrapper!r}")
        if weights.skipped:
            lines.append(f"left out: {', '.join(weights.skipped)}")
        if not self.source:
            return "\n".join([*lines, *_table((key, _times(array.shape)) for key, array in weights.arrays.items())])
        if self.source.sidecar.files:
            lines.append(f"beside it: {', '.join(self.source.sidecar.files)}")
        lines.append(f"layout: {self.source.translation.layout.name}")
        if self.converted and self.config:
            lines += [*_key_table(self.converted.keys), *remark_lines(self.converted)]
            model = describe_model(self.config)
        else:  # the keys show why
            lines += _key_table(self.source.translation.keys)
            model = str(self.problem).removeprefix(f"{weights.path}: ")
        return "\n".join([*lines, f"model: {model}"])


def describe_model(config: ViTConfig) -> str:
    """Describe a model in one line."""
    height, width = config.image_size
    return (
        f"ViT {config.embed_dim} wide, {config.depth} layers, {config.num_heads} heads, patch {config.patch_size} at "
        f"{height}x{width} ({config.grid[0]}x{config.grid[1]} patches and {config.num_prefix_tokens} prefix tokens"
        f"{', which have no positions' if config.no_embed_class and config.num_prefix_tokens else ''}), "
        f"{'rotary positions, ' if config.rotary else ''}{config.num_classes} classes, {config.pool} pooling, "
        f"{'SwiGLU' if config.gated else f'GELU {config.gelu}'}, epsilon {config.norm_eps:g}, "
        f"{flops.gmacs(config):.2f} GMACs"
    )


def remark_lines(converted: Converted) -> list[str]:
    """List the warnings of a conversion, and the keys that it drops."""
    dropped = [f"dropped: {key} ({reason})" for key, reason in converted.dropped.items()]
    return [f"warning: {remark}" for remark in converted.remarks] + dropped


def _key_table(keys: Iterable[MappedKey]) -> list[str]:
    """Format one line for the same key of all blocks, with "#" for the block's number."""
    folded: Counter[tuple[str, ...]] = Counter()
    for mapped in keys:
        key, path = mapped.key, mapped.path
        if block := re.match(r"blocks_(\d+)/", path):
            key = re.sub(rf"(?<=[._]){block[1]}(?=[./])", "#", key, count=1)
            path = path.replace(block[1], "#", 1)
        folded[key, _times(mapped.shape), "->", path, _times(mapped.leaf_shape), mapped.transform] += 1
    return _table((*line, f"x {count}" if count > 1 else "") for line, count in folded.items())


def _table(lines: Iterable[tuple[str, ...]]) -> list[str]:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
