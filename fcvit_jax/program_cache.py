"""Compiled programs are kept on disk for the next run."""

import contextlib
import os
import tempfile
from typing import Any

import jax

from fcvit_jax.compiling import cpu_info
from fcvit_jax.errors import InputError
from fcvit_jax.files import local_path


def keep_programs(folder: str | None) -> None:
    """Make JAX keep compiled programs in a folder, and reuse them. Nothing is kept if the folder cannot be written.

    folder: None for the default, "" for none.
    """
    options: Any = jax.config
    if folder is None:
        folder = options.jax_compilation_cache_dir or _default_cache()
    # JAX opens a bucket itself.
    options.update("jax_compilation_cache_dir", folder if "://" in str(folder) else None)
    if not folder:
        return
    with contextlib.suppress(OSError, RuntimeError, InputError):  # a read-only home, or none at all
        place = local_path(folder)
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            options.update("jax_compilation_cache_dir", str(place))
    options.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    options.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _default_cache() -> str:
    if jax.default_backend() == "cpu":
        # Intel CPUs with AVX-512 but no AMX: XLA rejects what it compiled on the same CPU (openxla/xla, issue 44565).
        cpu = cpu_info()
        if "GenuineIntel" in cpu and "avx512f" in cpu and "amx_tile" not in cpu:
            return ""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fcvit_jax", "jax")
