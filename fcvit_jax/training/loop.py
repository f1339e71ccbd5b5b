"""The training loop: it stops on a signal and resumes from its newest state."""

import contextlib
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import flatness, parallel
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.data.batches import BadImage, Batch, device_batches, train_batches
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import Accuracy
from fcvit_jax.files import local_path, one_line_file_errors, sweep, writable_directory
from fcvit_jax.training.assessment import Assessment
from fcvit_jax.training.log import Log
from fcvit_jax.training.recent_steps import RecentSteps
from fcvit_jax.training.saved_states import SavedStates
from fcvit_jax.training.step import StepInputs, TrainState, make_train_step, phases
from fcvit_jax.training.train_config import TrainConfig
from fcvit_jax.training.training_run import WRITTEN, TrainingRun, check_same, open_run


class TrainResult(NamedTuple):
    """The end of a run."""

    state: TrainState
    accuracy: Accuracy | None  # of the dense model on the test set; None if a signal stopped the run before
    checkpoint: Path  # the directory with the last parameters, for `load_checkpoint`


def train(config: TrainConfig, workdir: str | Path) -> TrainResult:
    """Train until the end or a SIGTERM; call it again with the same arguments to resume, bit for bit.

    docs/training.md lists the files that it writes into the working directory. Raises InputError for a configuration
    that makes no sense, a working directory of another run, an image that cannot be decoded, or a loss that is not
    finite.
    """
    workdir = writable_directory(local_path(workdir))
    if jax.process_index() == 0:
        for name in WRITTEN:
            sweep(workdir / name)
    with jax.default_matmul_precision(PRECISIONS[config.dtype][1]):
        run, params = open_run(config, workdir)
        training_batches(run, run.steps).close()  # raises for a data set that cannot be trained on
        for line in run.remarks:
            tell(line)
        state, accuracy = start(run, params)
    if config.flatness and accuracy:
        measure_flatness(run.config, workdir)
    return TrainResult(state, accuracy, workdir / "checkpoint")


def start(run: TrainingRun, params: Any) -> tuple[TrainState, Accuracy | None]:
    """Run the loop from the newest state, or from `params` if there is none."""
    abstract = jax.eval_shape(run.init, params)
    everywhere = parallel.replicated(run.mesh)
    fsdp = run.config.fsdp
    place = parallel.fully_sharded(run.mesh, abstract) if fsdp else jax.tree.map(lambda _: everywhere, abstract)
    steps = {
        first: jax.jit(
            make_train_step(run.model, run.start.preprocess, recipe),
            donate_argnums=0,
            out_shardings=(place, everywhere),
        )
        for first, recipe in phases(run.recipe).items()
    }
    facts = run.facts()
    with contextlib.closing(SavedStates(run.workdir / "states", run.config.keep)) as states:
        states.check_shared()
        if states.latest() is None:
            state, notes = jax.jit(run.init, out_shardings=place)(params), {}
        else:
            notes = states.notes()
            check_same(notes, facts, run.workdir)
            shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, place)
            state = states.restore(shapes)
        del params
        try:
            return loop(run, state, steps, states, {"best": 0.0, "skipped": 0, **notes, **facts})
        except BadImage as error:
            raise InputError(f"{error}; repair it, or leave it out with --config.on_bad=skip") from None


