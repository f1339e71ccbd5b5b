"""What the scripts' flags accept beyond absl's own parsers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
def get_config():
    inner = {"rate": 1.0, "policy": "none", "steps": placeholder(int), "affine": ConfigDict({"degrees": 8.0})}
    return ConfigDict({"inner": inner, "limit": 3, "freeze": placeholder(str)})
"""
SCRIPT = """
import sys, jax
from pathlib import Path
from fcvit_jax.flags import run_script
run_script(lambda config, workdir: print(config.to_json(), workdir), Path(sys.argv.pop(1)), "out")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(*arguments):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "config.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_none_and_the_home_directory_may_be_typed(script, tmp_path):
    nothing = ("inner.rate=none", "inner.steps=None", "inner.affine=none", "limit=NONE", "freeze=none")
    policy = "--config.inner.policy=none"
    done = script("--config=~/config.py", *(f"--config.{each}" for each in nothing), policy, "--workdir=~/run")
    found, _, workdir = done.stdout.strip().rpartition(" ")
    assert workdir == f"{tmp_path}/run", done.stderr
    inner = {"affine": None, "policy": "none", "rate": None, "steps": None}
    assert json.loads(found) == {"freeze": None, "inner": inner, "limit": None}


def test_a_field_that_does_not_exist_is_one_line(script):
    for field, told in (
        ("inner.rat=none", "no field 'rat'; did you mean 'rate'?"),
        ("inner.colour=3", "no field 'colour'; the fields are in the configuration's file"),
        ("outer.rate=3", "no field 'outer'; the fields are in the configuration's file"),
    ):
        done = script(f"--config.{field}")
        assert (done.returncode, done.stderr) == (2, f"error: --config: {told}\n")


def test_a_bucket_as_working_directory_is_one_line(script, tmp_path):
    done = script("--workdir=gs://bucket/run")
    assert done.returncode == 2
    assert done.stderr.startswith("error: gs://bucket/run is an address")
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]
