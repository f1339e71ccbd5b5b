"""Convert pretrained ViT weights into a checkpoint directory, or a checkpoint into a PyTorch file.

  python -m fcvit_jax.convert deit_small_patch16_224.fb_in1k deit_s            a name: downloaded, everything known
  python -m fcvit_jax.convert hf-hub:google/vit-base-patch16-224 vit_b         a repository of the Hugging Face hub
  python -m fcvit_jax.convert model.safetensors my_vit --preprocess timm/augreg
  python -m fcvit_jax.convert --inspect model.safetensors                      what it holds, how each key is mapped
  python -m fcvit_jax.convert my_vit my_vit.safetensors --to timm              back to PyTorch

SRC is a file (.safetensors, .pth, .pt, .bin, .npz, or the index.json of a sharded one), a directory saved by
transformers, a checkpoint of this library, https://..., hf-hub:OWNER/NAME, or a full name of the zoo. Its keys show its
layout: timm and DeiT, DINO and DINOv2, MAE, Hugging Face, torchvision, Google's .npz.

The geometry (width, depth, patch, grid, classes) is inferred from shapes. Normalisation cannot be inferred: timm's ViT
and DeiT weights have the same keys and expect different pixels. A full name states it, and so do the JSON files beside
timm's or Hugging Face's weights; otherwise pass --preprocess.
"""

import argparse
import re

from fcvit_jax.convert import convert, inspect
from fcvit_jax.convert.posembed import RESAMPLINGS
from fcvit_jax.data.preprocess import PRESETS
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.models.config import GELUS, POOLS


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    options = vars(_parser().parse_args(argv))
    src, out = options.pop("src"), options.pop("out")
    with one_line_errors():
        if options.pop("inspect"):
            options.pop("to")
            found = inspect(src, **options)
            print(found)
            if found.problem and not found.source:
                raise found.problem
        elif out is None:
            raise InputError("OUT is missing: name the directory or file to write, or pass --inspect to only look")
        else:
            convert(src, out, **options, report=print)


def _size(text: str) -> tuple[int, int]:
    if not (found := re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels: write 224, or 384x512 (height x width)")
    return int(found[1]), int(found[2] or found[1])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m fcvit_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="file, directory, https://..., hf-hub:OWNER/NAME or zoo name")
    add("out", metavar="OUT", nargs="?", help="checkpoint directory to write, new or empty")
    add("--inspect", action="store_true", help="print what SRC holds, and write nothing")
    add("--overwrite", action="store_true", help="replace an existing OUT")
    to = "write for PyTorch: OUT.safetensors in timm's keys, or a directory OUT for transformers' from_pretrained"
    add("--to", choices=("timm", "hf"), help=to)

    add = parser.add_argument_group("which weights").add_argument
    add("--ema", action="store_true", help="the averaged weights of a training checkpoint")
    key = "the dictionary of a training checkpoint that holds the weights, or the beginning of their names"
    add("--key", metavar="NAME", help=key)
    add("--sha256", metavar="HEX", help="the file's sha256, or its first digits, at least 8")
    add("--num_classes", metavar="N", type=int, help="classes that the head must have; 0 leaves the head out")

    add = parser.add_argument_group("what the file does not state").add_argument
    add("--model", metavar="NAME", help="timm's name, such as vit_small_patch16_224.augreg_in21k_ft_in1k")
    presets = f"one of {', '.join(PRESETS)}; fields may follow, as in timm/deit,crop_pct=1.0"
    add("--preprocess", metavar="PRESET", help=presets)
    add("--num_heads", metavar="N", type=int, help="required if no name is given and heads are not 64 wide")
    add("--gelu", choices=GELUS, help="exact by default, unless config.json or --model says otherwise")
    add("--norm_eps", metavar="X", type=float, help="1e-6 by default, unless config.json or --model says otherwise")
    add("--pool", choices=POOLS, help="what the head reads, if the keys do not show it")
    order = "or the order in which it has a data set's classes: timm, imagefolder (torchvision's), numeric"
    add("--class_names", metavar="FILE", help=f"text file with one class a line, in the head's order; {order}")
    unweighted = "merged tokens attract attention like single ones (for weights fine-tuned that way, such as MAE's)"
    flag, field = "--no_proportional_attention", "proportional_attention"
    add(flag, dest=field, action="store_const", const=False, help=unweighted)

    add = parser.add_argument_group("another size").add_argument
    add("--image_size", metavar="N", type=_size, help="pixels, N or HxW; by default the weights' own")
    add("--patch_size", metavar="N", type=int, help="pixels; resamples the kernel as FlexiViT does")
    add("--pos_embed", choices=tuple(RESAMPLINGS), help="how positions are resampled; the layout's way by default")
    return parser


if __name__ == "__main__":
    main()
