"""Measure how flat the minimum of a checkpoint is, and whether it is flatter than another.

  python -m fcvit_jax.flatness                                       the packaged digits model, offline
  python -m fcvit_jax.flatness --checkpoint RUN --dataset folder:photos/train
  python -m fcvit_jax.flatness --checkpoint SAM_RUN --compare ADAMW_RUN --dataset folder:photos/train

The loss is cross-entropy on images drawn from the data set (use the training set), without augmentation, in evaluation
mode and float32. The measures are:
- the eigenvalues at both ends of the Hessian's spectrum, and its trace;
- the largest rise of the loss within a radius (SAM's one step, and projected ascent), and the mean rise under noise,
  each with plain perturbations and in proportion to |w|;
- Keskar's sharpness;
- the loss along a random line and over a random plane.

--compare prints each ratio with its 95% interval, and a verdict: flatter, not flatter, or inconclusive; `compare` in
fcvit_jax/flatness/comparison.py has the rule. Flat does not mean better: sharpness hardly predicts test accuracy (arXiv
2302.07011). No single number measures flatness: eigenvalue and trace vanish with the loss.

Writes flatness.json and flatness.png; with --compare also comparison.json, and flatness_other.json if it is measured.
"""

import argparse
import dataclasses
from pathlib import Path

from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.checkpoint import load_checkpoint
from fcvit_jax.data.labels import match_head
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import OneLineParser, one_line_errors, printable
from fcvit_jax.files import local_path, writable_directory
from fcvit_jax.flatness.comparison import check_comparable, compare
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport
from fcvit_jax.flatness.measurement import measure
from fcvit_jax.flatness.presentation import FILES, present
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.program_cache import keep_programs
from fcvit_jax.settings import add_options


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    args = _parser().parse_args(argv)
    with one_line_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked beforehand, then measure, compare, write and print."""
    keep_programs(None)
    config = FlatnessConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(FlatnessConfig)})
    source, names, others = open_source(args.dataset), [args.checkpoint], []
    if args.compare and args.compare.endswith(".json"):
        others.append(FlatnessReport.read(local_path(args.compare)))
    elif args.compare:
        names.append(args.compare)
    check_comparable(config, others[0].config if others else config, args.loss_tolerance)
    checkpoints = {name: load_checkpoint(name) for name in names}
    remarks: dict[str, None] = {}
    for checkpoint in checkpoints.values():
        where = str(checkpoint.path)
        matched = match_head(source, checkpoint.config.num_classes, checkpoint.class_names, where)
        MergeSchedule.parse(args.schedule, checkpoint.config.depth, checkpoint.recommended)
        remarks |= dict.fromkeys(matched.remarks)
    for line in remarks:
        print(f"warning: {line}")
    workdir = writable_directory(_workdir(args))

    reports = []
    for name, file in zip(names, FILES, strict=False):
        report = measure(checkpoints[name], source, config, args.schedule)
        reports.append(dataclasses.replace(report, conditions=report.conditions | {"checkpoint": printable(name)}))
        reports[-1].write(workdir / file)
    reports += others
    print(present(workdir, reports, compare(reports[0], reports[1], args.loss_tolerance) if args.compare else None))


def _workdir(args: argparse.Namespace) -> Path:
    """Choose where results go: a train_sam.py working directory gets its own results, a checkpoint none."""
    given = local_path(args.checkpoint)
    runs = (given / "checkpoint" / "meta.json").is_file() and not (given / "meta.json").is_file()
    return local_path(args.workdir) if args.workdir else given if runs else Path("workdir/flatness")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m fcvit_jax.flatness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = "checkpoint, train_sam.py working directory, or packaged:NAME"
    parser.add_argument("--checkpoint", default="packaged:digits", help=where)
    parser.add_argument("--dataset", default="digits:train", help="folder:PATH, digits:train or tfds:NAME/SPLIT")
    parser.add_argument("--compare", metavar="OTHER", help="another checkpoint, or the flatness.json of one")
    no_verdict = "no verdict if one loss is more than 1 + X times the other (default: 0.25)"
    parser.add_argument("--loss_tolerance", type=float, default=0.25, metavar="X", help=no_verdict)
    parser.add_argument("--schedule", default="dense", help="merge schedule under which the loss is taken")
    place = "where results are written; by default a train_sam.py working directory itself, or workdir/flatness"
    parser.add_argument("--workdir", help=place)
    add_options(parser.add_argument_group("what is measured"), FlatnessConfig)
    return parser


if __name__ == "__main__":
    keep_freed_memory()
    main()
