"""All measures of flatness in one call: of a checkpoint, or of any loss at given parameters."""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, load_checkpoint, versions
from fcvit_jax.data.batches import eval_batches
from fcvit_jax.data.labels import match_head
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError, printable
from fcvit_jax.flatness.flatness_report import FlatnessConfig, FlatnessReport, RadiusCurve
from fcvit_jax.flatness.hessian import add_scaled, lanczos, trace_samples
from fcvit_jax.flatness.loss_surface import LossSurface, filter_normalised, loss_slice
from fcvit_jax.flatness.sharpness import ADAPTIVE, BOX, PLAIN, average_case, resolution, uphill, worst_case
from fcvit_jax.losses import cross_entropy
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT
from fcvit_jax.trees import Params, check_float32


def measure(
    checkpoint: Checkpoint | str | Path,
    dataset: Source | str,
    config: FlatnessConfig = FlatnessConfig(),  # noqa: B008  (it is frozen)
    schedule: MergeSchedule | str = "dense",
) -> FlatnessReport:
    """Measure how flat the minimum of a checkpoint's ViT is, on one device.

    checkpoint: opened, or what `load_checkpoint` takes. dataset: opened, or as text; use the training set, otherwise
    flatness means little. schedule: the merging under which the loss is taken. Raises InputError if the data set does
    not fit the model or holds less than a batch.
    """
    name = str(checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint)
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    source = open_source(dataset) if isinstance(dataset, str) else dataset
    source = match_head(source, checkpoint.config.num_classes, checkpoint.class_names, str(checkpoint.path))
    typed = str(schedule)
    if isinstance(schedule, str):
        schedule = MergeSchedule.parse(schedule, checkpoint.config.depth, checkpoint.recommended)
    schedule.plan(checkpoint.config, typed)
    checkpoint.check_correction([schedule])
    batches, fingerprint = draw_batches(source, checkpoint.preprocess, config)
    conditions = {
        "checkpoint": printable(name),
        "params_sha256": hashlib.sha256("".join(checkpoint.meta["files"].values()).encode()).hexdigest(),
        "dataset": printable(source.spec),
        "fingerprint": fingerprint,
        "num_images": len(batches) * config.batch_size,
        "schedule": str(schedule),
        "preprocess": checkpoint.preprocess.to_dict(),
        "dtype": "float32",
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    loss_fn = ClassificationLoss(ViT(checkpoint.config, schedule), checkpoint.preprocess, config.loss)
    return measure_surface(LossSurface(loss_fn, checkpoint.params, batches), config, conditions)


def measure_surface(
    surface: LossSurface, config: FlatnessConfig, conditions: dict[str, Any] | None = None
) -> FlatnessReport:
    """Measure the flatness of any loss at its parameters.

    `limit`, `batch_size` and `loss` of the configuration are not used. conditions: facts to keep with the report.
    Raises InputError if a parameter is not float32, or a loss is not finite; it names the measure.

    Memory: about six copies of the parameters, and one more for each of `eigen_steps`.
    """
    loss_fn, params, _ = surface
    check_float32(params, "flatness is measured on float32 parameters")
    eigen_key, trace_key, worst_key, average_key, slice_key = jax.random.split(jax.random.key(config.seed), 5)
    watched = _Watched(surface.batches)
    surface = surface._replace(batches=watched)

    losses, accuracies, centre, gradient = [], [], optax.tree.zeros_like(params), optax.tree.zeros_like(params)
    for batch in watched:
        loss, accuracy, part = uphill(loss_fn, params, batch, centre, PLAIN)
        losses.append(float(loss))
        accuracies.append(float(accuracy))
        gradient = add_scaled(gradient, 1 / len(watched), part)
    gradient_norm = float(optax.tree.norm(gradient))
    del gradient, part, centre
    _check_finite("the loss at the parameters", losses)
    _check_finite("the gradient", gradient_norm)

    watched.what = "eigenvalues"
    ends = lanczos(surface, eigen_key, config.eigen_steps, config.tolerance)
    ends = [dataclasses.replace(pair, vector=None) for pair in ends]  # frees their memory
    watched.what = "trace"
    trace = trace_samples(surface, trace_key, config.probes)
    _check_finite("the Hessian", [*trace.ravel(), *(pair.value for pair in ends)])

    curves = {}
    ascent = worst_key, config.ascent_steps, config.restarts
    plain = "", PLAIN, config.rho, config.sigma
    for name, ball, radii, sigmas in (plain, ("_adaptive", ADAPTIVE, config.adaptive_rho, config.adaptive_sigma)):
        watched.what = f"worst case{name}"
        worst = worst_case(surface, ball, radii, *ascent)
        curves[f"worst{name}"] = RadiusCurve(radii, worst.found[:, None])
        curves[f"one_step{name}"] = RadiusCurve(radii, worst.one_step[:, None])
        watched.what = f"average case{name}"
        curves[f"average{name}"] = RadiusCurve(sigmas, average_case(surface, ball, sigmas, average_key, config.draws))
    watched.what = "Keskar's sharpness"
    worst = worst_case(surface, BOX, config.epsilon, *ascent)
    curves["keskar"] = RadiusCurve(config.epsilon, worst.keskar_percent[:, None])
    for name, curve in curves.items():
        for radius, samples in zip(curve.radii, curve.samples, strict=True):
            _check_finite(f"{name} at {radius:g}", samples)

    line = plane = None
    first, second = (filter_normalised(params, part) for part in jax.random.split(slice_key))
    if config.line_points:
        watched.what = "loss along a line"
        line = loss_slice(surface, first, second, [(along, 0.0) for along in np.linspace(-1, 1, config.line_points)])
    if config.plane_points:
        watched.what = "loss over a plane"
        points = list(itertools.product(np.linspace(-1, 1, config.plane_points), repeat=2))
        plane = loss_slice(surface, first, second, points).reshape(config.plane_points, config.plane_points)
    watched.what = "rounding"
    rounding = resolution(surface, average_key)
    return FlatnessReport(
        conditions=conditions or {},
        config=config,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        weight_norm=float(optax.tree.norm(params)),
        gradient_norm=gradient_norm,
        resolution=rounding,
        losses=np.array(losses),
        accuracies=np.array(accuracies),
        eigenvalues={"largest": ends[0], "smallest": ends[1]},
        trace=trace,
        curves=curves,
        line=line,
        plane=plane,
    )


@dataclasses.dataclass(frozen=True)
class ClassificationLoss:
    """Cross-entropy and accuracy of (images uint8 [b, height, width, 3], labels int32 [b]).

    In evaluation mode, without smoothing or mixing.
    """

    model: ViT
    preprocess: Preprocess
    loss: str = "softmax"

    def __call__(self, params: Params, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images, labels = batch
        # The results are small differences of losses, which GPUs would lose by rounding products to TF32.
        with jax.default_matmul_precision("highest"):
            logits, _ = self.model.apply({"params": params}, self.preprocess.normalize(images))
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        right = jnp.argmax(logits, axis=-1) == labels
        return cross_entropy(logits, targets, self.loss).mean(), jnp.mean(right, dtype=jnp.float32)


def draw_batches(source: Source, preprocess: Preprocess, config: FlatnessConfig) -> tuple[list[Any], str]:
    """Draw whole batches (images, labels) from the data set with the seed; return the sha256 of their contents too."""
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
            digest.update("\n".join(batch.names).encode(errors="surrogateescape") + labels.tobytes() + images.tobytes())
            batches.append((jnp.asarray(images), jnp.asarray(labels)))
    return batches, digest.hexdigest()


class _Watched(list[Any]):
    """Batches with a progress bar for each pass over them."""

    what = "loss"

    def __iter__(self) -> Iterator[Any]:
        batches = super().__iter__()
        return iter(parallel.progress(batches, total=len(self), desc=self.what, unit="batch"))


def _check_finite(what: str, numbers: Any) -> None:
    if not np.isfinite(numbers).all():
        raise InputError(f"{what} is not finite: check the model, and choose a smaller radius")
