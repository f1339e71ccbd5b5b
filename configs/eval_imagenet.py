"""Any ImageNet-1k checkpoint of 12 layers on the 50,000 validation images, read through TensorFlow Datasets.

    python evaluate.py --config=configs/eval_imagenet.py --config.checkpoint=DIR --workdir=W

Prepare the data set once, on a machine with TensorFlow (a data set that exists as TFRecord works too):

    tfds build imagenet2012 --file_format=array_record --manual_dir=FOLDER_WITH_ILSVRC2012_img_val.tar

Not run by the authors: no copy of ImageNet was available.
"""

from ml_collections import ConfigDict

from configs import eval_digits


def get_config() -> ConfigDict:
    config = eval_digits.get_config()
    config.checkpoint = ""  # required
    config.dataset = "tfds:imagenet2012/validation"
    config.schedules = "dense,tome_r8,tome_r13,s2dfe_r12?,s2dfe_r18?,s2winc7_r12?,s2winc7_r16?"
    config.batch_size = 256
    config.gallery = 8
    return config
