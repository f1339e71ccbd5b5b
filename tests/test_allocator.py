"""What programs free stays theirs: large buffers cost page faults once."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from fcvit_jax.allocator import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    buffer = libc.malloc(40 << 20)
    libc.memset(buffer, 1, 40 << 20)
    libc.free(buffer)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""


def mapped(**variables):
    """MiB mapped in 20 rounds of taking, filling and freeing 40 MiB."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | variables
    return int(subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep freed memory")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    assert mapped() < 60
    assert mapped(MALLOC_ARENA_MAX="8") > 700
