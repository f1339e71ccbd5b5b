"""Evaluate a checkpoint under many merge schedules, in one pass over the data.

    python evaluate.py
    python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W
    python evaluate.py --config=configs/eval_imagenet.py --config.checkpoint=DIR \\
        --config.sweep=tome:0-16,s2dfe:2-20:2,s2winc7:1-20 --workdir=W
    python evaluate.py --config.gmacs_only=true --config.checkpoint=vit_small_patch16_224 --config.sweep=tome:0-16

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/eval_digits.py, the default, lists them.
Started again with the same --workdir and configuration, an interrupted run goes on behind its last batch. On several
hosts, start the same command on each with --distributed=auto (Slurm, Kubernetes, TPU), or
--distributed=HOST:PORT,COUNT,INDEX. On a CPU of several cores, --jax_num_cpu_devices=2 may be some percent faster.

Writes into the working directory: results.jsonl and .csv (one row a schedule), report.html and pareto.png,
per_class.json, outcomes.npz (what became of every image), and on request logits_<schedule>.npz and gallery/.
"""

from pathlib import Path
from typing import Any

from fcvit_jax.evaluation.job import Settings
from fcvit_jax.evaluation.report import format_table, write_report
from fcvit_jax.evaluation.run import forget, holds_accuracies, run
from fcvit_jax.evaluation.times import format_times
from fcvit_jax.flags import run_script


def main(config: Any, workdir: Path) -> None:
    settings = Settings.of(config)
    rows = run(settings, workdir)
    if not rows:  # another process has them
        return
    if settings.gmacs_only and holds_accuracies(workdir):
        written = f"nothing is written: {workdir} has an evaluation's results, or an interrupted one; they stay"
    else:
        written = f"written: {', '.join(write_report(rows, workdir))} in {workdir}"
    if not settings.gmacs_only:
        forget(workdir)
    print(format_table(rows))
    if "seconds" in rows[0]:
        print(format_times(rows[0]["seconds"]))
    print(written)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "eval_digits.py"
    run_script(main, config=default, workdir="workdir/evaluate")
