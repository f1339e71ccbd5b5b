"""How programs are compiled: precisions, XLA's options, batches in parts, and bfloat16 on CPU.

benchmarks/tuning.py measures what each choice gains on a CPU; docs/tuning_notes.md has the numbers of two machines.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fcvit_jax.errors import InputError

# A configuration's `dtype` -> dtype of the computation, and precision of float32 products, which GPUs would otherwise
# round to TF32.
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
_CPU = Path("/proc/cpuinfo")
_LIBRARY = {"xla_gpu_enable_triton_gemm": False}
_TOKENS = 3200  # fits 16 images of 197 tokens, 3,152


def options(images: int, tokens: int, dtype: Any) -> dict[str, Any] | None:
    """Choose compiler options, for `jax.jit` or `compile`, of a model's inference.

    images: computed on a device in one call. tokens: of an image, before merging. dtype: of the computation. Returns
    None if no option applies: on other devices, if XLA_FLAGS sets the option, or if this XLA does not know it.

    - CPU: XLA's older emitter of fused loops. Merged models compile in two thirds of the time, dense ones in 1.6 times.
    - Intel CPU, float32, from 768 tokens in a call and up to 600 an image: Eigen's matrix products instead of
      YNNPACK's. They gained 2 to 9 % of a whole dense model on a Xeon, and lost 5 % on an EPYC.
    - GPU, from 1,024 tokens in a call: matrix products by NVIDIA's library alone. XLA otherwise compiles and times
      programs of its own for every product, in two to eight times the compile time, for no gain at this size.
    """
    backend = jax.default_backend()
    wanted: dict[str, Any] = {}
    if backend == "cpu":
        wanted |= _LOOPS
        if "GenuineIntel" in cpu_info() and dtype == jnp.float32 and images * tokens >= 768 and tokens <= 600:
            wanted |= _PRODUCTS
    elif backend == "gpu" and images * tokens >= 1024:
        wanted |= _LIBRARY
    return {name: value for name, value in wanted.items() if _accepted(name, value)} or None


@functools.cache
def cpu_info() -> str:
    """Read what Linux tells of the CPU; "" elsewhere."""
    with contextlib.suppress(OSError):
        return _CPU.read_text()
    return ""


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
    """Run `call(params, *batch)` on every device of the mesh for its own images, in parts of `part_size`.

    Every array of the batch and of the result has a leading axis of images, which is spread over the mesh; `call` must
    compute each image independently. If XLA partitioned one program instead, it could copy reshaped arrays to all
    devices, and it cannot split Triton's programs. tokens: of an image.
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
    """Choose how many of a device's images to compute at a time: a divisor of `images`.

    On a CPU, at most about 3,200 tokens, or 1,600 on each of several CPU devices: the activations of more do not stay
    in the caches. On other devices, or if no divisor is at least half of that, all images. tokens: of an image.
    devices: of this process.
    """
    if devices[0].platform != "cpu":
        return images
    most = min(images, max(1, _TOKENS // min(len(devices), 2) // tokens))
    size = largest_divisor(images, most)
    return size if 2 * size >= most else images


def largest_divisor(number: int, most: int) -> int:
    """Find the largest divisor of a positive number that is at most `most`, or 1."""
    return max(size for size in range(1, max(1, min(number, most)) + 1) if number % size == 0)


def einsum(
    subscripts: str, x: jax.Array, y: jax.Array, finish: Callable[[jax.Array], jax.Array] = lambda sums: sums
) -> jax.Array:
    """Compute `finish(jnp.einsum(...))` of two arrays of one float dtype; `finish` keeps the dtype that it is given.

    On CPU in bfloat16 the sums are float32 and rounded after `finish`. XLA's library uses the CPU's matrix units (AMX),
    which are five times as fast, only for float32 sums; and each rounding costs as much as a pass over memory.
    """

    def plain(x: jax.Array, y: jax.Array) -> jax.Array:
        return finish(jnp.einsum(subscripts, x, y))

    def round_sums(x: jax.Array, y: jax.Array) -> jax.Array:
        return finish(jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)).astype(x.dtype)

    return plain(x, y) if x.dtype != jnp.bfloat16 else jax.lax.platform_dependent(x, y, cpu=round_sums, default=plain)
