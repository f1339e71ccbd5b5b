"""Convert pretrained ViT weights into a checkpoint directory, or a checkpoint into a PyTorch file.

  python -m fcvit_jax.convert deit_small_patch16_224.fb_in1k deit_s            a name: downloaded, everything known
  python -m fcvit_jax.convert hf-hub:timm/vit_small_patch16_224.augreg_in21k_ft_in1k vit_s
  python -m fcvit_jax.convert model.safetensors my_vit --preprocess timm/augreg
  python -m fcvit_jax.convert --inspect model.safetensors                      what is in it, and what becomes of it
  python -m fcvit_jax.convert my_vit my_vit.safetensors --to timm              back to PyTorch

SRC is a file (.safetensors, .pth, .pt, .bin, .npz, or the index.json of a sharded one), a directory as transformers
saves them, a checkpoint of this library, https://..., hf-hub:OWNER/NAME, or a full name of the zoo. Its keys tell its
layout: timm and DeiT, DINO and DINOv2, MAE, Hugging Face, torchvision, Google's .npz.

The geometry (width, depth, patch, grid, classes) is read off the file's shapes. Pixels cannot be: timm's ViT and DeiT
weights have the same keys and expect another normalisation. A name with a tag says all of it, and so do the JSON files
beside a file of timm's or Hugging Face's; otherwise --preprocess does.
"""

import argparse
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from fcvit_jax.checkpoint import ENTRIES, flat_params, load_checkpoint, save_checkpoint
from fcvit_jax.convert import export
from fcvit_jax.convert.fetch import expected_sha256, locate, weight_file
from fcvit_jax.convert.geometry import Grid, infer_config
from fcvit_jax.convert.posembed import RESAMPLINGS
from fcvit_jax.convert.readers import WeightFile, read_weights
from fcvit_jax.convert.sidecar import Sidecar, read_sidecar
from fcvit_jax.convert.translation import Converted, Row, Translation, assemble, translate
from fcvit_jax.data.preprocess import PRESETS, Preprocess, preset
from fcvit_jax.errors import InputError, OneLineParser, naming, one_line_errors
from fcvit_jax.files import check_target
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.config import GELUS, POOLS, ViTConfig

# Fields of a named model that its file may have otherwise: the keys tell.
_TOLD_BY_KEYS = ("image_size", "num_classes", "pool", "fc_norm", "representation_size")
_ASKED = ("num_heads", "norm_eps", "gelu", "pool", "image_size", "patch_size", "num_classes", "proportional_attention")


@dataclass(frozen=True)
class Source:
    """What was read: the file, the meaning of its keys, the JSON beside it, and the model that a name stands for."""

    weights: WeightFile
    translation: Translation
    sidecar: Sidecar
    model: zoo.Model | None


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        if args.inspect:
            inspect(args)
        elif args.out is None:
            raise InputError("OUT is missing: name what is to be written, or pass --inspect to look only")
        else:
            convert(args)


def convert(args: argparse.Namespace) -> None:
    """Read, translate, and write what --to says: a checkpoint directory, timm's file, or transformers' directory."""
    out = (
        export.check_target(args.out, args.to, args.overwrite)
        if args.to
        else check_target(args.out, args.overwrite, ENTRIES)
    )
    source = _understand(*_read(args), args)
    config, grid = _infer(source, args)
    preprocess = _preprocess(source, args, config)
    if preprocess is None and not args.to:
        raise InputError(f"{source.weights.path}: {_cannot_tell_pixels(args.model)}")
    class_names = _class_names(source, args, config)
    with naming(source.weights.path):
        converted = assemble(source.translation, config, grid, args.pos_embed)
    converted = replace(converted, remarks=(*_assumed(source, args, config), *converted.remarks))
    provenance = _provenance(source, converted)
    del source  # and with it the file's pages, before as many are needed to write
    if args.to == "timm":
        told = export.write_timm(out, config, converted.params)
    elif args.to == "hf":
        told = export.write_huggingface(out, config, converted.params, preprocess, class_names)
    else:
        told = f"pixels: {preprocess}"
        save_checkpoint(
            out,
            config,
            converted.params,
            cast(Preprocess, preprocess),
            class_names=class_names,
            provenance=provenance,
            overwrite=args.overwrite,
        )
    _print_remarks(converted)
    print(f"{out}: {_describe(config)}")
    print(told)


