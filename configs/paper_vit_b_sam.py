"""ViT-B/16 trained with SAM, under the schedules of the flatness plot of Heo et al., arXiv 2303.02331, on ImageNet's
validation images.

    python -m fcvit_jax.convert vit_base_patch16_224.sam_in1k vit_b_sam
    python evaluate.py --config=configs/paper_vit_b_sam.py --config.checkpoint=vit_b_sam --workdir=W

Compare what the schedules cost with the published numbers, without weights or images:

    python evaluate.py --config=configs/paper_vit_b_sam.py --config.gmacs_only=true

docs/published.md has the published accuracies and their sources. They were not measured here: no copy of ImageNet was
available. The plot has images/s and no GMACs. A comparison with configs/paper_vit_b.py does not test SAM alone: those
weights were also pretrained on ImageNet-21k.
"""

from ml_collections import ConfigDict

from configs import eval_imagenet


def get_config() -> ConfigDict:
    config = eval_imagenet.get_config()
    config.checkpoint = "vit_base_patch16_224.sam_in1k"
    config.schedules = "dense"
    config.sweep = "tome:2-18:2,s1dfe:2-22:2?,s2dfe:4-24:2?"
    return config
