"""Names instead of files: what a user typed becomes a local path, downloaded and cached where it has to be.

A download goes on where it broke off, and takes its name in the cache only when it is whole and checked.
"""

import contextlib
import difflib
import hashlib
import http.client
import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from fcvit_jax.convert.hub import WEIGHTS, fetch_from_hub
from fcvit_jax.errors import InputError, naming
from fcvit_jax.models import zoo

# What trainers leave beside the weights, in files of the same suffixes.
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")

_TIMEOUT = 30  # seconds without a byte
_WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt, as long as none brings new bytes
_CHUNK = 1 << 16
_PASSING = (429, 500, 502, 503, 504)  # statuses of a server that may answer otherwise a little later
_WEB_PAGE = "what comes is a web page, perhaps a login: download it in a browser, and name the file"


def locate(source: str, sha256: str | None = None, check: Callable[[Path], object] | None = None) -> Path:
    """The local file or directory behind what a user typed.

    source: an existing path, which is returned as it is; `https://...`, by `download`; `hf-hub:OWNER/NAME[@REVISION]`,
    whose weights (or their index) are returned, with the shards and the model's JSON files beside them; or a full name
    of the zoo, which stands for its source. sha256 and check are those of `download`: of other files they are left to
    the caller.

    Raises InputError: there is no such file, name or repository, it cannot be fetched, or is not what it should be.
    """
    if os.path.exists(source):
        return Path(source)
    if source.startswith("hf-hub:"):
        with naming(source):
            return fetch_from_hub(source)
    if "://" in source:
        return download(source, sha256, check)
    if source in zoo.names() and (address := zoo.get(source).source):
        return locate(address, sha256, check)
    near = [name for name in zoo.names() if name.startswith(f"{source}.")]
    near = near or difflib.get_close_matches(source, zoo.names(), n=3, cutoff=0.6)
    told = f", nor a full name of the zoo; the nearest are {', '.join(near)}" if near else ": check the path"
    raise InputError(f"{source}: no such file{told}")


