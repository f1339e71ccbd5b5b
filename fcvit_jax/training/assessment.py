"""Accuracy on the test set while training, dense and under the configured schedules."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch, device_batches, eval_batches
from fcvit_jax.evaluation.accuracy import Accuracy, StepConfig, compile_steps, measure_accuracy
from fcvit_jax.training.recent_steps import RecentSteps
from fcvit_jax.training.step import TrainState
from fcvit_jax.training.training_run import TrainingRun


class Assessment:
    """A test of all schedules, in batches as large as training's micro-batches, compiled when it is created.

    notes: the run's; their "best", the best accuracy so far, is updated. stopping: returns whether a signal came.
    """

    def __init__(self, run: TrainingRun, params: Any, notes: dict[str, Any], stopping: Callable[[], bool]):
        self.run, self.notes, self.stopping = run, notes, stopping
        self.batch_size = run.config.batch_size // run.recipe.sam.microbatches
        self.skipped, self.told, self.odd = 0, set[str](), Counter[str]()
        start, source = run.start, run.start.test_set
        config = StepConfig(
            start.preprocess, run.mesh, self.batch_size, run.config.dtype, source.scored, source.labels_per_image
        )
        self.steps = compile_steps(start.config, run.schedules, params, config)

    def __call__(self, state: TrainState, recent: RecentSteps, done: int) -> Accuracy | None:
        """Test, log, write best/ if it is the best, and checkpoint/ at the end. Returns the dense model's accuracy.

        Returns None and writes nothing if a signal came meanwhile.
        """
        run, config = self.run, self.run.config
        self.skipped, self.odd = 0, Counter()
        host = eval_batches(
            run.start.test_set,
            run.start.preprocess,
            self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.workers,
            on_bad=config.on_bad,
        )
        with contextlib.closing(device_batches(host, parallel.batched(run.mesh))) as batches:
            accuracies = measure_accuracy(self.steps, state.weights, self._until_stopped(batches, recent.tell))
        if self.stopping():
            return None
        for kind, text in run.start.preprocess.oddities.items():
            if self.odd[kind] and text not in self.told:
                recent.tell(f"warning: {text.format(f'{self.odd[kind]:,} test images')}")
                self.told.add(text)
        accuracy = accuracies["dense"]
        row = {f"test/{name}": each.top1 for name, each in accuracies.items()}
        if config.on_bad == "skip":
            row["test/skipped"] = float(parallel.sum_over_processes(self.skipped))
        recent.write(done, row)
        tested = ", ".join(f"{name} {each.top1:.2%}" for name, each in accuracies.items())
        recent.announce(f"step {done:,} of {run.steps:,}: test top-1 {tested}")
        if accuracy.top1 > self.notes["best"]:
            self.notes["best"] = accuracy.top1
            run.write_checkpoint("best", state.weights, done, accuracy)
        if done == run.steps:
            run.write_checkpoint("checkpoint", state.weights, done, accuracy)
        return accuracy

    def _until_stopped(self, batches: Iterator[Batch], tell: Callable[[str], None]) -> Iterator[Batch]:
        for batch in batches:
            self.skipped += len(batch.skipped)
            self.odd.update(batch.oddities)
            for why in set(batch.skipped) - self.told:
                tell(f"skipped: {why}")
            self.told |= {*batch.skipped}
            yield batch
            if self.stopping():
                return
