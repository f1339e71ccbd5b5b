"""SIGTERM, with which clusters announce that they will take the machine away."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def termination() -> Iterator[Callable[[], bool]]:
    """A function that tells whether to stop: a SIGTERM came, to this process or to another.

    Several processes must ask equally often, as none may stop alone: the service that joins them catches the signal,
    and answers all of them at the same question.
    """
    came: list[bool] = []
    if jax.process_count() > 1:
        numbers = itertools.count(1)

        def asked() -> bool:
            if not came and multihost_utils.reached_preemption_sync_point(next(numbers)):
                came.append(True)
            return bool(came)

        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
