"""The state of a training run and the one pure step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.models.vit import ViT
from fcvit_jax.training.sam import sam_value_and_grad


class TrainState(NamedTuple):
    """step: int32; params: float32 tree; opt_state: of the optax chain; key: the run's random key."""

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array


def init_state(model: ViT, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A model with fresh parameters."""
    init_key, key = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *model.config.image_size, 3), jnp.float32)
    params = jax.jit(model.init)(init_key, images)["params"]
    return TrainState(jnp.int32(0), params, optimizer.init(params), key)


def train_step(
    model: ViT,
    preprocess: Preprocess,
    optimizer: optax.GradientTransformation,
    rho: float,
    label_smoothing: float,
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of SAM with radius rho (0: none) on uint8 images [b, height, width, 3] and int32 labels [b].

    The key of each step comes from the run's key and the step's number, so that a resumed run draws the same.
    Returns the new state and float32 scalars: "loss", "accuracy", "gap", "grad_norm".
    """
    key = jax.random.fold_in(state.key, state.step)
    inputs = preprocess.normalize(images)

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, _ = model.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.config.num_classes), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    (loss, logits), grads, info = sam_value_and_grad(loss_fn, rho)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
    metrics = {"loss": loss, "accuracy": accuracy, "gap": info.gap, "grad_norm": info.grad_norm}
    return TrainState(state.step + 1, params, opt_state, state.key), metrics
