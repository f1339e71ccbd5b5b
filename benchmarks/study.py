"""Do flatter minima lose less when tokens merge? One command trains, evaluates and measures one model: one stored row.

    python benchmarks/study.py digits adamw 0
    python benchmarks/study.py clothing sam 2 --checkpoint clothing --photos photos

The arms of a setting share the initialisation, the data, their order and augmentation, the learning rate and all else
but what `ARMS` names: AdamW, AdamW with as many gradients as SAM computes, SAM, SAM with twice as many steps, ASAM and
GSAM. Each model is evaluated under the setting's merge schedules, dense among them, and its flatness is measured on
training images, and compared with the AdamW of the same seed, which therefore must be run first. Rerun the same command
to resume an interrupted run; a run whose row is stored is not run again.

digits: a small ViT from scratch, on scikit-learn's digits, offline. clothing: any checkpoint, fine-tuned whole for an
epoch at 112 pixels on PHOTOS/train and tested on PHOTOS/test, one folder a class.

benchmarks/study_report.py makes tables and plots of the rows.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scripts and configs/ are not installed

import numpy as np  # noqa: E402

from configs import digits_sam, finetune_folder  # noqa: E402
from fcvit_jax.allocator import keep_freed_memory  # noqa: E402
from fcvit_jax.checkpoint import load_checkpoint, versions  # noqa: E402
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors  # noqa: E402
from fcvit_jax.evaluation import evaluate  # noqa: E402
from fcvit_jax.flags import keep_programs  # noqa: E402
from fcvit_jax.flatness import FlatnessConfig, FlatnessReport, compare, measure  # noqa: E402
from fcvit_jax.flatness.hessian import standard_error  # noqa: E402
from fcvit_jax.training import TrainConfig, train  # noqa: E402

ROWS = ROOT / "docs" / "flatness_and_compression" / "runs.jsonl"
NEVER = 10**9  # steps
KEPT = ("schedule", "stages", "gmacs", "correct", "num_images", "top1", "gained", "lost", "agreement", "kl")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms of it share. config: of train_sam.py. rho, adaptive_rho: the radii of SAM (and GSAM) and of ASAM.

    ASAM's counts in shares of each weight: the two do not compare as numbers.
    """

    config: Callable[[argparse.Namespace], Any]
    rho: float
    adaptive_rho: float
    schedules: str
    flatness: FlatnessConfig


def digits(args: argparse.Namespace) -> Any:
    config = digits_sam.get_config()
    config.epochs = 20.0
    config.warmup_epochs = 2.0
    return config


def clothing(args: argparse.Namespace) -> Any:
    config = finetune_folder.get_config()
    config.checkpoint = args.checkpoint
    config.train, config.test = f"folder:{args.photos}/train", f"folder:{args.photos}/test"
    config.image_size = 112
    config.batch_size = 32
    config.epochs = 1.0
    config.warmup_epochs = 0.1
    config.optimizer.learning_rate = 1e-4
    return config


SETTINGS = {
    "digits": Setting(
        digits,
        0.05,
        0.2,
        "dense,tome_r8,tome_r16,tome_r32,s2dfe_r8,s2dfe_r16,s2dfe_r32,s2winc5_r8,s2winc5_r16,s2winc5_r32",
        FlatnessConfig(plane_points=0, line_points=0, epsilon=(1e-3,)),
    ),
    "clothing": Setting(
        clothing,
        0.02,
        0.2,
        "dense,tome_r4,tome_r8,tome_r16,s2dfe_r4,s2dfe_r8,s2dfe_r16,s2winc7_r4,s2winc7_r8,s2winc7_r16",
        FlatnessConfig(
            limit=64,
            batch_size=8,
            rho=(0.05, 0.2),
            adaptive_rho=(0.5, 1.0),
            epsilon=(1e-3,),
            sigma=(0.005, 0.01),
            adaptive_sigma=(0.1, 0.2),
            draws=4,
            ascent_steps=3,
            eigen_steps=6,
            probes=4,
            line_points=0,
            plane_points=0,
        ),
    ),
}


def twice(config: Any) -> dict[str, Any]:
    return {"epochs": 2 * config.epochs, "warmup_epochs": 2 * config.warmup_epochs}


