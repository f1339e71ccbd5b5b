"""Files and directories that are written whole or not at all: checks before long work, staging, one-line errors."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from fcvit_jax.errors import InputError, printable


def local_path(path: str | Path) -> Path:
    """Expand "~" in a path. Raises InputError for an address, such as gs://bucket/name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # a Path has a single slash
        raise InputError(
            f"{str(path).replace(':/', '://', 1).replace(':///', '://')} is an address, but only local paths are "
            "supported: mount the bucket (gcsfuse, Mountpoint for S3), or copy to and from a local folder"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"{path}: there is no such user") from None


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[Path]:
    """Yield the absolute path of a directory, or a link to it if it is not UTF-8, which TensorStore requires."""
    path = path.absolute()
    if printable(path) == str(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "directory")
        link.symlink_to(path)
        yield link


def check_target(path: str | Path, overwrite: bool, entries: frozenset[str]) -> Path:
    """Resolve the path of a directory to write; call it before any long work.

    Raises InputError if it exists (with `overwrite`: and has other entries than these), or cannot be written.
    """
    path = local_path(path).resolve()
    there = {entry.name for entry in path.iterdir()} if path.is_dir() else {path.name} if path.exists() else set()
    if there and not overwrite:
        raise InputError(f"{path} exists already: choose another name, or pass --overwrite to replace it")
    if odd := sorted(there - entries):
        raise InputError(f"{path} is not overwritten: it contains other files ({odd[0]}); choose another name")
    writable_directory(path.parent)
    return path


def writable_directory(path: Path) -> Path:
    """Make a directory and try to write into it, before any long work. Raises InputError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None


def check_room(directory: Path, tree: Any) -> None:
    """Raise InputError if the arrays of a tree do not fit on the disk, which Orbax would notice half-way."""
    needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)), shutil.disk_usage(directory).free
    if needed > free:
        room = f"{needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB free"
        raise InputError(f"{directory} cannot be written (the disk is full: {room}): make room, and run it again")


@contextlib.contextmanager
def one_line_file_errors(path: Path) -> Iterator[None]:
    """Raise InputError if the disk is full after all, or fails, while `path` is written."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises ValueError, ArrayRecord RuntimeError
        full = any(words in str(error) for words in ("No space left", "Disk quota exceeded"))
        if isinstance(error, InputError) or not (full or isinstance(error, OSError)):
            raise
        why = "the disk is full" if full else getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({why}): make room, and run it again") from None


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a directory beside `path` that replaces it if the block succeeds, and is deleted otherwise."""
    with one_line_file_errors(path):
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
        try:
            yield staging
            staging.chmod(0o755)
            if path.exists():
                retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
                os.replace(path, retired)
                try:
                    os.replace(staging, path)
                except BaseException:
                    os.replace(retired, path)
                    raise
                shutil.rmtree(retired)
            else:
                os.replace(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove what killed writers of `path` left beside it; restore an old directory that was not yet replaced."""
    random = "?" * 8  # as `mkdtemp` has it
    with one_line_file_errors(path):
        for retired in path.parent.glob(f".{path.name}.old-{random}"):
            shutil.rmtree(retired) if path.exists() else os.replace(retired, path)
        for staging in path.parent.glob(f".{path.name}.partial-{random}"):
            shutil.rmtree(staging)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. Raises InputError if that fails."""
    partial = path.with_name(f".{path.name}.partial")
    with one_line_file_errors(path):
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def file_name(text: str) -> str:
    """Make text fit for a file name: explicit schedules contain colons, commas and parentheses."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
