"""What inference.py times: our model, timm's with Token Merging in PyTorch, and matmuls to compare both with.

Each is built and warmed up. The logits of models are checked against those of our model in float32.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from fcvit_jax import compiling, parallel
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.errors import InputError
from fcvit_jax.models import flops
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT, cast_params

# The largest difference of logits from float32's, in standard deviations of those: typically, and in any image. If two
# proposals differ by rounding only, another token may merge, which moves that image's logits. In float32 this is one
# image at most, so the second largest difference is the typical one; in other dtypes it is the median.
TOLERANCES = {"float32": (1e-3, 1.0), "tf32": (0.03, 1.0), "bfloat16": (0.2, 1.0)}
OURS = {"xla": "fcvit_jax", "triton": "fcvit_jax triton"}  # by the kernels
SQUARES = {"cpu": (2048,)}  # sides of square matmuls; elsewhere:
LARGE_SQUARES = (2048, 8192)

Run = Callable[[int], None]  # make this many calls, and wait for them
Shape = tuple[int, int, int]  # of a matmul [m, k] x [k, n]


@dataclass(frozen=True)
class Case:
    """The conditions that the contenders of one comparison share.

    batches: float32 [m, b, height, width, 3]; the first is timed. references: float32 logits [m b, c] by schedule.
    kernels, devices: those of our model.
    """

    model: str
    config: ViTConfig
    params: dict[str, Any]
    schedules: dict[str, MergeSchedule]
    batches: np.ndarray
    references: dict[str, np.ndarray]
    dtype: str
    devices: int = 1
    kernels: str = "xla"

    @property
    def batch_size(self) -> int:
        return self.batches.shape[1]

    def __str__(self) -> str:
        height, width = self.config.image_size
        return f"{self.model} at {height}x{width}, batch {self.batch_size}, {self.dtype}"


@dataclass(frozen=True)
class Contender:
    """A model ready to be timed. None: the value does not exist, or is not reported."""

    name: str
    schedule: str
    run: Run
    executed_gmacs: float
    max_difference: float
    compile_seconds: float | None
    bytes: int | None
    devices: int = 1

    @property
    def label(self) -> str:
        return self.name + (f", {self.devices} devices" if self.devices > 1 else "")


def random_params(config: ViTConfig) -> dict[str, Any]:
    """Draw parameters of a trained model's magnitude: kernels keep the variance, scales are about 1, others small."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.standard_normal(leaf.shape, np.float32)
        match path[-1].key:
            case "kernel":
                return jnp.asarray(numbers / np.float32(sqrt(prod(leaf.shape[:-1]))))
            case "scale" | "ls1" | "ls2":
                return jnp.asarray(1 + 0.1 * numbers)
            case _:
                return jnp.asarray(0.1 * numbers)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def prepare_ours(case: Case) -> Iterator[Contender]:
    """Yield our model under every schedule, compiled and checked, its batches spread over the devices."""
    dtype, _ = PRECISIONS[case.dtype]
    mesh = parallel.data_mesh(jax.devices()[: case.devices])
    # As PyTorch's `model.to(dtype)` casts them.
    params = jax.device_put(cast_params(case.params, dtype), parallel.replicated(mesh))
    batches = jax.device_put(case.batches.astype(dtype), NamedSharding(mesh, PartitionSpec(None, "data")))
    images = batches[0]
    for name, schedule in case.schedules.items():
        started = time.perf_counter()
        call = compile_program(case.config, schedule, case.dtype, params, images, mesh, case.kernels)
        seconds = time.perf_counter() - started
        logits = compute_logits(call, params, batches)
        difference = largest_difference(f"{case}: {name}", logits, case.references[name], case.dtype)
        # Fewer than the schedule's if unused outputs are not computed.
        executed = flops.executed_gmacs(case.config, schedule)
        memory = call.memory_analysis()
        used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        used -= memory.alias_size_in_bytes
        run = repeat(call, params, images)
        yield Contender(OURS[case.kernels], name, run, executed, difference, seconds, used, case.devices)


