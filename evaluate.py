"""Evaluate a checkpoint under many merge schedules, in one pass over the data.

    python evaluate.py
    python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W
    python evaluate.py --config=configs/eval_imagenet.py --config.checkpoint=DIR \\
        --config.sweep=tome:0-16,s2dfe:2-20:2,s2winc7:1-20 --workdir=W
    python evaluate.py --config.rules="tome,evit(fuse=true),tofu"
    python evaluate.py --config.gmacs_only=true --config.checkpoint=vit_small_patch16_224 --config.sweep=tome:0-16

Override any field of the configuration with --config.FIELD=VALUE; configs/eval_digits.py, the default, lists them.
Rerun the same command to resume an interrupted evaluation after its last finished batch. On several hosts, run the same
command on each with --distributed=auto (Slurm, Kubernetes, TPU) or --distributed=HOST:PORT,COUNT,INDEX. A CPU runs as
two JAX devices if the batch divides; --jax_num_cpu_devices=1 prevents it.

Writes into the working directory: results.jsonl and .csv (one row a schedule), report.html and pareto.png,
per_class.json, outcomes.npz (the outcome of every image), and on request logits_<schedule>.npz and gallery/.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import jax

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import EvaluationConfig, cost_rows, evaluate
from fcvit_jax.evaluation.report import format_table, reports_in, write_report
from fcvit_jax.evaluation.times import format_times
from fcvit_jax.evaluation.workdir import clear, holds_accuracies
from fcvit_jax.files import writable_directory
from fcvit_jax.flags import run_script


def main(config: Any, workdir: Path) -> None:
    options = {field.name: config.get(field.name) for field in fields(EvaluationConfig)}
    known = {"checkpoint", "dataset", "schedules", "sweep", "gmacs_only", *options}
    for name in sorted(known ^ set(config)):
        state = "unknown" if name in config else "missing"
        raise InputError(f"config.{name} is {state}: see configs/eval_digits.py")
    for name in ("checkpoint",) if config.gmacs_only else ("checkpoint", "dataset"):
        if not config[name]:
            raise InputError(f"config.{name} is empty: pass --config.{name}=...")
    schedules = f"dense,{config.schedules},{config.sweep}" if config.sweep else config.schedules
    if config.gmacs_only:
        report_costs(config.checkpoint, schedules, config.rules, workdir)
    elif rows := evaluate(config.checkpoint, config.dataset, schedules, workdir=workdir, **options):
        print(f"{format_table(rows)}\n{format_times(rows[0]['seconds'])}")
        print(f"written: {', '.join(reports_in(workdir))} in {workdir}")


def report_costs(checkpoint: str, schedules: str, rules: str, workdir: Path) -> None:
    """Print what schedules cost, and write it unless the working directory has results of an evaluation."""
    if jax.process_index():
        return
    rows = cost_rows(checkpoint, schedules, rules)
    print("".join(f"warning: {line}\n" for line in rows[0]["remarks"]) + format_table(rows))
    if holds_accuracies(workdir):
        print(f"nothing is written: {workdir} has the results of an evaluation, which are kept")
        return
    clear(writable_directory(workdir))
    write_report(rows, workdir)
    print(f"written: {', '.join(reports_in(workdir))} in {workdir}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "eval_digits.py"
    run_script(main, config=default, workdir="workdir/evaluate", share_cpu=True)
