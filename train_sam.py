"""Train or fine-tune a ViT with sharpness-aware minimisation, ending in a checkpoint that evaluate.py reads.

    python train_sam.py --workdir=W
    python train_sam.py --config=configs/finetune_folder.py --config.checkpoint=deit_s \
        --config.train=folder:photos/train --config.test=folder:photos/test --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/training.py lists them all. Started again
with the same --workdir, a run goes on where it was; on SIGTERM it saves and stops. On several hosts, start the same
command on each with --distributed=auto (Slurm, Kubernetes, TPU), or --distributed=HOST:PORT,COUNT,INDEX.

Writes into the working directory: checkpoint/ (the last parameters, also of a run that was stopped), best/ (those of
the best test accuracy), metrics.jsonl, events/ (for TensorBoard, if tensorboardX is installed) and states/ (to go on
from); with --config.flatness=true also flatness.json and flatness.png, how flat the minimum is that it ended in. Where
loss or gradient are not finite it stops, with the parameters before that in last_good/ and the images' names in a file.
"""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import save_checkpoint, sweep, told_in_one_line, writable_directory
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.batches import Batch, device_batches, eval_batches, train_batches
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Accuracy, CompiledStep, compile_step, evaluate
from fcvit_jax.flags import run_script
from fcvit_jax.models.vit import ViT
from fcvit_jax.training.flatness import main as flatness
from fcvit_jax.training.job import WRITTEN, Job, check_same, prepare
from fcvit_jax.training.log import Log
from fcvit_jax.training.states import States
from fcvit_jax.training.step import TrainState, make_train_step
from fcvit_jax.training.termination import termination
from fcvit_jax.training.window import Window


def main(config: Any, workdir: Path) -> None:
    accuracy = train(config, workdir)
    if accuracy is None:
        tell(f"stopped and saved; the same command goes on from there: {workdir}")
    else:
        counted = f"{accuracy.correct}/{accuracy.num_images}"
        tell(f"test top-1 {accuracy.top1:.2%} ({counted}); written: {workdir}/checkpoint")
        if config.flatness:
            measure_flatness(config, workdir)


def train(config: Any, workdir: Path) -> Accuracy | None:
    """Train to the end and return the test accuracy of the dense model; None where a signal stopped the run before."""
    writable_directory(workdir)
    if jax.process_index() == 0:
        for name in (*WRITTEN, "pretrained"):
            sweep(workdir / name)
    job, params = prepare(config, workdir)
    for line in job.remarks:
        tell(line)
    abstract = jax.eval_shape(job.init, params)
    everywhere = parallel.replicated(job.mesh)
    place = parallel.fully_sharded(job.mesh, abstract) if config.fsdp else jax.tree.map(lambda _: everywhere, abstract)
    step = make_train_step(job.model, job.start.preprocess, job.recipe)
    step = jax.jit(step, donate_argnums=0, out_shardings=(place, everywhere))
    with contextlib.closing(States(workdir / "states", config.keep)) as states:
        if states.latest() is None:
            state, notes = jax.jit(job.init, out_shardings=place)(params), {}
        else:
            notes = states.notes()
            check_same(notes["config"], json.loads(config.to_json()), workdir)
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, place)
            state = states.restore(shapes)
        del params
        return loop(job, state, step, states, {"best": 0.0, "skipped": 0, **notes})


def loop(job: Job, state: TrainState, step: Any, states: States, notes: dict[str, Any]) -> Accuracy | None:
    """Steps until the end or a signal; logs, saves and evaluates at their intervals.

    A state is saved before it is evaluated, so that a long evaluation puts no step at risk. A run that goes on from a
    state that was to be evaluated does that first: it may have been stopped before.
    """
    config, done, skips = job.config, int(state.step), job.config.on_bad == "skip"
    notes = notes | {"config": json.loads(config.to_json())}
    accuracy = None
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(termination())
        test = Test(job, state.weights, stopping)
        compiled = step.lower(state, batch_shapes(job)).compile()
        log = Log(job.workdir, done, config.tensorboard) if jax.process_index() == 0 else None
        window = Window(log, config.batch_size, job.steps, done, notes["skipped"] if skips else None)
        stack.enter_context(contextlib.closing(window))

        def due(interval: int) -> bool:
            return done % interval == 0 or done == job.steps

        if done and due(config.eval_every):
            accuracy = assess(job, state, test, window, notes, done)
            if accuracy is None:
                export(job, state.weights, "checkpoint", done)
                return None
        batches = stack.enter_context(contextlib.closing(training_batches(job, done)))
        for batch in window.timed(batches):
            state, metrics = compiled(state, (batch.images, batch.labels, batch.mask))
            done += 1
            window.add(batch, metrics)
            stop, tested = stopping(), due(config.eval_every)
            saved = stop or tested or due(config.save_every)
            if not saved and not due(config.log_every):
                continue
            if bad := window.first_bad(done):
                raise give_up(job, state, *bad)
            if stop or due(config.log_every):
                window.log(done)
            with window.paused():
                if saved:
                    states.save(done, state, notes | {"skipped": window.skipped()} if skips else notes)
                if tested:
                    accuracy = None if stop else assess(job, state, test, window, notes, done)
                    stop = accuracy is None
                if stop:
                    states.wait()
                    export(job, state.weights, "checkpoint", done)
                    return None
        states.wait()
    return accuracy


