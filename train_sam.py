"""Train or fine-tune a ViT with sharpness-aware minimisation, ending in a checkpoint that evaluate.py reads.

    python train_sam.py --workdir=W
    python train_sam.py --config=configs/finetune_folder.py --config.checkpoint=deit_s \
        --config.train=folder:photos/train --config.test=folder:photos/test --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/training.py lists them all. Started again
with the same --workdir, a run goes on where it was; on SIGTERM it saves and stops. On several hosts, start the same
command on each with --distributed=auto (Slurm, Kubernetes, TPU), or --distributed=HOST:PORT,COUNT,INDEX.

Writes into the working directory: checkpoint/ (the last parameters), best/ (those of the best test accuracy),
metrics.jsonl, events/ (for TensorBoard, if tensorboardX is installed) and states/ (to go on from); with
--config.flatness=true also flatness.json and flatness.png, how flat the minimum is that it ended in.
"""

import contextlib
import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params, save_checkpoint, writable_directory
from fcvit_jax.convert.__main__ import main as convert
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.batches import Batch, device_batches, eval_batches, train_batches
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import DTYPES, Accuracy, CompiledStep, compile_step, evaluate
from fcvit_jax.flags import run_script
from fcvit_jax.models import zoo
from fcvit_jax.models.schedule import MergeSchedule, parse_schedules
from fcvit_jax.models.vit import ViT
from fcvit_jax.training import sam
from fcvit_jax.training.flatness import main as flatness
from fcvit_jax.training.log import Log
from fcvit_jax.training.optimizer import OptimizerConfig, frozen_mask, make_optimizer
from fcvit_jax.training.start import Start, from_checkpoint, from_scratch
from fcvit_jax.training.states import States
from fcvit_jax.training.step import Recipe, TrainState, init_state, make_train_step
from fcvit_jax.training.targets import TargetConfig

FREE = ("flatness", "keep", "log_every", "save_every", "tensorboard", "workers")  # what may change when a run goes on

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def main(config: Any, workdir: Path) -> None:
    accuracy = train(config, workdir)
    if accuracy is None:
        tell(f"stopped and saved; the same command goes on from there: {workdir}")
    else:
        counted = f"{accuracy.correct}/{accuracy.num_images}"
        tell(f"test top-1 {accuracy.top1:.2%} ({counted}); written: {workdir}/checkpoint")
        if config.flatness:
            measure_flatness(config, workdir)


@dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    train_set: Source
    test_set: Source
    start: Start
    model: ViT
    recipe: Recipe
    steps: int

    @cached_property
    def evaluations(self) -> dict[str, MergeSchedule]:
        """Schedules by name; dense is always among them."""
        depth = self.start.config.depth
        return {"dense": MergeSchedule.dense(depth), **parse_schedules(self.config.schedules, depth)}

    def init(self, params: Any) -> TrainState:
        recipe = self.recipe
        return init_state(
            self.model, recipe.optimizer, recipe.sam, self.config.seed, params, recipe.ema_decay is not None
        )


def train(config: Any, workdir: Path) -> Accuracy | None:
    """Train to the end and return the test accuracy of the dense model; None where a signal stopped the run before."""
    run = prepare(config, writable_directory(workdir))
    abstract = jax.eval_shape(run.init, run.start.params)
    everywhere = parallel.replicated(run.mesh)
    place = parallel.fully_sharded(run.mesh, abstract) if config.fsdp else jax.tree.map(lambda _: everywhere, abstract)
    step = make_train_step(run.model, run.start.preprocess, run.recipe)
    step = jax.jit(step, donate_argnums=0, out_shardings=(place, everywhere))
    with contextlib.closing(States(workdir / "states", config.keep)) as states:
        if states.latest() is None:
            return loop(run, jax.jit(run.init, out_shardings=place)(run.start.params), step, states, best=0.0)
        notes = states.notes()
        check_same(notes["config"], json.loads(config.to_json()), workdir)
        shapes = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), abstract, place)
        return loop(run, states.restore(shapes), step, states, notes["best"])


