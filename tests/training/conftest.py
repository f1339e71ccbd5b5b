import contextlib

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from fcvit_jax import parallel


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedules and step counts mix integers with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def devices(monkeypatch):
    """Return a function that sets the number of devices which a run in this process sees."""

    def few(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        monkeypatch.setattr(parallel, "data_mesh", lambda: mesh)

    few(1)
    return few


@pytest.fixture
def stop_at(monkeypatch):
    """Return a function that makes the next run in this process see a signal at its n-th query."""

    def at(number):
        @contextlib.contextmanager
        def stop_signal():
            asked = []
            yield lambda: asked.append(None) or len(asked) >= number

        monkeypatch.setattr(parallel, "stop_signal", stop_signal)

    return at
