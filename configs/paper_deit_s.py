"""DeiT-S/16 under the schedules of the comparison table of Heo et al., arXiv 2303.02331, on ImageNet's images.

    python -m fcvit_jax.convert deit_small_patch16_224.fb_in1k deit_s
    python evaluate.py --config=configs/paper_deit_s.py --config.checkpoint=deit_s --workdir=W

Compare what the schedules cost with the published numbers, without weights or images:

    python evaluate.py --config=configs/paper_deit_s.py --config.gmacs_only=true

docs/published.md has the published accuracies and their sources. They were not measured here: no copy of ImageNet was
available. The table prints GMACs to 0.1, which determines the rates of ToMe and DFE. It does not print the rate of the
full method, at 2.5 GMACs: the nearest s2winc7 has 2.64 GMACs, at r = 16.
"""

from ml_collections import ConfigDict

from configs import eval_imagenet


def get_config() -> ConfigDict:
    config = eval_imagenet.get_config()
    config.checkpoint = "deit_small_patch16_224.fb_in1k"
    config.schedules = "dense,tome_r12,s2dfe_r18?,s2winc7_r16?"
    return config
