"""Options of XLA with which programs run faster than with its defaults."""

import functools
import os
from typing import Any

import jax

_FASTER = {"cpu": {"xla_cpu_use_fusion_emitters": False}}


@functools.cache
def options() -> dict[str, Any] | None:
    """What to hand to `jax.jit(..., compiler_options=...)` or to `compile(compiler_options=...)` on this backend.

    On CPU, XLA's older emitter of fused loops: its programs run faster, and those that merge compile in 0.6 of
    the time (docs/performance.md). None elsewhere, where XLA_FLAGS decides it, and where this XLA knows no such option.
    """
    wanted = _FASTER.get(jax.default_backend())
    if wanted is None or any(name in os.environ.get("XLA_FLAGS", "") for name in wanted):
        return None
    try:
        jax.jit(lambda: 0, compiler_options=wanted).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):  # gone from a later XLA
        return None
    return wanted
