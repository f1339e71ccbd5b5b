"""Any checkpoint on a folder of images, one folder a class.

python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W
"""

from ml_collections import ConfigDict

from configs import eval_digits


def get_config() -> ConfigDict:
    config = eval_digits.get_config()
    config.checkpoint = ""  # to be given
    config.dataset = ""  # to be given
    config.batch_size = 16  # large enough for a CPU; on GPUs pass 128 or more
    config.schedules = "dense,tome_r8,tome_r13,s2dfe_r16,s2winc7_r16"
    config.gallery = 8
    return config
