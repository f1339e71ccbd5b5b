"""Every experiment loads, and its fields make sense."""

import importlib
import re
from pathlib import Path

import pytest
from flax import traverse_util

from configs import digits_sam, training
from fcvit_jax.checkpoint import load_checkpoint
from fcvit_jax.data.preprocess import preset
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation import EvaluationConfig
from fcvit_jax.models import zoo
from fcvit_jax.models.schedule import fit_schedules
from fcvit_jax.training import TrainConfig

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
    # Fields that the command line must set.
    config.train, config.test = config.train or "folder:train", config.test or "folder:test"
    if not config.model and not config.checkpoint:
        config.checkpoint = "deit_small_patch16_224.fb_in1k"
    config = TrainConfig.from_dict(config.to_dict())
    model = config.model or zoo.get(config.checkpoint or "").config
    if config.preprocess:
        preset(config.preprocess, model.image_size)
    assert fit_schedules(config.schedules, model)[1] == ()


@pytest.mark.parametrize("name", NAMES)
def test_the_experiment_has_schedules_for_every_model(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    typed = ",".join(filter(None, ("dense", config.schedules, config.get("sweep"))))
    for model in (*zoo.ARCHITECTURES.values(), load_checkpoint("packaged:digits").config):
        named, lines = fit_schedules(typed, model)
        assert any(each.startswith("tome_") for each in named)
        if model.depth >= 12 and not any(side % 2 for side in model.grid):
            assert lines == ()
        else:
            assert all(line.startswith("schedules left out") for line in lines)


def test_the_documentation_lists_every_field_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    listed = dict(re.findall(r"^\| `([\w.]+)` \| (.*?) \|", page, re.MULTILINE))
    fields = traverse_util.flatten_dict(training.defaults().to_dict(), sep=".", keep_empty_nodes=True)
    wanted = {name: f"`{value}`" for name, value in fields.items() if name not in ("train", "test", "model")}
    wanted |= {name: "none" for name, value in fields.items() if value is None}
    wanted |= {
        name: f"`{', '.join(f'{x:.3g}' for x in value)}`" for name, value in fields.items() if type(value) is tuple
    }
    wanted |= {"train": "required", "test": "required", "optimizer.learning_rate": "required", "model": "none"}
    assert {name: default for name, default in listed.items() if name in wanted} == wanted


@pytest.mark.parametrize("change", [{"rho": 0.1}, {"sam": {"radius": 0.1}}, {"sam": 0.1}])
def test_fields_that_do_not_exist_are_named(change):
    config = digits_sam.get_config().to_dict() | change
    with pytest.raises(
        InputError, match=r"^rho: there is no such|^sam\.radius: there is no such|^sam is 0\.1: it must be"
    ):
        TrainConfig.from_dict(config)