# The fields that an arm changes of the setting's configuration.
ARMS: dict[str, Callable[[Any, Setting], dict[str, Any]]] = {
    "adamw": lambda config, setting: {"sam.rho": 0.0},
    # As many gradients as SAM computes.
    "adamw_twice": lambda config, setting: {"sam.rho": 0.0} | twice(config),
    "sam": lambda config, setting: {"sam.rho": setting.rho},
    # Nearer to AdamW's loss.
    "sam_twice": lambda config, setting: {"sam.rho": setting.rho} | twice(config),
    "asam": lambda config, setting: {"sam.rho": setting.adaptive_rho, "sam.adaptive": True},
    "gsam": lambda config, setting: {"sam.rho": setting.rho, "sam.gap_weight": 0.4},
}


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with one_line_errors():
        name = f"{args.setting} {args.arm} {args.seed}"
        if any(name == f"{row['setting']} {row['arm']} {row['seed']}" for row in read(ROWS)):
            raise InputError(f"{ROWS} has the row of {name}: delete it to run again")
        keep_freed_memory()
        keep_programs(None)
        row = run(args)
        ROWS.parent.mkdir(exist_ok=True)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        merged = np.mean([each["top1"] for each in row["schedules"][1:]])
        print(
            f"{name}: dense {row['schedules'][0]['top1']:.2%}, merged {merged:.2%} on "
            f"average, loss {row['flatness']['loss']:.4g}; written into {ROWS.name}"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """The stored rows; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> dict[str, Any]:
    setting, place = SETTINGS[args.setting], args.workdir / args.setting
    config = setting.config(args)
    config.seed = args.seed
    config.update_from_flattened_dict(ARMS[args.arm](config, setting))
    config.schedules, config.eval_every, config.tensorboard = "dense", NEVER, False  # tested once, at the end
    workdir, twin = place / f"{args.arm}_{args.seed}", place / f"adamw_{args.seed}" / "flatness.json"
    if args.arm != "adamw" and not twin.exists():
        raise InputError(f"{twin} is absent: run the arm adamw of this seed first, which the others are compared with")
    train(TrainConfig.from_dict(config.to_dict()), workdir)

    evaluated = evaluate(workdir, config.test, setting.schedules, workdir=workdir / "evaluation", throughput_blocks=0)
    checkpoint = load_checkpoint(workdir)
    report = measure(checkpoint, config.train, setting.flatness)
    report.write(workdir / "flatness.json")
    comparison = compare(report, FlatnessReport.read(twin)) if args.arm != "adamw" else None
    steps = checkpoint.meta["provenance"]["steps"]
    return {
        "setting": args.setting,
        "arm": args.arm,
        "seed": args.seed,
        "config": json.loads(config.to_json()),
        "steps": steps,
        "gradients": steps * (2 if config.sam.rho else 1),
        "schedules": [{key: each[key] for key in KEPT} for each in evaluated],
        "flatness": summary(report),
        "against_adamw": comparison and {"verdict": comparison.verdict, "reason": comparison.reason},
        "device": evaluated[0]["device"],
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def summary(report: FlatnessReport) -> dict[str, Any]:
    """What is measured of the minimum, without the samples behind it. curves: means by radius."""
    return {
        "num_images": report.conditions["num_images"],
        "config": dataclasses.asdict(report.config),
        "loss": report.loss,
        "accuracy": float(report.accuracies.mean()),
        "weight_norm": report.weight_norm,
        "gradient_norm": report.gradient_norm,
        "eigenvalue": report.eigenvalues["largest"].value,
        "eigenvalue_residual": report.eigenvalues["largest"].residual,
        "trace": float(report.trace.mean()),
        "trace_error": standard_error(report.trace),
        "curves": {
            name: dict(zip(map(str, curve.radii), curve.samples.mean(axis=(1, 2)).tolist(), strict=True))
            for name, curve in report.curves.items()
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("seed", type=int)
    parser.add_argument("--checkpoint", default="clothing", help="clothing: where to start (default: clothing)")
    parser.add_argument("--photos", default="photos", help="clothing: holds train/ and test/ (default: photos)")
    parser.add_argument("--workdir", type=Path, default=Path("workdir/study"), help="default: workdir/study")
    return parser


if __name__ == "__main__":
    main()
