import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.evaluation.plot import draw_pareto, lines, plot_pareto, published_curves
from fcvit_jax.evaluation.runs import Run
from fcvit_jax.figures import COLOURS

VIT_S = "vit_small_patch16_224.augreg_in21k_ft_in1k"


def test_each_family_has_a_line(make_run):
    dense, tome, local = lines([make_run()])
    assert [line.name for line in (dense, tome, local)] == ["dense", "tome", "s2winc7"]
    assert [row["schedule"] for row in tome.rows] == ["tome_r8", "tome_r13"]
    assert (dense.colour, tome.colour, local.colour) == ("#000000", *COLOURS[:2])
    assert tome.marker != local.marker


def test_families_have_colours_and_several_runs_have_markers(make_run):
    drawn = lines([make_run("a"), make_run("b")])
    assert [line.name for line in drawn][1::3] == ["a: tome", "b: tome"]
    a, b = drawn[1], drawn[4]
    assert a.colour == b.colour
    assert (a.marker, a.dash) != (b.marker, b.dash)


def test_a_rule_is_a_line_of_its_own_with_its_rates(make_rows):
    rows = make_rows()
    rows[2]["schedule"] = "tome_r13@evit(fuse=true)"
    drawn = lines([Run("r", tuple(rows))])
    assert [line.name for line in drawn] == ["dense", "tome", "tome@evit(fuse=true)", "s2winc7"]
    assert len({line.colour for line in drawn}) == 4
    assert {label.get_text() for label in draw_pareto([Run("r", tuple(rows))]).axes[0].texts} == {"r=8", "r=13", "r=16"}


def test_the_legend_stays_inside_the_picture(make_rows):
    dense, one, *_ = make_rows(images_per_second=None)
    rules = [{**one, "schedule": f"s2winc7_r8@pitome(margin=0.{digit})"} for digit in range(1, 8)]
    figure = draw_pareto([Run("r", (dense, *rules))])
    legend = figure.legends[-1]
    box = legend.get_window_extent()
    assert len(figure.legends) == 1
    assert len(legend.get_texts()) == 9
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_rows_without_an_accuracy_are_not_drawn(make_rows):
    rows = make_rows()
    rows[1]["top1"] = None
    assert [len(line.rows) for line in lines([Run("r", tuple(rows))])] == [1, 1, 1]


def test_points_and_intervals(make_run):
    figure = draw_pareto([make_run()])
    gmacs, speed = figure.axes
    drawn: dict[Any, Any] = {line.get_label(): line for line in gmacs.get_lines()}
    np.testing.assert_allclose(drawn["tome"].get_xydata(), [(2.7, 85), (3.4, 88)])
    timed: dict[Any, Any] = {line.get_label(): line for line in speed.get_lines()}
    np.testing.assert_allclose(timed["tome"].get_xydata(), [(130, 88), (170, 85)])
    np.testing.assert_allclose(drawn["dense - 1 point"].get_ydata(), 89)
    collections: Any = gmacs.collections
    bars = [bar for collection in collections for bar in collection.get_segments()]
    assert len(bars) == 4
    assert any(np.allclose(bar, [(2.7, 82.7), (2.7, 87.1)]) for bar in bars)
    assert {label.get_text() for label in gmacs.texts} == {"r=8", "r=13", "r=16"}


def test_without_timing_there_is_one_panel(make_run):
    assert len(draw_pareto([make_run(images_per_second=None)]).axes) == 1
    assert len(draw_pareto([make_run(top1_low=None)]).axes[0].collections) == 0


def test_labels_of_a_sweep_do_not_cover_each_other(make_rows):
    dense, one, *_ = make_rows()
    sweep = [
        {
            **one,
            "schedule": f"{family}_r{r}",
            "gmacs": 4.6 - 0.14 * r - shift,
            "top1": 0.9 - 4e-5 * r**2.5 + 0.1 * shift,
        }
        for family, shift in (("tome", 0.0), ("s2dfe", 0.03), ("s2winc7", 0.05))
        for r in range(17)
    ]
    figure = draw_pareto([Run("r", (dense, *sweep))])
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].texts]
    assert len(boxes) > 15  # some of 51 find no place
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    # The ends of a line come before its middle.
    assert {"r=0", "r=16"} <= {label.get_text() for label in figure.axes[0].texts}


def test_published_curves_are_drawn_only_for_their_images(make_run):
    assert published_curves([make_run(model=VIT_S)]) == {}
    assert published_curves([make_run(model="vit_tiny_patch16_224", reference_top1=0.7)]) == {}
    evaluated = make_run(model=VIT_S, reference_top1=0.814)
    found = published_curves([evaluated])
    assert list(found) == ["published (Heo et al., digitised)", "published (Bolya et al.)"]
    assert {curve.family for curve in found["published (Heo et al., digitised)"]} == {
        "dense",
        "tome",
        "s2dfe",
        "s2winc7",
    }
    figure = draw_pareto([evaluated])
    assert len(figure.axes[0].get_lines()) == len(figure.axes[1].get_lines()) + 6
    assert next(iter(found)) in [text.get_text() for text in figure.legends[0].get_texts()]


def test_picture(make_run):
    picture = np.asarray(Image.open(io.BytesIO(plot_pareto([make_run(checkpoint="$C$")]))).convert("L"))
    height, width = picture.shape
    assert width == pytest.approx(7 * 150, abs=2)
    assert height == pytest.approx((2 * 4.4 + 0.8) * 150, abs=2)
    assert picture[: height // 2].std() > 5
    assert picture[height // 2 :].std() > 5
