"""Thirteen images of noise in seven classes, and a ViT for them."""

import numpy as np

import fcvit_jax as fc
from fcvit_jax.data.preprocess import preset

CLASSES = tuple("abcdefg")
CONFIG = fc.ViTConfig((16, 16), 4, 16, 3, 2, 32, num_classes=len(CLASSES))
PREPROCESS = preset("timm/augreg,crop_pct=1.0", (16, 16))
SCHEDULES = ("dense", "tome_r3", "s1winc1_r4")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (13, 16, 16, 3), dtype=np.uint8)


def counts(rows):
    return [(row["schedule"], row["correct"], row["top5"], row["gained"], row["lost"], row["kl"]) for row in rows]
