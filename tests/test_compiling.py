import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax import compiling, parallel


@pytest.fixture(autouse=True)
def fresh():
    compiling._accepted.cache_clear()
    yield
    compiling._accepted.cache_clear()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_program_compiles_with_the_options_and_computes_the_same(dtype, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(compiling, "cpu_info", lambda: "vendor_id : GenuineIntel")
    wanted = compiling.options(8, 197, dtype)
    names = {"cpu": {"xla_cpu_use_fusion_emitters"}, "gpu": {"xla_gpu_enable_triton_gemm"}}[jax.default_backend()]
    if dtype == jnp.float32 and jax.default_backend() == "cpu":
        names |= {"xla_cpu_experimental_ynn_fusion_type"}
    if jax.__version_info__ >= (0, 11):
        names -= {"xla_cpu_use_fusion_emitters"}  # this XLA has one emitter only
    assert set(wanted or {}) == names
    x = jax.random.normal(jax.random.key(0), (64, 64), dtype)
    lowered = jax.jit(lambda x: jnp.exp(x @ x / 8) + 1).lower(x)
    found, expected = (np.asarray(lowered.compile(each)(x), np.float32) for each in (wanted, None))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_options_depend_on_backend_size_and_dtype(monkeypatch):
    monkeypatch.setattr(compiling, "_accepted", lambda name, value: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiling.options(1, 197, jnp.bfloat16) is None
    assert compiling.options(8, 197, jnp.bfloat16) == {"xla_gpu_enable_triton_gemm": False}
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(compiling, "cpu_info", lambda: "vendor_id : GenuineIntel")
    loops, products = {"xla_cpu_use_fusion_emitters": False}, "xla_cpu_experimental_ynn_fusion_type"
    for images, tokens, dtype in [(1, 197, jnp.float32), (2, 785, jnp.float32), (8, 197, jnp.bfloat16)]:
        assert compiling.options(images, tokens, dtype) == loops
    for images, tokens in [(4, 197), (3, 257), (2, 577)]:
        found = compiling.options(images, tokens, jnp.float32)
        assert found is not None
        assert set(found) == {*loops, products}
    for info in ("vendor_id : AuthenticAMD", ""):
        monkeypatch.setattr(compiling, "cpu_info", lambda info=info: info)
        assert compiling.options(8, 197, jnp.float32) == loops
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiling.options(8, 197, jnp.float32) is None


def test_xla_flags_decide(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true --xla_gpu_enable_triton_gemm=true")
    monkeypatch.setattr(compiling, "cpu_info", lambda: "vendor_id : GenuineIntel")
    found = compiling.options(8, 197, jnp.float32)
    if jax.default_backend() == "cpu":
        assert found is not None
        assert list(found) == ["xla_cpu_experimental_ynn_fusion_type"]
    assert compiling.options(8, 197, jnp.bfloat16) is None


def test_an_option_that_xla_lacks_is_left_out():
    assert not compiling._accepted("xla_no_such_option", True)


@pytest.mark.parametrize(
    ("images", "tokens", "size"),
    [
        (32, 197, 16),
        (8, 197, 8),
        (31, 197, 31),
        (24, 197, 12),
        (34, 197, 34),
        (32, 65, 32),
        (4, 1370, 2),
        (5, 1370, 1),
        (7, 785, 7),
        (3, 4000, 1),
    ],
)
def test_a_cpu_computes_about_3200_tokens_at_a_time(images, tokens, size):
    cpu, gpu = SimpleNamespace(platform="cpu"), SimpleNamespace(platform="gpu")
    assert compiling.part_size(images, tokens, [cpu]) == size
    assert compiling.part_size(images, tokens, [gpu]) == images


def test_several_devices_of_a_cpu_compute_half_as_many_at_a_time():
    cpu = SimpleNamespace(platform="cpu")
    assert compiling.part_size(16, 197, [cpu] * 2) == 8
    assert compiling.part_size(4, 197, [cpu] * 8) == 4


THREE = pytest.param(1, 3, marks=pytest.mark.devices(3))


@pytest.mark.parametrize(("size", "devices"), [(6, 1), (3, 1), (2, 1), (1, 1), (3, 2), (1, 2), THREE])
def test_parts_come_together_in_order(size, devices, monkeypatch):
    seen = []

    def call(params, x, pair):
        seen.append(len(x))
        return {"sum": x.sum(axis=1) * params, "pair": (pair[0] + 1, pair[1])}

    x, y = jnp.arange(24.0).reshape(6, 4), jnp.arange(6)
    monkeypatch.setattr(compiling, "_TOKENS", 10 * size * min(devices, 2))
    mesh = parallel.data_mesh(jax.devices("cpu")[:devices])
    x, y = jax.device_put((x, y), parallel.batched(mesh))
    program = jax.jit(compiling.on_each_device(call, 10, mesh))
    found = program(2.0, x, (y, x))
    assert set(seen) == {size}
    assert found["sum"].sharding.is_equivalent_to(parallel.batched(mesh), 1)
    assert "jit_call" in program.lower(2.0, x, (y, x)).as_text()
    assert found["sum"].tolist() == (2 * x.sum(axis=1)).tolist()
    assert found["pair"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert found["pair"][1].tolist() == x.tolist()


@pytest.mark.parametrize("subscripts", ["nd,dm->nm", "bjn,bnd->bjd"])
def test_products_of_bfloat16_are_float32_until_the_end_on_cpu_alone(subscripts):
    shapes = [tuple({"b": 2}.get(letter, 64) for letter in part) for part in subscripts.split("->")[0].split(",")]
    x, y = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    product = jax.jit(partial(compiling.einsum, subscripts))

    def dots(platform, *arguments):
        text = product.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"stablehlo\.dot_general.*-> tensor<[\dx]*x(\w+)>", text)

    assert dots("cpu", x, y) == ["f32"]
    assert dots("cuda", x, y) == ["bf16"]
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    assert dots("cpu", *wide) == ["f32"]
    with jax.default_matmul_precision("highest"):
        expected = jnp.einsum(subscripts, *wide)
    found = product(x, y)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=1e-5)

    def total(x, y):
        return jnp.sum(product(x, y).astype(jnp.float32) ** 2)

    for gradient, like in zip(jax.grad(total, (0, 1))(x, y), (x, y), strict=True):
        assert gradient.dtype == like.dtype
    for gradient, exact in zip(jax.grad(total, (0, 1))(x, y), jax.grad(total, (0, 1))(*wide), strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), exact, atol=0.02 * float(jnp.abs(exact).max()))


def test_sums_are_finished_before_they_are_rounded_on_cpu_alone():
    x, y = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(2))
    seen = []

    def finish(sums):
        seen.append(sums.dtype)
        return sums + jnp.full((), 100.0, sums.dtype)

    product = jax.jit(lambda x, y: compiling.einsum("nd,dm->nm", x, y, finish))
    found = product(x, y)
    assert set(seen) == {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}  # from both platforms
    wide = x.astype(jnp.float32), y.astype(jnp.float32)
    once = np.asarray((jnp.einsum("nd,dm->nm", *wide) + 100.0).astype(jnp.bfloat16))
    twice = np.asarray(jnp.einsum("nd,dm->nm", *wide).astype(jnp.bfloat16) + jnp.bfloat16(100.0))
    if jax.default_backend() == "cpu":
        assert (np.asarray(found) != once).mean() < 0.01  # except for the order of the sums
        assert (twice != once).mean() > 0.01
    assert product(*wide).dtype == jnp.float32
