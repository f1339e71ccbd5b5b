import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's schedules and step counts mix integers with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield
