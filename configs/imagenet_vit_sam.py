"""ViT-S/16 on ImageNet-1k from scratch with SAM, the recipe of "When Vision Transformers Outperform ResNets"
(arXiv 2106.01548). Not run here: ImageNet was not available.

python train_sam.py --config=configs/imagenet_vit_sam.py --config.dtype=bfloat16 --workdir=W
python train_sam.py --config=configs/imagenet_vit_sam.py --config.dtype=bfloat16 --workdir=W --config.sam.rho=0.2 \
    --config.model.embed_dim=768 --config.model.num_heads=12 --config.model.mlp_dim=3072          (ViT-B/16)

Inception crop and flip, 300 epochs, batches of 4096, AdamW at 3e-3 with 10,000 steps of warm-up and weight decay 0.3,
gradients clipped at 1: as in table 4 of GSAM (arXiv 2203.08065). GSAM repeats this recipe and reports 78.1 % for S/16
with SAM and 79.9 % for B/16. Each of 64 micro-batches is perturbed on its own, as on 64 devices. The radii, 0.1 and
0.2, are starting points.
"""

from typing import Any

from configs.training import defaults


def get_config() -> Any:
    config = defaults()
    config.train = "tfds:imagenet2012/train"
    config.test = "tfds:imagenet2012/validation"
    config.preprocess = "timm/augreg"
    config.model.image_size = (224, 224)
    config.model.patch_size = 16
    config.model.embed_dim = 384
    config.model.depth = 12
    config.model.num_heads = 6
    config.model.mlp_dim = 1536
    config.targets.loss = "sigmoid"
    config.batch_size = 4096
    config.epochs = 300.0
    config.warmup_epochs = 32.0  # 10,000 steps, 312 an epoch
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.3
    config.sam.rho = 0.1
    config.sam.microbatches = 64
    config.sam.scope = "microbatch"
    config.schedules = "tome_r8,tome_r13,s2dfe_r16?,s2winc7_r16?"
    config.eval_every = 5000
    config.save_every = 1000
    return config
