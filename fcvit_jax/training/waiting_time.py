"""How long the devices wait for their images."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class WaitingTime:
    """Counts the seconds in which the devices had nothing to do because the next batch was not ready.

    Except on CPU, steps are computed while the host goes on. The host may wait for a batch during a step: only what it
    waits after that step has ended counts, so a thread notes when each step ends. The host is one step ahead, which
    keeps the devices busy and their memory free of later batches.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="end of step")
        self._end: Future[float] | None = None

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; call `started` after each step."""
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
        """A step with these results was dispatched. Returns when the step before it has ended."""
        before, self._end = self._end, self._thread.submit(_end, results)
        if before:
            before.result()

    def close(self) -> None:
        self._thread.shutdown()


def _end(results: Any) -> float:
    jax.block_until_ready(results)
    return time.perf_counter()
