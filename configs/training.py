"""The fields of a training run and their defaults, which the experiments start from; no experiment itself."""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fcvit_jax.data.augment import Augment
from fcvit_jax.training.optimizer import OptimizerConfig
from fcvit_jax.training.sam import SAMConfig
from fcvit_jax.training.targets import TargetConfig


def defaults() -> Any:
    config = ConfigDict()
    config.seed = 0
    config.train = placeholder(str)  # data sets: folder:PATH, digits:train, tfds:NAME/SPLIT
    config.test = placeholder(str)

    config.checkpoint = placeholder(str)  # directory, packaged:NAME or zoo name to start from; None: config.model
    config.image_size = placeholder(int)  # pixels, where others than the checkpoint's are wanted
    config.preprocess = placeholder(str)  # a preset; None: the checkpoint's own
    config.model = ConfigDict()  # fields of ViTConfig, for a run from scratch
    config.dropout = 0.0
    config.drop_path = 0.0
    config.schedule = "dense"  # the merge schedule that it is trained with
    config.dtype = "float32"  # float32 | tf32 | bfloat16: of the computation; parameters are float32
    config.remat = False  # compute activations again in the backward pass: less memory, more time
    config.fsdp = False  # spread parameters and the optimizer's state over the devices

    config.augment = fields(Augment, affine=placeholder(object))
    config.targets = fields(TargetConfig)  # label_smoothing, loss, mixup, cutmix
    config.batch_size = 512  # over all devices of all hosts
    config.epochs = 10.0
    config.warmup_epochs = 0.0
    config.optimizer = fields(OptimizerConfig, warmup_steps=None)
    config.ema_decay = 0.0  # of averaged parameters, which are then the ones evaluated and written; 0: none

    config.sam = fields(SAMConfig, start_step=None)
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


def fields(kind: Any, **others: Any) -> ConfigDict:
    """The fields of a dataclass with their defaults; of `others` those given instead, and none for None."""
    config = ConfigDict()
    for field in dataclasses.fields(kind):
        value = others.get(field.name, field.default)
        if field.name in others and value is None:
            continue
        unset = value is None or value is dataclasses.MISSING
        types = [t for t in typing.get_args(field.type) or (field.type,) if t is not type(None)]
        config[field.name] = placeholder(types[0]) if unset else value
    return config
