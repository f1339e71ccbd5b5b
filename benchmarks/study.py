"""Do flatter minima lose less when tokens merge? One command trains, evaluates and measures one model, one stored row.

    python benchmarks/study.py digits adamw 0
    python benchmarks/study.py clothing sam 2 --checkpoint clothing --photos photos
    python benchmarks/study.py digits_fit all 5      # all arms of the seeds 0 to 4, one after the other

The arms of a setting share the initialisation, the data, their order and augmentation, the learning rate and everything
but what `ARMS` changes: AdamW, AdamW with as many gradients as SAM computes, SAM, SAM with twice as many steps, ASAM,
GSAM, SAM at the end of the run only, and MSAM. Each model is evaluated under the setting's merge schedules, dense among
them. Its flatness is measured on training images, and compared with the AdamW of the same seed, which must be run
first. Rerun the same command to resume; a run whose row is stored is not run again.

digits, clothing: all arms take the same number of steps, or of gradients. digits is a small ViT from scratch, on
scikit-learn's digits, offline. clothing is any checkpoint, fine-tuned whole for an epoch at 112 pixels on PHOTOS/train
and tested on PHOTOS/test, with one folder per class.

digits_fit, clothing_fit: all arms train until they fit as well as AdamW, by one rule. The learning rate is constant
after the warm-up, and the running average of the parameters is measured. AdamW takes a fixed number of steps. Every
other arm stops at the first measurement at which its loss on training images, in evaluation mode, is not above AdamW's
last one. SAM at the end starts at a share of AdamW's steps, and takes no fewer.

benchmarks/study_report.py makes tables and plots of the rows.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the scripts and configs/ are not installed

import jax  # noqa: E402
import numpy as np  # noqa: E402

from configs import digits_sam, finetune_folder  # noqa: E402
from fcvit_jax.allocator import keep_freed_memory  # noqa: E402
from fcvit_jax.checkpoint import load_checkpoint, versions  # noqa: E402
from fcvit_jax.compiling import PRECISIONS  # noqa: E402
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors  # noqa: E402
from fcvit_jax.evaluation import evaluate  # noqa: E402
from fcvit_jax.flatness import FlatnessConfig, FlatnessReport, compare, measure  # noqa: E402
from fcvit_jax.flatness.hessian import standard_error  # noqa: E402
from fcvit_jax.flatness.measurement import ClassificationLoss, draw_batches  # noqa: E402
from fcvit_jax.program_cache import keep_programs  # noqa: E402
from fcvit_jax.training import TrainConfig, train  # noqa: E402
from fcvit_jax.training.loop import training_batches  # noqa: E402
from fcvit_jax.training.step import StepInputs, make_train_step, phases  # noqa: E402
from fcvit_jax.training.training_run import open_run  # noqa: E402

ROWS = ROOT / "docs" / "flatness_and_compression" / "runs.jsonl"
DEFAULTS = {"checkpoint": "clothing", "photos": "photos", "workdir": Path("workdir/study")}
NEVER = 10**9  # steps
KEPT = ("schedule", "stages", "gmacs", "correct", "num_images", "top1", "gained", "lost", "agreement", "kl")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How long arms train that stop when they fit as well as AdamW."""

    epochs: float  # AdamW's
    most: int  # an arm that does not fit stops after this many times AdamW's steps
    every: int  # steps between measurements of the loss
    images: int  # training images that it is measured on


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms share. config: of train_sam.py. rho, adaptive_rho: the radii of SAM (and GSAM) and of ASAM.

    ASAM's radius is in shares of each weight, so that the two numbers cannot be compared. MSAM's is 15 times SAM's, as
    in the commands of its authors for ViTs (3 and 0.2). arms: all of them, in the order of `all`.
    """

    config: Callable[[argparse.Namespace], Any]
    rho: float
    adaptive_rho: float
    schedules: str
    flatness: FlatnessConfig
    arms: tuple[str, ...]
    fit: Fit | None = None


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


def digits_fit(args: argparse.Namespace) -> Any:
    config = digits(args)
    config.model.image_size = (24, 24)
    config.model.depth = 4
    config.model.embed_dim = 32
    config.model.mlp_dim = 128
    return at_constant_rate(config, 0.98, 2e-3)


def clothing_fit(args: argparse.Namespace) -> Any:
    return at_constant_rate(clothing(args), 0.95, 5e-5)


def at_constant_rate(config: Any, ema_decay: float, learning_rate: float) -> Any:
    config.optimizer.schedule = "constant"
    config.optimizer.final_learning_rate = config.optimizer.learning_rate = learning_rate
    config.ema_decay = ema_decay
    return config


FIT_ARMS = ("adamw", "sam", "asam", "sam_last25", "msam")
SETTINGS = {
    "digits": Setting(
        digits,
        0.05,
        0.2,
        "dense,tome_r8,tome_r16,tome_r32,s2dfe_r8,s2dfe_r16,s2dfe_r32,s2winc5_r8,s2winc5_r16,s2winc5_r32",
        FlatnessConfig(plane_points=0, line_points=0, epsilon=(1e-3,)),
        ("adamw", "adamw_twice", "sam", "sam_twice", "asam", "gsam"),
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
        ("adamw", "adamw_twice", "sam", "asam"),
    ),
}
SETTINGS["digits_fit"] = dataclasses.replace(
    SETTINGS["digits"],
    config=digits_fit,
    schedules="dense,tome_r3,tome_r6,tome_r9,tome_r3@nearest,tome_r6@nearest,tome_r9@nearest",
    flatness=dataclasses.replace(SETTINGS["digits"].flatness, draws=4, ascent_steps=3, eigen_steps=8, probes=4),
    arms=(*FIT_ARMS, "sam_last10"),
    fit=Fit(epochs=12, most=3, every=22, images=256),
)
SETTINGS["clothing_fit"] = dataclasses.replace(
    SETTINGS["clothing"],
    config=clothing_fit,
    rho=0.002,
    adaptive_rho=0.02,
    schedules="dense,tome_r2,tome_r4,tome_r6,tome_r2@nearest,tome_r4@nearest,tome_r6@nearest",
    flatness=dataclasses.replace(
        SETTINGS["clothing"].flatness, rho=(0.05,), adaptive_rho=(0.5,), sigma=(0.005,), adaptive_sigma=(0.1,)
    ),
    arms=FIT_ARMS,
    fit=Fit(epochs=0.5, most=4, every=8, images=256),
)


def twice(config: Any) -> dict[str, Any]:
    return {"epochs": 2 * config.epochs, "warmup_epochs": 2 * config.warmup_epochs}


# The fields of the setting's configuration that an arm changes.
ARMS: dict[str, Callable[[Any, Setting], dict[str, Any]]] = {
    "adamw": lambda config, setting: {"sam.rho": 0.0},
    # As many gradients as SAM computes.
    "adamw_twice": lambda config, setting: {"sam.rho": 0.0} | twice(config),
    "sam": lambda config, setting: {"sam.rho": setting.rho},
    # Gets closer to AdamW's loss.
    "sam_twice": lambda config, setting: {"sam.rho": setting.rho} | twice(config),
    "asam": lambda config, setting: {"sam.rho": setting.adaptive_rho, "sam.adaptive": True},
    "gsam": lambda config, setting: {"sam.rho": setting.rho, "sam.gap_weight": 0.4},
    "sam_last25": lambda config, setting: {"sam.rho": setting.rho} | late(0.75, setting),
    "sam_last10": lambda config, setting: {"sam.rho": setting.rho} | late(0.9, setting),
    "msam": lambda config, setting: {"sam.rho": 15 * setting.rho, "sam.direction": "momentum"},
}


def late(share: float, setting: Setting) -> dict[str, Any]:
    return {"sam.start": share / (setting.fit.most if setting.fit else 1)}  # of AdamW's steps


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    with one_line_errors():
        keep_freed_memory()
        keep_programs(None)
        if args.arm == "all":
            for seed, arm in itertools.product(range(args.seed), SETTINGS[args.setting].arms):
                args.seed, args.arm = seed, arm
                if not stored(args):
                    one(args)
        elif stored(args):
            raise InputError(f"{args.rows} has the row of {title(args)}: delete it to run again")
        else:
            one(args)


def one(args: argparse.Namespace) -> None:
    """Make one row, and append it."""
    row = with_default_names(run(args), args)
    args.rows.parent.mkdir(exist_ok=True)
    with args.rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    merged = np.mean([each["top1"] for each in row["schedules"][1:]])
    print(
        f"{title(args)}: dense {row['schedules'][0]['top1']:.2%}, merged {merged:.2%} on average, loss "
        f"{row['flatness']['loss']:.4g} after {row['steps']} steps; written into {args.rows.name}",
        flush=True,
    )


def with_default_names(value: Any, args: argparse.Namespace) -> Any:
    """Name the photos, the checkpoint and the working directory as by default, wherever they lie on this machine."""
    if isinstance(value, dict):
        return {key: with_default_names(each, args) for key, each in value.items()}
    if isinstance(value, str):
        for name in ("photos", "checkpoint", "workdir"):
            here, default = str(getattr(args, name)), str(DEFAULTS[name])
            path = value.removeprefix("folder:")
            if path == here or path.startswith(f"{here}/"):
                return value.replace(here, default, 1)
    return value


def title(args: argparse.Namespace) -> str:
    return f"{args.setting} {args.arm} {args.seed}"


def stored(args: argparse.Namespace, arm: str | None = None) -> dict[str, Any] | None:
    """Find the stored row of the arguments, or of another arm."""
    key = args.setting, arm or args.arm, args.seed
    return next((row for row in read(args.rows) if (row["setting"], row["arm"], row["seed"]) == key), None)


def read(path: Path) -> list[dict[str, Any]]:
    """Read the stored rows; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(args: argparse.Namespace) -> dict[str, Any]:
    setting = SETTINGS[args.setting]
    config = setting.config(args)
    config.seed = args.seed
    config.update_from_flattened_dict(ARMS[args.arm](config, setting))
    config.schedules, config.eval_every, config.tensorboard = "dense", NEVER, False  # tested once, at the end
    workdir, base = args.workdir / args.setting / f"{args.arm}_{args.seed}", stored(args, "adamw")
    if args.arm != "adamw" and not (base and "report" in base):
        raise InputError(f"{args.rows} has no report of adamw {args.seed}: run that arm first, for the comparison")
    began, fit = time.perf_counter(), None
    if setting.fit:
        config.epochs = setting.fit.epochs * setting.fit.most
        fit = train_until(
            TrainConfig.from_dict(config.to_dict()), workdir, setting.fit, base["fit"]["loss"] if base else None
        )
    else:
        train(TrainConfig.from_dict(config.to_dict()), workdir)
    seconds = time.perf_counter() - began

    evaluated = evaluate(workdir, config.test, setting.schedules, workdir=workdir / "evaluation", throughput_blocks=0)
    checkpoint = load_checkpoint(workdir)
    report = measure(checkpoint, config.train, setting.flatness)
    comparison = compare(report, FlatnessReport.from_dict(base["report"])) if base else None
    steps = checkpoint.meta["provenance"]["steps"]
    row = {
        "setting": args.setting,
        "arm": args.arm,
        "seed": args.seed,
        "config": json.loads(config.to_json()),
        "steps": steps,
        "gradients": fit["gradients"] if fit else steps * (2 if config.sam.rho else 1),
        "fit": fit,
        "seconds": round(seconds, 1),
        "schedules": [{key: each[key] for key in KEPT} for each in evaluated],
        "flatness": summary(report),
        "against_adamw": comparison and {"verdict": comparison.verdict, "reason": comparison.reason},
        "device": evaluated[0]["device"],
        "versions": versions(),
        "date": date.today().isoformat(),
    }
    # AdamW's report is stored whole: the other arms of the seed are compared with it.
    return row if base else row | {"report": report.to_dict()}


