"""What the two scripts share: flags, and one-line errors about them."""

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fcvit_jax import parallel
from fcvit_jax.allocator import keep_freed_memory
from fcvit_jax.errors import one_line_errors
from fcvit_jax.files import local_path
from fcvit_jax.program_cache import keep_programs

flags.disclaim_key_flags()  # --help lists them as the script's own
_CACHE = (
    "Where to keep compiled programs for the next run; empty: nowhere. Default: $JAX_COMPILATION_CACHE_DIR, or "
    "fcvit_jax/jax in $XDG_CACHE_HOME or ~/.cache."
)


def run_script(main: Callable[[Any, Path], None], config: Path, workdir: str, share_cpu: bool = False) -> None:
    """Parse the command line and call `main` with the configuration (a `ConfigDict`) and the working directory.

    config: the default of --config, a file with a `get_config()`. workdir: the default of --workdir.
    share_cpu: call `parallel.share_cpu` with the configuration's batch size.
    """
    keep_freed_memory()
    with _one_line():
        fields = "The experiment; --config.FIELD=VALUE overrides one of its fields."
        config_flag = config_flags.DEFINE_config_file("config", str(config), fields, lock_config=True)
    place = "Where to write the results; rerun the same command to resume."
    workdir_flag = flags.DEFINE_string("workdir", workdir, place)
    flags.DEFINE_string("compile_cache", None, _CACHE)
    where = "Join other processes: auto (Slurm, Kubernetes, TPU), or HOST:PORT,COUNT,INDEX."
    flags.DEFINE_string("distributed", "", where)
    jax.config.config_with_absl()

    def run(argv: list[str]) -> None:
        if argv[1:]:
            raise app.UsageError(f"unknown argument {argv[1]!r}: set fields with --config.FIELD=VALUE")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        with one_line_errors():
            parallel.start_processes(flags.FLAGS.distributed)
            if share_cpu:
                parallel.share_cpu(config_flag.value.get("batch_size", 0))
        with parallel.ending_together(), one_line_errors():
            keep_programs(flags.FLAGS.compile_cache)
            main(config_flag.value, local_path(workdir_flag.value))

    try:
        app.run(run, flags_parser=_parse)
    finally:
        with one_line_errors():
            pass  # --help may have been printed to a closed pipe


def _parse(argv: list[str]) -> list[str]:
    with _one_line():
        home = os.path.expanduser("~")  # a shell expands it only where a word begins
        argv = [re.sub(r"^(--?config=)~(?=/)", lambda found: found[1] + home, each) for each in argv]
        # The parsers of numbers do not know "none".
        nothing = [re.fullmatch(r"--?config\.([\w.]+)=none", each, re.IGNORECASE) for each in argv]
        rest = app.parse_flags_with_usage([each for each, found in zip(argv, nothing, strict=True) if not found])
        config = flags.FLAGS.config
        _ = config.items  # a file that cannot be loaded raises at its first use
        for *parents, name in (found[1].split(".") for found in nothing if found):
            fields = functools.reduce(getattr, parents, config)
            # Text stays text: "none" may be one of its values.
            setattr(fields, name, "none" if isinstance(getattr(fields, name), str) else None)
        return rest


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, OSError) as error:
        text = " ".join(str(error).replace("\\n", " ").split()).strip("\"'")
        if hint := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text):
            text = f"no field {hint[2]!r}; did you mean {hint[1]!r}?"
        elif text.isidentifier():
            text = f"no field {text!r}; the fields are in the configuration's file"
        elif isinstance(error, OSError):
            text = text.rpartition("path]: ")[2]
        print(f"error: --config: {text}", file=sys.stderr)
        raise SystemExit(2) from None
