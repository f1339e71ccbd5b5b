"""Errors of users end in one line; tracebacks are for bugs of this library."""

import argparse
import contextlib
import os
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


def printable(text: object) -> str:
    """Escape what UTF-8 cannot express, such as bytes of a file's name."""
    return str(text).encode(errors="backslashreplace").decode()


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an `InputError` into `error: ...` on standard error and exit status 2; Ctrl-C into a line and 130.

    A JAX that does not start is such an error too. If nobody reads standard output any more, the exit status is 141,
    that of SIGPIPE. Characters that standard output cannot encode are escaped.
    """
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit
        raise SystemExit(141) from None
    except Exception:
        if why := _why_jax_does_not_start():
            print(f"error: {why}", file=sys.stderr)
            raise SystemExit(2) from None
        raise


def _why_jax_does_not_start() -> str | None:
    import jax

    try:
        jax.devices()
    except Exception as error:
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        fix = "check the driver, or set JAX_PLATFORMS=cpu"
        if platforms:
            fix = f"JAX_PLATFORMS is {platforms!r}: unset it, or name a platform that this machine has, such as cpu"
        why = " ".join(str(error).split())[:300] or "no such platform"
        return f"JAX does not start ({why}): {fix}"
    return None


class OneLineParser(argparse.ArgumentParser):
    """A command line with one-line errors, whose description keeps its lines."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def print_help(self, file: Any = None) -> None:
        with one_line_errors():  # it may be printed to a closed pipe
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")
