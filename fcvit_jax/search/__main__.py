"""Find the best merge schedule for a budget, on unlabelled images.

  python -m fcvit_jax.search                                         the packaged digits model, offline
  python -m fcvit_jax.search --checkpoint DIR --images photos --budget 0.6 --workdir found
  python -m fcvit_jax.search --checkpoint DIR --images photos --budget 2.8G,2.3G --workdir found
  python -m fcvit_jax.search --checkpoint DIR --images photos --budget 1.7x --batch_size 8 --workdir found
  python evaluate.py --config.checkpoint=DIR --config.dataset=... --config.schedules=dense,tome_r13,search:found

Candidates differ in the merge rule, in how many layers stay dense, in where windows end, and in how rates rise over the
layers. Half of the images chooses, by how far predictions move from the dense model's; the other half judges the choice
against the best of tome_rN, sNdfe_rN and sNwincN_rN within the budget. If the choice is not better beyond chance, the
simple schedule is recommended. No labels are read. Rerun the same command to resume an interrupted search.

Writes search.json and search.png.
"""

import argparse
from pathlib import Path

from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.errors import OneLineParser, one_line_errors
from fcvit_jax.program_cache import keep_programs
from fcvit_jax.search import SearchConfig, search
from fcvit_jax.search.budgets import FORMS
from fcvit_jax.search.findings import FILES
from fcvit_jax.settings import add_options


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        keep_programs(None)
        report = search(**vars(args))
        print(report)
        print(f"\nwritten into {args.workdir}: {', '.join(FILES)}")
        if args.write:
            print(f"added to {args.checkpoint}: merge as recommended by --config.schedules=dense,recommended")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m fcvit_jax.search", description=__doc__)
    where = "checkpoint, train_sam.py working directory, or packaged:NAME (default: packaged:digits)"
    parser.add_argument("--checkpoint", metavar="DIR", default="packaged:digits", help=where)
    images = "a folder with images at any depth, or a data set: folder:PATH, digits:train or tfds:NAME/SPLIT"
    parser.add_argument("--images", metavar="PATH", default="digits:train", help=images)
    budget = f"one or several, separated by commas: {FORMS} (default: 0.6)"
    parser.add_argument("--budget", metavar="B", default="0.6", help=budget)
    place = "where to write the results, and to resume from (default: workdir/search)"
    parser.add_argument("--workdir", metavar="W", type=Path, default=Path("workdir/search"), help=place)
    parser.add_argument("--write", action="store_true", help="add the result to the checkpoint, as `recommended`")
    corrected = "correct the head for the recommended schedule; write the checkpoint OUT if that is better"
    parser.add_argument("--correct", metavar="OUT", type=Path, help=corrected)
    add_options(parser, SearchConfig)
    return parser


if __name__ == "__main__":
    keep_freed_memory()
    main()
