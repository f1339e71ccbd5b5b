"""What the two scripts share: --config and --workdir, and mistakes told in one line."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fcvit_jax import parallel
from fcvit_jax.errors import one_line_errors

flags.disclaim_key_flags()  # --help lists them as the script's own


def run_script(main: Callable[[Any, Path], None], config: Path, workdir: str, distributed: bool = False) -> None:
    """Parse the command line and call `main` with the configuration (a `ConfigDict`) and the working directory.

    config: the file that --config names by default; it has a `get_config()`. workdir: the default of --workdir.
    distributed: whether the script may run as several processes, and has the flag --distributed.
    """
    with _one_line():
        fields = "The experiment; --config.FIELD=VALUE overrides a field of it."
        config_flag = config_flags.DEFINE_config_file("config", str(config), fields, lock_config=True)
    place = "Where the results are written; those of an earlier run go."
    workdir_flag = flags.DEFINE_string("workdir", workdir, place)
    where = "Join other processes: auto (Slurm, Kubernetes, TPU), or HOST:PORT,COUNT,INDEX."
    if distributed:
        flags.DEFINE_string("distributed", "", where)
    jax.config.config_with_absl()

    def run(argv: list[str]) -> None:
        if argv[1:]:
            raise app.UsageError(f"unknown argument {argv[1]!r}: fields are set by --config.FIELD=VALUE")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        with one_line_errors():
            parallel.start_processes(flags.FLAGS.distributed if distributed else "")
            main(config_flag.value, Path(workdir_flag.value))

    app.run(run, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
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
        elif isinstance(error, AttributeError) and text.isidentifier():
            text = f"no field {text!r}"
        elif isinstance(error, OSError):
            text = text.rpartition("path]: ")[2]
        print(f"error: --config: {text}", file=sys.stderr)
        raise SystemExit(2) from None
