"""How far merged predictions are from the dense model's, image by image, and a cache of that on disk.

The score of an image is KL(dense || merged) in nats; of a model without a head, 1 - the cosine of its features.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fcvit_jax import compiling, parallel
from fcvit_jax.checkpoint import Checkpoint
from fcvit_jax.data.batches import Batch
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import CompiledStep, StepConfig, compile_step, divergence
from fcvit_jax.files import one_line_file_errors
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.rules import Rule
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT, cast_params, unit_rows
from fcvit_jax.search.simulate import Rates, SimulatedViT, rates


def distance(config: ViTConfig, dense: jax.Array, merged: jax.Array) -> jax.Array:
    """Score each row of logits, or of features without a head, float32 [b, c] -> [b]."""
    if not config.headless:
        return divergence(None, dense, merged)
    return 1 - jnp.sum(unit_rows(dense) * unit_rows(merged), axis=1)


class Memory:
    """Named lists of numbers, kept in a file of JSON lines, from which a killed search resumes."""

    def __init__(self, path: Path | None, run: Mapping[str, Any]):
        """Open the file. path: None keeps all in memory. run: what the numbers depend on, as JSON-able values."""
        self.known: dict[str, list[float]] = {}
        self.differs: tuple[str, ...] = ()
        self._path = path
        lines = _json_lines(path) if path else []
        if lines and lines[0] != run:
            there = lines[0] if isinstance(lines[0], dict) else {}
            self.differs = tuple(sorted(key for key in there | dict(run) if there.get(key) != run.get(key)))
        if self.differs or not lines:
            if path:
                with one_line_file_errors(path):
                    path.write_text(json.dumps(run) + "\n")
        else:
            self.known = {key: values for line in lines[1:] for key, values in line.items()}
            if path and not path.read_bytes().endswith(b"\n"):  # killed while it was written
                with one_line_file_errors(path):
                    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def keep(self, key: str, values: Iterable[float]) -> list[float]:
        self.known[key] = list(map(float, values))
        if self._path:
            with one_line_file_errors(self._path), self._path.open("a") as file:
                file.write(json.dumps({key: self.known[key]}) + "\n")
        return self.known[key]


def _json_lines(path: Path) -> list[Any]:
    """Read the lines of a file up to the first that is damaged; none if the file does not exist."""
    found = []
    try:
        for line in path.read_text().splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return found


@dataclass(frozen=True, eq=False)  # hashed by identity
class Scorer:
    """A scorer of schedules on batches of images.

    batches: on the devices, padded; counts: how many images of each are real. params: cast to the dtype.
    """

    checkpoint: Checkpoint
    params: Any
    step_config: StepConfig
    batches: tuple[Batch, ...]
    memory: Memory

    @property
    def config(self) -> ViTConfig:
        return self.checkpoint.config

    def __call__(self, schedule: MergeSchedule, batch: int, compiled: bool = False) -> list[float]:
        """Score the images of one batch. compiled: by the real program, even if there is a simulator."""
        key = f"{schedule} {'compiled' if compiled else 'simulated'} {batch}"
        if key in self.memory.known:
            return self.memory.known[key]
        rows = self.batches[batch]
        layers = None if compiled else self._rates(schedule)
        if layers is None:
            logits = self.compiled(schedule)(self.params, rows)[1]
        else:
            rule, layers = layers
            logits = self._simulator(rule)((self.params, layers), rows.images)
        found = np.asarray(self._compare(self._dense(batch), logits), np.float64)[np.asarray(rows.mask)]
        if not np.isfinite(found).all():
            raise InputError(f"schedule {schedule}: the logits of an image are not finite; try another dtype")
        return self.memory.keep(key, np.maximum(found, 0.0))

    def logits(self, schedule: MergeSchedule) -> np.ndarray:
        """Compute the logits of all images, by the real program: float32 [n, c]."""
        step = self.compiled(schedule)
        return np.concatenate([np.asarray(step(self.params, rows)[1])[np.asarray(rows.mask)] for rows in self.batches])

    def _rates(self, schedule: MergeSchedule) -> tuple[Rule, Rates] | None:
        found = {rule: rates(schedule, self.config, rule) for rule in schedule.rules}
        return next(((rule, layers) for rule, layers in found.items() if layers is not None), None)

    @functools.cache  # noqa: B019  (a scorer lives as long as a search)
    def compiled(self, schedule: MergeSchedule) -> CompiledStep:
        """Compile the real program of a schedule."""
        return compile_step(ViT(self.config, schedule), self.params, self.step_config)

    @functools.cache  # noqa: B019
    def _dense(self, batch: int) -> jax.Array:
        return self.compiled(MergeSchedule.dense(self.config.depth))(self.params, self.batches[batch])[1]

    @functools.cached_property
    def _compare(self) -> Any:
        return jax.jit(
            functools.partial(distance, self.config), out_shardings=parallel.replicated(self.step_config.mesh)
        )

    @functools.cache  # noqa: B019
    def _simulator(self, rule: Rule) -> Any:
        """Make the program ((params, rates), images) -> logits; every device has its own images."""
        step, config = self.step_config, self.config
        compute, precision = compiling.computation(step.dtype)

        def simulate(arguments: tuple[Any, Rates], images: jax.Array) -> jax.Array:
            params, layers = arguments
            model = SimulatedViT(config, dtype=compute, rule=rule, rates=layers)
            return model.apply({"params": params}, step.preprocess.normalize(images))[0]  # pyright: ignore[reportIndexIssue]

        call = compiling.on_each_device(simulate, config.num_tokens, step.mesh)
        rows = parallel.batched(step.mesh)
        program = jax.jit(
            call,
            out_shardings=rows,
            compiler_options=compiling.options(step.batch_size // step.mesh.size, config.num_tokens, compute),
        )

        def run(arguments: tuple[Any, Rates], images: jax.Array) -> jax.Array:
            with jax.default_matmul_precision(precision):
                return parallel.settled(program(arguments, images))

        return run


def placed_params(checkpoint: Checkpoint, mesh: jax.sharding.Mesh, dtype: str) -> Any:
    """Place the parameters on every device, in the dtype of the computation."""
    host = jax.tree.map(np.asarray, checkpoint.params)
    return cast_params(jax.device_put(host, parallel.replicated(mesh)), compiling.computation(dtype)[0])
