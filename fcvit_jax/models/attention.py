"""The core of attention, softmax(q k' + log(size)) v, on any device and in any dtype.

Shape letters: b batch, h heads, q queries, n tokens, k head width.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


def attend(q: jax.Array, k: jax.Array, v: jax.Array, size: jax.Array | None) -> jax.Array:
    """Attention of q [b, h, q, k] to k and v [b, h, n, k]: [b, h, q, k] of their dtype; logits are float32.

    The queries come scaled. With size, float32 [b, n], its logarithm is added to the logits of each key: proportional
    attention, arXiv 2210.09461, equation 1.
    """
    logits = jnp.einsum("bhqk,bhnk->bhqn", q, k, preferred_element_type=jnp.float32)
    if size is not None:
        logits += jnp.log(size)[:, None, None, :]
    return jnp.einsum("bhqn,bhnk->bhqk", nn.softmax(logits).astype(q.dtype), v)