def compile_program(
    config: ViTConfig, schedule: MergeSchedule, dtype: str, params: Any, images: Any, mesh: Mesh, kernels: str = "xla"
) -> Any:
    """Compile our model: (params, images [b, height, width, 3]) -> logits [b, c]."""
    kind, precision = PRECISIONS[dtype]
    model = ViT(config, schedule, dtype=kind, kernels=kernels)

    def forward(params: Any, images: Any) -> jax.Array:
        return model.apply({"params": params}, images)[0]

    call = jax.jit(compiling.on_each_device(forward, config.num_tokens, mesh))
    with jax.default_matmul_precision(precision):
        return call.lower(params, images).compile(compiling.options(len(images) // mesh.size, config.num_tokens, kind))


def compute_logits(call: Any, params: Any, batches: jax.Array) -> np.ndarray:
    """Compute the logits [m b, c] of batches [m, b, height, width, 3]."""
    return np.concatenate([np.asarray(call(params, batch)) for batch in batches])


def repeat(call: Any, *arguments: jax.Array | dict[str, Any]) -> Run:
    """Make a function that calls a program: queued on a GPU, as PyTorch does; one by one on CPU, to avoid overlap."""
    one_by_one = jax.default_backend() == "cpu"

    def run(calls: int) -> None:
        result = None
        for _ in range(calls):
            result = call(*arguments)
            if one_by_one:
                result.block_until_ready()
        jax.block_until_ready(result)

    return run


def prepare_timm(case: Case, mode: str | None, only: Sequence[str] | None = None) -> Iterator[Contender]:
    """Yield timm's model on the same weights, and Token Merging on it; failures of torch.compile are reported.

    mode: of torch.compile. only: the schedules, by default all.
    """
    import pytorch_tome as peer
    import torch

    torch.compiler.reset()
    model = peer.load_timm(case.config, case.params).to("cuda" if jax.default_backend() == "gpu" else "cpu")
    wanted = {name: schedule for name, schedule in case.schedules.items() if only is None or name in only}
    modules = {name: peer.with_schedule(model, case.config, schedule) for name, schedule in wanted.items()}
    modules = {name: module for name, module in modules.items() if module is not None}
    if case.dtype != "float32":  # rounding to bfloat16 may hide what is wrong with a program
        peer.set_precision("float32")
        for name, module in modules.items():
            logits = peer.prepare(module, case.batches).logits
            largest_difference(f"{case}: timm {name} in float32", logits, case.references[name], "float32")
        model.to(getattr(torch, PRECISIONS[case.dtype][0].__name__))
    peer.set_precision(case.dtype)
    for name, module in modules.items():
        for label, how in (("timm", None), ("timm compiled", mode))[: 2 if mode else 1]:
            try:
                prepared = peer.prepare(module, case.batches, how)
            except Exception as error:
                if how is None:
                    raise
                why = next(iter(str(error).splitlines()), "")
                tqdm.write(f"{case}: torch.compile of {name} is left out: {type(error).__name__}: {why}")
                continue
            run, logits, seconds, used = prepared
            difference = largest_difference(f"{case}: {label} {name}", logits, case.references[name], case.dtype)
            yield Contender(label, name, run, flops.gmacs(case.config, case.schedules[name]), difference, seconds, used)


def largest_difference(what: str, logits: np.ndarray, reference: np.ndarray, dtype: str) -> float:
    """Return the largest difference of a logit, in standard deviations of the reference's; InputError if too large."""
    differences = np.sort(np.abs(logits - reference).max(axis=1) / reference.std())
    typical = float(differences[-2] if dtype == "float32" else np.median(differences))
    largest = float(differences[-1])  # NaN, if any: it is sorted to the end
    most_typical, most = TOLERANCES[dtype]
    if not (typical <= most_typical and largest <= most):  # NaN is not
        raise InputError(
            f"{what}: logits are {typical:.2g} standard deviations from float32's in a typical image and "
            f"{largest:.2g} in the worst, more than {most_typical:g} and {most:g}: they are wrong, and are not timed"
        )
    return largest


def prepare_matmuls(case: Case) -> dict[Shape, Run]:
    """Prepare products large enough to show the machine's peak, and those of the model's MLP, in the case's dtype."""
    dtype, precision = PRECISIONS[case.dtype]
    tokens, width, hidden = case.batch_size * case.config.num_tokens, case.config.embed_dim, case.config.mlp_dim
    sides = SQUARES.get(jax.default_backend(), LARGE_SQUARES)
    runs: dict[Shape, Run] = {}
    for m, k, n in [*((side, side, side) for side in sides), (tokens, width, hidden), (tokens, hidden, width)]:
        a, b = (jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(m, k), (k, n)]))
        with jax.default_matmul_precision(precision):
            call = jax.jit(partial(compiling.einsum, "mk,kn->mn")).lower(a, b).compile(compiling.options(m, 1, dtype))
            runs[m, k, n] = repeat(call, a, b)
    return runs
