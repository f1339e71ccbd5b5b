"""Every experiment loads, and what it says makes sense to whom it is for."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from configs import training
from fcvit_jax.data.augment import Augment
from fcvit_jax.data.preprocess import preset
from fcvit_jax.evaluation import EvaluationConfig
from fcvit_jax.models import zoo
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import parse_schedules
from fcvit_jax.training.job import check_fields
from fcvit_jax.training.optimizer import OptimizerConfig
from fcvit_jax.training.sam import SAMConfig
from fcvit_jax.training.targets import TargetConfig

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs").glob("*.py") if path.stem != "training")


def test_there_are_experiments():
    assert len(NAMES) >= 13


@pytest.mark.parametrize("name", NAMES)
def test_the_experiment_loads_and_its_fields_make_sense(name, tmp_path):
    config = importlib.import_module(f"configs.{name}").get_config()
    if "sam" not in config:
        names = ("checkpoint", "dataset", "schedules", "sweep", "gmacs_only")  # the other fields are of the evaluation
        EvaluationConfig(**{name: value for name, value in config.items() if name not in names})
        return
    # What is left to the command line.
    config.train, config.test = config.train or "folder:train", config.test or "folder:test"
    if not config.model and not config.checkpoint:
        config.checkpoint = "deit_small_patch16_224.fb_in1k"
    check_fields(config, tmp_path)
    SAMConfig(**config.sam)
    OptimizerConfig(**config.optimizer)
    TargetConfig(**config.targets)
    Augment(**config.augment)
    model = ViTConfig(num_classes=10, **config.model.to_dict()) if config.model else zoo.get(config.checkpoint).config
    if config.preprocess:
        preset(config.preprocess, model.image_size)
    for schedule in parse_schedules(config.schedules, model.depth).values():
        schedule.plan(model)


@pytest.mark.parametrize(
    ("field", "kind", "elsewhere"),
    [
        ("augment", Augment, set()),
        ("targets", TargetConfig, set()),
        ("optimizer", OptimizerConfig, {"warmup_steps"}),  # of warmup_epochs
        ("sam", SAMConfig, {"start_step"}),  # of sam_after_warmup
    ],
)
def test_the_fields_and_defaults_that_are_written_out_are_those_of_the_code(field, kind, elsewhere):
    missing = dataclasses.MISSING
    fields = {each.name: None if each.default is missing else each.default for each in dataclasses.fields(kind)}
    written = training.defaults()[field]
    assert {**written} == {name: default for name, default in fields.items() if name not in elsewhere}
