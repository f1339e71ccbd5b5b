"""Programs keep the memory that they free: large buffers cost page faults once."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from fcvit_jax.allocator import keep_freed_memory
keep_freed_memory()
import jax
double = jax.jit(lambda x: 2 * x)
x = double(jax.numpy.ones(25 << 20))  # 100 MiB: more than the heap of a thread other than the main one holds
for _ in range(5):  # the heap grows to what is held at a time; rarely by a buffer more later
    double(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):
    double(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**variables):
    """Count the page faults of 60 calls of a program whose output takes 100 MiB, on one CPU device."""
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name} | variables
    return int(subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be made to keep freed memory")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise():
    assert faults() < faults(MALLOC_ARENA_MAX="8") / 12
