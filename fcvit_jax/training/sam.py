"""Sharpness-aware minimisation as a way to estimate the gradient; nothing else of the training knows of it.

arXiv 2010.01412, equations 2 and 3: the gradient is taken at w + rho g / ||g||, g the gradient at w, the norm over all
parameters together. The optimizer then steps from w: the parameters themselves are never perturbed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Params = Any
LossFn = Callable[..., tuple[jax.Array, Any]]


class SAMInfo(NamedTuple):
    """What the two passes saw; float32 scalars.

    loss: at the parameters. gap: the loss at the perturbed parameters less that, to first order rho times `grad_norm`.
    grad_norm: of the gradient at the parameters.
    """

    loss: jax.Array
    gap: jax.Array
    grad_norm: jax.Array


def perturbation(grads: Params, rho: jax.Array | float) -> Params:
    """rho g / ||g||, in float32; zero where the gradient is."""
    norm = global_norm(grads)
    scale = jnp.where(norm > 0, jnp.float32(rho) / jnp.where(norm > 0, norm, 1.0), 0.0)
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)


def global_norm(tree: Params) -> jax.Array:
    """The Euclidean norm of all leaves together, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def sam_value_and_grad(loss_fn: LossFn, rho: float) -> Callable[..., tuple[tuple[jax.Array, Any], Params, SAMInfo]]:
    """Like `jax.value_and_grad(loss_fn, has_aux=True)`, with the gradient of SAM.

    loss_fn: (params, *args) -> (loss, aux). Both passes get the same arguments, the dropout key among them.
    rho: radius; 0 gives the plain gradient in a single pass, bit for bit.
    Returns a function of the same arguments that gives ((loss, aux), grads, info); loss and aux are those at the
    parameters, not at the perturbed ones.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def function(params: Params, *args: Any) -> tuple[tuple[jax.Array, Any], Params, SAMInfo]:
        (loss, aux), grads = value_and_grad(params, *args)
        norm = global_norm(grads)
        if not rho:
            return (loss, aux), grads, SAMInfo(loss, jnp.zeros_like(loss), norm)
        perturbed = jax.tree.map(lambda w, e: w + e.astype(w.dtype), params, perturbation(grads, rho))
        (sharp_loss, _), grads = value_and_grad(perturbed, *args)
        return (loss, aux), grads, SAMInfo(loss, sharp_loss - loss, norm)

    return function
