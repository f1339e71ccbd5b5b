"""Train a ViT with sharpness-aware minimisation, ending in a checkpoint directory that evaluate.py reads.

    python train_sam.py --workdir=W
    python train_sam.py --config=configs/digits_sam.py --config.rho=0.0 --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/digits_sam.py, the default, lists them.
Writes metrics.jsonl (a line an epoch) and checkpoint/ into the working directory.
"""

import contextlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import check_target, save_checkpoint
from fcvit_jax.data.augment import RandomAffine
from fcvit_jax.data.batches import device_batches, eval_batches, train_batches
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import compile_step, evaluate
from fcvit_jax.flags import run_script
from fcvit_jax.models.vit import ViT, ViTConfig
from fcvit_jax.training.optimizer import adamw
from fcvit_jax.training.step import init_state, train_step


def main(config: Any, workdir: Path) -> None:
    top1 = train(config, workdir)
    print(f"test top-1 {top1:.2%}; written: {workdir}/checkpoint, {workdir}/metrics.jsonl")


def train(config: Any, workdir: Path) -> float:
    """Train, evaluate, and write the checkpoint; returns the test top-1 of the dense model, a fraction."""
    target = check_target(workdir / "checkpoint", overwrite=False)
    if not 0 <= config.warmup_epochs < config.epochs:
        raise InputError(f"config.warmup_epochs is {config.warmup_epochs}: it must be 0 or more, and below epochs")
    if config.rho < 0:
        raise InputError(f"config.rho is {config.rho}: a radius is 0 or more")
    train_set, test_set = open_source(config.train), open_source(config.test)
    if train_set.class_names != test_set.class_names:
        raise InputError(f"{config.train} and {config.test} have different classes")
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)

    model_config = ViTConfig(num_classes=len(train_set.class_names), **config.model)
    preprocess = preset(config.preprocess, model_config.image_size)
    model = ViT(model_config, drop_path=config.drop_path)
    an_epoch = len(train_set) // config.batch_size
    if not an_epoch:
        raise InputError(f"config.batch_size is {config.batch_size}: {config.train} has {len(train_set)} images")
    steps = an_epoch * config.epochs
    optimizer = adamw(
        config.learning_rate, steps, an_epoch * config.warmup_epochs, config.weight_decay, config.clip_norm
    )
    state = jax.device_put(init_state(model, optimizer, config.seed), parallel.replicated(mesh))
    step = jax.jit(
        partial(train_step, model, preprocess, optimizer, config.rho, config.label_smoothing), donate_argnums=0
    )

    rows = parallel.batched(mesh)
    augment = RandomAffine(**config.augment)
    batches = train_batches(train_set, preprocess, config.batch_size, range(steps), config.seed, augment)
    with (
        contextlib.closing(device_batches(batches, rows)) as batches,
        open(workdir / "metrics.jsonl", "w") as log,
        tqdm(total=steps, desc="training", unit="step", disable=None) as bar,
    ):
        epoch = []
        for batch in batches:
            state, metrics = step(state, batch.images, batch.labels)
            epoch.append(metrics)
            bar.update()
            if len(epoch) == an_epoch:
                means = {name: float(np.mean([m[name] for m in epoch])) for name in metrics}
                if not np.isfinite(means["loss"]):
                    raise InputError(
                        f"the loss is {means['loss']} after step {int(state.step)}: lower learning_rate or rho"
                    )
                log.write(json.dumps({"step": int(state.step), **means}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{means['loss']:.3f}", gap=f"{means['gap']:.3f}")
                epoch = []

    evaluation = compile_step(ViT(model_config), preprocess, state.params, config.batch_size, mesh)
    test = device_batches(eval_batches(test_set, preprocess, config.batch_size), rows)
    accuracy = evaluate({"dense": evaluation}, state.params, test)["dense"]
    provenance = {
        "trained_by": "train_sam.py",
        "train_config": json.loads(config.to_json()),
        "steps": steps,
        "test": {"dataset": config.test, "correct": accuracy.correct, "num_images": accuracy.num_images},
    }
    save_checkpoint(
        target, model_config, state.params, preprocess, class_names=train_set.class_names, provenance=provenance
    )
    return accuracy.top1


if __name__ == "__main__":
    run_script(main, config=Path(__file__).parent / "configs" / "digits_sam.py", workdir="workdir/train_sam")
