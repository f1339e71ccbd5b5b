"""Small random models of the real libraries, and their outputs and ours on real photos.

No parameter is 0 or 1, so that none can be left out or mistaken for another.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from safetensors.torch import save_file  # noqa: E402

import fcvit_jax as fc  # noqa: E402
from conftest import SHARED  # noqa: E402
from fcvit_jax.convert.__main__ import main  # noqa: E402
from fcvit_jax.data.preprocess import decode, preset  # noqa: E402

TOLERANCE = 2e-5

State = dict[str, Any]


class Published(NamedTuple):
    """SRC, the options that it requires, and the real library's function of images [b, 3, height, width]."""

    source: Path
    flags: tuple[str, ...]
    logits: Callable[[Any], Any]
    image_size: tuple[int, int] = (64, 64)


def random(*shape, seed=0):
    return 0.15 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model, seed=0):
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter += random(*parameter.shape, seed=100 * seed + index)
    return model.eval()


def load(model, state):
    model.load_state_dict(state, strict=True)
    return model.eval()


def save(path: Path, state: Mapping[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        save_file(dict(state), path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    return path


def rename(state: Mapping[str, Any], *replacements: tuple[str, str]) -> State:
    for pattern, replacement in replacements:
        state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
    return dict(state)


def load_photos():
    """Load normalised photos [3, 3, height, width] of a given size: real ones if they lie beside the checkout."""
    paths = [sorted(place.iterdir())[0] for place in sorted((SHARED / "data/clothing/test").glob("*"))[:3]]
    noise = np.random.default_rng(0).integers(0, 256, (3, 97, 131, 3), np.uint8)
    images = [decode(path.read_bytes(), path.name) for path in paths] or [decode(pixels, "noise") for pixels in noise]

    def of_size(size):
        preprocess = preset("timm/augreg", size)
        pixels = preprocess.normalize(np.stack([preprocess(image) for image in images]))
        return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)

    return of_size


@partial(jax.jit, static_argnums=0)
def apply(config, params, images):
    return fc.ViT(config).apply({"params": params}, images)[0]


def ours(checkpoint, images):
    return np.asarray(apply(checkpoint.config, checkpoint.params, images.permute(0, 2, 3, 1).numpy()))


def theirs(logits, images):
    with torch.no_grad():
        return logits(images).numpy()


def convert(source, out: Path, *flags: str):
    main([str(source), str(out), *flags])
    return fc.load_checkpoint(out)
