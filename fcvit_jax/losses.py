"""The two losses of a classifier."""

import jax
import optax

LOSSES = ("softmax", "sigmoid")


def cross_entropy(logits: jax.Array, targets: jax.Array, loss: str) -> jax.Array:
    """Compute each row's cross-entropy to soft targets, float32 [b, c] -> [b]; "sigmoid" is summed over classes."""
    if loss == "softmax":
        return optax.softmax_cross_entropy(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
