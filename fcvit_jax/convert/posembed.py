"""Resampling of position embeddings onto another grid of patches."""

import jax
import jax.numpy as jnp
import numpy as np


def resample_timm(
    embedding: np.ndarray, prefix: int, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> np.ndarray:
    """As timm's `resample_abs_pos_embed`: bicubic (a = -0.5), antialiased, in float32; prefix entries stay.

    embedding: [1, prefix + rows * columns, d]; grids: (rows, columns).
    """
    head, grid = embedding[:, :prefix], embedding[:, prefix:].astype(np.float32)
    width = grid.shape[-1]
    resized = jax.image.resize(jnp.asarray(grid.reshape(*old_grid, width)), (*new_grid, width), "cubic", antialias=True)
    return np.concatenate([head.astype(np.float32), np.asarray(resized).reshape(1, -1, width)], axis=1)
