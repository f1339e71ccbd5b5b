import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
from fcvit_jax import evaluation
from fcvit_jax.evaluation.runs import Run
from thirteen_images import CLASSES, CONFIG, PIXELS, PREPROCESS, RNG, SCHEDULES

CONDITIONS = {
    "num_images": 1000,
    "checkpoint": "C",
    "model": None,
    "weights_sha256": "ab12",
    "dataset": "D",
    "preprocess": "P",
    "batch_size": 8,
    "dtype": "float32",
    "device": "X",
    "num_devices": 1,
    "versions": {"jax": "1"},
}
# schedule, top-1, its interval, GMACs, images/s, tokens, p of McNemar's test
RESULTS = [
    ("dense", 0.9, 0.88, 0.917, 4.6, 100.0, 197, 1.0),
    ("tome_r8", 0.88, 0.858, 0.899, 3.4, 130.0, 101, 0.2),
    ("tome_r13", 0.85, 0.827, 0.871, 2.7, 170.0, 41, 0.001),
    ("s2winc7_r16", 0.895, 0.874, 0.913, 2.64, 160.0, 21, 0.5),
]


@pytest.fixture
def make_rows():
    """Rows of four schedules with round numbers; keywords replace a field in all of them."""

    def make(**changes):
        return [
            {
                "schedule": schedule,
                "stages": "S",
                "top1": top1,
                "top1_low": low,
                "top1_high": high,
                "top5": 0.99,
                "mcnemar_p": p,
                "agreement": 1 - (0.9 - top1),
                "kl": 0.25 * (0.9 - top1),
                "gmacs": gmacs,
                "tokens_out": tokens,
                "images_per_second": rate,
                "images_per_second_spread": 0.1,
                "speedup": rate / 100,
                **CONDITIONS,
                **changes,
            }
            for schedule, top1, low, high, gmacs, rate, tokens, p in RESULTS
        ]

    return make


@pytest.fixture
def make_run(make_rows):
    def make(name="run", **changes):
        return Run(name, tuple(make_rows(**changes)))

    return make


@pytest.fixture
def write_run(make_rows):
    """Write a working directory as evaluate.py leaves it."""

    def write(directory, **changes):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(**changes)))
        return directory

    return write


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    params = jax.jit(fc.ViT(CONFIG).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    leaves, tree = jax.tree.flatten(params)
    noisy = [np.asarray(leaf) + RNG.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    path = tmp_path_factory.mktemp("weights") / "checkpoint"
    provenance = {"model": "vit_tiny_patch16_224", "sha256": "ab12"}
    return fc.save_checkpoint(
        path, CONFIG, tree.unflatten(noisy), PREPROCESS, class_names=CLASSES, provenance=provenance
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Thirteen images of noise in seven classes; in the order of the folder, image i has the pixels `PIXELS[i]`."""
    path = tmp_path_factory.mktemp("photos")
    for index, pixels in enumerate(PIXELS):
        (path / CLASSES[index // 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path / CLASSES[index // 2] / f"{index:02d}.png")
    return path


@pytest.fixture
def run(checkpoint, folder):
    def run(workdir, **changes):
        fields: Any = {"dataset": f"folder:{folder}", "schedules": ",".join(SCHEDULES), "batch_size": 8}
        return evaluation.evaluate(checkpoint, workdir=workdir, **({"throughput_blocks": 0} | fields | changes))

    return run
