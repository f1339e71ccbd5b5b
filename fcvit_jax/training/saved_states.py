"""The states of a run on disk, from which it resumes."""

import contextlib
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fcvit_jax.checkpoint import file_sha256
from fcvit_jax.errors import InputError
from fcvit_jax.files import check_room, one_line_file_errors, utf8_path, write_whole

DIGESTS = "sha256.json"  # of a state's files, in its directory: Orbax does not notice all damage


class SavedStates:
    """The last `keep` states of a run in a directory, by step, each with a JSON object of notes; by Orbax.

    A state is written under another name and renamed when it is complete, so a killed run leaves the earlier ones
    intact. The digests of its files are added when the run waits for it; a state without them is read unchecked.
    """

    def __init__(self, directory: Path, keep: int = 2):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").addFilter(_not_of_orbax)
        self._args, self._directory, self._opened = ocp.args, directory, contextlib.ExitStack()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        directory.mkdir(parents=True, exist_ok=True)
        place = self._opened.enter_context(utf8_path(directory))
        self._manager: Any = ocp.CheckpointManager(place, options=options)
        # Processes number their queries of the signal (`stop_signal`); Orbax would query with its own numbers.
        self._manager.reached_preemption = lambda step: False

    def check_shared(self) -> None:
        """Raise InputError if the processes see different states: each would resume from another step."""
        if jax.process_count() == 1:
            return
        latest = self.latest()
        every = multihost_utils.process_allgather(np.int32(-1 if latest is None else latest)).tolist()
        if len({*every}) > 1:
            told = ", ".join("none" if step < 0 else str(step) for step in every)
            raise InputError(
                f"{self._directory}: the processes see different states there ({told}): --workdir must be one "
                "directory that all hosts share"
            )

    def latest(self) -> int | None:
        """Return the step of the newest state; None if there is none."""
        return self._manager.latest_step()

    def notes(self) -> dict[str, Any]:
        """Read the notes of the newest state. Raises InputError if they are damaged."""
        return self._restore(notes=self._args.JsonRestore())

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Begin to write a state, in the background. Raises InputError if the disk is full."""
        # Copies the notes, as the caller may change them meanwhile.
        args = self._args.Composite(state=self._args.StandardSave(state), notes=self._args.JsonSave(dict(notes)))
        self.wait()  # for the previous state, which needs room too
        check_room(self._directory, state)
        with one_line_file_errors(self._directory):
            self._manager.save(step, args=args)

    def restore(self, abstract: Any) -> Any:
        """Read the newest state, with the shapes, dtypes and shardings of `abstract`. Raises InputError if damaged."""
        return self._restore(state=self._args.StandardRestore(abstract))

    def _restore(self, **item: Any) -> Any:
        (name,), step = item, self.latest()
        place = self._directory / str(step)
        try:
            if jax.process_index() == 0 and name == "notes":  # which are read first
                _check_digests(place)
            return self._manager.restore(step, args=self._args.Composite(**item))[name]
        except Exception as error:  # of Orbax, TensorStore or zarr
            before = max((each for each in self._manager.all_steps() if each != step), default=None)
            then = "starts from the beginning" if before is None else f"resumes from step {before}"
            why = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise InputError(f"{place} cannot be read ({why}): delete it, and the run {then}") from error

    def wait(self) -> None:
        """Wait until the states are on disk. Raises InputError if the disk is full."""
        with one_line_file_errors(self._directory):
            self._manager.wait_until_finished()
            if jax.process_index() == 0 and (latest := self.latest()) is not None:
                _write_digests(self._directory / str(latest))

    def close(self) -> None:
        """Wait, and release the directory. Raises InputError if the disk is full."""
        with self._opened, one_line_file_errors(self._directory):
            self._manager.close()


def _files(state: Path) -> dict[str, str | None]:
    files = (file for item in ("notes", "state") for file in sorted((state / item).rglob("*")) if file.is_file())
    return {file.relative_to(state).as_posix(): file_sha256(file) for file in files}


def _write_digests(state: Path) -> None:
    if not (state / DIGESTS).exists():
        write_whole(state / DIGESTS, json.dumps(_files(state)).encode())


def _check_digests(state: Path) -> None:
    """Raise ValueError that names the first file that has changed since it was written."""
    if (state / DIGESTS).exists():
        expected, found = json.loads((state / DIGESTS).read_text()), _files(state)
        if damaged := next((name for name in expected if found.get(name) != expected[name]), None):
            raise ValueError(f"{damaged} is damaged" if damaged in found else f"{damaged} is missing")


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """Drop Orbax's log of errors: it raises them as well."""
    return "orbax" not in record.pathname
