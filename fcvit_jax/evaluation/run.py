"""An evaluation, from its settings to its result rows: one pass over the data, which goes on if it is interrupted."""

import contextlib
import json
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.stages import Compiled

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch, device_batches, eval_batches
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import CompiledStep, classify, compile_divergence, compile_steps
from fcvit_jax.evaluation.job import Job, Settings, fingerprint, prepare
from fcvit_jax.evaluation.logits import LogitsWriter
from fcvit_jax.evaluation.outcomes import Journal, Outcomes, collect, concatenate, save_outcomes
from fcvit_jax.evaluation.results import class_table, gmacs_rows, result_rows
from fcvit_jax.evaluation.throughput import Rate, measure_throughput
from fcvit_jax.evaluation.times import Times
from fcvit_jax.files import writable_directory, write_whole

PANELS = 6  # of the gallery, at most, beside each image
JOURNAL = ".outcomes"  # in the working directory, until the results are written
FINISHED = (  # of an earlier run: they go
    "results.jsonl",
    "results.csv",
    "report.html",
    "pareto.png",
    "outcomes.npz",
    "per_class.json",
    "logits_*.npz",
    "gallery/[0-9]*_*.png",
)


def run(settings: Settings, workdir: Path) -> list[dict[str, Any]]:
    """Check everything that can be checked beforehand, then compile, evaluate and time; returns the result rows.

    Writes outcomes.npz and per_class.json, and what the settings ask for of logits and pictures. Interrupted at any
    moment, it goes on behind the last batch when it is called again with the same settings, until `forget` is called.
    Of several processes each calls it; the first writes and gets the rows, the others get none.
    """
    if not settings.checkpoint:
        raise InputError("config.checkpoint is empty: pass --config.checkpoint=...")
    if settings.gmacs_only:
        if jax.process_index():
            return []
        rows = gmacs_rows(settings)
        if not holds_accuracies(workdir):
            writable_directory(workdir)
            clear(workdir)
        return rows
    job, times = prepare(settings, workdir), Times()
    read(job).close()  # complains of numbers that make no sense
    with times("compiling"):
        steps = compile_steps(
            job.checkpoint.config,
            job.schedules,
            job.checkpoint.preprocess,
            job.params,
            settings.batch_size,
            job.mesh,
            settings.dtype,
            job.source,
        )
        compare = compile_comparison(job)
    outcomes = count(job, steps, compare, times)
    rates = measure(job, steps, times)
    if outcomes is None:
        return []
    write(job, outcomes, times)
    return result_rows(job, outcomes, steps, rates, times)


def forget(workdir: Path) -> None:
    """Remove what an interrupted run would need to go on."""
    (workdir / JOURNAL).unlink(missing_ok=True)
    LogitsWriter.remove(workdir)


def holds_accuracies(workdir: Path) -> bool:
    """Whether an evaluation has left its results there, or a part of them: those are not cleared for mere costs."""
    results = workdir / "results.jsonl"
    counted = any((workdir / name).exists() for name in (JOURNAL, "outcomes.npz"))
    return counted or (results.exists() and '"top1"' in results.read_text(errors="replace"))


def clear(workdir: Path) -> None:
    """Remove the results of an earlier run: they must not stand beside those of another."""
    forget(workdir)
    names = map(Path, FINISHED)
    patterns = [*FINISHED, *(str(name.with_name(f".{name.name}.partial")) for name in names)]  # killed while writing
    for stale in (path for pattern in patterns for path in workdir.glob(pattern)):
        try:
            stale.unlink()
        except OSError as error:
            raise InputError(f"{stale} cannot be removed ({error.strerror}): take another --workdir") from None


def compile_comparison(job: Job) -> Compiled | None:
    """What compares the schedules' logits with dense's, where there is something to compare."""
    others = [name for name in job.schedules if name != "dense"]
    if not others or "dense" not in job.schedules:
        return None
    num_classes = job.checkpoint.config.num_classes
    return compile_divergence(others, num_classes, job.settings.batch_size, job.mesh, job.source.scored)


