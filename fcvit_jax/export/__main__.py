"""Export a checkpoint for serving: a directory that runs on jax and numpy, without this library.

  python -m fcvit_jax.export packaged:digits served --schedules dense,s2winc5_r16 --batch_sizes 1,32
  python -m fcvit_jax.export vit vit_served --schedules s2winc7_r16 --batch_sizes 64 --dtype bfloat16 --platforms cuda
  python served/run.py --help                                        how to run it, on any machine

Merging needs fixed shapes, so each schedule at each batch size is its own program: a small StableHLO file,
OUT/programs/SCHEDULE_bN.stablehlo. All share OUT/weights.npz. Programs normalise the pixels: they take uint8 images
[N, height, width, 3] and return float32 logits [N, classes].

Exporting for a GPU needs no GPU. A program runs with the JAX that wrote it and with releases of the following six
months: keep the checkpoint, to export again later.
"""

import argparse
import json

from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.errors import OneLineParser, one_line_errors
from fcvit_jax.export import PLATFORMS, export


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(prog="python -m fcvit_jax.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint directory, or packaged:digits")
    parser.add_argument("path", metavar="OUT", help="directory to write, new or empty")
    schedules = "dense, tome_r13, s2dfe_r18, s2winc7_r16, or an explicit form such as dense:2,global:10:r16"
    parser.add_argument("--schedules", metavar="A,B", required=True, help=schedules)
    sizes = "images per call; 1 has the lowest latency"
    parser.add_argument("--batch_sizes", metavar="N,M", type=_counts, required=True, help=sizes)
    dtype = "of the computation; tf32 rounds products on GPUs, bfloat16 halves weights.npz too (default: float32)"
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="float32", help=dtype)
    platforms = f"what programs can be compiled for: some of {', '.join(PLATFORMS)} (default: cpu,cuda)"
    parser.add_argument("--platforms", metavar="A,B", type=_names, default=("cpu", "cuda"), help=platforms)
    parser.add_argument("--features", action="store_true", help="return (logits, pooled features) from a program")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at OUT")
    args = parser.parse_args(argv)
    with one_line_errors():
        out = export(**vars(args))
        meta = json.loads((out / "meta.json").read_text())
        print(f"{out}: {meta['parameters']:,} parameters, {meta['dtype']}, for {' and '.join(meta['platforms'])}")
        for name, program in meta["programs"].items():
            size = (out / program["file"]).stat().st_size
            print(f"  {name}: {program['stages']}, batches of {program['batch_size']}, {size / 1e3:.0f} kB")
        print(f"pixels: {meta['preprocess']['text']}")
        print(f"run it: pip install jax numpy flatbuffers pillow && python {args.path}/run.py PICTURE")


def _counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a batch size: write 32, or several as 1,32") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


if __name__ == "__main__":
    main()
