"""The fields of a training run with their defaults, from which the experiments start.

docs/training.md explains every field. The fields and defaults are those of `fcvit_jax.training.TrainConfig`.
"""

import dataclasses
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fcvit_jax.settings import nested_class
from fcvit_jax.training import TrainConfig


def defaults() -> Any:
    config = _fields_of(TrainConfig)
    config.model = ConfigDict()  # fields of ViTConfig, only for a run from scratch
    return config


def _fields_of(cls: Any) -> ConfigDict:
    config = ConfigDict()
    for field in dataclasses.fields(cls):
        if field.default in (None, dataclasses.MISSING):
            nested = nested_class(field)
            required = nested is not None and field.default is dataclasses.MISSING
            kind = next(iter(typing.get_args(field.type)), field.type)
            config[field.name] = _fields_of(nested) if required else placeholder(object if nested else kind)
        else:
            config[field.name] = field.default
    return config
