"""Processes that tests start, alone or several together, each with CPU devices of its own."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def start_python(*arguments: Any, devices: int = 1) -> subprocess.Popen[str]:
    """Start Python in the root of the repository; conftest.py sets its environment but for the devices."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def places(count: int = 2) -> list[str]:
    """Return what `--distributed` takes for each of several processes that run together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [f"127.0.0.1:{port},{count},{index}" for index in range(count)]


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Return the output and the errors of a process that succeeds; one that hangs prints where."""
    try:
        output, errors = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail(process.communicate()[1])
    assert process.returncode == 0, output + errors
    return output, errors
