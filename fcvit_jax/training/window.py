"""The steps since the last row of the log, and whether the devices had to wait for their images."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fcvit_jax.data.batches import Batch
from fcvit_jax.training.log import Log

OF_TWO_PASSES = ("gap", "gap_over_rho", "rho")  # 0 in a step without SAM's second pass: the mean is over the others


class Wait:
    """Counts the seconds in which the devices had nothing to do because the next batch was not there.

    Steps are computed behind the host's back, where no CPU computes them when it is called. While one is, the host may
    well wait for a batch: only what it waits after that step has ended counts, and a thread takes the time of that end.
    The host is one step ahead: that keeps the devices busy, and their memory free of batches for steps to come.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="end of step")
        self._end: Future[float] | None = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; to be told of each step by `started`."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            got = time.perf_counter()
            if batch is None:
                return
            idle_since = asked if self._end is None else max(asked, self._end.result() if self._end.done() else got)
            self.seconds += got - idle_since
            yield batch

    def started(self, results: Any) -> None:
        """A step was dispatched, whose results these will be. Returns when the step before it has ended."""
        before, self._end = self._end, self._thread.submit(_end, results)
        if before:
            before.result()

    def close(self) -> None:
        self._thread.shutdown()


def over_processes(count: int) -> int:
    """The sum of what each process has counted; all of them call it together."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(count)))) if jax.process_count() > 1 else count


def _end(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()


class Window:
    """The steps since the last row of the log: their means, the bar, and what is needed to tell what went wrong.

    log: None in all processes but the first. steps, done: of the run. skipped: images that were left out before, by
    all processes; None where none are.
    """

    def __init__(self, log: Log | None, batch_size: int, steps: int, done: int, skipped: int | None = None):
        self._log, self._batch_size = log, batch_size
        self._bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=None if log else True)
        self._before, self._skipped = skipped, 0
        self._wait = Wait()
        self._clear()

    def _clear(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._metrics: list[dict[str, Any]] = []
        self._began, self._wait.seconds = time.perf_counter(), 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the time that the devices wait for them is counted."""
        return self._wait.timed(batches)

    def add(self, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """A step was dispatched for this batch."""
        self._names.append(batch.names)
        self._metrics.append(metrics)
        self._wait.started(metrics)
        self._skipped += len(batch.skipped)
        for why in batch.skipped:
            self.tell(f"skipped: {why}")
        self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, after the steps that are under way, counts neither as theirs nor as waiting."""
        jax.block_until_ready(self._metrics[-1:])
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def first_bad(self, done: int) -> tuple[int, tuple[str, ...]] | None:
        """The first step whose loss or gradient was not finite, and the names of its images; `done` was the last."""
        self._metrics = jax.device_get(self._metrics)
        for index, row in enumerate(self._metrics):
            if not row["finite"]:
                return done - len(self._metrics) + 1 + index, self._names[index]
        return None

    def log(self, done: int) -> None:
        """Write the means, and begin anew."""
        rows = jax.device_get(self._metrics)
        means = {}
        for name in (name for name in rows[-1] if name != "finite"):
            values = [float(row[name]) for row in rows if name not in OF_TWO_PASSES or row["rho"] > 0]
            means[name] = float(np.mean(values)) if values else 0.0
        took = time.perf_counter() - self._began
        means["images_per_second"] = self._batch_size * len(rows) / took
        means["waiting_for_data"] = self._wait.seconds / took
        if (skipped := self.skipped()) is not None:
            means["skipped"] = float(skipped)
        self.write(done, means)
        self._bar.set_postfix(
            loss=f"{means['loss']:.3f}",
            gap=f"{means['gap']:.3f}",
            gap_rho=f"{means['gap_over_rho']:.2f}/{means['grad_norm']:.2f}",
            img_s=f"{means['images_per_second']:.0f}",
        )
        self._clear()

    def write(self, done: int, row: dict[str, float]) -> None:
        if self._log:
            self._log.write(done, row)

    def tell(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line)

    def skipped(self) -> int | None:
        """Images that were left out so far, by all processes; None where none are. All processes call it together."""
        if self._before is None:
            return None
        return self._before + over_processes(self._skipped)

    def close(self) -> None:
        self._wait.close()
        self._bar.close()
        if self._log:
            self._log.close()