def inspect(args: argparse.Namespace) -> None:
    """Print what a file holds, what its keys are taken for, and which model that gives; write nothing."""
    weights, sidecar = _read(args)
    count = sum(math.prod(array.shape) for array in weights.arrays.values())
    dtypes = Counter(array.dtype.name for array in weights.arrays.values())
    print(f"{weights.path.name}: {weights.format}")
    for name, sha256 in weights.files.items():
        print(f"sha256 {sha256}  {name}")
    print(f"{len(weights.arrays)} tensors, {count:,} numbers: " + ", ".join(f"{n} {d}" for d, n in dtypes.items()))
    if weights.wrapper:
        print(f"unwrapped from {weights.wrapper!r}")
    if weights.skipped:
        print(f"left aside: {', '.join(weights.skipped)}")
    try:
        source = _understand(weights, sidecar, args)
    except InputError:
        _print_table((key, _times(array.shape)) for key, array in weights.arrays.items())
        raise
    if source.sidecar.files:
        print(f"beside it: {', '.join(source.sidecar.files)}")
    print(f"layout: {source.translation.layout.name}")
    try:
        config, grid = _infer(source, args)
        with naming(weights.path):
            converted = assemble(source.translation, config, grid, args.pos_embed)
    except InputError as error:  # what is missing or does not fit: the keys show why
        _print_rows(source.translation.rows)
        print(f"model: {str(error).removeprefix(f'{weights.path}: ')}")
    else:
        _print_rows(converted.rows)
        _print_remarks(converted)
        print(f"model: {_describe(config)}")


def _read(args: argparse.Namespace) -> tuple[WeightFile, Sidecar | None]:
    """The weights behind SRC, and what our own checkpoint says of them."""
    if args.model:
        zoo.get(args.model)  # an unknown name is told before a large file is read
    if args.src.startswith("packaged:"):
        return _read_checkpoint(args.src)
    path = locate(args.src, args.sha256, lambda path: read_weights(path, args.ema))
    if path.is_dir():
        if any((path / name).is_dir() for name in ("params", "checkpoint/params")):
            return _read_checkpoint(path)
        path = weight_file(path)
    weights = read_weights(path, args.ema)
    expected = args.sha256 or expected_sha256(path.name)
    found = weights.files[path.name]
    if expected and not found.startswith(expected):
        told = "--sha256" if args.sha256 else "its name"
        raise InputError(
            f"{path}: its sha256 begins {found[: len(expected)]}, {told} says {expected}: the file is damaged or "
            "another one; download it again" + ("" if args.sha256 else ", or pass --sha256 if you renamed it")
        )
    return weights, None


def _read_checkpoint(path: str | Path) -> tuple[WeightFile, Sidecar]:
    checkpoint = load_checkpoint(path)
    arrays, fields = flat_params(checkpoint.params), asdict(checkpoint.config)
    weights = WeightFile(checkpoint.path, "checkpoint", arrays, checkpoint.meta["files"], None, ())
    names, provenance = checkpoint.meta["class_names"], checkpoint.meta["provenance"]
    return weights, Sidecar(
        "fcvit_jax", (), fields, checkpoint.preprocess, tuple(names) if names else None, provenance=provenance
    )


def _understand(weights: WeightFile, sidecar: Sidecar | None, args: argparse.Namespace) -> Source:
    try:
        with naming(weights.path):
            translation = translate(weights.arrays)
    except InputError:
        if not sidecar:
            read_sidecar(weights.path, ("huggingface",), pixels=False)  # may refuse the model by its name
        raise
    if not sidecar:
        whose = translation.layout.config_json
        sidecar = read_sidecar(weights.path, (whose,) if whose else (), pixels=not args.preprocess)
    name = args.model or (args.src if "." in args.src and args.src in zoo.names() else None)
    return Source(weights, translation, sidecar, zoo.get(name) if name else None)


