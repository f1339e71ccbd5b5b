"""Proportional attention against float64, its gradients, and what is lowered for other devices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_oracle import by_numpy, draw, float64
from fcvit_jax.models import attention
from fcvit_jax.models.attention import attend
from fcvit_jax.models.rules import mean_over_heads
from fcvit_jax.parallel import batched, data_mesh


@pytest.mark.parametrize(("tokens", "queries"), [(11, 11), (11, 1), (261, 1), (405, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_equals_float64(tokens, queries, dtype, tolerance, proportional):
    q, k, v, size = draw(tokens, queries, dtype)
    size = size if proportional else None
    found = jax.jit(attend)(q, k, v, size)
    assert found.dtype == dtype
    assert found.shape == (2, 3, queries, 16)
    np.testing.assert_allclose(float64(found), by_numpy(q, k, v, size), atol=tolerance)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(
    ("together", "dtype", "tolerance"),
    [(together, jnp.float32, 2e-5) for together in (0.3, 1, 2, 4)] + [(2, jnp.bfloat16, 0.03)],
)
def test_many_keys_attend_by_some_heads_at_a_time(together, dtype, tolerance, proportional, monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS", int(2 * 405 * 405 * together))
    jax.clear_caches()  # which know the function, and not the limit
    q, k, v, size = draw(405, 405, dtype, heads=4)
    program = jax.jit(lambda q, k, v: attend(q, k, v, size if proportional else None)).lower(q, k, v)
    logits = f"{2 * max(1, int(together))}x{math.ceil(405 / math.ceil(1 / together))}x405"
    assert (f"tensor<{logits}xf32>" in program.as_text()) == (jax.default_backend() == "cpu")
    expected = by_numpy(q, k, v, size if proportional else None)
    np.testing.assert_allclose(float64(program.compile()(q, k, v)), expected, atol=tolerance)


@pytest.mark.skipif(jax.device_count() < 2, reason="there is one device")
def test_images_with_many_keys_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS", 2 * 405 * 405)  # one head at a time
    jax.clear_caches()  # which know the function, and not the limit
    qkv, size = jax.device_put(
        (jnp.ones((2, 3, 3, 405, 16)), jnp.ones((2, 405))), batched(data_mesh(jax.devices()[:2]))
    )

    def call(qkv, size):
        q, k, v = jnp.moveaxis(qkv, 1, 0)
        return attend(q, k, v, size), mean_over_heads(k)

    def total(qkv, size):
        y, keys = call(qkv, size)
        return (y.sum(axis=(1, 2, 3)) + keys.sum(axis=(1, 2))) @ jnp.ones(2)

    for program in (jax.jit(call), jax.jit(jax.grad(total))):
        text = str(program.lower(qkv, size).compile().as_text())
        assert "while" in text
        assert not re.search("all-gather|all-to-all|collective-permute", text)


@pytest.mark.parametrize("queries", [11, 1])
def test_attention_by_softmax_as_on_gpus(queries):
    q, k, v, size = draw(11, queries, jnp.bfloat16)
    call = jax.jit(attention._attend_by_softmax)
    bias = jnp.log(size)[:, None, None]
    np.testing.assert_allclose(float64(call(q * q.shape[-1] ** -0.5, k, v, bias)), by_numpy(q, k, v, size), atol=0.03)
    text = call.trace(q, k, v, bias).lower(lowering_platforms=("cuda",)).as_text()
    sums = re.findall(r"stablehlo\.dot_general.*-> tensor<[\dx]*x16x(\w+)>", text)
    assert sums == ["f32" if queries == 1 else "bf16"]


@pytest.mark.parametrize("tokens", [11, 261, 405])  # the second in two halves, the third head by head
@pytest.mark.parametrize("scale", [1.0, 40.0])  # at 40, exp overflows
@pytest.mark.parametrize("proportional", [True, False])
def test_gradients_of_attention_equal_those_through_softmax(tokens, scale, proportional, monkeypatch):
    monkeypatch.setattr(attention, "_LOGITS", 2 * tokens**2)
    q, k, v, size = draw(tokens, tokens, jnp.float32)
    qkv = scale * q, k, v
    size = size if proportional else None
    towards = jax.random.normal(jax.random.key(9), (2, 3, tokens, 16))

    def by_softmax(q, k, v):
        logits = jnp.einsum("bhqk,bhnk->bhqn", q, k) / 4
        logits += 0.0 if size is None else jnp.log(size)[:, None, None, :]
        return jnp.sum(jnp.einsum("bhqn,bhnk->bhqk", jax.nn.softmax(logits), v) * towards)

    def ours(q, k, v):
        return jnp.sum(attend(q, k, v, size) * towards)

    for found, expected in zip(*(jax.grad(f, (0, 1, 2))(*qkv) for f in (ours, by_softmax)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * scale)


def test_the_mean_over_heads_is_the_mean():
    k = jax.random.normal(jax.random.key(0), (2, 5, 7, 4), jnp.bfloat16)
    np.testing.assert_allclose(mean_over_heads(k), float64(k).mean(axis=1), rtol=1e-6, atol=1e-6)
