"""Fine-tune DeiT-S on ImageNet-1k with SAM, from its published weights. Not run here: ImageNet was not available.

python train_sam.py --config=configs/finetune_imagenet.py --config.dtype=bfloat16 --workdir=W
python train_sam.py --config=configs/finetune_imagenet.py --workdir=W \
    --config.checkpoint=vit_base_patch16_224.augreg_in21k_ft_in1k --config.sam.rho=0.1

Sources: a few epochs of SAM at the end of training give most of its effect (arXiv 2410.10373). CrAFT (arXiv 2305.04526)
fine-tunes with SAM before compression. Learning rate and radius are starting points.
"""

from typing import Any

from configs.training import defaults


def get_config() -> Any:
    config = defaults()
    config.train = "tfds:imagenet2012/train"
    config.test = "tfds:imagenet2012/validation"
    config.checkpoint = "deit_small_patch16_224.fb_in1k"
    config.targets.label_smoothing = 0.1
    config.batch_size = 512
    config.epochs = 5.0
    config.warmup_epochs = 0.25
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.05
    config.sam.rho = 0.05
    config.schedules = "tome_r8,tome_r13,s2dfe_r16?,s2winc7_r16?"
    config.eval_every = 2500
    config.save_every = 1250
    return config