def _infer(source: Source, args: argparse.Namespace) -> tuple[ViTConfig, Grid | None]:
    stated = {}
    if model := source.model:
        config = asdict(model.config)
        stated[f"a {model.name}"] = {name: config[name] for name in config if name not in _TOLD_BY_KEYS}
    if source.sidecar.kind:
        # Of an architecture that config.json names, what it may change stands beside the name or in the keys.
        named = zoo.ARCHITECTURES.get(source.sidecar.architecture or "")
        told = {name: getattr(named, name) for name in ("num_heads", "gelu", "norm_eps")} if named else {}
        stated["what config.json describes"] = told | source.sidecar.fields
    asked = {name: getattr(args, name) for name in _ASKED if getattr(args, name) is not None}
    with naming(source.weights.path):
        return infer_config(source.translation, stated, asked)


def _preprocess(source: Source, args: argparse.Namespace, config: ViTConfig) -> Preprocess | None:
    """What --preprocess, the model's name or the JSON beside the file says of pixels, in this order."""
    if args.preprocess:
        return preset(args.preprocess, config.image_size)
    origin, known = "the preprocessing beside the weights", source.sidecar.preprocess
    if source.model and source.model.preprocess:
        origin, known = source.model.name, source.model.preprocess
    if known and known.image_size != config.image_size:
        if args.to:  # the file of weights goes without
            return None
        height, width = known.image_size
        raise InputError(
            f"{origin} is for {height}x{width} pixels ({known}), the model for {config.image_size[0]}x"
            f"{config.image_size[1]}: pass --image_size {height}x{width}, or --preprocess"
        )
    return known


def _assumed(source: Source, args: argparse.Namespace, config: ViTConfig) -> tuple[str, ...]:
    """What neither the file nor a name nor JSON tells, and the conversion goes on without."""
    remarks = []
    pixels = source.sidecar.preprocess
    if source.sidecar.kind == "huggingface" and pixels and pixels.crop_mode == "center":
        remarks.append("transformers cuts the centre one pixel further up or left where a margin is odd; here as timm")
    if not (source.model or source.sidecar.kind or source.translation.num_heads or args.num_heads):
        remarks.append(
            f"{config.num_heads} heads, GELU {config.gelu} and epsilon {config.norm_eps:g} are assumed, as is usual: "
            "pass --model, or --num_heads, --gelu and --norm_eps, if they are others"
        )
    return tuple(remarks)


def _cannot_tell_pixels(model: str | None) -> str:
    tags = [name for name in zoo.names() if model and name.startswith(f"{model}.")]
    return (
        "the normalisation cannot be told from the file (timm's ViT and DeiT have the same keys): pass "
        + (f"--model {tags[0]} or " if tags else "")
        + f"--preprocess {'|'.join(PRESETS)}"
    )


