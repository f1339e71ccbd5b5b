"""Tests while training, dense and under the configured schedules, and the checkpoints that are written of them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.checkpoint import save_checkpoint
from fcvit_jax.data.batches import Batch, device_batches, eval_batches
from fcvit_jax.evaluation.accuracy import Accuracy, StepConfig, compile_steps, measure_accuracy
from fcvit_jax.training.job import Job
from fcvit_jax.training.step import TrainState
from fcvit_jax.training.window import Window, over_processes


class Test:
    """Accuracy on the test set, dense and under the configured schedules; compiled at once, so as to fail early.

    Its batches are as large as the micro-batches that training has in memory.
    """

    def __init__(self, job: Job, params: Any, stopping: Callable[[], bool]):
        self.job, self.stopping = job, stopping
        self.batch_size = job.config.batch_size // job.recipe.sam.microbatches
        self.skipped, self.told = 0, set[str]()
        source = job.start.test_set
        config = StepConfig(
            job.start.preprocess,
            job.mesh,
            self.batch_size,
            job.config.dtype,
            source.scored,
            source.labels_per_image,
        )
        self.steps = compile_steps(job.start.config, job.schedules, params, config)

    def __call__(self, params: Any, tell: Callable[[str], None]) -> tuple[dict[str, Accuracy], int] | None:
        """The accuracy of each schedule, and how many images all processes skipped; None where a signal came meanwhile.

        tell: takes a line on a skipped image.
        """
        self.skipped = 0
        host = eval_batches(
            self.job.start.test_set,
            self.job.start.preprocess,
            self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.job.config.workers,
            on_bad=self.job.config.on_bad,
        )
        with contextlib.closing(device_batches(host, parallel.batched(self.job.mesh))) as batches:
            accuracies = measure_accuracy(self.steps, params, self.until_stopped(batches, tell))
        return None if self.stopping() else (accuracies, over_processes(self.skipped))

    def until_stopped(self, batches: Iterator[Batch], tell: Callable[[str], None]) -> Iterator[Batch]:
        for batch in batches:
            self.skipped += len(batch.skipped)
            for why in set(batch.skipped) - self.told:
                tell(f"skipped: {why}")
            self.told |= {*batch.skipped}
            yield batch
            if self.stopping():
                return


def assess(
    job: Job, state: TrainState, test: Test, window: Window, notes: dict[str, Any], done: int
) -> Accuracy | None:
    """Test, log, and write best/ if these are, and checkpoint/ at the end. Returns the accuracy of the dense model.

    None where a signal came meanwhile: then nothing is written, and all of it is done when the run goes on.
    """
    tested = test(state.weights, window.tell)
    if tested is None:
        return None
    accuracies, skipped = tested
    accuracy = accuracies["dense"]
    row = {f"test/{name}": each.top1 for name, each in accuracies.items()}
    if job.config.on_bad == "skip":
        row["test/skipped"] = float(skipped)
    window.write(done, row)
    if accuracy.top1 > notes["best"]:
        notes["best"] = accuracy.top1
        export(job, state.weights, "best", done, accuracy)
    if done == job.steps:
        export(job, state.weights, "checkpoint", done, accuracy)
    return accuracy


def export(job: Job, params: Any, name: str, done: int, accuracy: Accuracy | None = None) -> None:
    """Write parameters as a checkpoint directory that evaluate.py reads; by the first process."""
    tested = accuracy and {"dataset": job.config.test, "correct": accuracy.correct, "num_images": accuracy.num_images}
    provenance = {
        "trained_by": "train_sam.py",
        "train_config": json.loads(job.config.to_json()),
        "steps": done,
        "test": tested,
        "from": job.start.provenance,
    }
    whole = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(job.mesh))(params)
    if jax.process_index() == 0:
        save_checkpoint(
            job.workdir / name,
            job.start.config,
            jax.tree.map(np.asarray, whole),
            job.start.preprocess,
            class_names=job.start.train_set.class_names,
            provenance=provenance,
            overwrite=True,
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{name} {done}")
