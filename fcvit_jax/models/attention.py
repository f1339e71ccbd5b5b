"""The core of attention, softmax(q k' + log(size)) v, in the one place where its kernel is chosen.

Shape letters: b batch, h heads, q queries, n tokens, k head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from fcvit_jax.errors import InputError

KERNELS = ("xla", "cudnn")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, size: jax.Array | None, kernel: str = "xla") -> jax.Array:
    """Attention of q [b, h, q, k] to k and v [b, h, n, k]: [b, h, q, k] of their dtype; logits are float32.

    The queries come scaled. With size, float32 [b, n], its logarithm is added to the logits of each key: proportional
    attention, arXiv 2210.09461, equation 1.

    kernel: "xla", two products and a softmax, on any device and of any dtype; or "cudnn", one fused program for NVIDIA
    GPUs that never writes the logits to memory, in bfloat16. Raises InputError where the kernel is not to be had.
    """
    if kernel not in KERNELS:
        raise InputError(f"attention is {kernel!r}: choose one of {', '.join(KERNELS)}")
    if kernel == "cudnn":
        if q.dtype != jnp.bfloat16 or jax.default_backend() != "gpu":
            raise InputError("attention is 'cudnn': it takes an NVIDIA GPU and bfloat16; choose xla")
        return attend_fused(q, k, v, size, "cudnn")
    logits = jnp.einsum("bhqk,bhnk->bhqn", q, k, preferred_element_type=jnp.float32)
    if size is not None:
        logits += jnp.log(size)[:, None, None, :]
    return jnp.einsum("bhqn,bhnk->bhqk", nn.softmax(logits).astype(q.dtype), v)


def attend_fused(q: jax.Array, k: jax.Array, v: jax.Array, size: jax.Array | None, implementation: Any) -> jax.Array:
    """`attend` by `jax.nn.dot_product_attention`.

    cuDNN takes no bias that is the same for all queries, and a full one is as large as the logits that it saves. So
    log(size) travels in further channels: the queries have ones there, the keys its two halves, since one number of
    bfloat16 would be off by up to 0.4 %. The width is filled up with zeros to a multiple of 8, which cuDNN asks for.
    """
    width = q.shape[-1]
    if size is not None:
        log_size = jnp.log(size)
        high = log_size.astype(k.dtype)
        low = (log_size - high.astype(jnp.float32)).astype(k.dtype)
        channels = jnp.broadcast_to(jnp.stack([high, low], axis=-1)[:, None], (*k.shape[:3], 2))
        q = jnp.concatenate([q, jnp.ones((*q.shape[:3], 2), q.dtype)], axis=-1)
        k = jnp.concatenate([k, channels], axis=-1)

    def arrange(x: jax.Array) -> jax.Array:  # [b, h, _, k] -> [b, _, h, multiple of 8]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -(-q.shape[-1] // 8) * 8 - x.shape[-1]))).transpose(0, 2, 1, 3)

    y = jax.nn.dot_product_attention(arrange(q), arrange(k), arrange(v), scale=1.0, implementation=implementation)
    return y[..., :width].transpose(0, 2, 1, 3)
