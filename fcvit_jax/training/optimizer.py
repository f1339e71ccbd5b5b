"""The optax chain: clipping, the update rule, decoupled weight decay, learning rates of layers, frozen parameters.

SAM comes before it, so that clipping bounds the step and leaves the radius alone.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting
from fcvit_jax.trees import leaf_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters follow a gradient. Raises InputError that names the field.

    After the warm-up, the learning rate falls to `final_learning_rate` along the schedule, or stays ("constant").
    Weight decay is decoupled for all three optimizers, SGD too (arXiv 1711.05101).
    """

    # adamw (arXiv 1711.05101), sgd with (heavy-ball) momentum, or lion (arXiv 2302.06675).
    name: str = setting("adamw", choices=("adamw", "sgd", "lion"))
    learning_rate: float = setting(low=0)  # at the end of the warm-up
    final_learning_rate: float = setting(0.0, low=0)  # at the end of the run
    schedule: str = setting("cosine", choices=("cosine", "linear", "constant"))
    weight_decay: float = setting(0.0, low=0)
    b1: float = setting(0.9, low=0, below=1)  # adamw, lion
    b2: float = setting(0.999, low=0, below=1)  # adamw, lion (whose paper has 0.99)
    momentum: float = setting(0.9, low=0, below=1)  # sgd
    clip_norm: float | None = setting(1.0, above=0)  # of the gradient of all trained parameters; None: no clipping
    layer_decay: float | None = setting(None, above=0, high=1)  # see `layer_scales`; None: one learning rate for all
    freeze: str | None = None  # regular expression; parameters whose path starts with a match never change

    def __post_init__(self) -> None:
        check_settings(self, "optimizer.")
        if self.final_learning_rate > self.learning_rate:
            raise InputError(
                f"optimizer.final_learning_rate is {self.final_learning_rate}: it must not be above learning_rate, "
                f"{self.learning_rate}"
            )
        try:
            re.compile(self.freeze or "")
        except re.error as error:
            raise InputError(f"optimizer.freeze is {self.freeze!r}: no regular expression ({error})") from None


def make_optimizer(
    config: OptimizerConfig, params: Any, total_steps: int, warmup_steps: int = 0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Make the transformation for parameters (arrays or their shapes), and the learning rate at each step."""
    schedule = learning_rate_schedule(config, total_steps, warmup_steps)
    rule = {
        "adamw": optax.scale_by_adam(config.b1, config.b2),
        "sgd": optax.trace(config.momentum),
        "lion": optax.scale_by_lion(config.b1, config.b2),
    }[config.name]
    chain = [rule, optax.add_decayed_weights(config.weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)]
    if config.clip_norm is not None:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.layer_decay is not None:
        scales = layer_scales(params, config.layer_decay)
        chain.append(optax.stateless(lambda updates, _: _map_names(lambda path, u: u * scales[path], updates)))
    optimizer = optax.chain(*chain)
    if config.freeze is None:
        return optimizer, schedule
    # Frozen parameters neither count in the clipped norm nor take the optimizer's memory.
    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", frozen_mask(params, config.freeze))
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels), schedule


def momentum(opt_state: Any, params: Any) -> Any:
    """Return the optimizer's momentum before any scaling: a tree like the parameters, zero where they are frozen."""
    found = optax.tree.get(opt_state, "mu")  # of adamw and lion
    found = optax.tree.get(opt_state, "trace") if found is None else found
    # `optax.partition` leaves out what is frozen.
    return jax.tree.map(lambda w, m: jnp.zeros_like(w) if isinstance(m, optax.MaskedNode) else m, params, found)


def learning_rate_schedule(config: OptimizerConfig, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Make the learning rate of steps 0 .. total_steps - 1; it rises linearly from 0 in the warm-up."""
    warmup, peak, final = warmup_steps, config.learning_rate, config.final_learning_rate
    if warmup >= total_steps:
        raise InputError(f"a warm-up of {warmup} steps does not fit into the {total_steps} steps of the run")
    rest = {
        "cosine": optax.cosine_decay_schedule(peak, total_steps - warmup, final / peak if peak else 0.0),
        "linear": optax.linear_schedule(peak, final, total_steps - warmup),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), rest], [warmup]) if warmup else rest


def decay_mask(params: Any) -> Any:
    """Mark the parameters that decay: only kernels, not tokens, position embeddings or LayerScale."""
    return _map_names(lambda path, _: path.rpartition("/")[2] == "kernel", params)


def frozen_mask(params: Any, pattern: str) -> Any:
    """Mark the parameters whose path `re.match` matches; "blocks_1" also matches blocks_10, "blocks_1/" does not.

    Raises InputError if it matches no parameter, or all of them.
    """
    mask = _map_names(lambda path, _: re.match(pattern, path) is not None, params)
    matched = jax.tree.leaves(mask)
    if not any(matched):
        raise InputError(f"optimizer.freeze is {pattern!r}: it matches no path; one is {_names(params)[0]}")
    if all(matched):
        raise InputError(f"optimizer.freeze is {pattern!r}: it matches every parameter and leaves none to train")
    return mask


def layer_scales(params: Any, decay: float) -> dict[str, float]:
    """Return the factor on each parameter's learning rate: {path: decay ** (layers above)}.

    The embedding is layer 0, blocks_i layer i + 1, and all that follows layer depth + 1, as in BEiT (arXiv 2106.08254)
    and MAE (arXiv 2111.06377). timm's `param_groups_layer_decay` counts the norm before the pooling to the last block.
    """
    names = _names(params)
    layers = {path: int(found[1]) + 1 for path in names if (found := re.match(r"blocks_(\d+)/", path))}
    top = max(layers.values(), default=0) + 1
    return {path: decay ** (top - layers.get(path, 0 if path.startswith("embed/") else top)) for path in names}


def _map_names(function: Callable[[str, Any], Any], tree: Any) -> Any:
    return jax.tree.map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)


def _names(tree: Any) -> list[str]:
    return [leaf_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
