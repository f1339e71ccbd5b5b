"""The images in a folder of class folders, listed once: large listings are kept in the user's cache."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from fcvit_jax.errors import InputError

_WANTED = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".avif", ".apng", ".dib"),
    *(".jp2", ".j2k", ".jpx", ".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".pcx", ".qoi", ".ico"),
)
Image.init()  # without AVIF or JPEG 2000, Pillow has no decoder for them
EXTENSIONS = tuple(each for each in _WANTED if Image.registered_extensions().get(each) in Image.OPEN)
# Folders of operating systems and NAS devices: copies and thumbnails of images, which belong to no class.
JUNK = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
BESIDE = "beside the class folders"  # for images in none of them
_SUFFIXES = frozenset(EXTENSIONS)
INDEXED_FROM = 10_000  # images: fewer are listed in less than a second
_VERSION = 1


class Names(Sequence[str]):
    """Many names in one string of bytes: 8 bytes each beside their own, instead of 60."""

    def __init__(self, joined: bytes):
        """Take the names in the bytes of the file system, joined with a NUL after each."""
        self.joined = joined
        self._ends = np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self.joined[start : int(self._ends[index])])


@dataclass(frozen=True)
class Listing:
    """The images in class folders, at any depth.

    names: paths below the folder with forward slashes, class by class, sorted by name inside each. counts: images of
    each class folder, in the order of `names`: numerically if all are integers, otherwise by name. empty: folders
    without images. left_out: how many files by suffix, and how many folders of `JUNK`. not_followed: links to a folder
    above, or to one that is listed already.
    """

    names: Names
    counts: dict[str, int]
    empty: tuple[str, ...]
    left_out: dict[str, int]
    not_followed: tuple[str, ...]

    @property
    def remarks(self) -> tuple[str, ...]:
        """Return what a reader should know, one line each."""
        counted = [f"{count:,} {what}" for what, count in sorted(self.left_out.items())]
        lines = {
            f"left out: {_some(counted, 8)}": counted,
            f"not followed, as they lead to folders above or listed already: {_some(self.not_followed)}": (
                self.not_followed
            ),
            f"folders without an image are classes only if the head names them: {_some(self.empty)}": self.empty,
        }
        return tuple(line for line, holds in lines.items() if holds)


def list_images(root: Path) -> Listing:
    """List the images in the class folders of a folder.

    Hidden files and folders, and those of `JUNK`, are ignored. Raises InputError if a folder cannot be read.
    """
    real = os.path.realpath(root)
    index = _cache() / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.npz"
    if known := _read_index(index, real):
        return known
    scan = _Scan(real)
    listing = scan.classes()
    if len(listing.names) >= INDEXED_FROM and scan.settled:
        _write_index(index, real, listing, scan.stamps)
    return listing


def list_below(root: Path) -> Listing:
    """List the images of a folder at any depth, even beside its folders, as one class without a name."""
    scan = _Scan(os.path.realpath(root))
    return scan.one_class()


class _Scan:
    """One pass over a folder: real folders first, then the targets of links, so that every folder is listed once.

    Only a link beside the class folders may lead to a folder that is listed already, as a class of another name.
    """

    def __init__(self, root: str):
        self.root, self.began = root, time.time_ns()
        self.stamps: dict[str, tuple[int, int]] = {}  # of each folder listed, by its path below the root
        self.left_out: Counter[str] = Counter()
        self.not_followed: list[str] = []
        self._seen: set[str] = set()  # real paths of folders
        self._links: list[tuple[str, str]] = []  # class, path below the root

    @property
    def settled(self) -> bool:
        """Return whether a later change to any folder is sure to give it another time of modification."""
        times = [modified for modified, _ in self.stamps.values()]
        whole_seconds = all(modified % 10**9 == 0 for modified in times)
        return max(times) < self.began - (2 * 10**9 if whole_seconds else 10**8)

    def classes(self) -> Listing:
        self._seen.add(self.root)
        loose, folders = self._list("", "")
        for name in loose:
            self.left_out[f"{os.path.splitext(name)[1].lower()} {BESIDE}"] += 1
        self._links = [(place, place) for _, place in self._links]
        found = {place: b"" for place, _ in self._links}
        return self._follow(found | {name: _join(self._walk(name, name, f"{self.root}/{name}")) for name in folders})

    def one_class(self) -> Listing:
        return self._follow({"": _join(self._walk("", "", self.root))})

    def _follow(self, found: dict[str, bytes]) -> Listing:
        while self._links:
            links, self._links = sorted(self._links), []
            for name, place in links:
                path = f"{self.root}/{place}"
                real, beside = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
                listed = real in self._seen and "/" in place  # a link beside the classes is a class of its own
                if listed or any(f"{base}/".startswith(f"{real.rstrip('/')}/") for base in (self.root, beside)):
                    self.not_followed.append(place)
                else:
                    found[name] = _join([*Names(found[name]), *self._walk(name, place, real, "/" in place)])
        classes = [name for name, joined in found.items() if joined]
        numeric = all(name.isdecimal() for name in classes)
        classes.sort(key=(lambda name: (int(name), name)) if numeric else None)
        counts = {name: found[name].count(b"\0") for name in classes}
        names = Names(b"".join(found[name] for name in classes))
        empty = tuple(sorted(found.keys() - counts.keys()))
        return Listing(names, counts, empty, dict(self.left_out), tuple(self.not_followed))

    def _walk(self, name: str, place: str, real: str, once: bool = True) -> list[str]:
        """List the images in a folder and its real folders, with `once` unless they are listed already.

        real: the folder's real path.
        """
        found, pending = [], [(place, real)]
        while pending:
            place, real = pending.pop()
            if not once or real not in self._seen:
                self._seen.add(real)
                images, folders = self._list(name, f"{place}/" if place else "")
                found += images
                pending += [
                    (folder, f"{real}{folder[len(place) :]}" if place else f"{real}/{folder}") for folder in folders
                ]
        return found

    def _list(self, name: str, prefix: str) -> tuple[list[str], list[str]]:
        """List the images and the real folders in a folder, with the prefix; put links to folders into `_links`."""
        images, folders, path = [], [], f"{self.root}/{prefix}"
        try:
            self.stamps[prefix] = _stamp(path)
            with os.scandir(path) as entries:
                for entry in entries:
                    base = entry.name
                    if base[0] == ".":
                        continue
                    if entry.is_dir():
                        if base in JUNK:
                            self.left_out[f"{base} folders"] += 1
                        elif entry.is_symlink():
                            self._links.append((name, prefix + base))
                        else:
                            folders.append(prefix + base)
                    elif (suffix := base[base.rfind(".") :].lower()) in _SUFFIXES:
                        images.append(prefix + base)
                    else:
                        self.left_out[suffix if "." in base else "without a suffix"] += 1
        except OSError as error:
            raise InputError(f"folder {path} cannot be read: {error.strerror}") from None
        return images, folders


def _join(names: Iterable[str]) -> bytes:
    return os.fsencode("\0".join([*sorted(names), ""]))


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + f", ... ({len(names):,})" * (len(names) > most)


def _stamp(path: str) -> tuple[int, int]:
    """Return the values that change with the entries of a folder: its time of modification, and its inode."""
    status = os.stat(path)
    return status.st_mtime_ns, status.st_ino


def _cache() -> Path:
    root = os.environ.get("FCVIT_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fcvit_jax")
    return Path(root).expanduser() / "folders"


def _read_index(index: Path, root: str) -> Listing | None:
    """Read the listing in an index; None if it is missing, damaged or older than a change to any folder."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile):
        with index.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            facts: Any = json.loads(arrays["facts"].tobytes())
            if facts["kind"] != [_VERSION, root, *EXTENSIONS]:
                return None
            stamps = arrays["stamps"]
            joined = arrays["names"].tobytes()
        if np.array_equal([_stamp(f"{root}/{place}") for place in facts["places"]], stamps):
            names = Names(joined)
            if sum(facts["counts"].values()) == len(names):
                empty, not_followed = tuple(facts["empty"]), tuple(facts["not_followed"])
                return Listing(names, facts["counts"], empty, facts["left_out"], not_followed)
    return None


def _write_index(index: Path, root: str, listing: Listing, stamps: dict[str, tuple[int, int]]) -> None:
    """Keep a listing, if the cache can be written."""
    facts = {
        "kind": [_VERSION, root, *EXTENSIONS],
        "places": list(stamps),
        "counts": listing.counts,
        "empty": listing.empty,
        "left_out": listing.left_out,
        "not_followed": listing.not_followed,
    }
    arrays = {
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
        "stamps": np.array([*stamps.values()], np.int64),
        "names": np.frombuffer(listing.names.joined, np.uint8),
    }
    with contextlib.suppress(OSError):
        index.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=index.parent, suffix=".partial", delete=False) as file:
            try:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
                file.close()
                os.replace(file.name, index)
            finally:
                Path(file.name).unlink(missing_ok=True)
