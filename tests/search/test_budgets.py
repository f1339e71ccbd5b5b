"""fcvit_jax.search.budgets: the times of layers, measured for real."""

import jax
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax import parallel
from fcvit_jax.evaluation.accuracy import StepConfig
from fcvit_jax.models import attention
from fcvit_jax.models.config import Rotary
from fcvit_jax.models.rules import Nearest, ToMe
from fcvit_jax.search.budgets import measure_layers


@pytest.mark.parametrize("rotary", [None, Rotary()])
def test_layers_are_timed(rotary, monkeypatch):
    turned = []
    rotate = attention.rotate
    monkeypatch.setattr(attention, "rotate", lambda *args: turned.append(args) or rotate(*args))
    config = fc.ViTConfig((32, 32), 4, 32, 3, 2, 64, num_classes=3, rotary=rotary)
    params = jax.jit(fc.ViT(config).init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    step = StepConfig(fc.Preprocess(), parallel.data_mesh(jax.devices()[:1]), batch_size=2)
    turned.clear()
    times = measure_layers(config, params, [Nearest(), ToMe()], step, lambda: np.zeros(1))
    assert bool(turned) == bool(rotary)  # what rotary positions cost is timed too
    assert times.counts[-1] == config.num_tokens
    assert len(times.counts) == len(times.dense) == len(times.merging["nearest"]) == len(times.merging["tome"])
    assert min(times.dense) > 0
    assert np.isfinite(times.seconds(fc.MergeSchedule.parse("tome_r8", 3), config))
