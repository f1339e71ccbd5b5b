"""configs/digits_sam.py with DINOv3's rotary positions instead of learned ones: 357 of 360 test images.

python train_sam.py --config=configs/digits_rotary.py --workdir=W

benchmarks/positions.py measures merged positions on it (docs/rules.md).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import digits_sam


def get_config() -> Any:
    config = digits_sam.get_config()
    config.model.learned_positions = False
    config.model.rotary = ConfigDict({"theta": 100.0, "rotation": "half", "coordinates": "centred"})
    return config