def count(job: Job, steps: Mapping[str, CompiledStep], compare: Compiled | None, times: Times) -> Outcomes | None:
    """The pass over the data; returns the outcomes of all images, None to any process but the first."""
    size, total = job.settings.batch_size, job.num_records
    journal, writer = begin(job) if jax.process_index() == 0 else (None, None)
    done = len(journal.parts) if journal else 0
    if jax.process_count() > 1:
        done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    with contextlib.ExitStack() as stack:
        if journal:  # where not even a batch was counted there is nothing to go on from
            stack.callback(lambda: None if journal.parts else forget(job.workdir))
        batches = stack.enter_context(contextlib.closing(read(job, done)))
        bar = stack.enter_context(
            parallel.progress(desc="evaluating", total=total, initial=min(done * size, total), unit="img")
        )
        for batch, outcomes, logits in classify(steps, job.params, batches, compare, times):
            with times("on the host"):
                part = collect(batch, outcomes, job.mesh)
                if writer:
                    writer.add(batch, logits)
                if journal:
                    journal.append(part)
            bar.update(min(size, total - bar.n))
    if not journal:
        return None
    with times("on the host"):
        whole = concatenate(journal.parts)
        if writer:
            writer.save(whole)
    return whole


def begin(job: Job) -> tuple[Journal, LogitsWriter | None]:
    """The files that a run adds to: those of an interrupted one of the same settings, or new ones."""
    workdir = job.workdir
    journal = Journal(workdir / JOURNAL, fingerprint(job))
    counted = sum(len(part.names) for part in journal.parts)
    if journal.parts:
        done = min(len(journal.parts) * job.settings.batch_size, job.num_records)
        print(f"{workdir}: the run was interrupted; it goes on after {done:,} of {job.num_records:,} images")
    else:
        if journal.differs:
            print(f"{workdir}: the interrupted run there differs in {', '.join(journal.differs)}; this one starts anew")
        clear(workdir)
    writer = None
    if job.settings.save_logits:
        shape = job.num_records, job.checkpoint.config.num_classes
        writer = LogitsWriter(workdir, list(job.schedules), shape, counted)
    return journal, writer


def read(job: Job, start: int = 0, limit: int | None = None) -> Generator[Batch, None, None]:
    """This process's share of the batches, from the given one on."""
    settings = job.settings
    host = eval_batches(
        job.source,
        job.checkpoint.preprocess,
        settings.batch_size,
        start=start,
        limit=limit or settings.limit,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=settings.workers,
    )
    return device_batches(host, parallel.batched(job.mesh))


def measure(job: Job, steps: Mapping[str, CompiledStep], times: Times) -> dict[str, Rate]:
    """Images/s on the first batch, {} where that is not wanted."""
    blocks = job.settings.throughput_blocks
    if blocks < 1:
        return {}
    with contextlib.closing(read(job, limit=min(job.settings.batch_size, job.num_records))) as one:
        batch = next(one)
    with times("timing"), parallel.progress(desc="timing", total=blocks * len(steps), unit="block") as bar:
        return measure_throughput(steps, job.params, batch, blocks, on_block=bar.update)


def write(job: Job, outcomes: Outcomes, times: Times) -> None:
    """The files beside the rows."""
    save_outcomes(job.workdir / "outcomes.npz", list(job.schedules), outcomes)
    table = class_table(outcomes, job.schedules, job.source.class_names)
    write_whole(job.workdir / "per_class.json", json.dumps(table).encode())
    if job.settings.gallery > 0:
        with times("pictures"):
            draw(job)


def draw(job: Job) -> None:
    """The gallery: what the first images are merged to."""
    from fcvit_jax.evaluation.visualize import draw_gallery

    checkpoint = job.checkpoint
    merged = [name for name in job.schedules if name != "dense"]
    places = np.linspace(0, len(merged) - 1, PANELS).round() if merged else ()
    shown = {merged[int(place)]: job.schedules[merged[int(place)]] for place in places}
    many = min(job.settings.gallery, job.num_records)
    with contextlib.closing(eval_batches(job.source, checkpoint.preprocess, many, limit=many)) as batches:
        first = next(batches)
    # On one device of this process: the others may have no part in it.
    alone = replace(checkpoint, params=jax.tree.map(np.asarray, checkpoint.params))
    draw_gallery(alone, shown, np.asarray(first.images), first.names, job.workdir / "gallery", columns=4)
