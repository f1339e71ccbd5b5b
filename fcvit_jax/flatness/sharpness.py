"""Sharpness at a finite radius: how far the loss rises near the parameters, at worst and on average.

The neighbourhood is a ball in u, and the parameters in it are w + T u, elementwise:

    PLAIN     T = 1,        Euclidean norm     the ball that SAM climbs in (arXiv 2010.01412)
    ADAPTIVE  T = |w|,      Euclidean norm     invariant to rescaled weights that leave the function unchanged
                                               (arXiv 2302.07011; ASAM, arXiv 2102.11600, with eta = 0)
    BOX       T = |w| + 1,  largest |u_i|      Keskar's (arXiv 1609.04836, metric 2.1)

Everything is measured for each batch of m examples alone (m-sharpness, arXiv 2010.01412, section 4.1): results have an
axis of batches.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcvit_jax.flatness.loss_surface import BatchLoss, LossSurface, loss_at
from fcvit_jax.trees import Params, random_like, unit


class Ball(NamedTuple):
    """A ball, T = slope |w| + offset; the norm of u is the largest |u_i| in a box, otherwise Euclidean."""

    slope: float
    offset: float
    box: bool


PLAIN, ADAPTIVE, BOX = Ball(0.0, 1.0, False), Ball(1.0, 0.0, False), Ball(1.0, 1.0, True)


@partial(jax.jit, static_argnums=0)
def uphill(
    loss_fn: BatchLoss, params: Params, batch: Any, u: Params, ball: Ball
) -> tuple[jax.Array, jax.Array, Params]:
    """Compute loss and accuracy of a batch at w + T u, and the gradient in u (in PLAIN, at u = 0: the gradient)."""
    scale = _scale(params, ball)
    point = jax.tree.map(lambda w, t, x: w + t * x, params, scale, u)
    (loss, accuracy), gradient = jax.value_and_grad(loss_fn, has_aux=True)(point, batch)
    return loss, accuracy, optax.tree.mul(scale, gradient)


class WorstCase(NamedTuple):
    """Rises of the loss, float64 [radii, batches]."""

    one_step: np.ndarray  # at SAM's own perturbation
    found: np.ndarray  # the largest over all points of all ascents, starts included: a lower bound of the maximum
    losses: np.ndarray  # [batches], at the parameters

    @property
    def keskar_percent(self) -> np.ndarray:
        """100 (max - L) / (1 + L), metric 2.1 of arXiv 1609.04836, [radii, batches]; for a worst case in BOX."""
        return 100.0 * self.found / (1.0 + self.losses[None])


def worst_case(
    surface: LossSurface, ball: Ball, radii: tuple[float, ...], key: jax.Array, steps: int, restarts: int = 0
) -> WorstCase:
    """Find the rise of each batch's loss within each radius, by projected ascent from SAM's point and random ones.

    u_1 = radius d(T g(w)), u_k+1 = P(u_k + radius d(T g(w + T u_k))), with d(h) = h / ||h|| (in the box the signs of h)
    and P the projection on the ball. An ascent has `steps` points and costs steps - 1 gradients; with 1 it is SAM's.
    restarts: further ascents, from random points of the ball's surface. Memory: about six copies of the parameters.
    """
    loss_fn, params, batches = surface
    centre, one_step, found, losses = optax.tree.zeros_like(params), [], [], []
    for index, batch in enumerate(batches):
        loss, _, gradient = uphill(loss_fn, params, batch, centre, ball)
        keys = (jax.random.fold_in(jax.random.fold_in(key, index), restart) for restart in range(restarts))
        starts = [gradient, *(random_like(params, each) for each in keys)]
        points = [
            [_ascend(surface, batch, _step(centre, start, ball, radius), ball, radius, steps) for start in starts]
            for radius in radii
        ]
        rises = np.array(jax.device_get(points), np.float64) - float(loss)  # [radii, starts, (first, largest)]
        one_step.append(rises[:, 0, 0])
        found.append(np.maximum(rises[:, :, 1].max(axis=1), 0.0))
        losses.append(float(loss))
    return WorstCase(np.array(one_step).T, np.array(found).T, np.array(losses))


def average_case(surface: LossSurface, ball: Ball, sigmas: tuple[float, ...], key: jax.Array, draws: int) -> np.ndarray:
    """Compute the rise under noise z ~ N(0, sigma^2), (L(w + T z) + L(w - T z)) / 2 - L(w), for each draw and batch.

    Returns float64 [sigmas, draws, batches]. In pairs of opposite noise the gradient cancels. A draw is the same noise
    for all batches and, up to its size, all sigmas. Memory: three copies of the parameters.
    """
    loss_fn, params, batches = surface
    levels, zero = [], np.float32(0)  # [sigma, batch], one for each draw
    for draw in range(draws):
        noise = _scaled(params, random_like(params, jax.random.fold_in(key, draw)), ball)
        sizes = sigmas if draw else (0.0, *sigmas)  # the loss at the parameters, once
        signed = np.array([(size, -size) for size in sizes], np.float32)
        around = [
            [[loss_at(loss_fn, params, batch, noise, noise, size, zero) for size in pair] for pair in signed]
            for batch in batches
        ]
        levels.append(np.mean(jax.device_get(around), axis=2, dtype=np.float64).T)
    centre, levels[0] = levels[0][0], levels[0][1:]
    return np.stack(levels, axis=1) - centre[None, None]


def resolution(surface: LossSurface, key: jax.Array) -> float:
    """Measure float32's rounding in a batch's rise: rms over the batches, for noise of a unit in the last place."""
    return float(np.sqrt(np.mean(average_case(surface, ADAPTIVE, (2.0**-23,), key, 1) ** 2)))


def _ascend(
    surface: LossSurface, batch: Any, u: Params, ball: Ball, radius: float, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Return a batch's loss at the first point, u, and the largest of `steps` points."""
    loss_fn, params, _ = surface
    losses = []
    for _ in range(steps - 1):
        loss, _, gradient = uphill(loss_fn, params, batch, u, ball)
        u = _step(u, gradient, ball, radius)
        losses.append(loss)
    last = _scaled(params, u, ball)
    losses.append(loss_at(loss_fn, params, batch, last, last, np.float32(1), np.float32(0)))
    return losses[0], jnp.stack(losses).max()


@jax.jit
def _step(u: Params, gradient: Params, ball: Ball, radius: Any) -> Params:
    """P(u + radius d(gradient))."""
    return _project(optax.tree.add_scale(u, radius, _steepest(gradient, ball.box)), ball.box, radius)


@partial(jax.jit, donate_argnums=1)
def _scaled(params: Params, noise: Params, ball: Ball) -> Params:
    """T z."""
    return optax.tree.mul(_scale(params, ball), noise)


def _scale(params: Params, ball: Ball) -> Params:
    return jax.tree.map(lambda w: ball.slope * jnp.abs(w) + ball.offset, params)


def _steepest(tree: Params, box: Any) -> Params:
    """Find the direction of length 1 in which a function of this gradient rises fastest; 0 for a zero gradient."""
    return jax.tree.map(lambda h, e: jnp.where(box, jnp.sign(h), e), tree, unit(tree))


def _project(tree: Params, box: Any, radius: Any) -> Params:
    """Find the nearest point of the ball."""
    length = optax.tree.norm(tree)
    shrink = jnp.where(length > radius, radius / length, 1.0)
    return jax.tree.map(lambda x: jnp.where(box, jnp.clip(x, -radius, radius), shrink * x), tree)
