"""How programs are compiled: XLA's options, batches in parts, loops that compile fast, and bfloat16 on CPU."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fcvit_jax.errors import InputError

# By the name that a configuration's `dtype` takes: the dtype of the computation, and the precision of float32 products,
# which GPUs would otherwise round to TF32.
PRECISIONS = {
    "float32": (jnp.float32, "highest"),
    "tf32": (jnp.float32, "tensorfloat32"),
    "bfloat16": (jnp.bfloat16, "default"),
}


def computation(dtype: str) -> tuple[Any, str]:
    """Look up an entry of `PRECISIONS`. Raises InputError for another name."""
    if dtype not in PRECISIONS:
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[dtype]


_LOOPS = {"xla_cpu_use_fusion_emitters": False}
_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
_LIBRARY = {"xla_gpu_enable_triton_gemm": False}
_TOKENS = 3200  # 16 images of 197, of 3,152


def options(images: int, tokens: int, dtype: Any) -> dict[str, Any] | None:
    """Compiler options, for `jax.jit` or `compile`, of a model that computes so many images on a device at a call.

    tokens: of an image, at first. dtype: of the computation. None where there is nothing to be said: for other
    devices, where XLA_FLAGS name the options, and where this XLA knows none of them (docs/performance.md).

    On CPU, XLA's older emitter of fused loops: models that merge compile in 0.6 of the time with it, dense ones, and
    gradients, in up to 2.4 times of it. And in float32, for more than a few tokens, Eigen's matrix products instead of
    YNNPACK's, which are a tenth slower; not for long sequences, whose attention is slower with them. On GPUs, where
    there are many tokens, matrix products by NVIDIA's library alone: XLA else compiles programs of its own for every
    product, to find the fastest, which takes two to eight times as long and gains something for the few tokens of one
    image only.
    """
    backend = jax.default_backend()
    wanted: dict[str, Any] = {}
    if backend == "cpu":
        wanted |= _LOOPS
        if dtype == jnp.float32 and images * tokens >= 768 and tokens <= 600:
            wanted |= _PRODUCTS
    elif backend == "gpu" and images * tokens >= 1024:
        wanted |= _LIBRARY
    return {name: value for name, value in wanted.items() if _accepted(name, value)} or None


@functools.cache
def _accepted(name: str, value: Any) -> bool:
    if name in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):  # gone from a later XLA
        return False
    return True


def on_each_device(call: Callable[..., Any], tokens: int, mesh: Mesh) -> Callable[..., Any]:
    """`call(params, *batch)` on every device of the mesh for its own images, in parts of `part_size`.

    Every array of the batch and of what is returned has an axis of images in front, which is spread over the mesh; call
    computes each image by itself. Left to share one program out, XLA may copy to all devices what is reshaped, and
    cannot split programs that are not its own (Triton's). tokens: of an image.
    """

    def by_parts(params: Any, *batch: Any) -> Any:
        images = len(jax.tree.leaves(batch)[0])
        size = part_size(images, tokens, mesh.local_devices)
        if size == images:
            return call(params, *batch)
        parts = jax.tree.map(lambda rows: rows.reshape(-1, size, *rows.shape[1:]), batch)
        found = jax.lax.map(lambda part: call(params, *part), parts)
        return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), found)

    def everywhere(params: Any, *batch: Any) -> Any:
        specs = PartitionSpec(), *[PartitionSpec("data")] * len(batch)
        here = jax.shard_map(by_parts, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False)
        return here(params, *batch)

    program = everywhere if mesh.size > 1 else by_parts
    program.__name__ = getattr(call, "func", call).__name__  # of the program, in profiles and in the cache
    return program


def part_size(images: int, tokens: int, devices: Sequence[Any]) -> int:
    """How many of a device's images, each of so many tokens, it should compute at a time; they divide the images.

    On a CPU at most about 3,200 tokens, or 1,600 on each of several devices that it is taken as: what lies between the
    products of more falls out of the caches, by which a dense ViT-S at batch 32 loses an eighth of its speed
    (docs/performance.md). All on other devices, and where no divisor is at least half of that. devices: this process's.
    """
    if devices[0].platform != "cpu":
        return images
    most = min(images, max(1, _TOKENS // min(len(devices), 2) // tokens))
    size = largest_divisor(images, most)
    return size if 2 * size >= most else images


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a positive number that is no more than `most`; 1 where that is less than 1."""
    return max(size for size in range(1, max(1, min(number, most)) + 1) if number % size == 0)


def in_one_axis(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """An elementwise function of a small array, computed with all elements in one axis.

    XLA on CPU unrolls loops over a short last axis: the logarithms of sizes would take three times as long to compile.
    The barrier keeps it from undoing the reshape.
    """
    return function(jax.lax.optimization_barrier(x.reshape(-1))).reshape(x.shape)


def einsum(
    subscripts: str, x: jax.Array, y: jax.Array, finish: Callable[[jax.Array], jax.Array] = lambda sums: sums
) -> jax.Array:
    """As `jnp.einsum` of two arrays of one float dtype, and `finish` of that, which returns the dtype that it is given.

    On CPU in bfloat16 the sums are float32, and rounded when they are finished: for those XLA's library has the matrix
    units of CPUs (AMX); sums of bfloat16 take five times as long, and each rounding as long as reading what is rounded.
    """

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return finish(jnp.einsum(subscripts, x, y))

    def round_sums(x: jax.Array, y: jax.Array) -> jax.Array:
        return finish(jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)).astype(x.dtype)

    return plain(x, y) if x.dtype != jnp.bfloat16 else jax.lax.platform_dependent(x, y, cpu=round_sums, default=plain)
