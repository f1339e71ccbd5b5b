"""ViT-S/16 under the schedules of the accuracy plots of Heo et al., arXiv 2303.02331, on ImageNet's validation images.

    python -m fcvit_jax.convert vit_small_patch16_224.augreg_in21k_ft_in1k vit_s
    python evaluate.py --config=configs/paper_vit_s.py --config.checkpoint=vit_s --workdir=W

Compare what the schedules cost with the published numbers, without weights or images:

    python evaluate.py --config=configs/paper_vit_s.py --config.gmacs_only=true

docs/published.md has the published accuracies and their sources. They were not measured here: no copy of ImageNet was
available. The GMACs agree with the plots within 0.03, as tests/evaluation/test_published.py checks.
"""

from ml_collections import ConfigDict

from configs import eval_imagenet


def get_config() -> ConfigDict:
    config = eval_imagenet.get_config()
    config.checkpoint = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    config.schedules = "dense"
    config.sweep = "tome:0-16,s2dfe:6-20:2?,s2winc7:1-16?"
    return config
