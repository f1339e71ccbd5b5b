"""Training with sharpness-aware minimisation: `train(TrainConfig(...), workdir)`."""

from fcvit_jax.data.augment import Augment as Augment
from fcvit_jax.training.loop import TrainResult as TrainResult
from fcvit_jax.training.loop import train as train
from fcvit_jax.training.optimizer import OptimizerConfig as OptimizerConfig
from fcvit_jax.training.sam import SAMConfig as SAMConfig
from fcvit_jax.training.targets import TargetConfig as TargetConfig
from fcvit_jax.training.train_config import TrainConfig as TrainConfig
