"""Errors of users end in one line; tracebacks are for bugs of ours."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NoReturn


class InputError(ValueError):
    """Bad input: the message is one line that names the file or field, what is wrong, and the fix."""


@contextlib.contextmanager
def naming(name: object) -> Iterator[None]:
    """Put the name of a file before the messages of errors raised inside."""
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
    """A command line whose own errors are one line too, and whose description keeps its lines."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")
