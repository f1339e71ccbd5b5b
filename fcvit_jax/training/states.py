"""The states of a run on disk, from which it goes on: Orbax's CheckpointManager, whole or not there."""

from pathlib import Path
from typing import Any

from fcvit_jax.checkpoint import check_room, told_in_one_line


class States:
    """The last `keep` states of a run in a directory, by step, with what is to be remembered beside each.

    A state is written under another name and renamed when it is whole: a run that is killed leaves those before.
    """

    def __init__(self, directory: Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self._args, self._directory = ocp.args, directory
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager: Any = ocp.CheckpointManager(directory.absolute(), options=options)
        # Several processes count how often they ask whether a signal came (`termination`): Orbax's own question, with
        # numbers of its own in between, would set that count back.
        self._manager.reached_preemption = lambda step: False

    def latest(self) -> int | None:
        """The step of the newest state."""
        return self._manager.latest_step()

    def notes(self) -> dict[str, Any]:
        """What was remembered beside the newest state."""
        return self._restore(notes=self._args.JsonRestore())

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Begin to write a state; it is written while training goes on. Raises InputError where the disk is full."""
        args = self._args.Composite(state=self._args.StandardSave(state), notes=self._args.JsonSave(notes))
        check_room(self._directory, state)
        with told_in_one_line(self._directory):
            self._manager.save(step, args=args)

    def restore(self, abstract: Any) -> Any:
        """The newest state, with the shapes, dtypes and shardings of `abstract`, on however many devices those are."""
        return self._restore(state=self._args.StandardRestore(abstract))

    def _restore(self, **item: Any) -> Any:
        (name,) = item
        return self._manager.restore(self.latest(), args=self._args.Composite(**item))[name]

    def wait(self) -> None:
        """Until what was begun is on disk. Raises InputError where the disk is full."""
        with told_in_one_line(self._directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
