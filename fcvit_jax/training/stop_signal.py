"""SIGTERM, by which clusters announce that they will take the machine away."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """A function that returns whether to stop: this process or another one received SIGTERM.

    All processes must call it equally often, as none may stop alone: JAX's coordination service catches the signal
    and gives all of them the same answer to the same call. In a thread of a notebook no signal can be caught.
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
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
