"""The optax chain: clipping, AdamW, cosine schedule, and which parameters decay."""

from typing import Any

import jax
import optax


def decay_mask(params: Any) -> Any:
    """True for matrices that multiply activations; norms, biases, tokens and position embeddings do not decay."""
    return jax.tree.map_with_path(lambda path, leaf: path[-1].key == "kernel", params)


def adamw(
    learning_rate: float, steps: int, warmup_steps: int, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) under a linear warm-up and a cosine to zero, gradients clipped by their global norm."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps, steps)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, weight_decay=weight_decay, mask=decay_mask),
    )
