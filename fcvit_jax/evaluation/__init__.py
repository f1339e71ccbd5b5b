"""Accuracy, throughput and reports: many merge schedules in one pass over the data."""

import contextlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint
from fcvit_jax.data.batches import BadImage
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import CompiledStep, classify, compile_comparison, compile_steps
from fcvit_jax.evaluation.features import Features, collect_features
from fcvit_jax.evaluation.inputs import EvaluationConfig, EvaluationInputs, open_inputs
from fcvit_jax.evaluation.neighbours import BLOCK, rank_labels, vote
from fcvit_jax.evaluation.outcomes import Journal, Outcomes, collect, concatenate, save_logits, save_outcomes
from fcvit_jax.evaluation.result_rows import class_table, cost_rows, image_remarks, result_rows
from fcvit_jax.evaluation.runs import ResultRow
from fcvit_jax.evaluation.throughput import Rate, measure_throughput
from fcvit_jax.evaluation.times import Times
from fcvit_jax.evaluation.workdir import JOURNAL, NEIGHBOURS, forget, open_journal
from fcvit_jax.files import local_path, writable_directory, write_whole
from fcvit_jax.models.schedule import Schedules

__all__ = ["EvaluationConfig", "ResultRow", "cost_rows", "evaluate"]

PANELS = 6  # of the gallery, at most, beside each image


