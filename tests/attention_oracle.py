"""Proportional attention in float64 by NumPy, and random queries, keys, values and sizes for it."""

import jax
import jax.numpy as jnp
import numpy as np


def draw(tokens, queries, dtype, heads=3, width=16):
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (2, heads, tokens, width)
    q, k, v = (2 * jax.random.normal(key, shape).astype(dtype) for key in keys[:3])
    size = jax.random.randint(keys[3], (2, tokens), 1, 150).astype(jnp.float32)
    return q[:, :, :queries], k, v, size


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def by_numpy(q, k, v, size):
    """Attend: [b, h, q, w], [b, h, n, w] twice and sizes [b, n], or None for ones -> [b, h, q, w]."""
    q, k, v = map(float64, (q, k, v))
    logits = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights *= 1.0 if size is None else np.asarray(size, np.float64)[:, None, None]
    return weights / weights.sum(-1, keepdims=True) @ v
