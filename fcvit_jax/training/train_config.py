"""The configuration of a training run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.sources import FORMS
from fcvit_jax.errors import InputError
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.settings import check_settings, from_fields, setting
from fcvit_jax.training.optimizer import OptimizerConfig
from fcvit_jax.training.sam import SAMConfig
from fcvit_jax.training.targets import TargetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how. Raises InputError that names the field.

    docs/training.md lists all fields, those of `augment`, `targets`, `optimizer` and `sam` included.
    """

    train: str  # data sets: folder:PATH, digits:train, tfds:NAME/SPLIT
    test: str
    seed: int = setting(0, low=0)

    checkpoint: str | None = None  # directory, packaged:NAME or zoo name to start from; None: `model`, from scratch
    model: ViTConfig | None = None  # of a run from scratch; its num_classes is replaced by the training set's
    image_size: int | None = setting(None, low=1)  # pixels a side, if not the checkpoint's
    preprocess: str | None = None  # a preset; None: the checkpoint's own
    class_names: str | None = None  # of the checkpoint's head, or their order, as `read_class_names` takes them
    dropout: float = setting(0.0, low=0, below=1)  # probability
    drop_path: float = setting(0.0, low=0, below=1)  # probability in the last layer; rises linearly from 0 in the first
    schedule: str | MergeSchedule = "dense"  # the merge schedule to train with
    dtype: str = setting("float32", choices=tuple(PRECISIONS))  # of the computation; parameters are float32
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    fsdp: bool = False  # spread parameters and the optimizer's state over the devices

    augment: Augment = dataclasses.field(default_factory=Augment)
    targets: TargetConfig = dataclasses.field(default_factory=TargetConfig)
    batch_size: int = setting(512, low=1)  # over all devices of all hosts
    epochs: float = setting(10.0, above=0)
    warmup_epochs: float = setting(0.0, low=0)
    ema_decay: float = setting(0.0, low=0, below=1)  # of a running average, which is evaluated and written; 0: none
    optimizer: OptimizerConfig
    sam: SAMConfig = dataclasses.field(default_factory=SAMConfig)
    sam_after_warmup: bool = False  # SAM starts when the warm-up of the learning rate ends

    schedules: str = "dense"  # evaluated beside dense
    flatness: bool = False  # measure at the end how flat the minimum is, on training images
    eval_every: int = setting(1000, low=1)  # steps
    save_every: int = setting(1000, low=1)
    log_every: int = setting(50, low=1)
    keep: int = setting(2, low=1)  # states on disk
    tensorboard: bool = True
    workers: int | None = setting(None, low=1)  # decoding threads; None: as many as fit the machine
    on_bad: str = setting("stop", choices=("stop", "skip"))  # for images that cannot be decoded

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing: set --config.{name}=... to a data set such as {FORMS}")
        check_settings(self)
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"warmup_epochs is {self.warmup_epochs}: it must be below epochs, {self.epochs}")
        if self.checkpoint:
            return
        if not self.model:
            raise InputError(
                "checkpoint is missing: set --config.checkpoint=..., or, to train from scratch, use an experiment that "
                "has config.model, such as configs/imagenet_vit_sam.py"
            )
        if not self.preprocess:
            raise InputError("preprocess is missing: set --config.preprocess=..., such as timm/augreg")
        if self.image_size:
            raise InputError(
                f"image_size is {self.image_size}: it resamples a checkpoint, and none is given; set model.image_size"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "TrainConfig":
        """Build it from nested mappings, such as a ConfigDict or what `to_dict` returned; an empty model is none.

        Raises InputError that names an unknown or missing field.
        """
        return from_fields(cls, {"train": None, "test": None, **fields, "model": fields.get("model") or None})

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as nested dicts, for JSON; a schedule as text."""
        return dataclasses.asdict(self) | {"schedule": str(self.schedule)}
