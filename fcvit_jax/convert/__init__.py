"""Conversion of pretrained PyTorch and NumPy ViT weights into checkpoint directories and back, without PyTorch."""

from fcvit_jax.convert.conversion import convert as convert
from fcvit_jax.convert.conversion import inspect as inspect
from fcvit_jax.convert.inspection import Inspection as Inspection
