"""The loss along a random line and over a random plane through the parameters, filter-normalised (arXiv 1712.09913).

Pictures, not evidence: a random direction meets hardly any of the sharp ones.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.flatness.loss_surface import LossFn, LossSurface
from fcvit_jax.trees import Params, random_like


@jax.jit
def filter_normalised(params: Params, key: jax.Array) -> Params:
    """A random direction in which each filter is as long as that of the parameters (section 4 of the paper).

    A filter makes one output: a kernel without its last axis. Leaves with another name do not move: biases, norms and
    LayerScale as in the paper's code, and tokens and positions, which are added as biases are.
    """

    def rescale(path: Any, weights: jax.Array, direction: jax.Array) -> jax.Array:
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel":
            return jnp.zeros_like(direction)
        axes = tuple(range(weights.ndim - 1))
        wanted, length = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (weights, direction))
        return direction * (wanted / length)

    return jax.tree.map_with_path(rescale, params, random_like(params, key))


def loss_slice(surface: LossSurface, first: Params, second: Params, points: np.ndarray) -> np.ndarray:
    """The mean loss over the batches at w + a first + b second, for each row (a, b) of `points`, float64 [points, 2].

    Returns float64 [points]. Memory: three copies of the parameters, and one for the point.
    """
    loss_fn, params, batches = surface
    pairs = np.asarray(points, np.float32)
    losses = [[float(_loss_at(loss_fn, params, batch, first, second, *pair)) for pair in pairs] for batch in batches]
    return np.mean(losses, axis=0)


@partial(jax.jit, static_argnums=0)
def _loss_at(loss_fn: LossFn, params: Params, batch: Any, first: Params, second: Params, a: Any, b: Any) -> jax.Array:
    return loss_fn(jax.tree.map(lambda w, x, y: w + a * x + b * y, params, first, second), batch)[0]
