"""Convert pretrained ViT weights into a checkpoint directory.

  python -m fcvit_jax.convert deit_small_patch16_224-cd65a155.pth deit_s --model deit_small_patch16_224.fb_in1k
  python -m fcvit_jax.convert model.safetensors my_vit --preprocess timm/augreg
  python -m fcvit_jax.convert --inspect model.safetensors

The geometry (width, depth, patch, grid, classes) is read off the file's shapes. Pixels cannot be: timm's ViT and DeiT
weights have the same keys and expect another normalisation. A full name of timm's (--model NAME.TAG) says all of it;
otherwise --preprocess does.
"""

import argparse
import math
import re
from collections import Counter
from pathlib import Path
from typing import NoReturn

from fcvit_jax.checkpoint import check_target, save_checkpoint
from fcvit_jax.convert import layouts
from fcvit_jax.convert.readers import WeightFile, read_weights
from fcvit_jax.data.preprocess import PRESETS, Preprocess, preset
from fcvit_jax.errors import InputError, one_line_errors
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.vit import ViTConfig


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        if args.inspect:
            inspect(args.src, args)
        elif args.out is None:
            raise InputError("OUT is missing: name the checkpoint directory to write, or pass --inspect to look only")
        else:
            convert(args.src, args.out, args)


def convert(source: str, out: str, args: argparse.Namespace) -> None:
    """Read, translate, and write the checkpoint directory."""
    check_target(out, args.overwrite)
    if args.model:
        zoo.get(args.model)  # an unknown name is told before a large file is read
    weights = read_weights(source)
    layout = _named(source, layouts.detect_layout, weights.arrays)
    config = _infer(weights, args)
    preprocess = _preprocess(weights, args, config)
    class_names = _class_names(args.class_names, config.num_classes)
    converted = _named(source, layouts.convert_arrays, weights.arrays, config)
    provenance = {
        "source": weights.path.name,
        "sha256": weights.sha256,
        "format": weights.format,
        "layout": layout,
        "wrapper": weights.wrapper,
        "model": args.model,
        "dropped": converted.dropped,
        "remarks": list(converted.remarks),
    }
    path = save_checkpoint(
        out,
        config,
        converted.params,
        preprocess,
        class_names=class_names,
        provenance=provenance,
        overwrite=args.overwrite,
    )
    for remark in converted.remarks:
        print(f"warning: {remark}")
    for key, reason in converted.dropped.items():
        print(f"dropped: {key} ({reason})")
    print(f"{path}: {_describe(config)}")
    print(f"pixels: {preprocess}")


def inspect(source: str, args: argparse.Namespace) -> None:
    """Print what a file holds, and which layout and geometry it is taken for; write nothing."""
    weights = read_weights(source)
    count = sum(math.prod(array.shape) for array in weights.arrays.values())
    dtypes = Counter(array.dtype.name for array in weights.arrays.values())
    print(f"{weights.path.name}: {weights.format}, sha256 {weights.sha256}")
    print(f"{len(weights.arrays)} tensors, {count:,} numbers: " + ", ".join(f"{n} {d}" for d, n in dtypes.items()))
    if weights.wrapper:
        print(f"unwrapped from {weights.wrapper!r}")
    if weights.skipped:
        print(f"left aside: {', '.join(weights.skipped)}")
    width = max(map(len, weights.arrays))
    for key, array in weights.arrays.items():
        print(f"  {key:<{width}}  {'x'.join(map(str, array.shape)) or 'scalar'}")
    print(f"layout: {_named(source, layouts.detect_layout, weights.arrays)}")
    try:
        print(f"model: {_describe(_infer(weights, args))}")
    except InputError as error:
        print(f"model: {str(error).removeprefix(f'{weights.path}: ')}")


def _infer(weights: WeightFile, args: argparse.Namespace) -> ViTConfig:
    return _named(
        str(weights.path),
        layouts.infer_config,
        weights.arrays,
        args.model,
        args.num_classes,
        args.image_size,
        args.num_heads,
        args.pool,
    )


def _named(source: str, function, *args):
    """Call a function that does not know the file's name, and put the name in front of its complaint."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _preprocess(weights: WeightFile, args: argparse.Namespace, config: ViTConfig) -> Preprocess:
    if args.preprocess:
        return preset(args.preprocess, config.image_size)
    known = zoo.get(args.model).preprocess if args.model else None
    if known is None:
        tags = [name for name in zoo.names() if args.model and name.startswith(f"{args.model}.")]
        example = f"--model {tags[0]} or " if tags else ""
        raise InputError(
            f"{weights.path}: the normalisation cannot be told from the file (timm's ViT and DeiT have the same keys): "
            f"pass {example}--preprocess {'|'.join(PRESETS)}"
        )
    if known.image_size != config.image_size:
        raise InputError(
            f"{args.model} is evaluated at {known.image_size[0]} pixels ({known}): another size needs --preprocess too"
        )
    return known


def _class_names(path: str | None, num_classes: int) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        names = tuple(filter(None, map(str.strip, Path(path).read_text(encoding="utf-8").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--class_names {path} cannot be read as text: {error}") from None
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise InputError(
            f"--class_names {path} has {len(set(names))} different names, one a line; the head has {num_classes}"
        )
    return names


def _describe(config: ViTConfig) -> str:
    height, width = config.image_size
    return (
        f"ViT {config.embed_dim} wide, {config.depth} layers, {config.num_heads} heads, patch {config.patch_size} at "
        f"{height}x{width} ({config.grid[0]}x{config.grid[1]} patches and {config.num_prefix_tokens} prefix tokens"
        f"{', which have no positions' if config.no_embed_class else ''}), {config.num_classes} classes, "
        f"{config.pool} pooling, "
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help tells more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fcvit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", help="weights in timm's layout: .safetensors, .pth, .pt or .bin")
    parser.add_argument("out", metavar="OUT", nargs="?", help="checkpoint directory to write; it must not exist")
    parser.add_argument("--inspect", action="store_true", help="print what SRC holds, and write nothing")
    parser.add_argument(
        "--model", metavar="NAME", help="timm's name, such as vit_small_patch16_224.augreg_in21k_ft_in1k"
    )
    parser.add_argument(
        "--preprocess",
        metavar="PRESET",
        help=f"one of {', '.join(PRESETS)}; fields may follow, as in timm/deit,crop_pct=1.0",
    )
    parser.add_argument("--num_classes", metavar="N", type=_count, help="what the head must have; 0 leaves it out")
    parser.add_argument("--image_size", metavar="N", type=_size, help="pixels, N or HxW; by default the weights' own")
    parser.add_argument(
        "--num_heads", metavar="N", type=_count, help="needed where no --model is given and heads are odd"
    )
    parser.add_argument("--pool", choices=("token", "avg"), help="what the head reads, where it is not what keys tell")
    parser.add_argument("--class_names", metavar="FILE", help="text file with one class a line, in the head's order")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint OUT")
    return parser


if __name__ == "__main__":
    main()