def prepare(config: Any, workdir: Path) -> Run:
    """Open what the configuration names, and check that it fits together, before any long work."""
    mesh = parallel.data_mesh()
    parallel.check_batch_size(config.batch_size, mesh)
    for name in ("eval_every", "save_every", "log_every", "keep"):
        if type(config[name]) is not int or config[name] < 1:
            raise InputError(f"{name} is {config[name]}: it must be a number of steps, 1 or more")
    if config.dtype not in DTYPES:
        raise InputError(f"dtype is {config.dtype!r}: choose one of {', '.join(DTYPES)}")
    train_set, test_set = open_source(config.train), open_source(config.test)
    if train_set.class_names != test_set.class_names:
        raise InputError(f"{config.train} and {config.test} have different classes")
    an_epoch = len(train_set) // config.batch_size
    if not an_epoch:
        raise InputError(f"batch_size is {config.batch_size}: {config.train} has {len(train_set)} images")
    if not 0 <= config.warmup_epochs < config.epochs:
        raise InputError(f"warmup_epochs is {config.warmup_epochs}: it must be 0 or more, and below epochs")
    steps, warmup = round(config.epochs * an_epoch), round(config.warmup_epochs * an_epoch)

    start = begin(config, workdir, train_set.class_names)
    sam_config = sam.SAMConfig(**config.sam, start_step=warmup if config.sam_after_warmup else 0)
    if config.batch_size % (sam_config.microbatches * mesh.size):
        raise InputError(
            f"batch_size is {config.batch_size}: it must be a multiple of sam.microbatches, {sam_config.microbatches}, "
            f"times the {mesh.size} devices"
        )
    for line in (*start.remarks, *(f"warning: {line}" for line in sam.warnings(sam_config))):
        tell(line)
    compute, precision = DTYPES[config.dtype]
    jax.config.update("jax_default_matmul_precision", precision)
    schedule = MergeSchedule.parse(config.schedule, start.config.depth)
    regularised = dict(dropout=config.dropout, drop_path=config.drop_path, remat=config.remat)
    model = ViT(start.config, schedule, dtype=compute, **regularised)
    optimizer = OptimizerConfig(**config.optimizer, warmup_steps=warmup)
    params = abstract_params(start.config)
    transformation, learning_rate = make_optimizer(optimizer, params, steps)
    recipe = Recipe(
        transformation,
        learning_rate,
        sam_config,
        sam.rho_schedule(sam_config, steps),
        TargetConfig(**config.targets),
        frozen_mask(params, optimizer.freeze) if optimizer.freeze else None,
        config.ema_decay or None,
    )
    return Run(config, workdir, mesh, train_set, test_set, start, model, recipe, steps)


def begin(config: Any, workdir: Path, class_names: tuple[str, ...]) -> Start:
    """Fresh parameters, or those of a checkpoint: a directory, `packaged:NAME`, or a full name of the zoo."""
    if not config.checkpoint:
        return from_scratch(config.model.to_dict(), config.preprocess, len(class_names))
    path = config.checkpoint
    if path in zoo.names() and not Path(path).exists():
        path = workdir / "pretrained"
        if not path.exists() and jax.process_index() == 0:
            convert([config.checkpoint, str(path)])
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("pretrained")
    size = (config.image_size, config.image_size) if config.image_size else None
    return from_checkpoint(path, class_names, size, config.preprocess)


