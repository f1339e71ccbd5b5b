"""ViT-L/16 under the schedules of the accuracy plots of Heo et al., arXiv 2303.02331, on ImageNet's validation images.

    python -m fcvit_jax.convert vit_large_patch16_224.augreg_in21k_ft_in1k vit_l
    python evaluate.py --config=configs/paper_vit_l.py --config.checkpoint=vit_l --workdir=W

Compare what the schedules cost with the published numbers, without weights or images:

    python evaluate.py --config=configs/paper_vit_l.py --config.gmacs_only=true

docs/published.md has the published accuracies and their sources. They were not measured here: no copy of ImageNet was
available. The GMACs of s4dfe agree with the plots within 0.2. No known rule gives the GMACs of the plots' s4winc7; the
one here follows the paper's text.
"""

from ml_collections import ConfigDict

from configs import eval_imagenet


def get_config() -> ConfigDict:
    config = eval_imagenet.get_config()
    config.checkpoint = "vit_large_patch16_224.augreg_in21k_ft_in1k"
    config.schedules = "dense"
    config.sweep = "tome:0-8,s4dfe:2-10:2?,s4dfe:11-11?,s4winc7:2-10:2?"
    config.batch_size = 128
    return config
