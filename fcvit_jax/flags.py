"""The two scripts' flags: a configuration file whose fields are overridden, and mistakes told in one line."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

flags.disclaim_key_flags()  # --help lists them as the script's own


def define_config(default: Path) -> flags.FlagHolder[Any]:
    """Define --config, a file with `get_config()`, and --config.FIELD=VALUE."""
    with _one_line():
        help_ = "The experiment; --config.FIELD=VALUE overrides a field of it."
        return config_flags.DEFINE_config_file("config", str(default), help_, lock_config=True)


def parse_flags(argv: list[str]) -> list[str]:
    """What `app.run` calls to parse the command line."""
    with _one_line():
        rest = app.parse_flags_with_usage(argv)
        _ = flags.FLAGS.config.items  # a file that could not be loaded says so when it is first used
        return rest


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, OSError) as error:
        text = " ".join(str(error).replace("\\n", " ").split()).strip("\"'")
        if hint := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text):
            text = f"no field {hint[2]!r}; did you mean {hint[1]!r}?"
        elif isinstance(error, AttributeError):
            text = f"no field {text!r}"
        elif isinstance(error, OSError):
            text = text.rpartition("path]: ")[2]
        print(f"error: --config: {text}", file=sys.stderr)
        raise SystemExit(2) from None