def weight_file(directory: Path) -> Path:
    """The weights, or the index of their shards, in a directory as transformers saves them; else the only weight file.

    Raises InputError: there is none, there are several and none of a usual name, or the directory cannot be read.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
        names = [name for name in names if not _BESIDE.fullmatch(name)]
    except OSError as error:
        raise InputError(f"{directory} cannot be read ({error.strerror}): check the path") from error
    found = [name for name in WEIGHTS if name in names][:1] or [name for name in names if name.endswith(_SUFFIXES)]
    if not found:
        held = ", ".join(map(repr, names[:8])) or "no files"
        raise InputError(f"{directory} holds {held}, no weights ({', '.join(_SUFFIXES)}): name the right directory")
    if len(found) > 1:
        held = ", ".join(map(repr, found[:8])) + ", ..." * (len(found) > 8)
        raise InputError(f"{directory} holds {len(found)} weight files ({held}): name one of them")
    return directory / found[0]


def expected_sha256(name: str) -> str | None:
    """The start of a file's sha256, where its publisher put it into the name, as torch.hub has it: `deit-cd65a155.pth`.

    None without eight hex digits at the end, and where they are a date, such as 20240131.
    """
    found = re.search(r"-([0-9a-f]{8})(?:\.[A-Za-z]\w*)*$", name)
    return found[1] if found and not re.match(r"20\d\d(0[1-9]|1[0-2])[0-3]\d", found[1]) else None


def download(url: str, sha256: str | None = None, check: Callable[[Path], object] | None = None) -> Path:
    """The file of that address in the cache: `$FCVIT_JAX_CACHE`, else `fcvit_jax` in `$XDG_CACHE_HOME` or `~/.cache`.

    sha256: 8 to 64 hex digits, the start of the file's sha256; by default those in its name, if any. Plain http needs
    all 64 of them, unless the host is this machine. check: called with the whole file, under a passing name of the same
    suffix; it raises InputError if that is no weight file.

    Raises InputError: the address, the network, the server, the file, or the cache directory is at fault. What came of
    an unfinished file is kept, and the next call goes on from there; a wrong file is deleted.
    """
    with naming(url):
        sha256 = sha256.lower() if sha256 else None
        if sha256 and not re.fullmatch("[0-9a-f]{8,64}", sha256):
            raise InputError(f"{sha256!r} is no sha256: pass its 64 hex digits, or the first of them, at least 8")
        _check_address(url, sha256)
        name = re.sub(r"[^A-Za-z0-9_.+-]", "_", unquote(urlsplit(url).path).split("/")[-1])[-160:] or "weights"
        cache = os.environ.get("FCVIT_JAX_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fcvit_jax")
        # Files of one name come from many places: a hash of the address tells them apart.
        final = Path(cache).expanduser() / f"{_short_hash(url)}-{name}"
        try:
            return _complete(url, final, sha256, sha256 or expected_sha256(name), check)
        except OSError as error:
            told = f"{error.filename or final} cannot be written ({error.strerror})"
            raise InputError(f"{told}: make room, or set FCVIT_JAX_CACHE to another directory") from error


def _complete(url: str, final: Path, sha256: str | None, expected: str | None, check: Any) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        if not expected or _sha256(final).startswith(expected):
            return final
        final.unlink()
    part = _receive(url, final, sha256, expected)
    try:
        _verify(part, expected, check)
        os.replace(part, final)
    except (InputError, FileNotFoundError):
        if not part.exists() and final.exists():
            return final  # another process, at work on the same part, has just put it into place
        _forget(final, part)
        raise
    _note(final).unlink(missing_ok=True)
    return final


class _Part(NamedTuple):
    """An unfinished file, of one version, which its ETag (or else its date) and length tell from any other.

    Whoever writes to one part writes the same bytes to the same places: two processes at once do no harm, and a file
    that changes on its server is never spliced.
    """

    path: Path
    validator: str | None
    total: int | None


def _part(final: Path, validator: str | None, total: int | None) -> _Part:
    version = _short_hash(f"{validator or os.getpid()} {total}")
    return _Part(final.with_name(f"{final.stem}.{version}.part{final.suffix}"), validator, total)


def _receive(url: str, final: Path, sha256: str | None, expected: str | None) -> Path:
    """Bring a part to its full length, over as many connections as it takes."""
    attempts, furthest, broke = 0, -1, None
    while True:
        part = _recall(final)
        start = part.path.stat().st_size if part.validator and part.path.exists() else 0
        if start and start == part.total:
            return part.path
        try:
            with _request(url, sha256, start, part.validator) as response:
                if start and (response.status == 416 or (response.status == 206 and not _fits(response, part, start))):
                    _forget(final, part.path)
                    continue
                _check_answer(response, start)
                if response.status == 200:
                    part, start = _begin(response, final, part, expected), 0
                end = _write(response, part, start, final.name)
            if part.total in (None, end):
                return part.path
            broke = f"broke off at {end} of {part.total} bytes: run the same command again"
            if end > furthest:
                attempts, furthest = 0, end
        except ConnectionError as error:
            if not broke:  # the first answer of all: it is told at once
                raise InputError(str(error)) from error
        if attempts == len(_WAITS):
            if part.validator:
                raise InputError(f"{broke}, it goes on from there")
            _forget(final, part.path)
            raise InputError(broke)
        time.sleep(_WAITS[attempts])
        attempts += 1


def _request(url: str, sha256: str | None, start: int, validator: str | None) -> Any:
    """The answer, of whatever status. Raises ConnectionError: there is none."""
    headers = {"User-Agent": "fcvit_jax"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        opener = urllib.request.build_opener(_Redirects(sha256))
        return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        return error
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = "".join(filter(str.isprintable, str(getattr(error, "reason", error))))[:200]
        raise ConnectionError(f"cannot be reached ({reason}): check the address and the network") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Lets nothing lead from https to http, nor anywhere that the user may not name."""

    def __init__(self, sha256: str | None):
        self.sha256 = sha256

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            with naming(f"redirected to {newurl}"):
                if req.type == "https" and urlsplit(newurl).scheme != "https":
                    raise InputError("a step down from https: use another address")
                _check_address(newurl, self.sha256)
        except InputError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, sha256: str | None) -> None:
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    except ValueError as error:
        raise InputError("is no valid address: check it") from error
    if scheme not in ("http", "https"):
        raise InputError("only https:// is fetched: download it otherwise, and name the file")
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if scheme == "http" and not local and len(sha256 or "") != 64:
        raise InputError("plain http may be tampered with: use https, or pass --sha256 with all 64 digits")