def evaluate(
    checkpoint: str | Path | Checkpoint,
    dataset: str | Source,
    schedules: Schedules,
    *,
    workdir: str | Path | None = None,
    batch_size: int = EvaluationConfig.batch_size,
    dtype: str = EvaluationConfig.dtype,
    limit: int | None = EvaluationConfig.limit,
    real_labels: str = EvaluationConfig.real_labels,
    save_logits: bool = EvaluationConfig.save_logits,
    gallery: int = EvaluationConfig.gallery,
    throughput_blocks: int = EvaluationConfig.throughput_blocks,
    workers: int | None = EvaluationConfig.workers,
    rules: str = EvaluationConfig.rules,
    on_bad: str = EvaluationConfig.on_bad,
    class_names: str | Path | Sequence[str] = EvaluationConfig.class_names,
    neighbours: str | Source = EvaluationConfig.neighbours,
) -> list[ResultRow]:
    """Evaluate a checkpoint under merge schedules, in one pass over the data; returns one row a schedule.

        rows = fcvit_jax.evaluate("packaged:digits", "digits:test", ["dense", "tome_r12"])

    Every process of a run calls this; the first gets the rows, the others an empty list. Everything that can be checked
    is checked before the first compilation.

    Without a head, the checkpoint's features are compared with the dense model's instead, for its output and for the
    patches: the cosine, and the length of the difference over the dense length. With `neighbours`, images are also
    classified by the nearest of these.

    Args:
      checkpoint: a checkpoint directory, a `train_sam.py` working directory, `packaged:NAME`, or a loaded checkpoint.
      dataset: a data set's spec, as `open_source` takes it, or a source.
      schedules: names or explicit forms separated by commas (ranges such as `tome:0-16` too), a sequence of names or
        `MergeSchedule`s, or a mapping from names of your own. A `?` after a name leaves it out if it does not fit the
        model. Rows are compared with the schedule named `dense`.
      workdir: write all files of `evaluate.py` there. Call again with the same arguments to resume an interrupted
        evaluation after its last finished batch. None: write nothing.
      batch_size: images, over all devices.
      dtype: of the computation: float32, tf32 or bfloat16.
      limit: evaluate this many images: the first, or evenly spread ones of a folder, which is sorted by class.
      real_labels: ReaL's real.json: its labels replace those of ImageNet's validation images.
      save_logits: write logits_<schedule>.npz.
      gallery: draw the merged regions of this many images under each schedule.
      throughput_blocks: timed blocks a schedule; 0 leaves images/s out.
      workers: decoding threads; by default one per core.
      rules: merge rules, `tome,evit(fuse=true)`: every schedule that merges and names no rule runs under each of them.
      on_bad: for an image that cannot be read: `stop`, or `skip` it and count it in `images_skipped`. It may change
        when an interrupted evaluation is resumed.
      class_names: of the head, instead of the checkpoint's: a text file with one a line, a sequence, or, if the head
        has the data set's classes, in which order: "timm", "imagefolder" (torchvision's), "numeric" or "dataset".
      neighbours: for a checkpoint without a head: labelled images, whose features each schedule computes too. An image
        gets the class for which its 20 nearest vote, each of them with the weight exp(cosine / 0.07).

    Raises:
      InputError: in one line, if an argument does not fit or an image cannot be read.
    """
    names: Any = str(class_names) if isinstance(class_names, str | Path) else tuple(class_names)
    parallel.share_cpu(batch_size)
    numbers = batch_size, dtype, limit, real_labels, save_logits, gallery, throughput_blocks, workers
    config = EvaluationConfig(*numbers, rules, on_bad, names, neighbours)
    if workdir is None and (save_logits or gallery):
        raise InputError("save_logits and gallery write files: pass a workdir")
    inputs, times = open_inputs(checkpoint, dataset, schedules, config), Times()
    for line in inputs.remarks if jax.process_index() == 0 else ():
        print(f"warning: {line}", flush=True)
    folder = None if workdir is None else local_path(workdir)
    if folder and jax.process_index() == 0:
        writable_directory(folder)
    with times("compiling"):
        steps = compile_steps(inputs.checkpoint.config, inputs.schedules, inputs.params, inputs.step_config)
    try:
        with contextlib.ExitStack() as stack:
            galleries = _collect_neighbours(inputs, folder, steps, times, stack) if inputs.neighbours else None
            outcomes = _classify_all(inputs, folder, steps, times, galleries)
    except BadImage as error:
        raise InputError(f"{error}; repair it, or leave it out with on_bad=skip, and resume") from None
    rates = _measure_speed(inputs, steps, times)
    if outcomes is None:
        return []
    if folder and gallery:
        with times("pictures"):
            _draw(inputs, folder / "gallery")
    for line in image_remarks(outcomes, inputs.checkpoint.preprocess):
        print(f"warning: {line}")
    rows = result_rows(inputs, outcomes, steps, rates, times)
    if folder:
        from fcvit_jax.evaluation.report import write_report  # a command too: not imported before it runs

        save_outcomes(folder / "outcomes.npz", list(inputs.schedules), outcomes)
        if inputs.judged:
            table = class_table(outcomes, inputs.schedules, inputs.source.class_names)
            write_whole(folder / "per_class.json", json.dumps(table).encode())
        write_report(rows, folder)
        forget(folder)
    return rows


def _collect_neighbours(
    inputs: EvaluationInputs,
    workdir: Path | None,
    steps: Mapping[str, CompiledStep],
    times: Times,
    stack: contextlib.ExitStack,
) -> dict[str, Features]:
    """Compute the features of the neighbours under each schedule; their files last as long as the stack, or the run."""
    folder = workdir / NEIGHBOURS if workdir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
    assert inputs.neighbours
    return collect_features(replace(inputs, source=inputs.neighbours), steps, folder, times)


