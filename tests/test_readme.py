"""README: its examples run as written, and its numbers are the computed ones."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

import fcvit_jax as fc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LIBRARY, OWN_MODEL = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_library_example_runs_as_written():
    names: dict[str, Any] = {"images": jnp.zeros((2, 32, 32, 3))}
    exec(LIBRARY, names)
    assert names["logits"].shape == (2, 10)
    assert [row["schedule"] for row in names["rows"]] == ["dense", "tome_r16@nearest"]


def own_model(schedule):
    """Run the example under a schedule: tokens before [2, 17, 8], and after three layers, and their sizes."""
    tokens = np.random.default_rng(0).normal(size=(2, 17, 8)).astype(np.float32)

    def attention(x, log_size):
        assert log_size.shape == x.shape[:2]
        heads = jnp.stack([x, x], axis=1)
        return 0 * x, heads, heads, heads

    model = SimpleNamespace(depth=3, grid=(4, 4), num_prefix_tokens=1)
    block = SimpleNamespace(attention=attention, mlp=jnp.zeros_like)
    names: dict[str, Any] = dict(fc=fc, jnp=jnp, model=model, blocks=[block] * 3)
    names |= dict(schedule=fc.MergeSchedule.parse(schedule, 3), images=tokens, embed=jnp.asarray, batch=2, tokens=17)
    exec(OWN_MODEL, names)
    return tokens, names["x"], names["size"]


def test_the_example_of_an_own_model_merges_as_scheduled():
    tokens, x, size = own_model("tome_r4")
    assert x.shape == (2, 17 - 3 * 4, 8)
    np.testing.assert_allclose(size.sum(axis=1), 17)
    # Merging keeps the sum.
    np.testing.assert_allclose((x * size[..., None]).sum(axis=1), tokens.sum(axis=1), atol=1e-5)
    _, nearest, _ = own_model("tome_r4@nearest")
    assert np.abs(nearest - x).max() > 0.1  # the schedule's rule decides


def test_the_gmacs_of_the_schedules_are_those_computed():
    config = fc.zoo.get("vit_small_patch16_224").config
    printed = dict(re.findall(r"^\| `([^`]+)` \|.*\| (\d\.\d\d) \|$", README, flags=re.MULTILINE))
    assert len(printed) == 5
    for name, gmacs in printed.items():
        assert gmacs == f"{fc.flops.gmacs(config, fc.MergeSchedule.parse(name, 12)):.2f}"
    for name, gmacs in re.findall(r"^\| `([^`]+)` \| (\d\.\d\d) \|", README, flags=re.MULTILINE):
        assert gmacs == f"{fc.flops.gmacs(config, fc.MergeSchedule.parse(name, 12)):.2f}"


def test_every_place_states_the_same_version():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    latest = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[0]
    assert fc.__version__ == cited == latest


def test_every_file_that_a_page_links_to_exists():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())]
    assert len(links) > 30
    for page, link in links:
        assert (page.parent / link).exists(), f"{page.name}: {link}"
