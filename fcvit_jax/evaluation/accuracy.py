"""Many schedules in one pass over the data, which yields the outcome of every image under every schedule."""

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import compiling, parallel
from fcvit_jax.data.batches import BadImage, Batch
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.times import Times
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.fused import choose_kernels
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT


class Outcome(NamedTuple):
    """The outcome of each row of one batch under one schedule.

    rank: int32 [b], how many of the scored classes come before the right one (the first right one, of several): 0 is
        correct, below 5 is among the first five. -1 is a row that does not count. Equal logits rank in class order.
    prediction: int32 [b], the scored class that comes first.
    finite: bool [b], false if a row that counts has a logit that is not finite.
    kl: float32 [b], `divergence` from dense; None if it is not computed.
    """

    rank: Any
    prediction: Any
    finite: Any
    kl: Any = None


def eval_step(
    model: ViT,
    preprocess: Preprocess,
    scored: tuple[int, ...] | None,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> tuple[Outcome, jax.Array]:
    """Classify one batch.

    scored: the outputs among which a prediction is made, None for all. images: uint8 [b, height, width, 3]; labels:
    int32 [b], or [b, k] padded with -1, any of which is right; mask: bool [b], False for padding and for images without
    a label. Returns the outcome and the logits of all outputs, float32 [b, c].
    """
    logits, _ = model.apply({"params": params}, preprocess.normalize(images))
    scores, classes = _select(logits, scored)
    labels = labels.reshape(len(labels), -1)  # [b, k]
    own = jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=1)[..., None]
    ahead = (scores[:, None] > own) | ((scores[:, None] == own) & (classes[None, None] < labels[..., None]))
    rank = jnp.where(labels >= 0, jnp.sum(ahead, axis=2, dtype=jnp.int32), classes.size).min(axis=1)
    finite = jnp.isfinite(logits).all(axis=1)
    return Outcome(jnp.where(mask, rank, -1), classes[scores.argmax(axis=1)], finite | ~mask), logits


