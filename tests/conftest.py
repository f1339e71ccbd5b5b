"""Strict numerics for every test: no implicit promotion of dtype or rank, and eight CPU devices."""

import os
from pathlib import Path

# For the processes that tests start too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # LLVM's: most of what a test takes is compiling

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

LONG = ("test_train.py", "test_end_to_end.py", "test_evaluate.py", "test_html.py", "test_browser.py")
SHARED = Path(__file__).parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take minutes come first: of two workers, one would be left alone with the last."""
    items.sort(key=lambda item: item.path.name not in LONG)


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
