"""Freed memory is kept for the next call, as XLA on CPU wants its buffers anew at each."""

import ctypes
import os

import jax

# mallopt(3). A value of -1 stands for "never" with the threshold.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, instead of giving it back, and XLA use it; returns whether they do.

    Otherwise each buffer of 32 MiB or more is mapped afresh, page by page, at every call of a compiled program. To be
    called by programs, not by libraries, before JAX has made its devices. MALLOC_... and GLIBC_TUNABLES in the
    environment go before, and elsewhere than on glibc there is nothing to be done.

    Only the heap of the main thread grows beyond 64 MiB. One CPU device therefore computes in the thread that calls,
    not asynchronously; several compute in threads of their own, and keep smaller buffers only. A single heap for all
    threads is no way out: those of a program, and of XLA's compiler, then wait for each other (docs/performance.md).
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