def _class_names(source: Source, args: argparse.Namespace, config: ViTConfig) -> tuple[str, ...] | None:
    if args.class_names is None:
        names = source.sidecar.class_names
        return names if names and len(names) == config.num_classes else None
    try:
        names = tuple(filter(None, map(str.strip, Path(args.class_names).read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names {args.class_names} cannot be read as text: {error}") from None
    if len(names) != config.num_classes or len(set(names)) != config.num_classes:
        raise InputError(
            f"--class_names {args.class_names} has {len(set(names))} different names, one a line; the head has "
            f"{config.num_classes}"
        )
    return names


def _provenance(source: Source, converted: Converted) -> dict[str, Any]:
    weights = source.weights
    digests = list(weights.files.values())
    return {
        "source": weights.path.name,
        # Of several files, the digest of their digests: one string that tells these weights from others.
        "sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "files": weights.files,
        "from": source.sidecar.provenance,
        "format": weights.format,
        "layout": source.translation.layout.name,
        "wrapper": weights.wrapper,
        "left_aside": weights.skipped,
        "model": source.model.name if source.model else source.sidecar.architecture,
        "beside": source.sidecar.files,
        "keys": [row._asdict() for row in converted.rows],
        "dropped": converted.dropped,
        "remarks": converted.remarks,
    }


def _print_remarks(converted: Converted) -> None:
    for remark in converted.remarks:
        print(f"warning: {remark}")
    for key, reason in converted.dropped.items():
        print(f"dropped: {key} ({reason})")


def _print_rows(rows: Iterable[Row]) -> None:
    """One line for all blocks alike, with "#" for their numbers."""
    folded: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        key, path = row.key, row.path
        if block := re.match(r"blocks_(\d+)/", path):
            key = re.sub(rf"(?<=[._]){block[1]}(?=[./])", "#", key, count=1)
            path = path.replace(block[1], "#", 1)
        folded[key, _times(row.shape), "->", path, _times(row.leaf_shape), row.transform] += 1
    _print_table((*line, f"x {count}" if count > 1 else "") for line, count in folded.items())


def _print_table(lines: Iterable[tuple[str, ...]]) -> None:
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _describe(config: ViTConfig) -> str:
    height, width = config.image_size
    return (
        f"ViT {config.embed_dim} wide, {config.depth} layers, {config.num_heads} heads, patch {config.patch_size} at "
        f"{height}x{width} ({config.grid[0]}x{config.grid[1]} patches and {config.num_prefix_tokens} prefix tokens"
        f"{', which have no positions' if config.no_embed_class and config.num_prefix_tokens else ''}), "
        f"{config.num_classes} classes, {config.pool} pooling, GELU {config.gelu}, epsilon {config.norm_eps:g}, "
        f"{flops.gmacs(config):.2f} GMACs"
    )


def _size(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels: write 224, or 384x512 (height x width)")
    return int(found[1]), int(found[2] or found[1])


def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _digits(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no sha256: 64 hex digits, or the first of them, at least 8")
    return text.lower()


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a small number such as 1e-6")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m fcvit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="file, directory, https://..., hf-hub:OWNER/NAME or zoo name")
    parser.add_argument("out", metavar="OUT", nargs="?", help="checkpoint directory to write, new or empty")
    parser.add_argument("--inspect", action="store_true", help="print what SRC holds, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace what stands at OUT")
    parser.add_argument(
        "--to",
        choices=("timm", "hf"),
        help="write for PyTorch: OUT.safetensors in timm's keys, or a directory OUT for transformers' from_pretrained",
    )

    which = parser.add_argument_group("which weights")
    which.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    which.add_argument(
        "--sha256", metavar="HEX", type=_digits, help="what the file must have, or how it begins; 8 digits or more"
    )
    which.add_argument("--num_classes", metavar="N", type=_count, help="what the head must have; 0 leaves it out")

    told = parser.add_argument_group("what the file does not tell")
    told.add_argument("--model", metavar="NAME", help="timm's name, such as vit_small_patch16_224.augreg_in21k_ft_in1k")
    told.add_argument(
        "--preprocess",
        metavar="PRESET",
        help=f"one of {', '.join(PRESETS)}; fields may follow, as in timm/deit,crop_pct=1.0",
    )
    told.add_argument("--num_heads", metavar="N", type=_count, help="needed where no name is given and heads are odd")
    told.add_argument("--gelu", choices=GELUS, help="exact by default, unless config.json or --model says else")
    told.add_argument("--norm_eps", metavar="X", type=_epsilon, help="1e-6 by default, likewise")
    told.add_argument("--pool", choices=POOLS, help="what the head reads, where it is not what keys tell")
    told.add_argument("--class_names", metavar="FILE", help="text file with one class a line, in the head's order")
    told.add_argument(
        "--no_proportional_attention",
        dest="proportional_attention",
        action="store_const",
        const=False,
        help="merged tokens attract attention as single ones do (for weights fine-tuned so, such as MAE's)",
    )

    sizes = parser.add_argument_group("another size")
    sizes.add_argument("--image_size", metavar="N", type=_size, help="pixels, N or HxW; by default the weights' own")
    sizes.add_argument("--patch_size", metavar="N", type=_count, help="pixels; resamples the kernel as FlexiViT does")
    sizes.add_argument(
        "--pos_embed",
        choices=tuple(RESAMPLINGS),
        help="how positions are resampled; by default as those do whose layout it is",
    )
    return parser


if __name__ == "__main__":
    main()
