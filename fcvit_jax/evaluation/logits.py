"""Logits of a whole data set as `logits_<schedule>.npz`, streamed: memory does not grow with the number of images."""

import contextlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.outcomes import Journal, Outcomes
from fcvit_jax.files import file_name


def save_logits(
    directory: Path, schedules: Sequence[str], num_classes: int, journal: Journal, outcomes: Outcomes
) -> None:
    """Write one file per schedule: `logits` float32 [n, c], `labels` and `names`; all of them whole, or none.

    Raises InputError if the disk is full.
    """
    targets = [directory / f"logits_{file_name(name)}.npz" for name in schedules]
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(outcomes.names), num_classes)}
    try:
        with contextlib.ExitStack() as stack:
            archives = [stack.enter_context(zipfile.ZipFile(partial, "w")) for partial in partials]
            with contextlib.ExitStack() as opened:
                members = [opened.enter_context(each.open("logits.npy", "w", force_zip64=True)) for each in archives]
                for member in members:
                    np.lib.format.write_array_header_1_0(member, header)
                for batch in journal.logits():
                    for member, logits in zip(members, batch, strict=True):
                        member.write(np.ascontiguousarray(logits, "<f4").tobytes())
            for archive in archives:
                for name, array in (("labels", outcomes.labels), ("names", outcomes.names)):
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
        for partial, target in zip(partials, targets, strict=True):
            os.replace(partial, target)
    except OSError as error:
        for partial in partials:
            partial.unlink(missing_ok=True)
        raise InputError(
            f"{directory}: the logits cannot be written ({error.strerror}): make room and run it again; all counts are "
            "kept"
        ) from None
