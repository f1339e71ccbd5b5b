"""The loss as a function of the parameters, and slices through it: along random lines and over random planes."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.trees import Params, random_like

BatchLoss = Callable[[Params, Any], tuple[jax.Array, jax.Array]]


class LossSurface(NamedTuple):
    """The mean loss over a fixed list of batches, near the parameters.

    loss_fn: takes (parameters, batch) and returns the mean loss of the batch and its accuracy, float32 scalars. It is a
    static argument of compiled programs: pass the same object again, or an equal one, and nothing compiles twice.
    params: a float32 tree. batches: what loss_fn takes, all of one shape; they are iterated over many times.
    """

    loss_fn: BatchLoss
    params: Params
    batches: Iterable[Any]


def filter_normalised(params: Params, key: jax.Array) -> Params:
    """Draw a random direction in which each filter is as long as the parameters' (arXiv 1712.09913, section 4).

    A filter makes one output: a kernel without its last axis. Leaves with another name do not move.
    """

    def rescale(path: Any, weights: jax.Array, direction: jax.Array) -> jax.Array:
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel":
            return jnp.zeros_like(direction)
        axes = tuple(range(weights.ndim - 1))
        wanted, length = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (weights, direction))
        return direction * (wanted / length)

    # Drawn leaf by leaf, not in one program, which takes longer to compile than the gradient of the loss.
    return jax.tree.map_with_path(rescale, params, random_like(params, key))


def loss_slice(surface: LossSurface, first: Params, second: Params, points: Any) -> np.ndarray:
    """Compute the mean loss over the batches at w + a first + b second, for each (a, b) of `points`.

    Returns float64 [points]. Memory: three copies of the parameters, and one for the point.
    """
    loss_fn, params, batches = surface
    pairs = np.asarray(points, np.float32)
    losses = [[loss_at(loss_fn, params, batch, first, second, *pair) for pair in pairs] for batch in batches]
    return np.array(jax.device_get(losses), np.float64).mean(axis=0)


@partial(jax.jit, static_argnums=0)
def loss_at(loss_fn: BatchLoss, params: Params, batch: Any, first: Params, second: Params, a: Any, b: Any) -> jax.Array:
    """Compute the loss of a batch at w + a first + b second."""
    return loss_fn(jax.tree.map(lambda w, x, y: w + a * x + b * y, params, first, second), batch)[0]
