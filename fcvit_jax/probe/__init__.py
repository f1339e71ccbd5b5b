"""A head for a backbone: fitted on the features of labelled images, or made of class embeddings."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.checkpoint import ENTRIES, Checkpoint, load_checkpoint, save_checkpoint, without_head
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.data.batches import BadImage
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import InputError, printable
from fcvit_jax.evaluation.accuracy import compile_steps
from fcvit_jax.evaluation.features import Chunks, Features, collect_features
from fcvit_jax.evaluation.inputs import EvaluationConfig, open_inputs
from fcvit_jax.evaluation.neighbours import BLOCK, vote
from fcvit_jax.evaluation.statistics import wilson
from fcvit_jax.evaluation.times import Times, format_times
from fcvit_jax.files import check_target, local_path
from fcvit_jax.models.config import POOLS
from fcvit_jax.probe import heads
from fcvit_jax.probe.embeddings import read_embeddings
from fcvit_jax.probe.heads import Head, Score
from fcvit_jax.settings import check_settings, setting

__all__ = ["ProbeConfig", "ProbeReport", "probe", "zero_shot"]

HEADS = {"logistic": heads.logistic, "ridge": heads.ridge, "means": heads.class_means}
FEATURES = ".features"  # suffix of the folder beside OUT
MOST_HELD = 50_000  # images held out, at most
_POOLS = tuple(pool for pool in POOLS if pool != "dist_avg")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How to fit a head; `probe` explains the fields."""

    head: str = setting("logistic", choices=tuple(HEADS), help="logistic (regression), ridge (regression) or means")
    pool: str = setting("", help=f"features: {', '.join(_POOLS)}; by default as the checkpoint pools")
    schedule: str = setting("dense", help="merge schedule under which the features are computed")
    strengths: tuple[float, ...] = setting(
        (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 1e-5), above=0, help="of the regularisation, to try"
    )
    held_out: float = setting(0.2, above=0, below=1, help="share of each class that chooses the strength")
    limit: int | None = setting(None, low=2, help="use this many images, evenly spread over the classes")
    batch_size: int = setting(16, low=1, help="images per call, over all devices")
    dtype: str = setting("float32", choices=tuple(PRECISIONS), help="of the features: float32, tf32 or bfloat16")
    seed: int = setting(0, low=0, help="of which images are held out")
    on_bad: str = setting("stop", choices=("stop", "skip"), help="what to do with an image that cannot be read")
    workers: int | None = setting(None, low=1, help="decoding threads; by default as many as cores")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.pool and self.pool not in _POOLS:
            raise InputError(f"pool is {self.pool!r}: choose one of {', '.join(_POOLS)}")


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """The result of a probe. tried: held-out score of each strength. neighbours: correct held-out images of k-NN."""

    path: Path
    config: ProbeConfig
    pool: str
    dataset: str
    num_images: int
    num_classes: int
    strength: float | None
    held_out: Score
    neighbours: int
    tried: tuple[tuple[float, Score], ...]
    seconds: dict[str, float]

    @property
    def accuracy(self) -> float:
        """Top-1 of the head on the held-out images."""
        return self.held_out.correct / self.held_out.count

    def __str__(self) -> str:
        config, count = self.config, self.held_out.count
        lines = [
            f"{self.dataset}: {self.num_images:,} images of {self.num_classes} classes, {count:,} of them held out",
            f"features: pool {self.pool}, {config.schedule}, {config.dtype}",
        ]
        if self.strength is not None:
            lines += ["", "strength  held-out top-1 %    loss"]
            for strength, score in self.tried:
                chosen = " *" if strength == self.strength else ""
                lines.append(f"{strength:<8g}  {100 * score.correct / score.count:>16.2f}  {score.loss:>6.3f}{chosen}")
        lines.append("")
        for name, correct in ((config.head, self.held_out.correct), ("k-NN", self.neighbours)):
            low, high = wilson(correct, count)
            interval = f"95 % interval {100 * low:.2f}-{100 * high:.2f}"
            lines.append(f"{name}: {100 * correct / count:.2f} % of the held-out images, {interval}")
        return "\n".join([*lines, format_times(self.seconds)])