def _classify_all(
    inputs: EvaluationInputs,
    workdir: Path | None,
    steps: Mapping[str, CompiledStep],
    times: Times,
    galleries: Mapping[str, Features] | None = None,
) -> Outcomes | None:
    """Pass over the data; return the outcomes of all images, None in any process but the first.

    galleries: features by schedule, among which to look for neighbours.
    """
    size, total, first, compare = inputs.config.batch_size, inputs.num_records, jax.process_index() == 0, None
    keeps = inputs.config.save_logits or galleries is not None
    if "dense" in steps and (len(steps) > 1 or inputs.checkpoint.config.headless):
        with times("compiling"):
            compare = compile_comparison(inputs.checkpoint.config, inputs.step_config)
    journal = open_journal(workdir, inputs) if workdir and first else Journal(None, {})
    done = int(multihost_utils.broadcast_one_to_all(np.int32(len(journal.parts))))
    with contextlib.ExitStack() as stack:
        if workdir and first:  # without a finished batch there is nothing to resume from
            stack.callback(lambda: None if journal.parts else forget(workdir, JOURNAL))
        batches = stack.enter_context(inputs.batches(done))
        bar = parallel.progress(desc="evaluating", total=total, initial=min(done * size, total), unit="img")
        stack.enter_context(bar)
        for batch, outcomes, logits in classify(steps, inputs.params, batches, compare, times):
            with times("on the host"):
                part, kept = collect(batch, outcomes), []
                if keeps:
                    counts, *rows = (parallel.whole(array) for array in (batch.mask, *map(logits.get, steps)))
                    kept = [each[counts] for each in rows]
                if first:
                    journal.append(part, kept)
            for why in batch.skipped:
                bar.write(f"skipped: {why}")
            bar.update(min(size, total - bar.n))
    with times("on the host"):
        whole = concatenate(journal.parts) if first else None
        if galleries:
            whole = _find_neighbours(inputs, galleries, journal, whole)
        if workdir and whole and inputs.config.save_logits:
            save_logits(workdir, list(steps), inputs.checkpoint.config.output_dim, journal, whole)
    return whole


def _find_neighbours(
    inputs: EvaluationInputs, galleries: Mapping[str, Features], journal: Journal, outcomes: Outcomes | None
) -> Outcomes | None:
    """Classify the images by their neighbours. Every process has some neighbours, and the first one the images."""
    mesh, classes = inputs.step_config.mesh, len(inputs.source.class_names)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(outcomes.names) if outcomes else 0)))
    width = inputs.checkpoint.config.output_dim
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        nothing = np.zeros((part.stop - start, width), np.float32)
        queries = journal.logits_between(start, part.stop) if outcomes else [nothing] * len(galleries)
        for index, (gallery, block) in enumerate(zip(galleries.values(), queries, strict=True)):
            votes = vote(gallery.chunks(mesh), multihost_utils.broadcast_one_to_all(block), classes, mesh)
            if outcomes:
                outcomes.prediction[index, part] = votes.argmax(axis=1)
                outcomes.rank[index, part] = rank_labels(votes, outcomes.labels[part])
    return outcomes


def _measure_speed(inputs: EvaluationInputs, steps: Mapping[str, CompiledStep], times: Times) -> dict[str, Rate]:
    """Measure images/s on the first batch; {} if it is turned off."""
    if not inputs.config.throughput_blocks:
        return {}
    with inputs.batches(limit=min(inputs.config.batch_size, inputs.num_records)) as batches:
        batch = next(batches)
    with times("timing"):
        return measure_throughput(steps, inputs.params, batch, inputs.config.throughput_blocks)


def _draw(inputs: EvaluationInputs, folder: Path) -> None:
    """Draw the gallery: the merged regions of the first images."""
    from fcvit_jax.evaluation.visualize import draw_gallery, first_images  # a command too

    checkpoint = inputs.checkpoint
    merged = [name for name in inputs.schedules if name != "dense"]
    places = np.linspace(0, len(merged) - 1, PANELS).round().astype(int) if merged else ()
    shown = {merged[place]: inputs.schedules[merged[place]] for place in places}
    images, names = first_images(inputs.source, checkpoint, inputs.config.gallery, inputs.config.on_bad)
    # On one device of this process, since other processes do not take part.
    alone = replace(checkpoint, params=jax.tree.map(np.asarray, checkpoint.params))
    draw_gallery(alone, shown, images, names, folder, columns=4)
