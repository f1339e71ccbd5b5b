import importlib
import statistics
import sys
from pathlib import Path

import pytest

from fcvit_jax.evaluation import published
from fcvit_jax.models import flops, zoo
from fcvit_jax.models.schedule import MergeSchedule, parse_schedules

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
as_markdown = importlib.import_module("published_page").as_markdown
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("paper_*.py"))
# How exactly the plots' GMACs could be read off: ViT-S, ViT-B, ViT-L; the comparison table prints one decimal.
PRECISION = {"vit_small": 0.03, "vit_base": 0.05, "vit_large": 0.2, "deit_small": 0.05}


def plotted():
    """(weights, family, [(schedule, GMACs)]) of every curve whose source has multiply-accumulates and rates."""
    for curve in published.curves():
        points = [(point.schedule, point.gmacs) for point in curve.points if point.schedule and point.gmacs]
        if points:
            yield curve.model, curve.family, points


@pytest.mark.parametrize(("model", "family", "points"), list(plotted()), ids=lambda value: str(value)[:12])
def test_our_multiply_accumulates_are_those_of_the_plots(model, family, points):
    config = zoo.get(model).config
    allowed = next(value for name, value in PRECISION.items() if model.startswith(name))
    errors = [gmacs - flops.gmacs(config, MergeSchedule.parse(name, config.depth)) for name, gmacs in points]
    assert max(map(abs, errors)) <= allowed
    # The plots' axis is read off with one bias; beside it a curve's points agree better still.
    assert statistics.pstdev(errors) <= allowed / 3


def test_the_curves_that_the_plots_pin_down():
    assert {(model.split("_patch")[0], family, len(points)) for model, family, points in plotted()} == {
        ("vit_small", "s2dfe", 8),
        ("vit_small", "s2winc7", 13),
        ("vit_base", "s2winc7", 8),
        ("vit_large", "s4dfe", 6),
        ("deit_small", "dense", 1),
        ("deit_small", "tome", 1),
        ("deit_small", "s2dfe", 1),
    }


def test_the_rates_of_the_sam_plot_fit_its_speed():
    # It has only images/s. With the right rates, each point has the same multiply-accumulates a second.
    for curve in published.curves("vit_base_patch16_224.sam_in1k"):
        timed = [(curve.gmacs(point), point.images_per_second) for point in curve.points]
        work = [gmacs * rate for gmacs, rate in timed if gmacs and rate]
        if work:
            assert max(work) / min(work) < 1.035, curve.family


def test_the_rates_of_the_comparison_table_are_the_only_ones():
    config = zoo.get("deit_small_patch16_224").config
    for family, r in (("tome", 12), ("s2dfe", 18)):
        near = {n: flops.gmacs(config, MergeSchedule.parse(f"{family}_r{n}", 12)) for n in (r - 1, r, r + 1)}
        assert [n for n, gmacs in near.items() if round(gmacs, 1) == 2.8] == [r]


def test_points_are_plausible():
    for curve in published.curves():
        model = zoo.get(curve.model)
        assert model.top1 is not None
        for point in curve.points:
            gmacs = curve.gmacs(point)
            assert gmacs is not None
            assert 0.3 < gmacs / flops.gmacs(model.config) <= 1
            if point.top1 is not None:  # merging costs accuracy, and never helps by more than the reading's error
                assert 100 * model.top1 - 8 < point.top1 < 100 * model.top1 + 0.15
        assert len({point.schedule for point in curve.points if point.schedule}) in (0, len(curve.points))


def test_points_by_schedule():
    named = published.points("vit_small_patch16_224.augreg_in21k_ft_in1k")
    assert named["s2winc7_r16"] == published.Point("s2winc7", 16, 80.53, 2.651, 1405)
    assert named["tome_r13"].top1 == 79.32  # Heo et al.'s, whose README neighbour has 79.30
    assert named["dense"].r == 0
    assert published.points("vit_small_patch16_224") == named
    # An architecture stands for one set of weights, not for a mixture.
    assert published.points("vit_base_patch16_224")["tome_r8"].top1 == 83.86
    assert "s1dfe_r2" not in published.points("vit_base_patch16_224")
    assert published.points("vit_tiny_patch16_224") == published.points(None) == published.points("") == {}


def test_the_page_matches_the_output_of_the_script():
    assert (ROOT / "docs" / "published.md").read_text() == as_markdown()


def test_every_point_is_on_the_page():
    lines = as_markdown().splitlines()
    points = [point for curve in published.curves() for point in curve.points]
    assert sum(line.endswith("` |") for line in lines) == len(points)
    assert "| `s2dfe_r18` | 79.73 | 1793 | 2.787 | 2.78 | `heo-paretos` |" in lines
    assert "| s4winc7, rate unknown | 85.78 | - | 55.1 | - | `heo-paretos` |" in lines


@pytest.mark.parametrize("name", CONFIGS)
def test_the_experiments_have_every_published_schedule_of_their_source(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    depth = zoo.get(config.checkpoint).config.depth
    lists = (config.schedules, config.sweep) if config.sweep else (config.schedules,)
    schedules = parse_schedules(",".join(lists), depth)
    wanted = [curve for curve in published.curves(config.checkpoint) if curve.source.name.startswith("heo")]
    assert {point.schedule for curve in wanted for point in curve.points if point.schedule} <= set(schedules)
    assert config.dataset == "tfds:imagenet2012/validation"


def test_there_is_an_experiment_for_each_of_the_papers_models():
    models = {curve.model for curve in published.curves() if curve.source.name.startswith("heo")}
    assert {importlib.import_module(f"configs.{name}").get_config().checkpoint for name in CONFIGS} == models