def batch_shapes(job: Job) -> tuple[jax.ShapeDtypeStruct, ...]:
    rows, spread = job.config.batch_size, parallel.batched(job.mesh)
    shapes = ((rows, *job.start.config.image_size, 3), np.uint8), ((rows,), np.int32), ((rows,), np.bool_)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for shape, dtype in shapes)


def training_batches(job: Job, done: int) -> Any:
    config, augment = job.config, Augment(**job.config.augment)
    host = train_batches(
        job.start.train_set,
        lambda image, rng: augment(image, job.start.preprocess, rng),
        job.start.config.image_size,
        config.batch_size,
        range(done, job.steps),
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
        on_bad=config.on_bad,
    )
    return device_batches(host, parallel.batched(job.mesh))


class Test:
    """Accuracy on the test set, dense and under the configured schedules; compiled at once, so as to fail early.

    Its batches are as large as the micro-batches that training has in memory.
    """

    def __init__(self, job: Job, params: Any, stopping: Callable[[], bool]):
        self.job, self.stopping = job, stopping
        self.batch_size = job.config.batch_size // job.recipe.sam.microbatches
        self.told: set[str] = set()
        self.steps: dict[str, CompiledStep] = {}
        quiet = None if jax.process_index() == 0 else True
        for name, schedule in tqdm(job.schedules.items(), "compiling", leave=False, unit="schedule", disable=quiet):
            self.steps[name] = compile_step(
                ViT(job.start.config, schedule),
                job.start.preprocess,
                params,
                self.batch_size,
                job.mesh,
                job.config.dtype,
                job.start.test_set.scored,
                job.start.test_set.labels_per_image,
            )

    def __call__(self, params: Any, tell: Callable[[str], None]) -> dict[str, Accuracy] | None:
        """The accuracy of each schedule; None where a signal came meanwhile. tell: takes a line on a skipped image."""
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
            accuracies = evaluate(self.steps, params, self.until_stopped(batches, tell))
        return None if self.stopping() else accuracies

    def until_stopped(self, batches: Iterator[Batch], tell: Callable[[str], None]) -> Iterator[Batch]:
        for batch in batches:
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
    accuracies = test(state.weights, window.tell)
    if accuracies is None:
        return None
    accuracy = accuracies["dense"]
    row = {f"test/{name}": each.top1 for name, each in accuracies.items()}
    if job.config.on_bad == "skip":
        row["test/skipped"] = float(len(job.start.test_set) - accuracy.num_images)
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


def give_up(job: Job, state: TrainState, at: int, names: tuple[str, ...]) -> InputError:
    """What to raise where a step was not finite. Its images are named in a file, each process's in its own."""
    names = tuple(filter(None, names))  # padding has none
    file = job.workdir / ("not_finite.txt" if jax.process_count() == 1 else f"not_finite_{jax.process_index()}.txt")
    with told_in_one_line(file):
        file.write_text("".join(f"{name}\n" for name in names))
    finite = jax.jit(lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all())
    kept = "the parameters before it are not finite either"
    if finite(state.weights):
        export(job, state.weights, "last_good", int(state.step))
        kept = f"the last good parameters are in {job.workdir / 'last_good'}"
    return InputError(
        f"loss or gradient is not finite at step {at} (images {', '.join(names[:4])}, ...; all of them in {file}): "
        f"lower optimizer.learning_rate or sam.rho, and start in another --workdir; {kept}"
    )


def measure_flatness(config: Any, workdir: Path) -> None:
    """Write flatness.json and flatness.png beside the checkpoint, measured on the training images."""
    arguments = ["--checkpoint", str(workdir), "--dataset", config.train]
    if jax.process_count() > 1:
        tell(f"one process measures flatness: run python -m fcvit_jax.training.flatness {shlex.join(arguments)}")
    else:
        flatness(arguments)


def tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "digits_sam.py"
    run_script(main, config=default, workdir="workdir/train_sam")
