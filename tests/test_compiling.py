import jax
import jax.numpy as jnp
import pytest

from fcvit_jax import compiling


@pytest.fixture(autouse=True)
def fresh():
    compiling.options.cache_clear()
    yield
    compiling.options.cache_clear()


def test_a_program_compiles_with_the_options_and_computes_the_same(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    wanted = compiling.options()
    assert wanted == ({"xla_cpu_use_fusion_emitters": False} if jax.default_backend() == "cpu" else None)
    lowered = jax.jit(lambda x: jnp.exp(x) + 1.0).lower(jnp.zeros(3))
    assert lowered.compile(wanted)(jnp.zeros(3)).tolist() == [2.0, 2.0, 2.0]


def test_xla_flags_decide(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    assert compiling.options() is None


def test_an_option_that_xla_has_not_is_left_out(monkeypatch):
    monkeypatch.setattr(compiling, "_FASTER", {jax.default_backend(): {"xla_no_such_option": True}})
    assert compiling.options() is None
