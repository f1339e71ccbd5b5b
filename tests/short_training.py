"""A run of train_sam.py that takes seconds: in this process, or as a process of its own."""

import json
import time
from typing import Any

import jax
import numpy as np
from PIL import Image

import fcvit_jax as fc
import processes
from configs import digits_sam
from fcvit_jax.training import TrainConfig, loop

TINY = {
    "model.embed_dim": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 32,
    "model.image_size": (16, 16),
    "batch_size": 32,
    "epochs": 1.0,
    "warmup_epochs": 0.25,
    "drop_path": 0.2,
    "sam.refresh_every": 2,
    "ema_decay": 0.9,
    "schedules": "tome_r2",
    "eval_every": 22,
    "save_every": 5,
    "log_every": 4,
    "tensorboard": False,
}
# Fields of a measurement of flatness that takes seconds.
FEW = dict(limit=8, batch_size=4, ascent_steps=1, draws=1, eigen_steps=1, probes=1, line_points=0, plane_points=0)
# Fields of a model of another family.
NEWER: Any = dict(model__learned_positions=False, model__rotary={"theta": 100.0}, model__gated=True, model__pool="map")


def tiny(**changes):
    config = digits_sam.get_config()
    config.update_from_flattened_dict(TINY | {name.replace("__", "."): value for name, value in changes.items()})
    return config


def train(config, workdir):
    """Train with a configuration of the scripts; return the final accuracy, None if a signal stopped the run."""
    return loop.train(TrainConfig.from_dict(config.to_dict()), workdir).accuracy


def start(workdir, *more, devices=1, **changes):
    """Start train_sam.py as a process."""
    fields = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return processes.start_python("train_sam.py", f"--workdir={workdir}", *flags, *more, devices=devices)


def finish(process):
    """Return all that a process printed, once it has succeeded."""
    return "".join(processes.finish(process))


def params(workdir):
    return fc.load_checkpoint(workdir).params


def states_in(workdir):
    """List the steps of the states on disk."""
    return sorted(int(path.name) for path in (workdir / "states").glob("*") if path.name.isdigit())


def wait_for(found, process):
    while process.poll() is None and not found():
        time.sleep(0.02)


def photos(folder, count=16, size=(24, 20), broken=0):
    """Write two kinds of pictures; the first few of the first kind are broken."""
    chance = np.random.default_rng(0)
    for name, low in (("bright", 160), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = chance.integers(low, low + 90, (*size, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    for index in range(broken):
        (folder / "bright" / f"{index:02}.png").write_bytes(b"nothing")
    return f"folder:{folder}"


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def rows(workdir):
    return [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
