"""ViT-B/16 under the schedules of the accuracy plots of Heo et al., arXiv 2303.02331, on ImageNet's validation images.

    python -m fcvit_jax.convert vit_base_patch16_224.augreg_in21k_ft_in1k vit_b
    python evaluate.py --config=configs/paper_vit_b.py --config.checkpoint=vit_b --workdir=W

Compare what the schedules cost with the published numbers, without weights or images:

    python evaluate.py --config=configs/paper_vit_b.py --config.gmacs_only=true

docs/published.md has the published accuracies and their sources. They were not measured here: no copy of ImageNet was
available. The GMACs of s2winc7 agree with the plots within 0.05; the plots give only images/s for s2dfe.
"""

from ml_collections import ConfigDict

from configs import eval_imagenet


def get_config() -> ConfigDict:
    config = eval_imagenet.get_config()
    config.checkpoint = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    config.schedules = "dense"
    config.sweep = "tome:0-16,s2dfe:2-20:2?,s2winc7:2-16:2?"
    return config
