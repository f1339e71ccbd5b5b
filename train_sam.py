"""Train or fine-tune a ViT with sharpness-aware minimisation; evaluate.py reads the checkpoint that it writes.

    python train_sam.py --workdir=W
    python train_sam.py --config=configs/finetune_folder.py --config.checkpoint=deit_s \\
        --config.train=folder:photos/train --config.test=folder:photos/test --workdir=W

--config.FIELD=VALUE overrides a field of the configuration; docs/training.md lists them all. Rerun the same command to
resume a run; on SIGTERM it saves and stops. On several hosts, run the same command on each with --distributed=auto
(Slurm, Kubernetes, TPU) or --distributed=HOST:PORT,COUNT,INDEX, and one --workdir that all of them share.

Writes checkpoint/, best/, metrics.jsonl, events/ (with tensorboardX) and states/ into the working directory, and with
--config.flatness=true flatness.json and flatness.png. If loss or gradient are not finite, it stops; last_good/ has the
parameters before that, and a file the names of the images.
"""

from pathlib import Path
from typing import Any

from fcvit_jax.flags import run_script
from fcvit_jax.training import TrainConfig, train
from fcvit_jax.training.loop import tell


def main(config: Any, workdir: Path) -> None:
    result = train(TrainConfig.from_dict(config.to_dict()), workdir)
    if result.accuracy is None:
        tell(f"stopped and saved; run the same command to resume: {workdir}")
    else:
        counted = f"{result.accuracy.correct}/{result.accuracy.num_images}"
        tell(f"test top-1 {result.accuracy.top1:.2%} ({counted}); written: {result.checkpoint}")


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "digits_sam.py"
    run_script(main, config=default, workdir="workdir/train_sam")
