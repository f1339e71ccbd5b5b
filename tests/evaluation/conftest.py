import json

import pytest

from fcvit_jax.evaluation.runs import Run

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
