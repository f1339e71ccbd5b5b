"""Strict numerics, two CPU devices, one cache of compiled programs, and the table of slow tests.

`@pytest.mark.devices(8)` runs a test in a process of its own that has eight CPU devices. `slow` tests run only when
asked for: `-m slow`, or `-m ""` for everything.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# JAX checks neither the age nor the number of entries: `pytest_configure` removes old ones.
PROGRAMS = ROOT / ".pytest_cache" / "jax"
DAYS = 14


def xla_rejects_its_own_programs() -> bool:
    """As `fcvit_jax.flags` has it: CPUs on which a cache costs more than it saves."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    return "GenuineIntel" in text and "avx512f" in text and "amx_tile" not in text


# By environment variable, for the processes that tests start too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # LLVM's: most of what a test takes is compiling
if not xla_rejects_its_own_programs():
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", "2")))
jax.config.update("jax_default_matmul_precision", "highest")

LONG = ("test_train.py", "test_end_to_end.py", "test_evaluate.py", "test_html.py", "test_browser.py")
# By file, the tests that get the marker `slow`; all of a file where none is named.
SLOW: dict[str, tuple[str, ...]] = {}
SHARED = ROOT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        PROGRAMS.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS.iterdir():
            if program.stat().st_mtime < time.time() - DAYS * 24 * 3600:
                program.unlink(missing_ok=True)


class Elsewhere(pytest.Item):
    """A test that runs in a process of its own, which has more CPU devices than this one."""

    def __init__(self, *, devices: int, **arguments: Any):
        super().__init__(**arguments)
        self.devices = devices

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", self.nodeid]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(self.devices)}
        done = subprocess.run(command, cwd=self.config.rootpath, env=environment, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)
        if " passed" not in done.stdout:
            pytest.skip(done.stdout)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(config, items)
    for index, item in enumerate(items):
        mark = item.get_closest_marker("devices")
        if mark and mark.args[0] > jax.config.jax_num_cpu_devices:  # pyright: ignore[reportAttributeAccessIssue]
            parent: Any = item.parent
            items[index] = Elsewhere.from_parent(parent, name=item.name, devices=mark.args[0])
            items[index].own_markers.extend(item.own_markers)
    # The files that take minutes come first: of two workers, one would be left alone with the last.
    items.sort(key=lambda item: item.path.name not in LONG)


def mark_slow(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `SLOW` names. Where whole files were collected, a name that no test has is an error."""
    found: dict[str, set[str]] = {}
    for item in items:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        name = getattr(item, "originalname", item.name)
        found.setdefault(file, set()).add(name)
        if file in SLOW and (not SLOW[file] or name in SLOW[file]):
            item.add_marker("slow")
    absent = [file for file in SLOW if not (ROOT / "tests" / file).exists()]
    if not any("::" in argument for argument in config.args):
        absent += [f"{file}::{name}" for file in SLOW.keys() & found for name in {*SLOW[file]} - found[file]]
    if absent:
        raise pytest.UsageError(f"tests/conftest.py: SLOW names what does not exist: {', '.join(sorted(absent))}")


def shared(relative: str) -> Path:
    """A file of the folder of real photos and weights that may stand beside the checkout, or skip the test."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent: the test needs real data that the project does not carry")
    return path


@pytest.fixture
def clothing_test() -> Path:
    """372 real photos in ten class folders."""
    return shared("data/clothing/test")


@pytest.fixture
def imagenet_samples() -> list[Path]:
    """251 real ImageNet files, among them odd sizes, greyscale and EXIF-rotated ones."""
    return sorted(shared("data/imagenet_samples").glob("*.JPEG"))


@pytest.fixture
def clothing_weights() -> Path:
    """A trained ViT-S/14 with ten classes, in timm's layout, float16."""
    return shared("weights/clothing_vits14.safetensors")
