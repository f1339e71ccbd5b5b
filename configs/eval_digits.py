"""The packaged digits ViT on scikit-learn's handwritten digits: the offline default.

    python evaluate.py

Expected: the table that README.md shows, within half a minute on two CPU cores.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.checkpoint = "packaged:digits"  # a checkpoint directory, a train_sam.py working directory, or packaged:NAME
    config.dataset = "digits:test"  # folder:PATH, tfds:NAME/SPLIT[@DATA_DIR] or digits:train|test
    config.real_labels = ""  # ReaL's real.json: its labels replace those of ImageNet's validation images
    # Names or explicit forms, separated by commas; a schedule with a ? is left out if it does not fit the model.
    config.schedules = "dense,tome_r16,tome_r32,tome_r16@nearest,tome_r32@nearest,s2dfe_r32?,s2winc5_r32?"
    config.sweep = ""  # dense and ranges of rates beside them: tome:0-16,s2dfe:2-20:2 (LOW-HIGH or LOW-HIGH:STEP)
    config.rules = ""  # run the schedules that merge under each of these merge rules: tome,evit(fuse=true),tofu
    config.gmacs_only = False  # only print what the schedules cost; checkpoint may then be the name of a model
    config.batch_size = 32  # images, over all devices
    config.dtype = "float32"  # float32, tf32 or bfloat16, which is faster on GPUs and on CPUs with AMX
    config.limit = config_dict.placeholder(int)  # evaluate N images: the first, or from all classes of a folder
    config.save_logits = False  # write logits_<schedule>.npz
    config.gallery = 0  # draw the merged regions of the first N images under each schedule
    config.throughput_blocks = 5  # timed blocks per schedule; 0 leaves images/s out
    config.workers = config_dict.placeholder(int)  # decoding threads; default: one per core
    config.on_bad = "stop"  # or skip: images that cannot be read are counted and left out
    # Class names of the head, instead of the checkpoint's: a text file, or the order of the data set's classes in it:
    # timm, imagefolder (torchvision's), numeric or dataset.
    config.class_names = ""
    # For a checkpoint without a head: labelled images; the nearest of them classify the data set's images.
    config.neighbours = ""
    return config
