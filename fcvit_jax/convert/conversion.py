"""From pretrained ViT weights to a checkpoint directory, or to a file for PyTorch."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

from fcvit_jax.checkpoint import ENTRIES, Checkpoint, save_checkpoint
from fcvit_jax.convert import pytorch
from fcvit_jax.convert.inspection import Inspection, describe_model, remark_lines
from fcvit_jax.convert.translation import assemble
from fcvit_jax.convert.weight_source import WeightSource, named_model, open_weights
from fcvit_jax.errors import InputError, naming
from fcvit_jax.files import check_target
from fcvit_jax.models.config import GELUS, POOLS
from fcvit_jax.settings import check_settings, setting


class ConversionOptions(TypedDict, total=False):
    """The options of `convert`, and of `inspect`, which ignores the first three. None is the same as absence."""

    overwrite: bool
    class_names: str | Path | Sequence[str] | None
    report: Callable[[str], object] | None
    model: str | None
    preprocess: str | None
    ema: bool
    key: str | None
    sha256: str | None
    pos_embed: str | None
    num_classes: int | None
    image_size: int | tuple[int, int] | None
    patch_size: int | None
    num_heads: int | None
    gelu: str | None
    norm_eps: float | None
    pool: str | None
    proportional_attention: bool | None


PathLike = str | Path


@overload
def convert(
    src: PathLike, out: PathLike, *, to: Literal["timm", "hf"], **options: Unpack[ConversionOptions]
) -> Path: ...
@overload
def convert(src: PathLike, out: PathLike, *, to: None = None, **options: Unpack[ConversionOptions]) -> Checkpoint: ...
def convert(
    src: PathLike, out: PathLike, *, to: Literal["timm", "hf"] | None = None, **options: Unpack[ConversionOptions]
) -> Checkpoint | Path:
    """Convert pretrained ViT weights into a checkpoint directory, and return the checkpoint.

    None leaves an option to the file, to the JSON beside it, or to the model's name.

    Args:
      src: a file, a directory of transformers, a checkpoint of this library, `https://...`, `hf-hub:OWNER/NAME`, or a
        full name of the zoo.
      out: the directory to write, new or empty; with `overwrite`, also a checkpoint.
      to: write for PyTorch instead, and return the path: "timm" writes OUT.safetensors in timm's keys, "hf" a directory
        for transformers' from_pretrained.
      model: timm's name, such as "vit_small_patch16_224.augreg_in21k_ft_in1k".
      preprocess: a preset, such as "timm/augreg" or "timm/deit,crop_pct=1.0".
      image_size, patch_size: pixels, N or (height, width); position embeddings and the patch kernel are resampled.
      pos_embed: how positions are resampled, a key of `posembed.RESAMPLINGS`; by default as the weights' authors do.
      num_classes: classes that the head must have; 0 leaves the head out.
      num_heads, gelu, norm_eps, pool, proportional_attention: fields of `ViTConfig`.
      class_names: the names in the head's order, or a text file with one a line; or, if the head has those of a data
        set, in which order: "timm", "imagefolder" (torchvision's) or "numeric".
      ema: take the averaged weights of a training checkpoint.
      key: the dictionary of a training checkpoint that holds the weights, or the beginning of their names.
      sha256: hex digits that the file's sha256 must begin with, at least 8.
      report: called with each line that describes the conversion, such as `print`; the checkpoint's
        `meta["provenance"]` keeps the same.

    Raises InputError if the weights cannot be found, read or understood, if something has to be stated, or if `out`
    exists or cannot be written.
    """
    overwrite, preprocess = options.get("overwrite", False), options.get("preprocess")
    path = pytorch.check_output(out, to, overwrite) if to else check_target(out, overwrite, ENTRIES)
    found: Any = inspect(src, **options)
    if found.problem:
        raise found.problem
    source: WeightSource = found.source
    config, converted = found.config, found.converted
    try:
        pixels: Any = source.preprocess(preprocess, config)
    except InputError:
        if preprocess or not to:
            raise
        pixels = None  # PyTorch's file needs none
    names = source.class_names(options.get("class_names"), config.num_classes)
    remarks = (*source.assumptions(config, options.get("num_heads")), *converted.remarks)
    converted = replace(converted, remarks=remarks)
    provenance = source.provenance(converted)
    del found, source  # frees the file's pages before writing needs as many
    if to == "timm":
        usage = pytorch.write_timm(path, config, converted.params)
    elif to == "hf":
        listed = tuple(names) if names and not isinstance(names, str) else None
        usage = pytorch.write_huggingface(path, config, converted.params, pixels, listed)
    else:
        usage = f"pixels: {pixels}"
        facts: Any = dict(class_names=names, provenance=provenance, overwrite=overwrite)
        save_checkpoint(path, config, converted.params, pixels, **facts)
    if report := options.get("report"):
        for line in (*remark_lines(converted), f"{path}: {describe_model(config)}", usage):
            report(line)
    if to:
        return path
    meta = json.loads((path / "meta.json").read_text())
    return Checkpoint(path, config, converted.params, pixels, meta)


def inspect(src: PathLike, **options: Unpack[ConversionOptions]) -> Inspection:
    """Read weights, and return how each key is mapped and which model results; write nothing.

    The options are those of `convert`. Raises InputError if the weights cannot be found or read. If they are not
    understood, or something has to be stated, `Inspection.problem` is the reason.
    """
    if unknown := options.keys() - ConversionOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {min(unknown)!r}")
    asked, named = _asked(options), named_model(str(src), options.get("model"))
    sha256 = (options.get("sha256") or "").lower()
    if sha256 and not re.fullmatch(r"[0-9a-f]{8,64}", sha256):
        raise InputError(f"{sha256!r} is not a sha256: pass its 64 hex digits, or the first of them, at least 8")
    weights, sidecar = open_weights(str(src), options.get("ema", False), sha256 or None, options.get("key"))
    source = None
    try:
        known: Any = dict(pixels=not options.get("preprocess"), num_classes=asked.get("num_classes"))
        source = WeightSource.understand(weights, sidecar, named, **known)
        config, grid = source.infer(asked)
        with naming(weights.path):
            converted = assemble(
                source.translation, config, grid, options.get("pos_embed") or source.sidecar.resampling
            )
    except InputError as error:
        return Inspection(weights, source, problem=error)
    return Inspection(weights, source, config, converted)


@dataclass(frozen=True)
class _AskedFields:
    """Fields of `ViTConfig` that a user states; None leaves a field to the weights."""

    num_classes: int | None = setting(None, low=0)
    image_size: tuple[int, int] | None = setting(None, low=1)
    patch_size: int | None = setting(None, low=1)
    num_heads: int | None = setting(None, low=1)
    gelu: str | None = setting(None, choices=GELUS)
    norm_eps: float | None = setting(None, above=0, below=1)
    pool: str | None = setting(None, choices=POOLS)
    proportional_attention: bool | None = None

    def __post_init__(self) -> None:
        check_settings(self)


def _asked(options: ConversionOptions) -> dict[str, Any]:
    """Select the fields of `ViTConfig` among the stated options, as `infer_config` takes them."""
    asked = {field.name: options.get(field.name) for field in fields(_AskedFields)}
    if type(size := asked["image_size"]) is int:
        asked["image_size"] = (size, size)
    return {name: value for name, value in vars(_AskedFields(**asked)).items() if value is not None}
