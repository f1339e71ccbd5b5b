"""Every kernel of attention against float64, proportional attention included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcvit_jax as fc
from fcvit_jax.models.attention import attend, attend_fused

SHAPE = (2, 3, 11, 16)  # images, heads, tokens, head width


def as_cudnn(q, k, v, size):
    """What goes into cuDNN, computed by XLA: without a GPU the kernel itself is not tried."""
    with jax.numpy_dtype_promotion("standard"):  # XLA's own way mixes dtypes
        return attend_fused(q, k, v, size, "xla")


KERNELS = {"xla": attend, "cudnn": as_cudnn}


def draw(queries, dtype):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (2 * jax.random.normal(key, SHAPE).astype(dtype) for key in keys[:3])
    size = jax.random.randint(keys[3], (2, 11), 1, 150).astype(jnp.float32)
    return q[:, :, :queries], k, v, size


def by_numpy(q, k, v, size):
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    weights = np.exp(q @ k.swapaxes(2, 3)) * (1.0 if size is None else np.asarray(size, np.float64)[:, None, None])
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("queries", [11, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 0.03)])
@pytest.mark.parametrize("proportional", [True, False])
def test_attention_equals_float64(kernel, queries, dtype, tolerance, proportional):
    q, k, v, size = draw(queries, dtype)
    size = size if proportional else None
    found = jax.jit(KERNELS[kernel])(q, k, v, size)
    assert found.dtype == dtype
    assert found.shape == (2, 3, queries, 16)
    np.testing.assert_allclose(np.asarray(found, np.float64), by_numpy(q, k, v, size), atol=tolerance)


def test_the_logarithm_of_the_size_keeps_float32s_precision_in_bfloat16():
    """Keys and queries are zero: the weights are the sizes alone, and what is off is bfloat16's rounding of them."""
    size = jnp.asarray([[1.0, 2.0, 5.0, 7.0, 13.0, 49.0, 101.0, 150.0]])
    zero, values = jnp.zeros((1, 1, 8, 8), jnp.bfloat16), jnp.eye(8, dtype=jnp.bfloat16)[None, None]
    weights = np.asarray(as_cudnn(zero, zero, values, size), np.float64)[0, 0, 0]
    # A single number of bfloat16 for the logarithm would put the weights off by up to 1.1 %.
    np.testing.assert_allclose(weights, np.asarray(size[0]) / float(size.sum()), rtol=2**-8)


def test_a_kernel_that_is_not_to_be_had_is_told():
    q, k, v, size = draw(11, jnp.float32)
    with pytest.raises(fc.InputError, match="'cudnn': it takes an NVIDIA GPU and bfloat16; choose xla"):
        attend(q, k, v, size, "cudnn")
    with pytest.raises(fc.InputError, match="attention is 'flash': choose one of xla, cudnn"):
        attend(q, k, v, size, "flash")


def test_a_model_computes_by_the_kernel_that_it_is_told():
    config = fc.ViTConfig((32, 32), 8, 32, 2, 2, 64, num_classes=5)
    model = fc.ViT(config, attention="cudnn", dtype=jnp.bfloat16)
    images = jnp.zeros((1, 32, 32, 3))
    params = fc.ViT(config).init(jax.random.key(0), images)["params"]
    if jax.default_backend() != "gpu":
        with pytest.raises(fc.InputError, match="NVIDIA GPU"):
            model.apply({"params": params}, images)
    else:
        expected, _ = fc.ViT(config, dtype=jnp.bfloat16).apply({"params": params}, images)
        np.testing.assert_allclose(model.apply({"params": params}, images)[0], expected, atol=0.03)
