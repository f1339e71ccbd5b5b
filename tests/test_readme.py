import re
from pathlib import Path

import jax.numpy as jnp

import fcvit_jax as fc

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_library_example_runs_as_written():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {"images": jnp.zeros((2, 32, 32, 3))}
    exec(example, names)
    assert names["logits"].shape == (2, 10)


def test_the_gmacs_of_the_schedules_are_those_computed():
    config = fc.zoo.get("vit_small_patch16_224").config
    (line,) = re.findall(r"GMACs of ViT-S/16: (.*?)\.\n", README)
    printed = dict(part.replace("`", "").split() for part in line.split(", "))
    assert printed == {
        name: f"{fc.flops.gmacs(config, fc.MergeSchedule.parse(name, 12)):.2f}"
        for name in ("dense", "tome_r13", "s2dfe_r18", "s2winc7_r16")
    }
