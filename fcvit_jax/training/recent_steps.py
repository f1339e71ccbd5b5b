"""The steps since the last row of the log, and how long the devices waited for images."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fcvit_jax import parallel
from fcvit_jax.data.batches import Batch
from fcvit_jax.training.log import Log

OF_TWO_PASSES = ("gap", "gap_over_rho", "rho")  # 0 in a step without SAM's second pass, which the mean leaves out


class RecentSteps:
    """The steps since the last row of the log: their means, the progress bar, and the images of each.

    log: None in all processes but the first. steps, done: of the run. skipped: images so far, by all processes; None if
    none may be skipped.
    """

    def __init__(self, log: Log | None, batch_size: int, steps: int, done: int, skipped: int | None = None):
        self._log, self._batch_size = log, batch_size
        self._bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=None if log else True)
        self._before, self._skipped = skipped, 0
        self.waiting = WaitingTime()
        self._clear()

    def _clear(self) -> None:
        self._names: list[tuple[str, ...]] = []
        self._metrics: list[dict[str, Any]] = []
        self._began, self.waiting.seconds = time.perf_counter(), 0.0

    def add(self, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """Count a step that was dispatched for this batch."""
        self._names.append(batch.names)
        self._metrics.append(metrics)
        self.waiting.started(metrics)
        self._skipped += len(batch.skipped)
        for why in batch.skipped:
            self.tell(f"skipped: {why}")
        self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the dispatched steps; the time spent inside counts neither as theirs nor as waiting."""
        jax.block_until_ready(self._metrics[-1:])
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def first_bad(self, done: int) -> tuple[int, tuple[str, ...]] | None:
        """Find the first step whose loss or gradient was not finite, and its images' names; `done` was the last."""
        self._metrics = jax.device_get(self._metrics)
        for index, row in enumerate(self._metrics):
            if not row["finite"]:
                return done - len(self._metrics) + 1 + index, self._names[index]
        return None

    def log(self, done: int) -> None:
        """Write the means and clear the steps."""
        rows = jax.device_get(self._metrics)
        means = {}
        for name in (name for name in rows[-1] if name != "finite"):
            values = [float(row[name]) for row in rows if name not in OF_TWO_PASSES or row["rho"] > 0]
            means[name] = float(np.mean(values or 0.0))
        took = time.perf_counter() - self._began
        means["images_per_second"] = self._batch_size * len(rows) / took
        means["waiting_for_data"] = self.waiting.seconds / took
        if (skipped := self.skipped()) is not None:
            means["skipped"] = float(skipped)
        self.write(done, means)
        if self._bar.disable:  # no terminal
            speed = f"{means['images_per_second']:.3g} images/s"
            self.announce(f"step {done:,} of {self._bar.total:,}: loss {means['loss']:.3f}, {speed}")
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
        """Print a line above the bar."""
        self._bar.write(line)

    def announce(self, line: str) -> None:
        """Print a line about the whole run above the bar of the first process."""
        if self._log:
            self.tell(line)

    def skipped(self) -> int | None:
        """Count the images that all processes have skipped; None if none may be. All processes call it together."""
        return None if self._before is None else self._before + parallel.sum_over_processes(self._skipped)

    def close(self) -> None:
        self.waiting.close()
        self._bar.close()
        if self._log:
            self._log.close()


class WaitingTime:
    """The seconds in which the devices had nothing to do because the next batch was not ready.

    The host is one step ahead of the devices and may wait for a batch during a step. Only waiting after the end of that
    step counts, so a thread notes when each step ends.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="end of step")
        self._end = self._thread.submit(lambda: 0.0)  # of the newest step

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches; call `started` after each step."""
        asked = time.perf_counter()
        for batch in batches:
            got = time.perf_counter()
            self.seconds += got - max(asked, self._end.result() if self._end.done() else got)
            yield batch
            asked = time.perf_counter()

    def started(self, results: Any) -> None:
        """Note that a step with these results was dispatched, and wait until the step before it has ended."""

        def end() -> float:
            jax.block_until_ready(results)
            return time.perf_counter()

        before, self._end = self._end, self._thread.submit(end)
        before.result()

    def close(self) -> None:
        self._thread.shutdown()
