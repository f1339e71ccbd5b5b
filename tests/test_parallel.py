"""How several processes end, and how a CPU becomes two devices, tested in separate processes."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from processes import places, start_python

ROOT = Path(__file__).parents[1]
TOLD = "error: another process stopped: see its message\n"


def start_all(body, count=2):
    """Start processes that run the body, with `index` and `exchange()`, inside `ending_together`."""
    program = textwrap.dedent("""
        import _thread, os, signal, sys, threading, time
        import numpy as np
        from jax.experimental import multihost_utils
        from fcvit_jax import parallel
        from fcvit_jax.errors import InputError, one_line_errors

        index = int(sys.argv[1].rpartition(",")[2])
        exchange = lambda: multihost_utils.process_allgather(np.int32(index))
        parallel.start_processes(sys.argv[1])
        exchange()
        with parallel.ending_together(), one_line_errors():
    """) + textwrap.indent(textwrap.dedent(body), "    ")
    return [start_python("-c", program, place) for place in places(count)]


def ends(processes):
    """Return the exit status and standard error of each process."""
    return [(process.returncode, errors) for process in processes for _, errors in [process.communicate(timeout=120)]]


def test_each_of_three_processes_prints_one_line_if_one_fails():
    for culprit in (0, 2):
        processes = start_all(
            f"""
            if index == {culprit}:
                raise InputError("this one failed")
            time.sleep(100) if index == 1 else exchange()
            """,
            count=3,
        )
        began = time.monotonic()
        told = ends(processes)
        assert time.monotonic() - began < 60  # most of it is the start
        assert told.pop(culprit) == (2, "error: this one failed\n")
        assert told == [(2, TOLD), (2, TOLD)]


def test_finished_processes_wait_for_the_others():
    processes = start_all(
        """
        if index == 1:
            time.sleep(3)
            print("done", file=sys.stderr)
        """
    )
    assert ends(processes) == [(0, ""), (0, "done\n")]


def test_nothing_but_an_exit_at_once_ends_a_process_that_waits_in_an_exchange():
    """Its main thread is inside the exchange: no exception reaches it, no handler of a signal runs."""
    processes = start_all(
        """
        if index == 1:
            time.sleep(12)
            os._exit(0)

        def try_all():
            time.sleep(2)
            _thread.interrupt_main()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
            print("still waiting", file=sys.stderr, flush=True)
            os._exit(7)

        threading.Thread(target=try_all, daemon=True).start()
        exchange()
        """
    )
    assert ends(processes)[0] == (7, "still waiting\n")


@pytest.mark.parametrize(
    ("environment", "before", "size", "devices"),
    [
        ({}, "", 8, [1, 2, 1, 2]),
        ({}, "", 1, [1, 1, 1, 1]),
        ({}, "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})", 8, [1, 1, 1, 1]),
        ({}, "jax.devices()", 8, [1, 1, 1, 1]),
        ({"JAX_NUM_CPU_DEVICES": "3"}, "", 8, [1, 2, 3, 2]),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, "", 8, [1, 1, 1, 1]),
    ],
    ids=["two cores", "odd batch", "one core", "devices made", "chosen", "chosen by a flag"],
)
def test_a_cpu_is_taken_as_two_devices_unless_something_else_was_chosen(environment, before, size, devices):
    program = f"""
import jax
from fcvit_jax import parallel
{before}
parallel.share_cpu({size})
print([parallel.inference_mesh(batch_size).size for batch_size in (1, 2, 3, 8)])
"""
    if len(os.sched_getaffinity(0)) < 2 and not environment and not before:
        pytest.skip("this process may run on one core only")
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    kept |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", program], env=kept, capture_output=True, text=True)
    assert done.stdout.strip() == str(devices), done.stderr