def loop(
    run: TrainingRun, state: TrainState, steps: dict[int, Any], states: SavedStates, notes: dict[str, Any]
) -> tuple[TrainState, Accuracy | None]:
    """Step until the end or a signal; log, save and test at their intervals.

    A state is saved before it is tested, so a resumed run first tests a state that was due.
    steps: the jitted step of each of `phases`; those still to come are compiled at once.
    """
    config, done, skips = run.config, int(state.step), run.config.on_bad == "skip"
    accuracy = None
    rows, spread = config.batch_size, parallel.batched(run.mesh)
    shapes = ((rows, *run.start.config.image_size, 3), np.uint8), ((rows,), np.int32), ((rows,), np.bool_)
    inputs = StepInputs(*(jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for shape, dtype in shapes))
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(parallel.stop_signal())
        assess = Assessment(run, state.weights, notes, stopping)
        now = max(first for first in steps if first <= done)
        ahead = {max(first, done): step.lower(state, inputs).compile() for first, step in steps.items() if first >= now}
        log = Log(run.workdir, done, config.tensorboard) if jax.process_index() == 0 else None
        recent = RecentSteps(log, config.batch_size, run.steps, done, notes["skipped"] if skips else None)
        stack.enter_context(contextlib.closing(recent))

        def due(interval: int) -> bool:
            return done % interval == 0 or done == run.steps

        if 0 < done < run.steps:
            recent.announce(f"resuming after step {done:,} of {run.steps:,}")
        if done and due(config.eval_every):
            with recent.paused():
                accuracy = assess(state, recent, done)
            if accuracy is None:
                run.write_checkpoint("checkpoint", state.weights, done)
                return state, None
        batches = stack.enter_context(contextlib.closing(training_batches(run, done)))
        odd = run.start.preprocess.oddities
        for batch in recent.waiting.timed(batches):
            if done in ahead:
                compiled = ahead.pop(done)
                if done and done == run.recipe.sam.start:
                    recent.announce(f"SAM starts after step {done:,}")
            state, metrics = parallel.settled(compiled(state, StepInputs(*batch[:3])))
            done += 1
            recent.add(batch, metrics)
            for text in [odd.pop(kind) for kind in {*batch.oddities} & odd.keys()]:
                recent.tell(f"warning: {text.format('training images')}")
            stop, tested = stopping(), due(config.eval_every)
            saved, logged = stop or tested or due(config.save_every), stop or due(config.log_every)
            if (saved or logged) and (bad := recent.first_bad(done)):
                raise give_up(run, state, *bad)
            if logged:
                recent.log(done)
            if not saved:
                continue
            with recent.paused():
                states.save(done, state, notes | {"skipped": recent.skipped()} if skips else notes)
                if tested:
                    accuracy = None if stop else assess(state, recent, done)
                    stop = accuracy is None
                if stop:
                    states.wait()
                    run.write_checkpoint("checkpoint", state.weights, done)
                    return state, None
        states.wait()
    return state, accuracy


def training_batches(run: TrainingRun, done: int) -> Generator[Batch, None, None]:
    """Yield this process's share of the batches after step `done`, on the devices."""
    config = run.config
    host = train_batches(
        run.start.train_set,
        lambda image, rng: config.augment(image, run.start.preprocess, rng),
        run.start.config.image_size,
        config.batch_size,
        range(done, run.steps),
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.workers,
        on_bad=config.on_bad,
    )
    return device_batches(host, parallel.batched(run.mesh))


def give_up(run: TrainingRun, state: TrainState, at: int, names: tuple[str, ...]) -> InputError:
    """Make the error for a step that was not finite; each process writes the names of its images to a file."""
    names = tuple(filter(None, names))  # padding has none
    file = run.workdir / ("not_finite.txt" if jax.process_count() == 1 else f"not_finite_{jax.process_index()}.txt")
    with one_line_file_errors(file):
        file.write_text("".join(f"{name}\n" for name in names), errors="surrogateescape")
    finite = jax.jit(lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all())
    kept = "the parameters before it are not finite either"
    if finite(state.weights):
        path = run.write_checkpoint("last_good", state.weights, int(state.step))
        kept = f"the last good parameters are in {path}"
    return InputError(
        f"loss or gradient is not finite at step {at} (images {', '.join(names[:4])}, ...; all of them in {file}): "
        f"lower optimizer.learning_rate or sam.rho, and start in another --workdir; {kept}"
    )


def measure_flatness(config: TrainConfig, workdir: Path) -> None:
    """Write flatness.json and flatness.png beside the checkpoint, for the trained loss on training images."""
    loss, schedule = config.targets.loss, config.schedule
    if jax.process_count() > 1:
        words = ["--checkpoint", str(workdir), "--dataset", config.train, "--loss", loss, "--schedule", str(schedule)]
        tell(f"flatness is measured by one process: run python -m fcvit_jax.flatness {shlex.join(words)}")
        return
    report = flatness.measure(workdir, config.train, flatness.FlatnessConfig(loss=loss), schedule=schedule)
    report.write(workdir / "flatness.json")
    tell(flatness.present(workdir, [report]))


def tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