def probe(
    checkpoint: str | Path | Checkpoint,
    dataset: str | Source,
    out: str | Path,
    *,
    features: str | Path | None = None,
    overwrite: bool = False,
    head: str = ProbeConfig.head,
    pool: str = ProbeConfig.pool,
    schedule: str = ProbeConfig.schedule,
    strengths: tuple[float, ...] = ProbeConfig.strengths,
    held_out: float = ProbeConfig.held_out,
    limit: int | None = ProbeConfig.limit,
    batch_size: int = ProbeConfig.batch_size,
    dtype: str = ProbeConfig.dtype,
    seed: int = ProbeConfig.seed,
    on_bad: str = ProbeConfig.on_bad,
    workers: int | None = ProbeConfig.workers,
) -> ProbeReport:
    """Fit a linear head on the features of labelled images, and write the model with it as a checkpoint directory.

        report = fc.probe("dinov2_s", "folder:photos/train", "probed")
        rows = fc.evaluate("probed", "folder:photos/test", ["dense", "tome_r13"])

    Part of the images is held out, to choose the strength of the regularisation and to judge. The head that is written
    is fitted on all images. Every process of a run calls this; the first one writes.

    Args:
      checkpoint: what `load_checkpoint` takes, or a loaded checkpoint. Its own head, if any, is replaced.
      dataset: a data set's spec with one label an image, or a source.
      out: the checkpoint directory to write.
      features: the folder that keeps the features, OUT.features by default. An interrupted pass resumes from it, and
        another head on the same features needs no pass.
      overwrite: replace a checkpoint at `out`.
      head: "logistic", multinomial logistic regression; "ridge", in closed form; or "means", the cosine to each class's
        mean.
      pool: "token", "avg", "token_avg" or "map"; by default the checkpoint's own.
      schedule: merges tokens while the features are computed.
      strengths: of the regularisation; the best on the held-out images is chosen.
      held_out, seed: the share of each class that is held out, and the seed that draws it.
      limit, batch_size, dtype, on_bad, workers: as `evaluate` takes them.

    Raises:
      InputError: in one line, if an argument does not fit, a class has a single image, or an image cannot be read.
    """
    chosen = head, pool, schedule, tuple(strengths), held_out, limit, batch_size, dtype, seed, on_bad, workers
    config, path, times = ProbeConfig(*chosen), check_target(out, overwrite, ENTRIES), Times()
    whole = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    source = dataset if isinstance(dataset, Source) else open_source(dataset)
    if source.labels_per_image > 1 or not source.class_names:
        raise InputError(f"{source.spec}: a probe needs images with one label each")
    first, *others = source.class_names
    if not others:
        raise InputError(f"{source.spec} has one class, {first!r}: a head needs two or more")
    if config.head == "means" and (config.pool or whole.config.pool) == "dist_avg":
        raise InputError("class means need one feature vector an image: pass pool=token or avg")
    backbone, params = without_head(whole.config, whole.params, config.pool or None)
    kind: dict[str, Any] = dict(
        batch_size=config.batch_size, dtype=config.dtype, workers=config.workers, on_bad=config.on_bad
    )
    bare = dataclasses.replace(whole, config=backbone, params=params)
    inputs = open_inputs(bare, source, config.schedule, EvaluationConfig(limit=config.limit, **kind))
    inputs = dataclasses.replace(inputs, step_config=dataclasses.replace(inputs.step_config, patches=False))
    if len(inputs.schedules) != 1:
        raise InputError(f"schedule {config.schedule!r} names {len(inputs.schedules)}: give one")
    for line in inputs.remarks if jax.process_index() == 0 else ():
        print(f"warning: {line}", flush=True)
    folder = local_path(features) if features else path.with_name(path.name + FEATURES)
    with times("compiling"):
        steps = compile_steps(backbone, inputs.schedules, inputs.params, inputs.step_config)
    try:
        (found,) = collect_features(inputs, steps, folder, times).values()
    except BadImage as error:
        raise InputError(f"{error}; repair it, or leave it out with on_bad=skip, and resume") from None
    held = hold_out(found, source.class_names, config)
    mesh = inputs.step_config.mesh
    with times("neighbours"):
        neighbours = _count_neighbours(found, held, len(source.class_names), mesh)
    with times("fitting"):
        fitted, strength, tried = _fit(Chunks(found, mesh, held), len(source.class_names), config)
    count = int((found.all_labels() >= 0).sum())
    results = dict(tried)[strength], neighbours, tried, times.seconds
    shown = None if config.head == "means" else strength
    facts = path, config, backbone.pool, printable(source.spec), count, len(source.class_names), shown
    report = ProbeReport(*facts, *results)
    about = dataclasses.asdict(config) | {"dataset": report.dataset, "num_images": count, "strength": shown}
    score = {"correct": report.held_out.correct, "num_images": report.held_out.count}
    save_with_head(path, whole, (backbone, params), fitted, source.class_names, about | {"held_out": score}, overwrite)
    return report


