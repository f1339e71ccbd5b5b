"""Logits of a whole data set as `logits_<schedule>.npz`, streamed: memory does not grow with the number of images."""

import contextlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcvit_jax.evaluation.outcomes import Journal, Outcomes
from fcvit_jax.files import file_name, told_in_one_line


def save_logits(
    directory: Path, schedules: Sequence[str], num_classes: int, journal: Journal, outcomes: Outcomes
) -> None:
    """Write one file per schedule: `logits` float32 [n, c], `labels` and `names`; all of them whole, or none.

    Raises InputError if they cannot be written.
    """
    targets = [directory / f"logits_{file_name(name)}.npz" for name in schedules]
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(outcomes.names), num_classes)}
    with told_in_one_line(directory), contextlib.ExitStack() as leftovers:
        for partial in partials:
            leftovers.callback(partial.unlink, missing_ok=True)
        with contextlib.ExitStack() as opened:
            archives = [opened.enter_context(zipfile.ZipFile(partial, "w")) for partial in partials]
            members = [opened.enter_context(each.open("logits.npy", "w", force_zip64=True)) for each in archives]
            for member in members:
                np.lib.format.write_array_header_1_0(member, header)
            for batch in journal.logits():
                for member, logits in zip(members, batch, strict=True):
                    member.write(np.ascontiguousarray(logits, "<f4").tobytes())
            for archive, member in zip(archives, members, strict=True):
                member.close()
                for name, array in (("labels", outcomes.labels), ("names", outcomes.names)):
                    with archive.open(f"{name}.npy", "w") as other:
                        np.lib.format.write_array(other, array, allow_pickle=False)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
