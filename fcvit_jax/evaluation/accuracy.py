"""Accuracy of many schedules in one pass over the data: each image is decoded and sent to the device once."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.models.vit import ViT

# What `dtype` may be: the computation's dtype, and the precision of float32 products, which GPUs would round to TF32.
DTYPES = {
    "float32": (jnp.float32, "highest"),
    "tf32": (jnp.float32, "tensorfloat32"),
    "bfloat16": (jnp.bfloat16, "default"),
}


def eval_step(
    model: ViT,
    preprocess: Preprocess,
    params: Any,
    totals: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Classify one batch.

    totals: int32 [4], counted so far: right first guesses, labels among the first five, images, images whose logits are
    not finite. images: uint8 [b, height, width, 3]; labels: int32 [b]; mask: bool [b], False for padding.
    Returns the new totals and the logits, float32 [b, c]. Equal logits rank in the order of the classes.
    """
    logits, _ = model.apply({"params": params}, preprocess.normalize(images))
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1, dtype=jnp.int32)
    finite = jnp.isfinite(logits).all(axis=1)
    counted = jnp.stack([finite & (rank < 1), finite & (rank < 5), jnp.ones_like(mask), ~finite])
    return totals + jnp.sum(counted & mask[None], axis=1, dtype=jnp.int32), logits


@dataclass(frozen=True)
class CompiledStep:
    """`eval_step` of one schedule, compiled ahead of time for one batch shape: it cannot compile a second time."""

    model: ViT
    call: jax.stages.Compiled
    compile_seconds: float

    def start(self) -> jax.Array:
        """Totals of nothing, where `call` wants them."""
        return jax.device_put(jnp.zeros(4, jnp.int32), self.call.input_shardings[0][1])


def compile_step(
    model: ViT, preprocess: Preprocess, params: Any, batch_size: int, mesh: jax.sharding.Mesh, dtype: str = "float32"
) -> CompiledStep:
    """Compile `eval_step` for batches of one size, the rows spread over the devices of the mesh.

    params: the parameters, replicated. dtype: a key of `DTYPES`; it replaces the model's own.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    parallel.check_batch_size(batch_size, mesh)
    compute, precision = DTYPES[dtype]
    model = model.clone(dtype=compute)
    everywhere, rows = parallel.replicated(mesh), parallel.batched(mesh)
    shape = partial(jax.ShapeDtypeStruct, sharding=rows)
    step = jax.jit(partial(eval_step, model, preprocess), out_shardings=(everywhere, rows))
    started = time.perf_counter()
    with jax.default_matmul_precision(precision):
        call = step.lower(
            params,
            jax.ShapeDtypeStruct((4,), jnp.int32, sharding=everywhere),
            shape((batch_size, *model.config.image_size, 3), jnp.uint8),
            shape((batch_size,), jnp.int32),
            shape((batch_size,), jnp.bool_),
        ).compile()
    return CompiledStep(model, call, time.perf_counter() - started)


@dataclass(frozen=True)
class Accuracy:
    """Counts over all images; the fractions divide once."""

    correct: int
    correct5: int
    num_images: int

    @property
    def top1(self) -> float:
        return self.correct / self.num_images

    @property
    def top5(self) -> float:
        return self.correct5 / self.num_images


def evaluate(
    steps: Mapping[str, CompiledStep],
    params: Any,
    batches: Iterable[Batch],
    on_batch: Callable[[Batch, Mapping[str, jax.Array]], None] | None = None,
) -> dict[str, Accuracy]:
    """Run every schedule on every batch.

    steps: compiled steps by schedule name, in the order they run. batches: on the device, all of the compiled shape.
    on_batch: called with each batch and the logits, [b, c] a schedule, once they are computed.
    Raises InputError where a model's logits are not finite, or where there is no image.
    """
    totals = {name: step.start() for name, step in steps.items()}
    for batch in batches:
        logits = {}
        for name, step in steps.items():
            totals[name], logits[name] = step.call(params, totals[name], batch.images, batch.labels, batch.mask)
        # Wait here: otherwise the host runs ahead, and batches pile up in the device's memory.
        jax.block_until_ready(totals)
        if on_batch:
            on_batch(batch, logits)

    results = {}
    for name, total in totals.items():
        correct, correct5, seen, broken = map(int, np.asarray(total))
        if broken:
            raise InputError(
                f"schedule {name}: the logits of {broken} of {seen} images are not finite; try another dtype"
            )
        if not seen:
            raise InputError("no image was evaluated: the data set is empty")
        results[name] = Accuracy(correct, correct5, seen)
    return results
