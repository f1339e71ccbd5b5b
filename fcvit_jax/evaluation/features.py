"""Pooled features of a whole data set: computed in one pass, kept in files, read back memory-mapped, chunk by chunk.

Each process keeps the features of its own images alone. Features of a million images are never in memory at once.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from fcvit_jax import parallel
from fcvit_jax.evaluation.accuracy import CompiledStep, classify
from fcvit_jax.evaluation.inputs import EvaluationInputs
from fcvit_jax.evaluation.times import Times
from fcvit_jax.files import file_name, one_line_file_errors, writable_directory, write_whole

CHUNK = 2**24  # bytes of features that each device gets at a time
RESIDENT = 2**29  # bytes of all features, up to which the devices keep them


class Chunk(NamedTuple):
    """Some rows of all processes, spread over the devices.

    values: float32 [m, d]. labels: int32 [m], -1 for rows that do not count. held: bool [m], the held-out rows.
    """

    values: jax.Array
    labels: jax.Array
    held: jax.Array


@dataclass(frozen=True)
class Features:
    """This process's rows of the features of a data set, in the order in which `eval_batches` shares them.

    values: float32 [n, d], memory-mapped. labels: int32 [n], -1 for padding and for images that were skipped.
    """

    values: np.ndarray
    labels: np.ndarray

    def all_labels(self) -> np.ndarray:
        """Gather the labels of all processes, [processes, n]."""
        gathered = multihost_utils.process_allgather(self.labels) if jax.process_count() > 1 else self.labels
        return np.asarray(gathered).reshape(-1, len(self.labels))

    def chunks(self, mesh: jax.sharding.Mesh, held: np.ndarray | None = None) -> Iterator[Chunk]:
        """Transfer the features to the devices, in chunks of one shape. held: bool [n]; by default no row."""
        rows, devices = parallel.batched(mesh), mesh.size // jax.process_count()
        held = np.zeros(len(self.labels), bool) if held is None else held
        size = min(CHUNK // (4 * self.values.shape[1]), -(-len(self.labels) // devices)) * devices
        for start in range(0, len(self.labels), size):
            part = slice(start, start + size)
            arrays = self.values[part], self.labels[part], held[part]
            lacking = size - len(arrays[1])
            filled = (
                np.pad(array, [(0, lacking)] + [(0, 0)] * (array.ndim - 1), constant_values=filler)
                for array, filler in zip(arrays, (0, -1, False), strict=True)
            )
            yield Chunk(*(jax.make_array_from_process_local_data(rows, array) for array in filled))


class Chunks:
    """The chunks of features, once for each `for` loop; the devices keep them if there are few."""

    def __init__(self, features: Features, mesh: jax.sharding.Mesh, held: np.ndarray | None = None):
        self.width, self._read = features.values.shape[1], lambda: features.chunks(mesh, held)
        small = features.values.nbytes * jax.process_count() <= RESIDENT
        self._kept = [*self._read()] if small else None

    def __iter__(self) -> Iterator[Chunk]:
        return self._read() if self._kept is None else iter(self._kept)


def collect_features(
    inputs: EvaluationInputs, steps: Mapping[str, CompiledStep], folder: Path, times: Times | None = None
) -> dict[str, Features]:
    """Compute the features of the images by schedule, or read them from the folder; all processes call this.

    steps: of a model without a head. An interrupted pass resumes after its last finished batch. Raises InputError as
    `classify` does, and if the folder cannot be written.
    """
    here, count, batch_size = jax.process_index(), jax.process_count(), inputs.config.batch_size
    rows, total = batch_size // count, math.ceil(inputs.num_records / batch_size)
    suffix = f".{here}-of-{count}" if count > 1 else ""
    progress, run = folder / f"progress{suffix}.json", inputs.fingerprint | {"processes": count}
    state = _read_progress(writable_directory(folder) / progress.name)
    shapes = dict.fromkeys(steps, (total * rows, inputs.checkpoint.config.output_dim)) | {"": (total * rows,)}
    paths = {name: folder / f"{f'features_{file_name(name)}' if name else 'labels'}{suffix}.npy" for name in shapes}
    finished = state["batches"] if state.get("run") == run and all(path.exists() for path in paths.values()) else 0
    finished = int(np.min(multihost_utils.process_allgather(np.int32(finished)))) if count > 1 else finished
    done = min(finished * batch_size, inputs.num_records)
    if state and here == 0:
        how = (
            f"{done:,} of {inputs.num_records:,} images are there" if finished else "those of another run are replaced"
        )
        print(f"{folder}: features, {how}", flush=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_line_file_errors(folder))
        files = {name: stack.enter_context(path.open("r+b" if finished else "wb")) for name, path in paths.items()}
        for name, file in files.items():
            shape, kind = shapes[name], "<f4" if name else "<i4"
            np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 4 * finished * rows * math.prod(shape[1:]))
            file.seek(0, 2)
        if finished < total:
            batches = stack.enter_context(inputs.batches(finished))
            bar = stack.enter_context(
                parallel.progress(desc="features", total=inputs.num_records, initial=done, unit="img")
            )
            for batch, _, found in classify(steps, inputs.params, batches, None, times):
                labels, mask = (_local(each, inputs.step_config.mesh) for each in (batch.labels, batch.mask))
                files[""].write(np.where(mask, labels, -1).astype("<i4").tobytes())
                for name in steps:
                    mine = np.asarray(found[name])[here * rows : (here + 1) * rows]
                    files[name].write(np.ascontiguousarray(mine, "<f4").tobytes())
                for file in files.values():
                    file.flush()
                finished += 1
                for why in batch.skipped:
                    bar.write(f"skipped: {why}")
                write_whole(progress, json.dumps({"run": run, "batches": finished}).encode())
                bar.update(min(batch_size, bar.total - bar.n))
    labels = np.load(paths[""])
    return {name: Features(np.load(paths[name], mmap_mode="r"), labels) for name in steps}


def _read_progress(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}


def _local(rows: Any, mesh: jax.sharding.Mesh) -> np.ndarray:
    return np.asarray(multihost_utils.global_array_to_host_local_array(rows, mesh, PartitionSpec("data")))
