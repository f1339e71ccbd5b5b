"""A small ViT on scikit-learn's 1,437 training digits, from scratch, with SAM: the packaged checkpoint.

python train_sam.py --config=configs/digits_sam.py --workdir=W

"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.train = "digits:train"
    config.test = "digits:test"
    config.preprocess = "timm/augreg,crop_pct=1.0"  # 8x8 pixels scaled to image_size; values to -1 .. 1

    config.model = ConfigDict()  # fields of ViTConfig
    config.model.image_size = (32, 32)
    config.model.patch_size = 4
    config.model.embed_dim = 64
    config.model.depth = 6
    config.model.num_heads = 4
    config.model.mlp_dim = 256
    config.drop_path = 0.05

    config.augment = ConfigDict()  # fields of RandomAffine
    config.augment.degrees = 12.0
    config.augment.shift = 0.06
    config.augment.scale = (0.88, 1.12)

    config.batch_size = 64
    config.epochs = 50
    config.warmup_epochs = 5
    config.learning_rate = 3e-3
    config.weight_decay = 0.05
    config.clip_norm = 1.0
    config.label_smoothing = 0.1
    config.rho = 0.05  # radius of SAM; 0 trains without
    return config
