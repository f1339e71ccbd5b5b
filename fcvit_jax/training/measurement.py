"""The flatness of a loss at given parameters, all measures in one call, and that loss for a checkpoint's ViT."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from fcvit_jax.checkpoint import Checkpoint, versions
from fcvit_jax.data.batches import eval_batches
from fcvit_jax.data.labels import match_head
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT
from fcvit_jax.training.hessian import LossFn, add, lanczos, power_iteration, times, trace_samples
from fcvit_jax.training.report import Curve, FlatnessConfig, FlatnessReport
from fcvit_jax.training.sam import Params, global_norm
from fcvit_jax.training.sharpness import (
    ADAPTIVE,
    BOX,
    PLAIN,
    average_case,
    keskar_percent,
    resolution,
    uphill,
    worst_case,
)
from fcvit_jax.training.slices import filter_normalised, loss_slice
from fcvit_jax.training.targets import cross_entropy, soft_targets

Batch = tuple[jax.Array, jax.Array]


def measure(
    params: Params,
    loss_fn: LossFn,
    batches: Sequence[Any],
    config: FlatnessConfig,
    conditions: dict[str, Any] | None = None,
) -> FlatnessReport:
    """Measure the flatness of a loss at the parameters, on one device.

    params: a float32 tree, else InputError. loss_fn: see `hessian`. batches: what it takes, all of one shape; they are
    gone through many times. `limit`, `batch_size` and `loss` of the configuration are not looked at. conditions: facts
    to keep with the report. Raises InputError where a loss is not finite, naming the measure.

    Memory: about six copies of the parameters, and with Lanczos one more for each of `eigen_steps`.
    """
    for path, leaf in jax.tree.leaves_with_path(params):
        if leaf.dtype != jnp.float32:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(f"{name} is {leaf.dtype}: flatness is measured on float32 parameters")
    key = jax.random.key(config.seed)
    eigen_key, trace_key, worst_key, average_key, slice_key = jax.random.split(key, 5)

    losses, accuracies, gradient = [], [], times(params, 0.0)
    with watched(batches, "loss") as passing:
        for batch in passing:
            loss, accuracy, part = uphill(loss_fn, params, batch, PLAIN)
            losses.append(float(loss))
            accuracies.append(float(accuracy))
            gradient = add(gradient, part, 1 / len(batches))
    gradient_norm = float(global_norm(gradient))
    del gradient, part
    _check_finite("the loss at the parameters", losses)
    _check_finite("the gradient", gradient_norm)

    passes = config.eigen_steps + 2 * (config.eigen == "lanczos")
    with watched(batches, "eigenvalues", passes) as passing:
        arguments = loss_fn, params, passing, eigen_key, config.eigen_steps, config.tolerance
        if config.eigen == "lanczos":
            largest, smallest = lanczos(*arguments)
            pairs = {"largest": largest, "smallest": smallest}
        else:
            pairs = {"dominant": power_iteration(*arguments)}
    eigenvalues = {name: pair._replace(vector=None) for name, pair in pairs.items()}
    del pairs
    with watched(batches, "trace", config.probes) as passing:
        trace = trace_samples(loss_fn, params, passing, trace_key, config.probes)
    _check_finite("the Hessian", [*trace.ravel(), *(pair.value for pair in eigenvalues.values())])

    curves = {}
    for name, ball, radii in (("", PLAIN, config.rho), ("_adaptive", ADAPTIVE, config.adaptive_rho)):
        with watched(batches, f"worst case{name}") as passing:
            worst = worst_case(loss_fn, params, passing, ball, radii, worst_key, config.ascent_steps, config.restarts)
        curves[f"worst{name}"] = Curve(radii, worst.found[:, None])
        curves[f"one_step{name}"] = Curve(radii, worst.one_step[:, None])
    with watched(batches, "Keskar's sharpness") as passing:
        worst = worst_case(
            loss_fn, params, passing, BOX, config.epsilon, worst_key, config.ascent_steps, config.restarts
        )
    curves["keskar"] = Curve(config.epsilon, keskar_percent(worst)[:, None])
    for name, ball, sigmas in (("", PLAIN, config.sigma), ("_adaptive", ADAPTIVE, config.adaptive_sigma)):
        with watched(batches, f"average case{name}", config.draws) as passing:
            rises = average_case(loss_fn, params, passing, ball, sigmas, average_key, config.draws)
        curves[f"average{name}"] = Curve(sigmas, rises)
    for name, curve in curves.items():
        for radius, samples in zip(curve.radii, curve.samples, strict=True):
            _check_finite(f"{name} at {radius:g}", samples)

    line, plane = _slices(loss_fn, params, batches, slice_key, config)
    return FlatnessReport(
        conditions=conditions or {},
        config=config,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        weight_norm=float(global_norm(params)),
        gradient_norm=gradient_norm,
        resolution=resolution(loss_fn, params, batches, average_key),
        losses=np.array(losses),
        accuracies=np.array(accuracies),
        eigenvalues=eigenvalues,
        trace=trace,
        curves=curves,
        line=line,
        plane=plane,
    )


def measure_checkpoint(
    checkpoint: Checkpoint, source: Source, config: FlatnessConfig, schedule: MergeSchedule | None = None
) -> FlatnessReport:
    """Measure a checkpoint's ViT on images of a data set.

    schedule: the merging under which the loss is taken; dense by default. Raises InputError where the data set does not
    fit the model or holds less than a batch.
    """
    source = match_head(source, checkpoint.config.num_classes, checkpoint.meta["class_names"], str(checkpoint.path))
    schedule = schedule or MergeSchedule.dense(checkpoint.config.depth)
    schedule.plan(checkpoint.config)
    batches, fingerprint = draw_batches(source, checkpoint.preprocess, config)
    conditions = {
        "checkpoint": str(checkpoint.path),
        "params_sha256": hashlib.sha256("".join(checkpoint.meta["files"].values()).encode()).hexdigest(),
        "dataset": source.spec,
        "fingerprint": fingerprint,
        "num_images": len(batches) * config.batch_size,
        "schedule": str(schedule),
        "preprocess": checkpoint.preprocess.to_dict(),
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    loss_fn = ClassificationLoss(ViT(checkpoint.config, schedule), checkpoint.preprocess, config.loss)
    return measure(checkpoint.params, loss_fn, batches, config, conditions)


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy against the labels, and accuracy, of (images uint8 [b, height, width, 3], labels int32 [b]).

    In evaluation mode and of the labels as they are, whatever the training dropped, smoothed or mixed.
    """

    model: ViT
    preprocess: Preprocess
    loss: str = "softmax"

    def __call__(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        images, labels = batch
        # Small differences of losses are the whole result: GPUs would round the products to TF32.
        with jax.default_matmul_precision("highest"):
            logits, _ = self.model.apply({"params": params}, self.preprocess.normalize(images))
        targets = soft_targets(labels, self.model.config.num_classes, 0.0)
        right = jnp.argmax(logits, axis=-1) == labels
        return cross_entropy(logits, targets, self.loss).mean(), jnp.mean(right, dtype=jnp.float32)


def draw_batches(source: Source, preprocess: Preprocess, config: FlatnessConfig) -> tuple[list[Batch], str]:
    """Whole batches, drawn from the data set with the seed, and the sha256 of all that is in them."""
    count = min(config.limit, len(source)) // config.batch_size * config.batch_size
    if not count:
        raise InputError(
            f"batch_size is {config.batch_size}: limit is {config.limit} and {source.spec} has {len(source)} images, "
            "which must make one whole batch"
        )
    order = np.random.default_rng(config.seed).permutation(len(source))
    drawn = dataclasses.replace(source, size=count, read=lambda index: source.read(int(order[index])))
    digest, batches = hashlib.sha256(), []
    with contextlib.closing(eval_batches(drawn, preprocess, config.batch_size)) as decoded:
        for batch in decoded:
            images, labels = np.asarray(batch.images), np.asarray(batch.labels)
            digest.update("\n".join(batch.names).encode() + labels.tobytes() + images.tobytes())
            batches.append((jnp.asarray(images), jnp.asarray(labels)))
    return batches, digest.hexdigest()


class _Watched:
    def __init__(self, batches: Sequence[Any], bar: tqdm):
        self.batches, self.bar = batches, bar

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            yield batch
            self.bar.update()


@contextlib.contextmanager
def watched(batches: Sequence[Any], what: str, passes: int = 1) -> Iterator[_Watched]:
    """The batches, and a progress bar that moves whenever they are gone through."""
    with tqdm(total=passes * len(batches), desc=what, unit="batch", leave=False, disable=None) as bar:
        yield _Watched(batches, bar)


def _check_finite(what: str, numbers: Any) -> None:
    if not np.isfinite(numbers).all():
        raise InputError(f"{what} is not finite: is the model in order, and is the radius one that it can bear?")


def _slices(
    loss_fn: LossFn, params: Params, batches: Sequence[Any], key: jax.Array, config: FlatnessConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    first, second = (filter_normalised(params, part) for part in jax.random.split(key))
    line = plane = None
    if config.line_points:
        points = np.stack([np.linspace(-1, 1, config.line_points), np.zeros(config.line_points)], axis=1)
        with watched(batches, "loss along a line") as passing:
            line = loss_slice(loss_fn, params, passing, first, second, points)
    if config.plane_points:
        side = np.linspace(-1, 1, config.plane_points)
        points = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1)
        with watched(batches, "loss over a plane") as passing:
            losses = loss_slice(loss_fn, params, passing, first, second, points.reshape(-1, 2))
        plane = losses.reshape(points.shape[:2])
    return line, plane
