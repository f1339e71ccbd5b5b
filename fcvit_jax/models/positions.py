"""Rotary positions: queries and keys are turned by angles that follow from each token's coordinates.

RoFormer: arXiv 2104.09864; along two axes, EVA-02: arXiv 2303.11331, and DINOv3: arXiv 2508.10104. A merged token lies
at the mean of its members' coordinates.

Shape letters: b batch, n tokens, h heads, w head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax.models.config import Rotary, ViTConfig
from fcvit_jax.models.merging import Matching, merge_tokens


def grid_coordinates(config: ViTConfig) -> np.ndarray | None:
    """Compute each token's coordinates (y, x) before merging, float32 [1, n, 2]; None without rotary positions.

    Prefix tokens lie at 0, which turns nothing.
    """
    rotary = config.rotary
    if rotary is None:
        return None

    def along(axis: int) -> np.ndarray:
        count = config.grid[axis]
        if rotary.coordinates == "centred":
            return 2 * np.pi * (2 * (np.arange(count) + 0.5) / count - 1)
        index = np.arange(count) + rotary.offset
        return index if rotary.reference is None else index / count * rotary.reference[axis]

    patches = np.stack(np.meshgrid(along(0), along(1), indexing="ij"), axis=-1).reshape(-1, 2)
    return np.pad(patches, ((config.num_prefix_tokens, 0), (0, 0)))[None].astype(np.float32)


def rotate(x: jax.Array, coordinates: jax.Array, rotary: Rotary) -> jax.Array:
    """Turn queries or keys [b, h, n, w] by their tokens' coordinates, float32 [b, n, 2] or [1, n, 2]; in float32."""
    width = x.shape[-1]
    periods = rotary.periods or rotary.theta ** (np.arange(width // 4) * 4 / width)
    axes = coordinates[:, :, ::-1] if rotary.x_first else coordinates
    angles = axes[..., None] / np.asarray(periods, np.float32)[None, None, None]
    angles = angles.reshape(angles.shape[0], 1, angles.shape[1], width // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs = (2, width // 2) if rotary.rotation == "half" else (width // 2, 2)
    axis = pairs.index(2) - 2
    first, second = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], *pairs), axis, 0)
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return turned.reshape(x.shape).astype(x.dtype)


def merge_coordinates(coordinates: jax.Array, size: jax.Array, matching: Matching) -> jax.Array:
    """Average the coordinates of each target's members by size, float32 [b, t, 2]; pruned tokens do not count.

    coordinates: float32 [b, n, 2] or [1, n, 2]. size: float32 [b, n].
    """
    coordinates = jnp.broadcast_to(coordinates, (*size.shape, 2))
    weight = None if matching.weight is None else jnp.where(matching.weight > 0, size, 0.0)
    matching = Matching(matching.target, matching.tokens_out, matching.order, weight)
    with jax.default_matmul_precision("highest"):  # whatever the tokens' precision is
        return merge_tokens(coordinates, size, matching)[0]
