"""A training run, from its configuration to its checkpoint: it stops on a signal, and goes on where it was."""

import contextlib
import json
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.data.batches import BadImage, Batch, device_batches, train_batches
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Accuracy
from fcvit_jax.files import sweep, told_in_one_line, writable_directory
from fcvit_jax.training.flatness import main as flatness
from fcvit_jax.training.job import WRITTEN, Job, check_same, prepare
from fcvit_jax.training.log import Log
from fcvit_jax.training.states import States
from fcvit_jax.training.step import TrainState, make_train_step
from fcvit_jax.training.termination import termination
from fcvit_jax.training.testing import Test, assess, export
from fcvit_jax.training.window import Window


def train(config: Any, workdir: Path) -> Accuracy | None:
    """Train to the end and return the test accuracy of the dense model; None where a signal stopped the run before."""
    writable_directory(workdir)
    if jax.process_index() == 0:
        for name in WRITTEN:
            sweep(workdir / name)
    job, params = prepare(config, workdir)
    training_batches(job, job.steps).close()  # complains of a data set that cannot be trained on
    for line in job.remarks:
        tell(line)
    facts = {"config": json.loads(config.to_json()), "data": job.data()}
    abstract = jax.eval_shape(job.init, params)
    everywhere = parallel.replicated(job.mesh)
    place = parallel.fully_sharded(job.mesh, abstract) if config.fsdp else jax.tree.map(lambda _: everywhere, abstract)
    step = make_train_step(job.model, job.start.preprocess, job.recipe)
    step = jax.jit(step, donate_argnums=0, out_shardings=(place, everywhere))
    with contextlib.closing(States(workdir / "states", config.keep)) as states:
        states.check_shared()
        if states.latest() is None:
            state, notes = jax.jit(job.init, out_shardings=place)(params), {}
        else:
            notes = states.notes()
            check_same(notes["config"] | notes.get("data", {}), facts["config"] | facts["data"], workdir)
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, place)
            state = states.restore(shapes)
        del params
        try:
            return loop(job, state, step, states, {"best": 0.0, "skipped": 0, **notes, **facts})
        except BadImage as error:
            raise InputError(f"{error}; mend it, or start again with --config.on_bad=skip to leave it out") from None


def loop(job: Job, state: TrainState, step: Any, states: States, notes: dict[str, Any]) -> Accuracy | None:
    """Steps until the end or a signal; logs, saves and evaluates at their intervals.

    A state is saved before it is evaluated, so that a long evaluation puts no step at risk. A run that goes on from a
    state that was to be evaluated does that first: it may have been stopped before.
    """
    config, done, skips = job.config, int(state.step), job.config.on_bad == "skip"
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
            with window.paused():
                accuracy = assess(job, state, test, window, notes, done)
            if accuracy is None:
                export(job, state.weights, "checkpoint", done)
                return None
        batches = stack.enter_context(contextlib.closing(training_batches(job, done)))
        for batch in window.timed(batches):
            state, metrics = parallel.settled(compiled(state, (batch.images, batch.labels, batch.mask)))
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
    """What the step takes beside the state: images, labels and mask."""
    rows, spread = job.config.batch_size, parallel.batched(job.mesh)
    shapes = ((rows, *job.start.config.image_size, 3), np.uint8), ((rows,), np.int32), ((rows,), np.bool_)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for shape, dtype in shapes)


def training_batches(job: Job, done: int) -> Generator[Batch, None, None]:
    """This process's share of the batches behind step `done`, on the devices."""
    config = job.config
    host = train_batches(
        job.start.train_set,
        lambda image, rng: job.augment(image, job.start.preprocess, rng),
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
    """Write flatness.json and flatness.png beside the checkpoint: of the loss that was trained, on training images."""
    arguments = ["--checkpoint", str(workdir), "--dataset", config.train]
    arguments += ["--loss", config.targets.loss, "--schedule", config.schedule]
    if jax.process_count() > 1:
        tell(f"one process measures flatness: run python -m fcvit_jax.training.flatness {shlex.join(arguments)}")
    else:
        flatness(arguments)


def tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
