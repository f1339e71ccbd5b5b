"""The fields of a training run and their defaults, which the experiments start from; no experiment itself."""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def defaults() -> Any:
    config = ConfigDict()
    config.seed = 0
    config.train = placeholder(str)  # data sets: folder:PATH, digits:train, tfds:NAME/SPLIT
    config.test = placeholder(str)

    config.checkpoint = placeholder(str)  # directory, packaged:NAME or zoo name to start from; None: config.model
    config.image_size = placeholder(int)  # pixels of a side, where others than the checkpoint's are wanted
    config.preprocess = placeholder(str)  # a preset; None: the checkpoint's own
    config.model = ConfigDict()  # for a run from scratch, fields of fcvit_jax/models/config.py: ViTConfig
    config.dropout = 0.0  # probability
    config.drop_path = 0.0  # of leaving a layer out, in the last one; rising to it from the first
    config.schedule = "dense"  # the merge schedule that it is trained with
    config.dtype = "float32"  # float32 | tf32 | bfloat16: of the computation; parameters are float32
    config.remat = False  # compute activations again in the backward pass: less memory, more time
    config.fsdp = False  # spread parameters and the optimizer's state over the devices

    config.augment = ConfigDict()  # fcvit_jax/data/augment.py: Augment
    config.augment.crop = "random_resized"  # random_resized | resize_crop | eval: the preprocessing's own
    config.augment.scale = (0.08, 1.0)  # of a random_resized crop: share of the image's area
    config.augment.ratio = (3 / 4, 4 / 3)  # of a random_resized crop: width over height
    config.augment.flip = 0.5  # probability of mirroring
    config.augment.policy = "none"  # none, or RandAugment as timm writes it: rand-m9-n2-mstd0.5-inc1
    config.augment.erase = 0.0  # probability of a rectangle of noise
    config.augment.affine = placeholder(object)  # degrees, shift, scale and fill of a random affine map; None: none

    config.targets = ConfigDict()  # fcvit_jax/training/targets.py: TargetConfig
    config.targets.loss = "softmax"  # softmax | sigmoid
    config.targets.label_smoothing = 0.0  # share of the target that is spread over all classes
    config.targets.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    config.targets.cutmix = 0.0  # likewise; where both are on, each batch is mixed by one of them

    config.batch_size = 512  # over all devices of all hosts
    config.epochs = 10.0
    config.warmup_epochs = 0.0
    config.ema_decay = 0.0  # of averaged parameters, which are then the ones evaluated and written; 0: none

    config.optimizer = ConfigDict()  # fcvit_jax/training/optimizer.py: OptimizerConfig
    config.optimizer.name = "adamw"  # adamw | sgd | lion
    config.optimizer.learning_rate = placeholder(float)  # at the end of the warm-up; to be given
    config.optimizer.final_learning_rate = 0.0  # at the end of the run
    config.optimizer.schedule = "cosine"  # cosine | linear | constant
    config.optimizer.weight_decay = 0.0  # decoupled, of kernels
    config.optimizer.b1 = 0.9  # adamw, lion
    config.optimizer.b2 = 0.999  # adamw, lion
    config.optimizer.momentum = 0.9  # sgd
    config.optimizer.clip_norm = 1.0  # greatest norm of the gradient; None: any
    config.optimizer.layer_decay = placeholder(float)  # of the learning rate, layer by layer downwards; None: none
    config.optimizer.freeze = placeholder(str)  # regular expression of paths that stay: embed/|blocks_[0-7]/

    config.sam = ConfigDict()  # fcvit_jax/training/sam.py: SAMConfig
    config.sam.rho = 0.05  # radius; 0: no SAM
    config.sam.rho_final = placeholder(float)  # a cosine from rho to it; None: constant
    config.sam.adaptive = False  # ASAM, which wants about ten times the radius
    config.sam.eta = 0.01  # ASAM's floor
    config.sam.gap_weight = 0.0  # GSAM's alpha; 0: off
    config.sam.refresh_every = 1  # LookSAM's k; 1: SAM in every step
    config.sam.reuse_scale = 0.7  # LookSAM's alpha
    config.sam.microbatches = 1  # parts of the batch that are in memory one at a time
    config.sam.scope = "batch"  # batch | microbatch: one perturbation for each part (m-sharpness)
    config.sam.perturb = "all"  # all | kernels | norms
    config.sam_after_warmup = False  # a radius of 0 during the warm-up

    config.schedules = "dense"  # what is evaluated, beside dense
    config.flatness = False  # measure at the end how flat the minimum is, on training images: flatness.json, .png
    config.eval_every = 1000  # steps
    config.save_every = 1000
    config.log_every = 50
    config.keep = 2  # states on disk
    config.tensorboard = True
    config.workers = placeholder(int)  # decoding threads; None: what fits the machine
    config.on_bad = "stop"  # stop | skip: what an image that cannot be decoded does, in training and testing
    return config
