"""Train or fine-tune a ViT with sharpness-aware minimisation, ending in a checkpoint that evaluate.py reads.

    python train_sam.py --workdir=W
    python train_sam.py --config=configs/finetune_folder.py --config.checkpoint=deit_s \\
        --config.train=folder:photos/train --config.test=folder:photos/test --workdir=W

Any field of the configuration is overridden by --config.FIELD=VALUE; configs/training.py lists them all. Started again
with the same --workdir, a run goes on where it was; on SIGTERM it saves and stops. On several hosts, start the same
command on each with --distributed=auto (Slurm, Kubernetes, TPU), or --distributed=HOST:PORT,COUNT,INDEX; --workdir
must then be one directory that all of them see. docs/training.md tells more.

Writes into the working directory: checkpoint/ (the last parameters, also of a run that was stopped), best/ (those of
the best test accuracy), metrics.jsonl, events/ (for TensorBoard, if tensorboardX is installed) and states/ (to go on
from); with --config.flatness=true also flatness.json and flatness.png, how flat the minimum is that it ended in. Where
loss or gradient are not finite it stops, with the parameters before that in last_good/ and the images' names in a file.
"""

from pathlib import Path
from typing import Any

from fcvit_jax.flags import run_script
from fcvit_jax.training.run import measure_flatness, tell, train


def main(config: Any, workdir: Path) -> None:
    accuracy = train(config, workdir)
    if accuracy is None:
        tell(f"stopped and saved; the same command goes on from there: {workdir}")
    else:
        counted = f"{accuracy.correct}/{accuracy.num_images}"
        tell(f"test top-1 {accuracy.top1:.2%} ({counted}); written: {workdir}/checkpoint")
        if config.flatness:
            measure_flatness(config, workdir)


if __name__ == "__main__":
    default = Path(__file__).parent / "configs" / "digits_sam.py"
    run_script(main, config=default, workdir="workdir/train_sam")
