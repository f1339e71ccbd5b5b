"""Freed memory is kept for the next call, as XLA on CPU wants its buffers anew at each."""

import ctypes
import os

# mallopt(3). A value of -1 stands for "never" with the threshold.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, in one heap, instead of giving it back; returns whether it does.

    Otherwise each buffer of 32 MiB or more is mapped afresh, page by page, at every call of a compiled program. To be
    called by programs, not by libraries, and before threads are started. MALLOC_... and GLIBC_TUNABLES in the
    environment go before, and elsewhere than on glibc there is nothing to be done.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # macOS, Windows, musl
        return False
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1))
    return all(mallopt(*option) for option in options)
