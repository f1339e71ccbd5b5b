"""Curvature: Hessian-vector products, the eigenvalues at both ends of the spectrum, the trace.

H is the Hessian of a loss surface at its parameters. Everything comes from products Hv, forward over reverse (about
2.6 gradients each), one batch at a time. Each also gives v'H_b v of every batch b, for a bootstrap.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fcvit_jax.flatness.loss_surface import BatchLoss, LossSurface
from fcvit_jax.trees import Params, dot, random_like, unit


@dataclasses.dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue of the Hessian, as far as it was found."""

    value: float  # v'Hv
    residual: float  # ||Hv - value v||; some eigenvalue is that close
    converged: bool  # the residual is at most `tolerance` times |value|
    products: int  # Hessian-vector products spent
    samples: np.ndarray  # float64 [batches], v'H_b v of each batch
    vector: Params  # v, of length 1


def hessian_product(surface: LossSurface, vector: Params) -> tuple[Params, np.ndarray]:
    """Compute Hv, and v'H_b v of each batch, float64 [batches]. Memory: the parameters, v, Hv and two more of them."""
    total, samples = _times(0.0, vector), []
    for batch in surface.batches:
        total, curvature = _add_product(surface.loss_fn, surface.params, batch, vector, total)
        samples.append(curvature)
    return _times(1 / len(samples), total), np.array(jax.device_get(samples), np.float64)


def lanczos(surface: LossSurface, key: jax.Array, steps: int, tolerance: float) -> tuple[Eigenpair, Eigenpair]:
    """Find the largest and the smallest eigenvalue, by at most `steps` steps of Lanczos and one more product for each.

    Every new vector is orthogonalised against all before it, twice: in float32 the three-term recurrence alone finds a
    converged end again and again. Memory: one copy of the parameters per step.
    """
    basis, alphas, betas = [_unit(random_like(surface.params, key))], [], []
    while True:
        product, samples = hessian_product(surface, basis[-1])
        alphas.append(float(samples.mean()))
        for _ in range(2):
            for vector in basis:
                product = add_scaled(product, -_dot(product, vector), vector)
        beta = float(_norm(product))
        values, vectors = np.linalg.eigh(np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1))
        # Each end's residual by its own size: by the size of the largest, any vector of the bulk near 0 would pass.
        found = beta * np.abs(vectors[-1, [0, -1]]) <= tolerance / 2 * np.abs(values[[0, -1]])
        exhausted = beta <= 1e-6 * np.abs(values).max()  # the basis spans the Krylov space of its first vector
        if len(basis) == steps or exhausted or found.all():
            break
        basis.append(_unit(product))
        betas.append(beta)

    ends, products = [], len(basis)
    for weights in (vectors[:, -1], vectors[:, 0]):
        vector = _times(0.0, basis[0])
        for weight, column in zip(weights, basis, strict=True):
            vector = add_scaled(vector, weight, column)
        vector = _unit(vector)
        product, samples = hessian_product(surface, vector)
        value = float(samples.mean())
        residual = float(_norm(add_scaled(product, -value, vector)))
        ends.append(Eigenpair(value, residual, residual <= tolerance * abs(value), products + 2, samples, vector))
    return ends[0], ends[1]


def trace_samples(surface: LossSurface, key: jax.Array, probes: int) -> np.ndarray:
    """Compute v'H_b v for random signs v, float64 [probes, batches]; the mean estimates the trace (Hutchinson 1989)."""
    noise = (random_like(surface.params, jax.random.fold_in(key, probe)) for probe in range(probes))
    signs = (jax.tree.map(lambda x: jnp.copysign(1.0, x), tree) for tree in noise)
    return np.stack([hessian_product(surface, vector)[1] for vector in signs])


def standard_error(samples: np.ndarray) -> float:
    """Return the standard error over the probes, [probes, batches], with the batches fixed; nan for one probe."""
    means = samples.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan


@partial(jax.jit, static_argnums=0, donate_argnums=4)
def _add_product(
    loss_fn: BatchLoss, params: Params, batch: Any, vector: Params, total: Params
) -> tuple[Params, jax.Array]:
    gradient = jax.grad(lambda w: loss_fn(w, batch)[0])
    _, product = jax.jvp(gradient, (params,), (vector,))
    return optax.tree.add(total, product), dot(vector, product)


_dot, _unit, _norm = jax.jit(dot), jax.jit(unit), jax.jit(optax.tree.norm)
_times = jax.jit(optax.tree.scale)  # (factor, tree)
add_scaled = jax.jit(optax.tree.add_scale, donate_argnums=0)  # (tree, factor, other): donates `tree`
