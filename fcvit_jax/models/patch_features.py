"""Features of patches, for dense prediction: unmerged, on the grid, at any layer."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import jax

from fcvit_jax.errors import InputError
from fcvit_jax.models.layers import LayerNorm
from fcvit_jax.models.merging import unmerge_tokens
from fcvit_jax.models.vit import ViT


class PatchFeatures(NamedTuple):
    """The tokens that leave a layer, on the grid.

    patches: [b, rows, columns, d], every patch with the value of its token. prefix: [b, k, d], the class token, the
    distillation token and registers. pruned: bool [b, rows, columns], the patches that a rule dropped; their value is a
    stand-in.
    """

    patches: jax.Array
    prefix: jax.Array
    pruned: jax.Array


@overload
def patch_features(
    model: ViT, params: Any, images: jax.Array, layers: int = -1, norm: bool = True
) -> PatchFeatures: ...
@overload
def patch_features(
    model: ViT, params: Any, images: jax.Array, layers: Sequence[int], norm: bool = True
) -> tuple[PatchFeatures, ...]: ...
def patch_features(
    model: ViT, params: Any, images: jax.Array, layers: int | Sequence[int] = -1, norm: bool = True
) -> PatchFeatures | tuple[PatchFeatures, ...]:
    """Compute the features of all patches of images, whatever the model's schedule has merged. Pure; jit it.

        model = fc.ViT(checkpoint.config, schedule=schedule)
        found = jax.jit(partial(fc.patch_features, model, layers=(5, 11)))(checkpoint.params, images)
        found[1].patches  # [b, rows, columns, d]

    images: normalised, as the model takes them. layers: one, or several, counted from 0, or from the end: -1 is the
    last. norm: apply the model's last norm to every layer's tokens, as DINOv2's and DINOv3's `get_intermediate_layers`
    and timm's `forward_intermediates(norm=True)` do; False returns them unchanged. A norm that follows the pooling is
    not applied. Raises InputError for a layer that the model lacks.
    """
    config, several = model.config, not isinstance(layers, int)
    wanted = tuple(layers) if not isinstance(layers, int) else (layers,)
    for layer in wanted:
        if not -config.depth <= layer < config.depth:
            raise InputError(f"layer {layer}: the model has layers 0 to {config.depth - 1}")
    out: Any = model.apply({"params": params}, images)[1]
    normalise = LayerNorm(config.norm_eps)

    def at(layer: int) -> PatchFeatures:
        state = out["layers"][layer]
        tokens, grid = state["tokens"], (len(images), *config.grid)
        if norm and not config.fc_norm:
            tokens: Any = normalise.apply({"params": params["norm"]}, tokens)
        patches = unmerge_tokens(tokens, state["source"]).reshape(*grid, -1)
        return PatchFeatures(patches, tokens[:, : config.num_prefix_tokens], state["pruned"].reshape(grid))

    found = tuple(map(at, wanted))
    return found if several else found[0]
