"""Errors that end a command are one line: JAX that does not start, a closed pipe, names of any bytes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fcvit_jax.errors import one_line_errors, printable

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("platform", ["tpu", "nonsense"])
def test_jax_that_does_not_start_is_one_line(tmp_path, platform):
    done = run("-m", "fcvit_jax.convert", "packaged:digits", str(tmp_path / "out"), JAX_PLATFORMS=platform)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: JAX does not start (Unable to initialize backend '{platform}'")
    assert line.endswith(
        f"JAX_PLATFORMS is '{platform}': unset it, or name a platform that this machine has, such as cpu"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_unchanged():
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors():
        raise RuntimeError("a bug")


@pytest.mark.parametrize("command", ["-m fcvit_jax.convert --help", "-m fcvit_jax.convert --inspect packaged:digits"])
def test_a_closed_pipe_is_silent(command):
    reading, writing = os.pipe()
    os.close(reading)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=env, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode in (0, 141)  # argparse ignores it


def test_names_of_any_bytes_are_printed():
    code = "from fcvit_jax.errors import one_line_errors\nwith one_line_errors(): print('caf\\udce9 \\u4e2d')"
    assert run("-c", code).stdout == "caf\\udce9 中\n"
    assert run("-c", code, PYTHONIOENCODING="ascii").stdout == "caf\\udce9 \\u4e2d\n"
    assert printable("caf\udce9") == "caf\\udce9"
