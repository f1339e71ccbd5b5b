"""The best schedule for a budget on this device, found on unlabelled images: `search(checkpoint, images, budget)`."""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.checkpoint import Checkpoint, flat_params, load_checkpoint, recommend, versions
from fcvit_jax.data.batches import device_batches, eval_batches
from fcvit_jax.data.records import Source
from fcvit_jax.data.sources import open_images
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import StepConfig
from fcvit_jax.files import check_target, local_path, writable_directory
from fcvit_jax.models import flops
from fcvit_jax.models.rules import Rule, parse_rule
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.search.budgets import Budget, parse_budgets, share_cost
from fcvit_jax.search.candidates import Candidate, Cost, check_reachable
from fcvit_jax.search.correction import Logits, correct_head
from fcvit_jax.search.findings import SearchReport
from fcvit_jax.search.front import Front, SearchConfig
from fcvit_jax.search.scores import Memory, Scorer, placed_params

__all__ = ["SearchConfig", "SearchReport", "search"]

MEMORY = ".search.jsonl"  # until the results are written


def search(
    checkpoint: str | Path | Checkpoint,
    images: str | Source,
    budget: str | float | Sequence[str | float],
    *,
    workdir: str | Path | None = None,
    write: bool = False,
    correct: str | Path | None = None,
    limit: int = SearchConfig.limit,
    candidates: int = SearchConfig.candidates,
    batch_size: int = SearchConfig.batch_size,
    dtype: str = SearchConfig.dtype,
    rules: str = SearchConfig.rules,
    seed: int = SearchConfig.seed,
    workers: int | None = SearchConfig.workers,
) -> SearchReport:
    """Find the schedules that keep a model's predictions best within budgets, on unlabelled images.

        report = fcvit_jax.search("packaged:digits", "digits:train", "0.5,0.7", limit=256)
        report.recommended  # {"0.5": "dense:1,global:...", "0.7": ...}

    Candidates differ in the rule, in a dense prefix, in the layer at which windows end, and in how rates rise over the
    layers. Half of the images chooses among them, by the divergence of the predictions from the dense model's; the
    other half judges the choice against the best of `tome_rN`, `sNdfe_rN` and `sNwincN_rN` within the budget.

    Args:
      checkpoint: what `load_checkpoint` takes, or a loaded checkpoint.
      images: a folder with images at any depth, a data set's spec, or a source. Labels are not read.
      budget: one or several, separated by commas: 0.6 of the dense GMACs, 2.8G, a speed-up of 1.7x measured on this
        device, or 900/s, images/s measured here.
      workdir: write search.json and search.png there. Call again with the same arguments to resume a killed search.
        None: write nothing.
      write: add the recommended schedules to the checkpoint's meta.json, as `recommended`.
      correct: a directory for a checkpoint whose head is corrected, in closed form, for the recommended schedule alone.
        It is written if it is better beyond chance on the images that judge.
      limit, candidates, batch_size, dtype, rules, seed, workers: see `SearchConfig`.

    Raises:
      InputError: in one line, if an argument does not fit, or no schedule meets a budget.
    """
    config = SearchConfig(limit, candidates, batch_size, dtype, rules, seed, workers)
    if jax.process_count() > 1:
        raise InputError("a search runs in one process, on all of its devices: start it without --distributed")
    budgets, tried = parse_budgets(budget), _parse_rules(rules)
    mesh = parallel.data_mesh()
    parallel.check_batch_size(batch_size, mesh)
    source = images if isinstance(images, Source) else open_images(images.removeprefix("folder:"))
    count = min(limit, len(source))
    if count < 2:
        raise InputError(f"images {source.spec}: {count} is too few: half of them choose and half judge")
    name = str(checkpoint.path if isinstance(checkpoint, Checkpoint) else checkpoint)
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
    cost = share_cost(opened.config)
    for each in budgets:
        _check_budget(each, tried, opened, cost)
    for line in source.remarks:
        print(f"warning: {line}")
    folder = None if workdir is None else writable_directory(local_path(workdir))
    opened.check_correction([MergeSchedule.dense(opened.config.depth)])
    target = None if correct is None else _check_correctable(opened, budgets, correct)
    if write:
        recommend(opened, None)

    step = StepConfig(opened.preprocess, mesh, batch_size, dtype)
    batches, digest = _draw(source, opened, config, count, mesh)
    run = _fingerprint(opened, config, [each.text for each in budgets], digest)
    memory = _open_memory(folder, run)
    scorer = Scorer(opened, placed_params(opened, mesh, dtype), step, batches, memory)
    half = math.ceil(count / 2 / batch_size)  # batches
    conditions = {
        "checkpoint": name,
        "images": source.spec,
        "chosen_by": (count + 1) // 2,
        "judged_by": count // 2,
        "budgets": [each.text for each in budgets],
        **dataclasses.asdict(config),
        "dense_gmacs": flops.gmacs(opened.config),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "versions": versions(),
    }
    report = Front(scorer, config, tried, budgets, half, cost).report(conditions)
    if target:
        ((text, form),) = report.recommended.items()
        dense, merged = MergeSchedule.dense(opened.config.depth), MergeSchedule.parse(form, opened.config.depth)
        logits = Logits(scorer.logits(dense), scorer.logits(merged), (count + 1) // 2)
        correction = correct_head(opened, form, text, logits, target, seed)
        report = dataclasses.replace(report, correction=correction)
    if folder:
        report.write(folder)
        (folder / MEMORY).unlink(missing_ok=True)
    if write:
        recommend(opened, report.recommended)
    return report


def _check_correctable(checkpoint: Checkpoint, budgets: Sequence[Budget], out: str | Path) -> Path:
    if not checkpoint.config.num_classes:
        raise InputError(f"{checkpoint.path} has no head to correct: leave --correct out")
    if len(budgets) > 1:
        raise InputError("a head is corrected for one schedule: give one budget, or leave --correct out")
    return check_target(out, False, frozenset())


def _parse_rules(text: str) -> list[Rule]:
    rules = [parse_rule(part) for part in re.split(r",(?![^(]*\))", text) if part.strip()]
    if not rules:
        raise InputError("rules is empty: name at least one, such as nearest,tome")
    return list(dict.fromkeys(rules))


def _check_budget(budget: Budget, rules: Sequence[Rule], checkpoint: Checkpoint, cost: Cost) -> None:
    """Raise InputError for a budget that cannot be met, or restricts nothing, as far as is known without timing."""
    model, dense = checkpoint.config, flops.gmacs(checkpoint.config)
    if budget.unit == "x" and budget.number < 1:
        raise InputError(f"budget {budget.text}: a speed-up below 1 restricts nothing; choose more")
    if not budget.timed:
        limit = budget.number * (1 if budget.unit else dense)
        cheapest = min(cost(Candidate(rule).at(2.0 * model.num_patches, model)) for rule in rules)
        check_reachable(limit, cheapest, dense, budget.text, "GMACs")


def _draw(source: Source, checkpoint: Checkpoint, config: SearchConfig, count: int, mesh: Any) -> tuple[tuple, str]:
    """Draw the images: batches of those that choose, then of those that judge; and the sha256 of their names."""
    order = np.random.default_rng(config.seed).permutation(len(source))[:count]
    digest, found = hashlib.sha256(), []
    for part in np.split(order, [(count + 1) // 2]):
        drawn = dataclasses.replace(
            source, size=len(part), read=lambda index, part=part: source.read(int(part[index])), labels_per_image=1
        )
        drawn = dataclasses.replace(drawn, read=lambda index, read=drawn.read: read(index)._replace(label=0))
        host = eval_batches(drawn, checkpoint.preprocess, config.batch_size, workers=config.workers)
        with contextlib.closing(device_batches(host, parallel.batched(mesh))) as batches:
            for batch in tqdm(batches, desc="decoding", unit="batch", leave=False, disable=None):
                digest.update("\n".join(batch.names).encode(errors="surrogateescape"))
                found.append(batch)
    return tuple(found), digest.hexdigest()


def _fingerprint(checkpoint: Checkpoint, config: SearchConfig, budgets: list[str], digest: str) -> dict[str, Any]:
    """Describe everything that the findings depend on."""
    weights = hashlib.sha256()
    for path, array in sorted(flat_params(checkpoint.params).items()):
        weights.update(path.encode() + array.tobytes())
    weights.update(json.dumps([checkpoint.config.to_dict(), checkpoint.preprocess.to_dict()]).encode())
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "workers"}
    where = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "versions": versions()}
    return {"checkpoint": weights.hexdigest(), "images": digest, "budgets": budgets, **settings, **where}


def _open_memory(folder: Path | None, run: Mapping[str, Any]) -> Memory:
    memory = Memory(folder and folder / MEMORY, run)
    if memory.known:
        print(f"{folder}: resuming the interrupted search after {len(memory.known):,} measurements")
    elif memory.differs:
        print(f"{folder}: the interrupted search there differs in {', '.join(memory.differs)}; starting over")
    return memory
