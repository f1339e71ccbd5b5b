"""Multiply-accumulates of a ViT under a schedule, counted analytically.

The papers' "GFLOPS" are multiply-accumulates / 1e9 of the matrix products alone: patch embedding, projections,
attention, MLP and head. Norms, softmax, activations and Token Merging's matching are left out. A merge rule adds what
it computes beyond that.
"""

from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule


def layer_macs(config: ViTConfig, schedule: MergeSchedule | None = None) -> tuple[int, ...]:
    """Count the multiply-accumulates of every layer, for one image."""
    width = config.embed_dim
    return tuple(
        # qkv and output projection; logits and weighted sum; what the rule adds; MLP, after the merging.
        4 * layer.tokens_in * width**2
        + 2 * layer.tokens_in**2 * width
        + (layer.rule.macs(layer, config) if layer.removed else 0)
        + _mlp_products(config) * layer.tokens_out * width * config.mlp_dim
        for layer in (schedule or MergeSchedule.dense(config.depth)).plan(config)
    )


def macs(config: ViTConfig, schedule: MergeSchedule | None = None) -> int:
    """Count the multiply-accumulates of the whole model, for one image."""
    patches = config.num_patches * config.patch_size**2 * 3 * config.embed_dim
    pooled = config.embed_dim * (2 if config.pool in ("dist_avg", "token_avg") else 1)
    hidden = config.representation_size if config.num_classes else 0
    hidden = hidden or (config.projection_dim if config.num_classes else 0)
    head = pooled * hidden + (hidden or pooled) * config.num_classes
    return patches + sum(layer_macs(config, schedule)) + _pool_macs(config, schedule) + head


def _mlp_products(config: ViTConfig) -> int:
    """Count an MLP's products of width and hidden width for each token: a gate is one more."""
    return 3 if config.gated else 2


def _pool_macs(config: ViTConfig, schedule: MergeSchedule | None) -> int:
    """Count attention pooling: keys, values and attention of all tokens; query, projection and MLP of the probe."""
    if config.pool != "map":
        return 0
    width, tokens = config.embed_dim, (schedule or MergeSchedule.dense(config.depth)).tokens(config)[-1]
    return 2 * tokens * (width + 1) * width + 2 * width * (width + (config.map_mlp_dim or config.mlp_dim))


def executed_gmacs(config: ViTConfig, schedule: MergeSchedule | None = None) -> float:
    """Count the multiply-accumulates / 1e9 that are computed for the logits of one image.

    Fewer than `gmacs` if prefix tokens are pooled: the last layer then does not merge, and computes queries, projection
    and MLP for these tokens alone.
    """
    saved = 0
    if count := config.pooled_tokens:
        width = config.embed_dim
        layer = (schedule or MergeSchedule.dense(config.depth)).plan(config)[-1]
        queries, outputs = layer.tokens_in - count, layer.tokens_out - count
        saved = layer.rule.macs(layer, config) if layer.removed else 0
        saved += queries * (2 * width**2 + 2 * layer.tokens_in * width)
        saved += _mlp_products(config) * outputs * width * config.mlp_dim
    return (macs(config, schedule) - saved) / 1e9


def gmacs(config: ViTConfig, schedule: MergeSchedule | None = None) -> float:
    """Count the multiply-accumulates / 1e9 of the whole model, for one image; the schedule defaults to dense."""
    return macs(config, schedule) / 1e9
