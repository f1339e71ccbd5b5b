"""The packaged digits ViT on scikit-learn's handwritten digits: the offline default.

    python evaluate.py

Expected: the table that README.md shows.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.checkpoint = "packaged:digits"  # a checkpoint directory, a train_sam.py working directory, or packaged:NAME
    config.dataset = "digits:test"  # folder:PATH, tfds:NAME/SPLIT[@DATA_DIR] or digits:train|test
    config.real_labels = ""  # ReaL's real.json: its labels replace those of ImageNet's validation images
    config.schedules = "dense,tome_r12,s2dfe_r15,s2winc5_r16"  # names or explicit forms, separated by commas
    config.sweep = ""  # dense and ranges of rates beside them: tome:0-16,s2dfe:2-20:2 (LOW-HIGH or LOW-HIGH:STEP)
    config.rules = ""  # run the schedules that merge under each of these merge rules: tome,evit(fuse=true),tofu
    config.gmacs_only = False  # print what the schedules cost and evaluate nothing; the name of a model is enough
    config.batch_size = 32  # images, over all devices
    config.dtype = "float32"  # float32, tf32 or bfloat16, which is faster on GPUs and on CPUs with AMX
    config.limit = config_dict.placeholder(int)  # evaluate the first N images only
    config.save_logits = False  # write logits_<schedule>.npz
    config.gallery = 0  # draw what the first N images are merged to under each schedule
    config.throughput_blocks = 5  # timed blocks per schedule; 0 leaves images/s out
    config.workers = config_dict.placeholder(int)  # decoding threads; default: one per core
    return config
