"""The programs for what of the model is bound by memory, by name, and the choice between them for inference."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from fcvit_jax.models import xla
from fcvit_jax.models.merging import match_tokens

KERNELS = ("xla", "triton", "interpreted")


class Kernels(NamedTuple):
    """The functions of `xla`, and the matching of what its attention hands on, by whichever programs."""

    attend: Callable[..., Any]
    match: Callable[..., Any]
    add_and_norm: Callable[..., Any]
    merge_and_norm: Callable[..., Any]


def choose_kernels(dtype: Any, devices: Iterable[Any]) -> str:
    """The fastest of `KERNELS` for inference in a dtype on these devices: "triton" on NVIDIA GPUs in bfloat16.

    On several, which has not been tried yet, each has to compute images of its own (`compiling.on_each_device`): XLA
    cannot split Triton's programs.
    """

    def runs_triton(device: Any) -> bool:
        capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are named otherwise
        return device.platform == "gpu" and bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8.0

    return "triton" if dtype == jnp.bfloat16 and all(map(runs_triton, devices)) else "xla"


def kernels_of(name: str) -> Kernels:
    """The kernels of a name of `KERNELS`."""
    if name == "xla":
        return Kernels(xla.attend, match_tokens, xla.add_and_norm, xla.merge_and_norm)
    from fcvit_jax.models import triton, triton_matching  # there may be none in a JAX for other devices

    ours = triton.attend, triton_matching.match, triton.add_and_norm, triton.merge_and_norm
    return Kernels(*(partial(kernel, interpret=name == "interpreted") for kernel in ours))
