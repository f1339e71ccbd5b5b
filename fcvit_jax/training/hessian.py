"""Curvature: Hessian-vector products, the eigenvalues at both ends of the spectrum, the trace.

The loss is the mean over a fixed list of batches, and H its Hessian at the parameters. Everything comes from products
Hv, forward over reverse (about 2.6 gradients each), one batch at a time; H itself is never there. Each product also
gives v'H_b v of every batch b, whose mean is v'Hv: what a bootstrap over the batches wants.

A loss function takes (parameters, batch) and returns its mean over the rows and their accuracy, float32 scalars. It is
a static argument of what is compiled here: pass the same object again, or an equal one, and nothing compiles twice.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fcvit_jax.training.sam import Params, global_norm, orthogonal, unit

LossFn = Callable[[Params, Any], tuple[jax.Array, jax.Array]]
Sampler = Callable[..., jax.Array]


class Eigenpair(NamedTuple):
    """An eigenvalue of the Hessian, as far as it was found.

    value: v'Hv of the unit vector, with its sign. residual: ||Hv - value v||; some eigenvalue lies that near.
    converged: the residual is at most `tolerance` times |value|. products: Hessian-vector products
    that were spent. samples: float64 [batches], v'H_b v of each batch. vector: a tree like the parameters.
    """

    value: float
    residual: float
    converged: bool
    products: int
    samples: np.ndarray
    vector: Params


def hessian_product(
    loss_fn: LossFn, params: Params, batches: Iterable[Any], vector: Params
) -> tuple[Params, np.ndarray]:
    """Hv, and v'H_b v of each batch, float64 [batches]. Memory: the parameters, v, Hv and two more like them."""
    total, samples = times(vector, 0.0), []
    for batch in batches:
        total, curvature = _add_product(loss_fn, params, batch, vector, total)
        samples.append(float(curvature))
    return times(total, 1 / len(samples)), np.array(samples)


def power_iteration(
    loss_fn: LossFn, params: Params, batches: Iterable[Any], key: jax.Array, steps: int, tolerance: float
) -> Eigenpair:
    """The eigenvalue that is largest in size, whichever its sign. Memory: five or six copies of the parameters.

    Where the two ends of the spectrum are about as far from 0 it does not settle, and `converged` says so.
    """
    vector = _unit(random_like(params, key))
    for step in range(1, steps + 1):
        product, samples = hessian_product(loss_fn, params, batches, vector)
        value = float(samples.mean())
        residual = float(_residual(product, vector, value))
        converged = residual <= tolerance * abs(value)
        if converged or step == steps:
            return Eigenpair(value, residual, converged, step, samples, vector)
        vector = _unit(product)
    raise ValueError(f"steps is {steps}: there must be at least one")


def lanczos(
    loss_fn: LossFn, params: Params, batches: Iterable[Any], key: jax.Array, steps: int, tolerance: float
) -> tuple[Eigenpair, Eigenpair]:
    """The largest and the smallest eigenvalue, by at most `steps` steps of Lanczos and a product more for each.

    Every new vector is orthogonalised against all before it, twice: in float32 the three-term recurrence alone loses
    orthogonality as soon as an end has converged, and finds that end again and again. Memory: a copy of the parameters
    a step. Value and residual are those of the vectors put together from the basis, not the recurrence's estimates.
    """
    basis, alphas, betas = [_unit(random_like(params, key))], [], []
    while True:
        product, samples = hessian_product(loss_fn, params, batches, basis[-1])
        alphas.append(float(samples.mean()))
        for _ in range(2):
            for vector in basis:
                product = _orthogonal(product, vector)
        beta = float(_norm(product))
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        # The residual of each end, by its own size: any vector of the bulk near 0 would do by that of the largest.
        found = beta * np.abs(vectors[-1, [0, -1]]) <= tolerance / 2 * np.abs(values[[0, -1]])
        exhausted = beta <= 1e-6 * np.abs(values).max()  # the basis spans all that H makes of its first vector
        if len(basis) == steps or exhausted or found.all():
            break
        basis.append(_unit(product))
        betas.append(beta)

    ends, products = [], len(basis)
    for weights in (vectors[:, -1], vectors[:, 0]):
        vector = times(basis[0], 0.0)
        for weight, column in zip(weights, basis, strict=True):
            vector = add(vector, column, weight)
        vector = _unit(vector)
        product, samples = hessian_product(loss_fn, params, batches, vector)
        value = float(samples.mean())
        residual = float(_residual(product, vector, value))
        ends.append(Eigenpair(value, residual, residual <= tolerance * abs(value), products + 2, samples, vector))
    return ends[0], ends[1]


def trace_samples(loss_fn: LossFn, params: Params, batches: Iterable[Any], key: jax.Array, probes: int) -> np.ndarray:
    """v'H_b v for random signs v, float64 [probes, batches]: the mean estimates the trace (Hutchinson 1989)."""
    signs = (random_like(params, jax.random.fold_in(key, probe), jax.random.rademacher) for probe in range(probes))
    return np.stack([hessian_product(loss_fn, params, batches, vector)[1] for vector in signs])


def standard_error(samples: np.ndarray) -> float:
    """Of the mean over the probes, the batches being what they are: [probes, batches] -> nan for a single probe."""
    means = samples.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


def random_like(params: Params, key: jax.Array, sampler: Sampler = jax.random.normal) -> Params:
    """A float32 tree of the parameters' shapes (nothing else of them counts), drawn with `sampler(key, shape, dtype)`.

    A leaf's key comes from its path, so that neither the order of the tree nor what else is in it matters.
    """

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        drawn = sampler(jax.random.fold_in(key, zlib.crc32(name.encode())), leaf.shape, jnp.float32)
        # On the leaf's devices: programs would be compiled anew for another placement.
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and leaf.committed
        return jax.device_put(drawn, leaf.sharding) if placed else drawn

    return jax.tree.map_with_path(draw, params)


@jax.jit
def times(tree: Params, factor: jax.typing.ArrayLike) -> Params:
    """factor * tree"""
    return jax.tree.map(lambda x: factor * x, tree)


@partial(jax.jit, donate_argnums=0)
def add(total: Params, tree: Params, weight: jax.typing.ArrayLike) -> Params:
    """total + weight * tree; the memory of `total` is given up."""
    return jax.tree.map(lambda t, x: t + jnp.float32(weight) * x, total, tree)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _add_product(
    loss_fn: LossFn, params: Params, batch: Any, vector: Params, total: Params
) -> tuple[Params, jax.Array]:
    gradient = jax.grad(lambda w: loss_fn(w, batch)[0])
    _, product = jax.jvp(gradient, (params,), (vector,))
    curvature = jax.tree.reduce(jnp.add, jax.tree.map(lambda v, h: jnp.sum(v * h), vector, product))
    return jax.tree.map(jnp.add, total, product), curvature


@jax.jit
def _residual(product: Params, vector: Params, value: jax.typing.ArrayLike) -> jax.Array:
    return global_norm(jax.tree.map(lambda h, v: h - value * v, product, vector))


_orthogonal, _unit, _norm = jax.jit(orthogonal, donate_argnums=0), jax.jit(unit), jax.jit(global_norm)
