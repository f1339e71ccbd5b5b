"""Any checkpoint on a folder of images with one subfolder per class.

python evaluate.py --config=configs/eval_folder.py --config.checkpoint=DIR --config.dataset=folder:PATH --workdir=W
"""

from ml_collections import ConfigDict

from configs import eval_digits


def get_config() -> ConfigDict:
    config = eval_digits.get_config()
    config.checkpoint = ""  # required
    config.dataset = ""  # required
    config.batch_size = 16  # enough for a CPU; on GPUs pass 128 or more
    config.schedules = "dense,tome_r8,tome_r13,s2dfe_r16?,s2winc7_r16?"
    config.gallery = 8
    return config