def zero_shot(
    checkpoint: str | Path | Checkpoint, classes: str | Path, out: str | Path, *, overwrite: bool = False
) -> Checkpoint:
    """Write the image tower of CLIP, SigLIP and the like with a head of class embeddings, as a checkpoint directory.

    logits = exp(logit_scale) * cosine(image, class) + logit_bias. classes: a file as `read_embeddings` takes it. The
    image's embedding is the checkpoint's output: projected features, or pooled ones; a classifier is replaced. Raises
    InputError if the widths differ.
    """
    path, given = check_target(out, overwrite, ENTRIES), read_embeddings(classes)
    whole = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    config, params = without_head(whole.config, whole.params)
    if projected := whole.config.headless and whole.config.num_classes:
        config = dataclasses.replace(config, projection_dim=projected)
        params = params | {"projection": whole.params["head"]}
    elif whole.config.projection_dim:
        config = dataclasses.replace(config, projection_dim=whole.config.projection_dim)
        params = params | {"projection": whole.params["projection"]}
    width, wanted = given.embeddings.shape[1], config.projection_dim or config.output_dim
    if width != wanted:
        raise InputError(
            f"{classes}: the embeddings are {width} wide, the image's are {wanted}: take both towers of one model, and "
            "convert it with its projection"
        )
    factor = np.exp(given.scale)
    kernel = (factor * given.embeddings.T).astype(np.float32)
    head = Head(kernel, np.full(len(given.names), given.bias, np.float32), unit=True)
    about = {"class_embeddings": printable(classes), "logit_scale": given.scale, "logit_bias": given.bias}
    save_with_head(path, whole, (config, params), head, given.names, about, overwrite)
    return load_checkpoint(path)


def hold_out(features: Features, class_names: tuple[str, ...], config: ProbeConfig) -> np.ndarray:
    """Choose the held-out rows of this process: the same share of each class, and the same images on any processes.

    Returns bool [n]. Raises InputError for a class with fewer than two images.
    """
    rows = config.batch_size // jax.process_count()
    shares = features.all_labels()  # [processes, n]: batch by batch, the rows of each process
    labels = shares.reshape(len(shares), -1, rows).transpose(1, 0, 2).ravel()
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    if (fewest := int(counts.min())) < 2:
        name, images = class_names[int(counts.argmin())], "one image" if fewest else "no image"
        raise InputError(f"class {name!r} has {images}: at least two are needed, one of them to judge the fit")
    share = min(config.held_out, MOST_HELD / len(labels))
    generator, held = np.random.default_rng(config.seed), np.zeros(len(labels), bool)
    for label, count in enumerate(counts):
        many = min(max(1, round(share * count)), count - 1)
        held[generator.permutation(np.flatnonzero(labels == label))[:many]] = True
    return held.reshape(-1, len(shares), rows)[:, jax.process_index()].ravel()


def _fit(chunks: Chunks, num_classes: int, config: ProbeConfig) -> tuple[Head, float, tuple[tuple[float, Score], ...]]:
    """Choose the strength on the held-out rows, starting from the strongest; then fit on all rows.

    Returns the head, the strength, and the held-out score of each. Among equal accuracies the lowest loss wins.
    """
    fit = HEADS[config.head](chunks, num_classes)
    strengths = sorted(set(config.strengths), reverse=True) if config.head != "means" else [0.0]
    tried, factors = [], {}
    for strength in parallel.progress(strengths, desc="fitting", unit="strength"):
        head = fit("fit", strength)
        factors[strength] = 1.0 if config.head == "logistic" else heads.calibrate(head, chunks)
        tried.append((strength, heads.score(heads.scaled(head, factors[strength]), chunks, "held")))
    best = max(tried, key=lambda pair: (pair[1].correct, -pair[1].loss))[0]
    return heads.scaled(fit("all", best), factors[best]), best, tuple(tried)


def _count_neighbours(features: Features, held: np.ndarray, num_classes: int, mesh: jax.sharding.Mesh) -> int:
    """Count the held-out images that their nearest neighbours among the others classify correctly."""
    rows, several, correct = np.flatnonzero(held), jax.process_count() > 1, 0
    chunks = Chunks(features, mesh, held)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(rows))))) if several else len(rows)
    block = BLOCK // jax.process_count()
    for start in range(0, most, block):
        here = rows[start : start + block]
        size = min(block, most - start)
        queries = np.zeros((size, features.values.shape[1]), np.float32)
        labels = np.full(size, -1, np.int32)
        queries[: len(here)], labels[: len(here)] = features.values[here], features.labels[here]
        if several:
            queries, labels = multihost_utils.process_allgather((queries, labels), tiled=True)
        votes = vote(chunks, np.asarray(queries), num_classes, mesh)
        correct += int((votes.argmax(axis=1) == labels).sum())
    return correct


def save_with_head(
    path: Path,
    whole: Checkpoint,
    backbone: tuple[Any, Any],
    head: Head,
    class_names: tuple[str, ...],
    about: dict[str, Any],
    overwrite: bool,
) -> None:
    """Write a backbone, (config, params), with a head; the first process writes, the others wait."""
    config, params = backbone
    config = dataclasses.replace(config, num_classes=len(class_names), unit_features=head.unit)
    leaf = {"kernel": head.kernel, "bias": head.bias}
    # The mean logits of two equal heads are the logits of the mean features.
    both = {"head": leaf, "head_dist": leaf} if config.pool == "dist_avg" else {"head": leaf}
    if jax.process_index() == 0:
        save_checkpoint(
            path,
            config,
            jax.tree.map(np.asarray, dict(params)) | both,
            whole.preprocess,
            class_names=class_names,
            provenance={"head_by": "fcvit_jax.probe", "probe": about, "from": whole.meta.get("provenance")},
            overwrite=overwrite,
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{path} is written")