def _check_answer(response: Any, start: int) -> None:
    """Raises InputError for what another attempt would not change, ConnectionError for what it may."""
    status = response.status
    told = f"the server answers {status} ({http.client.responses.get(status, 'unknown')})"
    if status in _PASSING:
        raise ConnectionError(f"{told}: try again later")
    if status in (401, 403):
        raise InputError(f"{told}: if it needs a login, download it in a browser, and name the file")
    if status != 200 and not (status == 206 and start):
        raise InputError(f"{told}: check the address")
    if response.headers.get_content_type() == "text/html":
        raise InputError(_WEB_PAGE)


def _fits(response: Any, part: _Part, start: int) -> bool:
    """Whether a partial answer is the rest of this part: some servers honour Range, but not If-Range."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    same = _validator(response) in (part.validator, None)
    return same and span is not None and (int(span[1]), int(span[2])) == (start, part.total)


def _begin(response: Any, final: Path, previous: _Part, expected: str | None) -> _Part:
    """The part of a file that comes whole; noted, so that a later call can ask for the rest of the same version."""
    part = _part(final, _validator(response), response.length)
    if part.total is None and not expected:
        raise InputError("the server does not tell the length, so that a break would go unseen: pass --sha256")
    if previous != part:
        previous.path.unlink(missing_ok=True)
    _note(final).write_text(json.dumps([part.validator, part.total]), encoding="utf-8")
    part.path.touch()
    return part


def _write(response: Any, part: _Part, end: int, title: str) -> int:
    """Write what comes to where it belongs, and return where it ends: before the total, if the connection breaks."""
    bar = tqdm(
        desc=title, total=part.total, initial=end, unit="B", unit_scale=True, disable=None
    )  # None: on a terminal
    with part.path.open("r+b") as file, bar:
        file.seek(end)
        for chunk in _chunks(response):
            end += len(chunk)
            if part.total is not None and end > part.total:
                part.path.unlink(missing_ok=True)
                raise InputError(f"more comes than the {part.total} bytes announced: run the same command again")
            file.write(chunk)
            bar.update(len(chunk))
    return end


def _chunks(response: Any) -> Iterator[bytes]:
    """What comes until the end, or until the connection breaks: the length tells which it was."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while chunk := response.read(_CHUNK):
            yield chunk


def _verify(part: Path, expected: str | None, check: Callable[[Path], object] | None) -> None:
    with part.open("rb") as file:
        if file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith((b"<!doctype html", b"<html")):
            raise InputError(_WEB_PAGE)
    if expected and not (found := _sha256(part)).startswith(expected):
        raise InputError(f"its sha256 is {found}, not {expected}: run the same command again, or check --sha256")
    if check:
        try:
            check(part)
        except InputError as error:  # names the part, which is gone by the time that this is read
            raise InputError(f"the file {str(error).removeprefix(str(part)).lstrip(': ')}") from error


def _validator(response: Any) -> str | None:
    """A strong ETag or else the date: what tells that a file is still the same, byte for byte."""
    etag = response.headers.get("ETag", "W/")
    return response.headers.get("Last-Modified") if etag.startswith("W/") else etag


def _note(final: Path) -> Path:
    return final.with_name(f"{final.name}.part.json")


def _recall(final: Path) -> _Part:
    try:
        validator, total = json.loads(_note(final).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, TypeError):  # none, or another process is just writing it
        validator, total = None, None
    return _part(final, validator, total)


def _forget(final: Path, part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(final).unlink(missing_ok=True)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
