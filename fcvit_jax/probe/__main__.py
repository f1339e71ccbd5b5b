"""Fit a linear head on the features of labelled images, or make one from class embeddings.

  python -m fcvit_jax.probe OUT                                               the packaged digits model, offline
  python -m fcvit_jax.probe --checkpoint dinov2_s --dataset folder:photos/train OUT
  python -m fcvit_jax.probe --checkpoint dinov2_s --dataset folder:photos/train --pool token_avg --head ridge OUT
  python -m fcvit_jax.probe --checkpoint siglip_b --classes prompts.npz OUT   zero-shot
  python evaluate.py --config=configs/eval_folder.py --config.checkpoint=OUT --config.dataset=folder:photos/test

OUT is a checkpoint directory with class names. The features are kept in OUT.features: rerun the same command to resume
an interrupted pass, or add --overwrite and another --head to use them again. See docs/probing.md.
"""

import argparse

import jax

from fcvit_jax import parallel
from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.probe import ProbeConfig, probe, zero_shot
from fcvit_jax.program_cache import keep_programs
from fcvit_jax.settings import add_options


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    args = vars(_parser().parse_args(argv))
    with one_line_errors():
        parallel.start_processes(args.pop("distributed"))
    with parallel.ending_together(), one_line_errors():
        keep_programs(None)
        checkpoint, dataset, classes, out = (args.pop(name) for name in ("checkpoint", "dataset", "classes", "out"))
        if classes:
            if dataset:
                raise InputError("--classes makes a head without images: leave --dataset out")
            zero_shot(checkpoint, classes, out, overwrite=args["overwrite"])
            print(f"written: {out}")
            return
        report = probe(checkpoint, dataset or "digits:train", out, **args)
        if jax.process_index() == 0:
            print(f"{report}\nwritten: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m fcvit_jax.probe", description=__doc__)
    parser.add_argument("out", metavar="OUT", help="the checkpoint directory to write")
    where = "checkpoint, train_sam.py working directory, or packaged:NAME (default: packaged:digits)"
    parser.add_argument("--checkpoint", metavar="DIR", default="packaged:digits", help=where)
    images = "labelled images: folder:PATH, digits:train or tfds:NAME/SPLIT (default: digits:train)"
    parser.add_argument("--dataset", metavar="SPEC", help=images)
    parser.add_argument("--classes", metavar="FILE", help="class embeddings, .npz or .safetensors, instead of images")
    parser.add_argument("--features", metavar="DIR", help="where features are kept (default: OUT.features)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--distributed", metavar="WHERE", default="", help="auto, or HOST:PORT,COUNT,INDEX")
    add_options(parser, ProbeConfig)
    return parser


if __name__ == "__main__":
    keep_freed_memory()
    main()
