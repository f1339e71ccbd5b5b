"""The targets of a training step: soft targets, and images mixed with one another.

Rows of padding weigh nothing anywhere. Shape letters: b batch, c classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from fcvit_jax.losses import LOSSES
from fcvit_jax.settings import check_settings, setting


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """The loss and its targets. Raises InputError that names the field.

    If mixup and cutmix are both on, each batch is mixed by one of them, at even odds.
    """

    loss: str = setting("softmax", choices=LOSSES)  # sigmoid: a binary decision for each class
    label_smoothing: float = setting(0.0, low=0, below=1)  # share of the target that is spread over all classes
    mixup: float = setting(0.0, low=0)  # alpha of mixup's Beta(alpha, alpha); 0: off
    cutmix: float = setting(0.0, low=0)  # alpha of CutMix's Beta(alpha, alpha); 0: off

    def __post_init__(self) -> None:
        check_settings(self, "targets.")


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Compute (1 - smoothing) one-hot + smoothing / c for both losses: int32 [b] -> float32 [b, c]."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def row_weights(mask: jax.Array) -> jax.Array:
    """Weigh rows, bool [b] -> float32 [b], so that mean(weight * loss) is the mean loss of the unmasked rows.

    The weights average to 1, so that equally large parts of the batch may be averaged separately.
    """
    return mask * (mask.size / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0))


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mask: jax.Array, config: TargetConfig
) -> tuple[jax.Array, jax.Array]:
    """Replace each image by share x itself + (1 - share) x its partner, and its targets in the same way.

    mixup, arXiv 1710.09412, equation 1: the share is lambda. CutMix, arXiv 1905.04899, equation 1: it is 0 in a box and
    1 around it. lambda ~ Beta(alpha, alpha), drawn once a batch, as in the papers' code and in timm's default mode.

    images: normalised float32 [b, height, width, 3]. targets: float32 [b, c], weighted by the mean share over the
    pixels. mask: bool [b]; padding is not mixed.

    The partner is the previous row: this moves one row between neighbouring devices, where timm's flip moves all.
    """
    if not config.mixup and not config.cutmix:
        return images, targets
    _, height, width, _ = images.shape
    kind_key, lambda_key, box_key = jax.random.split(key, 3)
    is_mixup = jax.random.bernoulli(kind_key, 0.5 if config.mixup and config.cutmix else float(config.mixup > 0))
    alpha = jnp.where(is_mixup, config.mixup, config.cutmix)
    lam = jax.random.beta(lambda_key, alpha, alpha)
    share = jnp.where(is_mixup, lam, cutmix_share(box_key, lam, (height, width)))
    alone = ~(mask & _partner(mask))
    share = jnp.where(alone[:, None, None], 1.0, share[None])
    weight = share.mean(axis=(1, 2))[:, None]
    share = share[..., None]
    return share * images + (1 - share) * _partner(images), weight * targets + (1 - weight) * _partner(targets)


def cutmix_share(key: jax.Array, lam: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Draw a box, 0 inside and 1 around it: float32 [height, width]. arXiv 1905.04899, section 3.1; timm's `rand_bbox`.

    The box has sqrt(1 - lam) of each side, and its centre lies anywhere in the image.
    """
    inside = []
    for side, axis_key in zip(size, jax.random.split(key), strict=True):
        cut = jnp.floor(side * jnp.sqrt(1 - lam)).astype(jnp.int32)
        start = jax.random.randint(axis_key, (), 0, side) - cut // 2
        inside.append((jnp.arange(side) >= start) & (jnp.arange(side) < start + cut))
    return 1.0 - (inside[0][:, None] & inside[1][None]).astype(jnp.float32)


def _partner(rows: jax.Array) -> jax.Array:
    return jnp.roll(rows, 1, axis=0)
