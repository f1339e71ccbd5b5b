"""The flatness of a minimum, and its comparison with another: `measure(checkpoint, dataset)`, `compare`."""

from fcvit_jax.flatness.comparison import Comparison as Comparison
from fcvit_jax.flatness.comparison import compare as compare
from fcvit_jax.flatness.flatness_report import FlatnessConfig as FlatnessConfig
from fcvit_jax.flatness.flatness_report import FlatnessReport as FlatnessReport
from fcvit_jax.flatness.loss_surface import LossSurface as LossSurface
from fcvit_jax.flatness.measurement import measure as measure
from fcvit_jax.flatness.measurement import measure_surface as measure_surface
from fcvit_jax.flatness.presentation import present as present
