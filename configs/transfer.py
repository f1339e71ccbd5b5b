"""Transfer to CIFAR-10, CIFAR-100 or Oxford Pets with SAM. Not run here: the data were not available.

python train_sam.py --config=configs/transfer.py --workdir=W
python train_sam.py --config=configs/transfer.py --workdir=W --config.train=tfds:cifar100/train \
    --config.test=tfds:cifar100/test
python train_sam.py --config=configs/transfer.py --workdir=W --config.train=tfds:oxford_iiit_pet/train \
    --config.test=tfds:oxford_iiit_pet/test --config.epochs=70 --config.warmup_epochs=14

The recipe without SAM is that of google-research/vision_transformer: SGD with momentum 0.9, batches of 512, clipping
at 1, cosine with warm-up, no weight decay, learning rate 0.01, 10,000 steps with 500 of warm-up for CIFAR. The radius
is SAM's usual.
"""

from typing import Any

from configs.training import defaults


def get_config() -> Any:
    config = defaults()
    config.train = "tfds:cifar10/train"
    config.test = "tfds:cifar10/test"
    config.checkpoint = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    config.augment.scale = (0.05, 1.0)
    config.batch_size = 512
    config.epochs = 103.0  # 10,000 steps of CIFAR
    config.warmup_epochs = 5.0
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.sam.rho = 0.05
    config.schedules = "tome_r8,s2winc7_r16?"
    config.eval_every = 1000
    config.save_every = 500
    return config
