import dataclasses
import functools
import io

import jax.numpy as jnp
import numpy as np
from PIL import Image

from fcvit_jax.flatness.flatness_report import FlatnessConfig, RadiusCurve
from fcvit_jax.flatness.loss_surface import LossSurface
from fcvit_jax.flatness.measurement import measure_surface
from fcvit_jax.flatness.presentation import plot_flatness

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)


@functools.cache
def report(scale):
    def loss(params, batch):
        return batch * jnp.square(params["kernel"] - 1).sum(), batch

    config = FlatnessConfig(ascent_steps=2, eigen_steps=2, probes=1, draws=2, line_points=5, plane_points=5)
    return measure_surface(
        LossSurface(loss, {"kernel": scale * jnp.ones((2, 2))}, [jnp.float32(x) for x in (1.0, 1.2, 1.4)]), config
    )


def picture(*reports):
    image = Image.open(io.BytesIO(plot_flatness(reports)))
    assert image.format == "PNG"
    assert min(image.size) > 800
    return np.asarray(image.convert("RGB"), np.int32)


def drawn(image, color):
    return (abs(image - np.array(color)[None, None]).sum(axis=2) < 30).sum()


def test_one_report_and_two():
    one, two = picture(report(1.5)), picture(report(1.5), report(2.0))
    assert drawn(one, BLUE) > 2000
    assert drawn(one, ORANGE) == 0
    assert drawn(two, ORANGE) > 1000


def test_without_slices():
    bare = dataclasses.replace(report(1.5), line=None, plane=None)
    assert 500 < drawn(picture(bare), BLUE) < drawn(picture(report(1.5)), BLUE)


def test_rises_that_have_no_logarithm_are_left_out():
    curves = dict(report(1.5).curves)
    curves["average"] = RadiusCurve((0.1, 0.2), np.array([[[-1.0, -1.0, -1.0]], [[1.0, 2.0, -0.5]]]))
    curves["worst"] = RadiusCurve((0.1, 0.2), np.zeros((2, 1, 3)))
    assert drawn(picture(dataclasses.replace(report(1.5), curves=curves)), BLUE) > 500


def test_a_long_path_leaves_the_axes_their_room():
    """A legend wider than its axes makes matplotlib give up the layout, with a warning."""
    long = dataclasses.replace(report(1.5), conditions={"checkpoint": "/very" * 40 + "/end"})
    assert drawn(picture(long), BLUE) > 2000