def check_same(before: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
    """A run goes on with the configuration that it began with."""
    old, new = flat(before), flat(now)
    if differs := [name for name in sorted(old | new) if old.get(name) != new.get(name) and name not in FREE]:
        told = ", ".join(f"{name} {old.get(name)!r} there, {new.get(name)!r} here" for name in differs[:5])
        raise InputError(f"{workdir} holds a run of another configuration ({told}): name another --workdir")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sam": {"rho": 0.1}} -> {"sam.rho": 0.1}"""
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def loop(run: Run, state: TrainState, step: Step, states: States, best: float) -> Accuracy | None:
    """Steps until the end or a signal; logs, evaluates and saves at their intervals."""
    config, done = run.config, int(state.step)
    notes: dict[str, Any] = {"config": json.loads(config.to_json()), "best": best}
    accuracy = None
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(termination())
        window = stack.enter_context(contextlib.closing(Window(run, done)))
        test = Test(run)
        batches = stack.enter_context(contextlib.closing(training_batches(run, done)))
        for batch in window.timed(batches):
            state, metrics = step(state, (batch.images, batch.labels, batch.mask))
            done += 1
            window.add(batch, metrics)
            last, stop = done == run.steps, stopping(done)
            if done % config.log_every == 0 or last or stop:
                window.log(done)
            if done % config.eval_every == 0 or last:
                params = state.params if run.recipe.ema_decay is None else state.ema
                accuracies = test(params)
                accuracy = accuracies["dense"]
                window.write(done, {f"test/{name}": a.top1 for name, a in accuracies.items()})
                if accuracy.top1 > notes["best"]:
                    notes["best"] = accuracy.top1
                    export(run, params, "best", done, accuracy)
                if last:
                    export(run, params, "checkpoint", done, accuracy)
            if done % config.save_every == 0 or last or stop:
                states.save(done, state, notes)
            if stop and not last:
                states.wait()
                return None
        states.wait()
    if accuracy is None:  # the run was complete when it was started
        accuracy = test(state.params if run.recipe.ema_decay is None else state.ema)["dense"]
    return accuracy


def training_batches(run: Run, done: int) -> Any:
    config, augment = run.config, Augment(**run.config.augment)
    host = train_batches(
        run.train_set,
        lambda image, rng: augment(image, run.start.preprocess, rng),
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


class Test:
    """Accuracy on the test set, dense and under the configured schedules; compiled when it is first wanted."""

    def __init__(self, run: Run):
        self.run = run
        self.steps: dict[str, CompiledStep] = {}

    def __call__(self, params: Any) -> dict[str, Accuracy]:
        run, config = self.run, self.run.config
        for name, schedule in run.evaluations.items():
            if name not in self.steps:
                self.steps[name] = compile_step(
                    ViT(run.start.config, schedule),
                    run.start.preprocess,
                    params,
                    config.batch_size,
                    run.mesh,
                    config.dtype,
                    run.test_set.scored,
                    run.test_set.labels_per_image,
                )
        host = eval_batches(
            run.test_set,
            run.start.preprocess,
            config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.workers,
        )
        with contextlib.closing(device_batches(host, parallel.batched(run.mesh))) as batches:
            return evaluate(self.steps, params, batches)


class Window:
    """The steps since the last row of the log: their means, the bar, and what is needed to tell what went wrong."""

    def __init__(self, run: Run, done: int):
        self.run = run
        first = jax.process_index() == 0
        self.logfile = Log(run.workdir, done, run.config.tensorboard) if first else None
        quiet = None if first else True
        self.bar = tqdm(total=run.steps, initial=done, desc="training", unit="step", disable=quiet)
        self.skipped = 0
        self._clear()

    def _clear(self) -> None:
        self.steps: list[tuple[tuple[str, ...], dict[str, jax.Array]]] = []
        self.began, self.waited = time.perf_counter(), 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the time that the loop waits for them is counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        self.steps.append((batch.names, metrics))
        for why in batch.skipped:
            self.skipped += 1
            self.bar.write(f"skipped: {why}")
        self.bar.update()

    def log(self, done: int) -> None:
        """Write the means. Raises InputError where a step was not finite: the parameters are those before it."""
        rows = [(names, {name: float(value) for name, value in row.items()}) for names, row in self.steps]
        bad = next((index for index, (_, row) in enumerate(rows) if not row["finite"]), None)
        if bad is not None:
            at, names = done - len(rows) + 1 + bad, rows[bad][0]
            raise InputError(
                f"loss or gradient is not finite at step {at} (images {', '.join(names[:4])}, ...): lower "
                "optimizer.learning_rate or sam.rho, and start in another --workdir; the last good state is in "
                f"{self.run.workdir / 'states'}"
            )
        means = {name: float(np.mean([row[name] for _, row in rows])) for name in rows[-1][1] if name != "finite"}
        took = time.perf_counter() - self.began
        means["images_per_second"] = self.run.config.batch_size * len(rows) / took
        means["waiting_for_data"] = self.waited / took
        if self.run.config.on_bad == "skip":
            means["skipped"] = float(self.skipped)
        self.write(done, means)
        self.bar.set_postfix(
            loss=f"{means['loss']:.3f}",
            gap=f"{means['gap']:.3f}",
            gap_rho=f"{means['gap_over_rho']:.2f}/{means['grad_norm']:.2f}",
            img_s=f"{means['images_per_second']:.0f}",
        )
        self._clear()

    def write(self, done: int, row: dict[str, float]) -> None:
        if self.logfile:
            self.logfile.write(done, row)

    def close(self) -> None:
        self.bar.close()
        if self.logfile:
            self.logfile.close()


def export(run: Run, params: Any, name: str, done: int, accuracy: Accuracy) -> None:
    """Write parameters as a checkpoint directory that evaluate.py reads; by the first process."""
    provenance = {
        "trained_by": "train_sam.py",
        "train_config": json.loads(run.config.to_json()),
        "steps": done,
        "test": {"dataset": run.config.test, "correct": accuracy.correct, "num_images": accuracy.num_images},
        "from": run.start.provenance,
    }
    whole = jax.jit(lambda tree: tree, out_shardings=parallel.replicated(run.mesh))(params)
    if jax.process_index() == 0:
        save_checkpoint(
            run.workdir / name,
            run.start.config,
            jax.tree.map(np.asarray, whole),
            run.start.preprocess,
            class_names=run.train_set.class_names,
            provenance=provenance,
            overwrite=True,
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{name} {done}")


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """A function of the step that tells whether to stop there: a SIGTERM came, to this process or to another."""
    if jax.process_count() > 1:  # the service that joins the processes catches it, and agrees on a step
        yield multihost_utils.reached_preemption_sync_point
        return
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


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
