"""What a user did wrong is told in one line; a traceback is kept for mistakes of ours."""

import argparse
import contextlib
import math
import numbers
import sys
from collections.abc import Iterator
from typing import Any, NoReturn


class InputError(ValueError):
    """Bad input: the message is one line that names the file or field, what is wrong and the mend."""


def is_number(value: Any, low: float = 0, high: float = math.inf) -> bool:
    """Whether a field's value is a number, low <= value < high. Python counts bool among them; here it is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) < high


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Put the name of a file in front of the complaint of what does not know it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an `InputError` into `error: ...` on standard error and exit status 2; Ctrl-C into a line and 130."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


class OneLineParser(argparse.ArgumentParser):
    """A command line whose mistakes are told in one line too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help tells more)\n")