def divergence(scored: tuple[int, ...] | None, dense: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(dense || other) in nats, float32 [b], of the softmax over the scored outputs. Both logits: float32 [b, c]."""
    p, q = (jax.nn.log_softmax(_select(values, scored)[0]) for values in (dense, logits))
    return jnp.sum(jnp.exp(p) * (p - q), axis=1)


def _select(logits: jax.Array, scored: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """The logits of the scored outputs in ascending order, and the indices of these outputs."""
    if scored is None:
        return logits, jnp.arange(logits.shape[1], dtype=jnp.int32)
    classes = jnp.asarray(sorted(scored), jnp.int32)
    return logits[:, classes], classes


@dataclass(frozen=True)
class StepConfig:
    """What steps are compiled for: batches of one size, their rows spread over the devices of the mesh.

    dtype: a key of `compiling.PRECISIONS`. scored, labels_per_image: as in the `Source` of the images.
    """

    preprocess: Preprocess
    mesh: jax.sharding.Mesh
    batch_size: int
    dtype: str = "float32"
    scored: tuple[int, ...] | None = None
    labels_per_image: int = 1


@dataclass(frozen=True)
class CompiledStep:
    """`eval_step` of one schedule, compiled ahead of time for one batch shape: it cannot compile a second time."""

    model: ViT
    call: jax.stages.Compiled
    compile_seconds: float

    def __call__(self, params: Any, batch: Batch) -> tuple[Outcome, jax.Array]:
        """Start the step. Every device gets the whole outcome; the logits are spread by rows."""
        return parallel.settled(self.call(params, batch.images, batch.labels, batch.mask))


def compile_step(model: ViT, params: Any, config: StepConfig) -> CompiledStep:
    """Compile `eval_step`, for parameters placed as these are; replaces the model's dtype and kernels."""
    batch_size, mesh = config.batch_size, config.mesh
    parallel.check_batch_size(batch_size, mesh)
    compute, precision = compiling.computation(config.dtype)
    schedule = model.schedule or MergeSchedule.dense(model.config.depth)
    model = model.clone(dtype=compute, kernels=choose_kernels(compute, mesh.devices.flat, schedule, model.config))
    everywhere, rows = parallel.replicated(mesh), parallel.batched(mesh)
    shape = partial(jax.ShapeDtypeStruct, sharding=rows)
    several = (config.labels_per_image,) if config.labels_per_image > 1 else ()
    call = partial(eval_step, model, config.preprocess, config.scored)
    call = compiling.on_each_device(call, model.config.num_tokens, mesh)
    step = jax.jit(call, out_shardings=(everywhere, rows))
    started = time.perf_counter()
    with jax.default_matmul_precision(precision):
        call = step.lower(
            params,
            shape((batch_size, *model.config.image_size, 3), jnp.uint8),
            shape((batch_size, *several), jnp.int32),
            shape((batch_size,), jnp.bool_),
        ).compile(compiling.options(batch_size // mesh.size, model.config.num_tokens, compute))
    return CompiledStep(model, call, time.perf_counter() - started)


def compile_steps(
    model: ViTConfig, schedules: Mapping[str, MergeSchedule], params: Any, config: StepConfig
) -> dict[str, CompiledStep]:
    """`compile_step` for every schedule; on CPU two at a time: while XLA compiles one, another is traced."""

    def compiled(schedule: MergeSchedule) -> CompiledStep:
        return compile_step(ViT(model, schedule), params, config)

    pool = ThreadPoolExecutor(2 if jax.default_backend() == "cpu" else 1, thread_name_prefix="compile")
    try:
        found = pool.map(compiled, schedules.values())
        bar = parallel.progress(schedules, desc="compiling", unit="schedule")
        return {name: next(found) for name in bar}
    finally:
        pool.shutdown(cancel_futures=True)


def compile_divergence(names: Iterable[str], num_classes: int, config: StepConfig) -> jax.stages.Compiled:
    """Compile `divergence` from dense for all schedules named: (logits, logits by name) to values by name.

    The program takes logits from steps that were compiled for the same configuration.
    """

    def divergences(dense: jax.Array, others: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: divergence(config.scored, dense, logits) for name, logits in others.items()}

    sharding = parallel.batched(config.mesh)
    logits = jax.ShapeDtypeStruct((config.batch_size, num_classes), jnp.float32, sharding=sharding)
    program = jax.jit(divergences, out_shardings=parallel.replicated(config.mesh))
    return program.lower(logits, dict.fromkeys(names, logits)).compile()


def classify(
    steps: Mapping[str, CompiledStep],
    params: Any,
    batches: Iterable[Batch],
    compare: jax.stages.Compiled | None = None,
    times: Times | None = None,
) -> Iterator[tuple[Batch, dict[str, Outcome], dict[str, jax.Array]]]:
    """Run every schedule on every batch: yields the batch, the outcomes on the host, and the logits on the device.

    While one batch is computed, the one before it is handed out and the one after it is waited for: never more, or they
    would pile up in the device's memory.

    steps: compiled steps by schedule name, in the order they run. batches: on the device, all of the compiled shape.
    compare: from `compile_divergence`, for all schedules but dense; requires dense among the steps. times: gets the
    seconds that the host waits. Raises InputError if a model's logits are not finite.
    """
    times, waiting, computing, bad = times or Times(), iter(batches), None, None
    while True:
        with times("waiting for data"):
            try:
                batch = next(waiting, None)
            except BadImage as error:  # the batch before it is finished first
                batch, bad = None, error
        with times("computing"):
            started = (batch, *_start(steps, params, batch, compare)) if batch is not None else None
        if computing is not None:
            with times("computing"):
                fetched = jax.device_get(computing[1])  # which sorts by name
            outcomes = {name: fetched[name] for name in steps}
            for name, outcome in outcomes.items():
                if broken := int((~outcome.finite).sum()):
                    raise InputError(
                        f"schedule {name}: the logits of {broken} of {(outcome.rank >= 0).sum()} images are not finite "
                        f"({', '.join(computing[0].names[:3])}, ...); try another dtype"
                    )
            yield computing[0], outcomes, computing[2]
        if bad:
            raise bad
        if started is None:
            return
        computing = started


def _start(
    steps: Mapping[str, CompiledStep], params: Any, batch: Batch, compare: jax.stages.Compiled | None
) -> tuple[dict[str, Outcome], dict[str, jax.Array]]:
    outcomes, logits = {}, {}
    for name, step in steps.items():
        outcomes[name], logits[name] = step(params, batch)
    if compare:
        others = {name: logits[name] for name in steps if name != "dense"}
        for name, kl in compare(logits["dense"], others).items():
            outcomes[name] = outcomes[name]._replace(kl=kl)
    return outcomes, logits


@dataclass(frozen=True)
class Accuracy:
    """Counts over all images; the fractions divide once."""

    correct: int
    correct5: int
    num_images: int

    @classmethod
    def of(cls, rank: np.ndarray) -> "Accuracy":
        """rank: int [n], as in `Outcome`. Raises InputError if no image counts."""
        rank = rank[rank >= 0]
        if not rank.size:
            raise InputError("no image was evaluated: the data set has none that can be read and has a label")
        return cls(int((rank < 1).sum()), int((rank < 5).sum()), rank.size)

    @property
    def top1(self) -> float:
        return self.correct / self.num_images

    @property
    def top5(self) -> float:
        return self.correct5 / self.num_images


def measure_accuracy(steps: Mapping[str, CompiledStep], params: Any, batches: Iterable[Batch]) -> dict[str, Accuracy]:
    """Measure the accuracy of every schedule. Arguments and errors are those of `classify` and `Accuracy.of`."""
    ranks: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int32)] for name in steps}
    for _, outcomes, _ in classify(steps, params, batches):
        for name, outcome in outcomes.items():
            ranks[name].append(outcome.rank)
    return {name: Accuracy.of(np.concatenate(found)) for name, found in ranks.items()}
