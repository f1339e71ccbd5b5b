"""The twin of configs/digits_sam.py without SAM: the same everything, a radius of 0.

python train_sam.py --config=configs/digits_adamw.py --workdir=W

Gave packaged:digits_adamw, 353 of 360 right (98.06 %); by today's order of sums it ends at 352, after 1,188 steps and 1
min 39 s on two CPU cores.
"""

from typing import Any

from configs import digits_sam


def get_config() -> Any:
    config = digits_sam.get_config()
    config.sam.rho = 0.0
    return config