def train_until(config: TrainConfig, workdir: Path, fit: Fit, target: float | None) -> dict[str, Any]:
    """Train until the loss on training images is not above the target; without one, for AdamW's steps.

    Writes the checkpoint. Returns that loss, the target, and the gradients that were computed.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with jax.default_matmul_precision(PRECISIONS[config.dtype][1]):
        run, params = open_run(config, workdir)
        start = run.start
        state = jax.jit(run.init)(params)
        recipes = phases(run.recipe)
        steps = {
            first: jax.jit(make_train_step(run.model, start.preprocess, recipe), donate_argnums=0)
            for first, recipe in recipes.items()
        }
        drawn, _ = draw_batches(start.train_set, start.preprocess, FlatnessConfig(limit=fit.images, batch_size=32))
        loss_fn = jax.jit(ClassificationLoss(run.model, start.preprocess))
        whole = run.steps // fit.most  # AdamW's steps
        earliest = whole if len(recipes) > 1 else 0  # before, SAM at the end has not had its share
        loss, done, passes, path = float("inf"), 0, 0, []
        for done, batch in enumerate(training_batches(run, 0), start=1):
            phase = max(first for first in steps if first < done)
            state, _ = steps[phase](state, StepInputs(*batch[:3]))
            passes += 1 + (recipes[phase].sam.rho > 0 and recipes[phase].sam.direction == "gradient")
            last = target is None and done == whole
            if done % fit.every and not last:
                continue
            loss = float(np.mean([float(loss_fn(state.weights, each)[0]) for each in drawn]))
            path.append((done, round(loss, 5)))
            if last or (target is not None and loss <= target and done >= earliest):
                break
        run.write_checkpoint("checkpoint", state.weights, done)
    return {"loss": loss, "target": target, "gradients": passes, "losses": path}


def summary(report: FlatnessReport) -> dict[str, Any]:
    """Summarise a report without its samples. curves: means by radius."""
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
    parser.add_argument("arm", choices=(*ARMS, "all"))
    parser.add_argument("seed", type=int, help="of the run; with the arm all, the number of seeds")
    parser.add_argument(
        "--checkpoint", default=DEFAULTS["checkpoint"], help="clothing: where to start (default: clothing)"
    )
    parser.add_argument(
        "--photos", default=DEFAULTS["photos"], help="clothing: holds train/ and test/ (default: photos)"
    )
    parser.add_argument("--workdir", type=Path, default=DEFAULTS["workdir"], help="default: workdir/study")
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"where rows are stored (default: {ROWS.name} of docs)")
    return parser


if __name__ == "__main__":
    main()
