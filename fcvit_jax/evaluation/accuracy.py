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
from fcvit_jax.models.merging import unmerge_tokens
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT, unit_rows


class Outcome(NamedTuple):
    """The outcome of each row of one batch under one schedule.

    rank: int32 [b], how many of the scored classes come before the right one, or the first right one: 0 is correct,
        below 5 is among the first five. -1 is a row that does not count. Equal logits rank in class order.
    prediction: int32 [b], the scored class that comes first.
    finite: bool [b], false if a row that counts has a logit that is not finite.
    kl: float32 [b], `divergence` from dense; None if it is not computed.
    distances: float32 [b, 4], of features from dense, in the order of `DISTANCES`; None if there are none.
    """

    rank: Any
    prediction: Any
    finite: Any
    kl: Any = None
    distances: Any = None


# How far features are from the dense model's: the cosine of the two, and the length of their difference over the dense
# length; for the output, and for the patches after unmerging (mean cosine; length over all patches together).
DISTANCES = ("cosine", "distance", "patch_cosine", "patch_distance")


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


def feature_step(
    model: ViT,
    preprocess: Preprocess,
    patches: bool,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> tuple[Outcome, Any]:
    """Compute the features of one batch, with a model that has no head; arguments as in `eval_step`.

    Returns an outcome of rank 0 for rows that count, and the features, float32 [b, d]. With `patches`, these are paired
    with the features of all patches, unmerged, [b, p, d].
    """
    found: Any = model.apply({"params": params}, preprocess.normalize(images))
    features, out = found
    counts = jnp.where(mask, 0, -1).astype(jnp.int32)
    outcome = Outcome(counts, jnp.zeros_like(counts), jnp.isfinite(features).all(axis=1) | ~mask)
    return outcome, (features, unmerge_tokens(out["tokens"], out["source"])) if patches else features


def distances(dense: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Compute `DISTANCES` from the pairs that `feature_step` returns with `patches`, float32 [b, 4]."""

    def compare(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:  # [b, rows, d]
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        apart = jnp.square(a - b).sum(axis=(1, 2)) / jnp.maximum(jnp.square(a).sum(axis=(1, 2)), 1e-30)
        return jnp.sum(unit_rows(a) * unit_rows(b), axis=-1).mean(axis=1), jnp.sqrt(apart)

    pooled = compare(dense[0][:, None], other[0][:, None])
    return jnp.stack([*pooled, *compare(dense[1], other[1])], axis=1)


def divergence(scored: tuple[int, ...] | None, dense: jax.Array, logits: jax.Array) -> jax.Array:
    """Compute KL(dense || other) in nats, float32 [b], of the softmax over scored outputs; logits: float32 [b, c]."""
    p, q = (jax.nn.log_softmax(_select(values, scored)[0]) for values in (dense, logits))
    return jnp.sum(jnp.exp(p) * (p - q), axis=1)


def _select(logits: jax.Array, scored: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """Select the logits of the scored outputs in ascending order, and the indices of these outputs."""
    if scored is None:
        return logits, jnp.arange(logits.shape[1], dtype=jnp.int32)
    classes = jnp.asarray(sorted(scored), jnp.int32)
    return logits[:, classes], classes


@dataclass(frozen=True)
class StepConfig:
    """What steps are compiled for: batches of one size, their rows spread over the devices of the mesh.

    dtype: a key of `compiling.PRECISIONS`. scored, labels_per_image: as in the `Source` of the images. patches: without
    a head, compute the features of the patches too.
    """

    preprocess: Preprocess
    mesh: jax.sharding.Mesh
    batch_size: int
    dtype: str = "float32"
    scored: tuple[int, ...] | None = None
    labels_per_image: int = 1
    patches: bool = False


@dataclass(frozen=True)
class CompiledStep:
    """`eval_step` of one schedule, or `feature_step` without a head, compiled ahead of time for one batch shape.

    It cannot compile a second time.
    """

    model: ViT
    call: jax.stages.Compiled
    compile_seconds: float

    def __call__(self, params: Any, batch: Batch) -> tuple[Outcome, Any]:
        """Start the step. Every device gets the whole outcome, and features; logits and patches are spread by rows."""
        return parallel.settled(self.call(params, batch.images, batch.labels, batch.mask))


def compile_step(model: ViT, params: Any, config: StepConfig) -> CompiledStep:
    """Compile the step of a model, for parameters placed as these are; replaces the model's dtype and kernels."""
    batch_size, mesh = config.batch_size, config.mesh
    parallel.check_batch_size(batch_size, mesh)
    compute, precision = compiling.computation(config.dtype)
    schedule = model.schedule or MergeSchedule.dense(model.config.depth)
    model = model.clone(dtype=compute, kernels=choose_kernels(compute, mesh.devices.flat, schedule, model.config))
    everywhere, rows = parallel.replicated(mesh), parallel.batched(mesh)
    shape = partial(jax.ShapeDtypeStruct, sharding=rows)
    several = (config.labels_per_image,) if config.labels_per_image > 1 else ()
    if model.config.headless:
        call = partial(feature_step, model, config.preprocess, config.patches)
        placing = (everywhere, rows) if config.patches else everywhere
    else:
        call, placing = partial(eval_step, model, config.preprocess, config.scored), rows
    call = compiling.on_each_device(call, model.config.num_tokens, mesh)
    step = jax.jit(call, out_shardings=(everywhere, placing))
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
    """Call `compile_step` for every schedule; on CPU two at a time: while XLA compiles one, another is traced."""

    def compiled(schedule: MergeSchedule) -> CompiledStep:
        return compile_step(ViT(model, schedule), params, config)

    pool = ThreadPoolExecutor(2 if jax.default_backend() == "cpu" else 1, thread_name_prefix="compile")
    try:
        found = pool.map(compiled, schedules.values())
        bar = parallel.progress(schedules, desc="compiling", unit="schedule")
        return {name: next(found) for name in bar}
    finally:
        pool.shutdown(cancel_futures=True)


def compile_comparison(model: ViTConfig, config: StepConfig) -> jax.stages.Compiled:
    """Compile how far a schedule is from dense: (output of dense, output) to fields of `Outcome`.

    The outputs are those of steps with the same configuration. The program computes `divergence` of logits, or
    `distances` of features, which need `patches`.
    """

    def compare(dense: Any, other: Any) -> dict[str, jax.Array]:
        if model.headless:
            return {"distances": distances(dense, other)}
        return {"kl": divergence(config.scored, dense, other)}

    everywhere, rows = parallel.replicated(config.mesh), parallel.batched(config.mesh)
    shape = (config.batch_size, model.output_dim)
    output: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere if model.headless else rows)
    if model.headless:
        shape = (config.batch_size, model.num_patches, model.embed_dim)
        output = output, jax.ShapeDtypeStruct(shape, compiling.computation(config.dtype)[0], sharding=rows)
    return jax.jit(compare, out_shardings=everywhere).lower(output, output).compile()


def classify(
    steps: Mapping[str, CompiledStep],
    params: Any,
    batches: Iterable[Batch],
    compare: jax.stages.Compiled | None = None,
    times: Times | None = None,
) -> Iterator[tuple[Batch, dict[str, Outcome], dict[str, jax.Array]]]:
    """Run every schedule on every batch: yields the batch, the outcomes on the host, and the logits on the device.

    While one batch is computed, the previous one is handed out and the next one is waited for. More would pile up in
    the device's memory.

    steps: compiled steps by schedule name, in the order they run. batches: on the device, all of the compiled shape.
    compare: from `compile_comparison`; requires dense among the steps. Features of patches are not yielded.
    times: gets the seconds that the host waits. Raises InputError if a model's logits are not finite.
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
    outcomes, logits, dense = {}, {}, None
    for name in sorted(steps, key=lambda name: name != "dense"):
        outcome, output = steps[name](params, batch)
        dense = output if name == "dense" else dense
        if compare:
            outcome = outcome._replace(**compare(dense, output))
        outcomes[name], logits[name] = outcome, output[0] if isinstance(output, tuple) else output
    return outcomes, logits


@dataclass(frozen=True)
class Accuracy:
    """Counts over all images; fractions divide once."""

    correct: int
    correct5: int
    num_images: int

    @classmethod
    def of(cls, rank: np.ndarray) -> "Accuracy":
        """Count ranks, int [n], as in `Outcome`. Raises InputError if no image counts."""
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
