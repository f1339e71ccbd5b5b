"""The files that an evaluation leaves in its working directory, even an interrupted one."""

import shutil
from pathlib import Path

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.inputs import EvaluationInputs
from fcvit_jax.evaluation.outcomes import Journal

JOURNAL = ".outcomes"  # until the results are written; a file in earlier versions
NEIGHBOURS = ".neighbours"  # features, until then
FINISHED = (
    *(JOURNAL, "results.jsonl", "results.csv", "report.html", "pareto.png", "outcomes.npz", "per_class.json"),
    *("logits_*.npz", "gallery/[0-9]*_*.png"),
)


def holds_accuracies(workdir: Path) -> bool:
    """Return whether an evaluation has left results there, finished or not."""
    results = workdir / "results.jsonl"
    counted = any((workdir / name).exists() for name in (JOURNAL, "outcomes.npz"))
    return counted or (results.exists() and '"top1"' in results.read_text(errors="replace"))


def clear(workdir: Path) -> None:
    """Delete the results of an earlier run, and half-written files of a killed one, but not `NEIGHBOURS`."""
    forget(workdir, JOURNAL)
    for name in map(Path, FINISHED):
        for stale in [*workdir.glob(str(name)), *workdir.glob(str(name.with_name(f".{name.name}.partial")))]:
            try:
                stale.unlink()
            except OSError as error:
                raise InputError(f"{stale} cannot be removed ({error.strerror}): choose another --workdir") from None


def forget(workdir: Path, *folders: str) -> None:
    """Delete the files from which an interrupted run would resume, or some of them."""
    for folder in folders or (JOURNAL, NEIGHBOURS):
        shutil.rmtree(workdir / folder, ignore_errors=True)


def open_journal(workdir: Path, inputs: EvaluationInputs) -> Journal:
    """Open the journal of an interrupted run with the same inputs, or start a new one."""
    journal = Journal(workdir / JOURNAL, inputs.fingerprint)
    if inputs.config.on_bad == "stop":
        journal.forget_skips()
    if journal.parts:
        done = min(len(journal.parts) * inputs.config.batch_size, inputs.num_records)
        print(f"{workdir}: resuming the interrupted run after {done:,} of {inputs.num_records:,} images")
    else:
        if journal.differs:
            print(f"{workdir}: the interrupted run there differs in {', '.join(journal.differs)}; starting over")
        clear(workdir)
    return journal
