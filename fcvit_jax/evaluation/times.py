"""The time that the parts of a run took."""

import contextlib
import time
from collections.abc import Iterator, Mapping


class Times:
    """Seconds by name: `with times("compiling"): ...` adds to `times.seconds["compiling"]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def format_times(seconds: Mapping[str, float]) -> str:
    """Format one line: `time: 12.3 s compiling (40%), 18.1 s computing (60%)`."""
    whole = sum(seconds.values()) or 1.0
    return "time: " + ", ".join(f"{took:.1f} s {name} ({took / whole:.0%})" for name, took in seconds.items())
