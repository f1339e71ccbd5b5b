"""Keep freed memory for the next call: XLA:CPU allocates its buffers again in every call."""

import ctypes
import os

import jax

# mallopt(3). A value of -1 stands for "never" with the threshold.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory instead of returning it to the system; returns whether it does.

    Otherwise every buffer of 32 MiB or more is mapped again, page by page, in every call of a compiled program: 14 % of
    a dense ViT-S/16's time at batch 32 on two cores. Call it in programs, not in libraries, before JAX creates its
    devices. Nothing is changed if the environment sets MALLOC_... or GLIBC_TUNABLES, or without glibc.

    Only the heap of the main thread grows beyond 64 MiB. A single CPU device therefore computes in the calling thread,
    not asynchronously. Several devices compute in their own threads, and keep smaller buffers only: with one heap for
    all threads, those of a program and of XLA's compiler would wait for each other.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return False
    if not all(mallopt(*option) for option in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))):
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True
