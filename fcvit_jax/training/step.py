"""The state of a training run and the one pure step.

Parameters are float32, whatever the model computes in: bfloat16 would round most of SAM's perturbation away.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.losses import cross_entropy
from fcvit_jax.models.vit import ViT
from fcvit_jax.training.optimizer import momentum
from fcvit_jax.training.sam import SAMConfig, SAMState, init_sam, perturb_mask, sam_value_and_grad
from fcvit_jax.training.targets import TargetConfig, mix, row_weights, soft_targets

Metrics = dict[str, jax.Array]


class StepInputs(NamedTuple):
    """The rows of a training batch. Rows whose mask is False are padding and change nothing."""

    images: Any  # uint8 [b, height, width, 3]
    labels: Any  # int32 [b]
    mask: Any  # bool [b]


class TrainState(NamedTuple):
    """All state that a run needs to resume, bit for bit.

    finite: False from the first step that was not finite; no later step changes the state.
    """

    step: jax.Array  # int32, the steps taken
    params: Any  # float32
    opt_state: Any
    ema: Any  # the average of the parameters, () if off
    sam: SAMState
    key: jax.Array  # the same in every step
    finite: jax.Array  # bool

    @property
    def weights(self) -> Any:
        """The parameters to evaluate and write: their running average if there is one."""
        return self.ema if self.ema else self.params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that a step needs beside the model."""

    optimizer: optax.GradientTransformation  # from `make_optimizer`, as is the next
    learning_rate: optax.Schedule
    sam: SAMConfig  # from `with_start`
    rho: optax.Schedule  # from `rho_schedule`
    targets: TargetConfig
    frozen: Any = None  # from `frozen_mask`, for the optimizer's pattern
    ema_decay: float = 0.0  # of the running average of the parameters; 0: none


def phases(recipe: Recipe) -> dict[int, Recipe]:
    """Map first steps to the recipe from there on: plain gradients before `sam.start`, and SAM after it."""
    start = int(recipe.sam.start) if recipe.sam.rho else 0
    plain = dataclasses.replace(recipe, sam=dataclasses.replace(recipe.sam, rho=0.0, rho_final=None))
    return {0: plain, start: recipe}  # one phase if SAM starts at step 0


def init_state(model: ViT, recipe: Recipe, seed: int, params: Any = None) -> TrainState:
    """Make the state before the first step, with fresh parameters if none are given.

    Given parameters are copied, as float32, and so is the average: the state is donated to the step.
    """
    init_key, key = jax.random.split(jax.random.key(seed))
    if params is None:
        images = jnp.zeros((1, *model.config.image_size, 3), jnp.float32)
        params = jax.jit(model.init)(init_key, images)["params"]
    params = _copy(params)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=recipe.optimizer.init(params),
        ema=_copy(params) if recipe.ema_decay else (),
        sam=init_sam(recipe.sam, params),
        key=key,
        finite=jnp.bool_(True),
    )


def make_train_step(
    model: ViT, preprocess: Preprocess, recipe: Recipe
) -> Callable[[TrainState, StepInputs], tuple[TrainState, Metrics]]:
    """Make the pure function (state, inputs) -> (state, metrics), to be compiled with the state donated.

    It takes SAM's gradient at every step: compile one function for each of `phases`.

    The keys of a step come from the run's key and the step's number, so that a resumed run draws the same.

    If the loss or the gradient is not finite, the state is returned unchanged, even its step number. "finite" is then 0
    in this and all later steps. The other metrics, float32 scalars, are explained in docs/training.md.
    """
    targets_config, frozen = recipe.targets, recipe.frozen
    perturbed = None if frozen is None else perturb_mask(frozen, recipe.sam.perturb, frozen)

    def loss_fn(params: Any, batch: tuple[jax.Array, ...], key: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels, targets, weights = batch
        if frozen is not None:
            params = jax.tree.map(lambda w, is_frozen: jax.lax.stop_gradient(w) if is_frozen else w, params, frozen)
        logits, _ = model.apply({"params": params}, pixels, train=True, rngs={"dropout": key})
        losses = cross_entropy(logits, targets, targets_config.loss)
        return jnp.mean(weights * losses), jnp.argmax(logits, axis=-1)

    value_and_grad = sam_value_and_grad(loss_fn, recipe.sam, perturbed)

    def train_step(state: TrainState, inputs: StepInputs) -> tuple[TrainState, Metrics]:
        images, labels, mask = inputs
        mix_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        weights = row_weights(mask)
        targets = soft_targets(labels, model.config.num_classes, targets_config.label_smoothing)
        pixels, targets = mix(mix_key, preprocess.normalize(images), targets, mask, targets_config)

        along = recipe.sam.rho > 0 and recipe.sam.direction == "momentum"
        sam = SAMState(momentum(state.opt_state, state.params)) if along else state.sam
        (loss, predictions), grads, sam, info = value_and_grad(
            state.params, (pixels, targets, weights), model_key, recipe.rho(state.step), state.step, sam
        )
        updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A low decay at first, so that the initial parameters are forgotten quickly.
        decay = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay) if recipe.ema_decay else state.ema
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))

        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(weights * (predictions == labels)),
            "gap": info.gap,
            "grad_norm": info.grad_norm,
            "rho": info.rho,
            "gap_over_rho": info.gap / jnp.where(info.rho > 0, info.rho, 1.0),
            "learning_rate": recipe.learning_rate(state.step),
            "update_norm": optax.tree.norm(updates),
            "finite": finite,
        }
        new = TrainState(state.step + 1, params, opt_state, ema, sam, state.key, finite)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new._replace(key=()), state._replace(key=()))
        return kept._replace(key=state.key, finite=finite), {
            name: jnp.asarray(x, jnp.float32) for name, x in metrics.items()
        }

    return train_step


def _copy(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
