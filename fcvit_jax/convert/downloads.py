"""From a path, address, hub repository or zoo name to a local file, through a cache."""

import difflib
import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from fcvit_jax.convert.readers import parse_index
from fcvit_jax.convert.unfinished import check_directory
from fcvit_jax.errors import InputError, naming
from fcvit_jax.models import zoo

# The names under which transformers saves weights; the first found is taken.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Files that trainers leave beside the weights, under the same suffixes.
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_TIMEOUT = 30  # seconds without a byte
_BY_HAND = "download it in a browser, and name the file"
_LOGIN = "run `hf auth login` or set HF_TOKEN"

Check = Callable[[Path, str], object]


def locate(source: str, check: Check, sha256: str | None = None) -> Path:
    """Return the local file or directory behind what a user typed.

    source: an existing path, returned unchanged; `https://...`; `hf-hub:OWNER/NAME[@REVISION]`; or a full name of the
    zoo. check, sha256: those of `download`, for addresses only. Raises InputError if there is no such file, name or
    repository, or if it cannot be downloaded.
    """
    if os.path.exists(path := os.path.expanduser(source)):
        return Path(path)
    if source.startswith("hf-hub:"):
        with naming(source):
            return _fetch_from_hub(source)
    if "://" in source:
        return download(source, check, sha256)
    if source in zoo.names() and (address := zoo.get(source).source):
        return locate(address, check, sha256)
    near = [name for name in zoo.names() if name.startswith(f"{source}.")]
    near = near or difflib.get_close_matches(source, zoo.names(), n=3, cutoff=0.6)
    fix = f", nor a full name of the zoo; the nearest are {', '.join(near)}" if near else ": check the path"
    raise InputError(f"{source}: no such file{fix}")


def weight_file(directory: Path) -> Path:
    """Return the weights, or the index of their shards, in a directory of transformers, or the only weight file.

    Raises InputError if there is none, if there are several, or if the directory cannot be read.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    except OSError as error:
        raise InputError(f"{directory} cannot be read ({error.strerror}): check the path") from error
    names = [name for name in names if not _BESIDE.fullmatch(name)]
    found = [name for name in _WEIGHTS if name in names][:1] or [name for name in names if name.endswith(_SUFFIXES)]
    if len(found) == 1:
        return directory / found[0]
    check_directory(directory)
    listed = ", ".join(map(repr, (found or names)[:8])) + ", ..." * (len(found) > 8)
    if found:
        raise InputError(f"{directory} holds {len(found)} weight files ({listed}): name one of them")
    raise InputError(
        f"{directory} holds {listed or 'no files'}, no weights ({', '.join(_SUFFIXES)}): name the right directory"
    )


def download(url: str, check: Check, sha256: str | None = None) -> Path:
    """Download a file into the cache, unless it is there, and return its path.

    The cache is `$FCVIT_JAX_CACHE`, or pooch's for "fcvit_jax": `~/.cache/fcvit_jax` on Linux. A file gets its name
    there when it is whole and checked, and is downloaded again if it is damaged later.

    check: called with the path and the name of a whole file; raises InputError if it is not the right one. sha256: what
    the user states; plain http needs all 64 digits, unless the host is this machine.
    Raises InputError if the address, network, server, file or cache is at fault.
    """
    import pooch
    import requests

    def check_response(response: requests.Response, **kwargs: Any) -> None:
        try:
            _check_response(response, sha256)
        except InputError:
            response.close()
            raise

    def fetch(url: str, output_file: Any, pooch_: Any, **kwargs: Any) -> None:
        # The total is pooch's to set. Silent unless standard error is a terminal.
        with tqdm(desc=cached.name.split("-", 1)[1], total=1, unit="B", unit_scale=True, disable=None) as bar:
            settings: Any = dict(progressbar=bar, timeout=_TIMEOUT, hooks={"response": check_response})
            pooch.HTTPDownloader(chunk_size=1 << 16, **settings)(url, output_file, pooch_)
        try:
            check(Path(output_file), cached.name)
        except InputError as error:  # names the temporary file, which is gone when this is read
            raise InputError(f"the file {str(error).removeprefix(str(output_file)).lstrip(': ')}") from error

    with naming(url):
        _check_address(url, sha256)
        folder = Path(os.environ.get("FCVIT_JAX_CACHE") or pooch.os_cache("fcvit_jax")).expanduser()
        cached = folder / pooch.utils.unique_file_name(url)
        pooch.get_logger().setLevel("WARNING")
        try:
            if cached.exists():
                try:
                    check(cached, cached.name)
                except InputError:
                    cached.unlink()
            downloader: Any = fetch
            return Path(pooch.retrieve(url, None, cached.name, folder, downloader=downloader))
        except requests.HTTPError as error:
            response: Any = error.response
            response.close()
            raise InputError(_refusal(response)) from error
        except requests.RequestException as error:
            cause = getattr(error.args[0] if error.args else None, "reason", error)  # urllib3's, without its wrapping
            reason = "".join(filter(str.isprintable, str(cause)))[:200]
            raise InputError(f"cannot be downloaded ({reason}): check the address and the network") from error
        except OSError as error:
            what = f"{error.filename or cached} cannot be written ({error.strerror or error})"
            raise InputError(f"{what}: make room, or set FCVIT_JAX_CACHE to another directory") from error


def _check_address(url: str, sha256: str | None) -> None:
    try:
        scheme, host = urlsplit(url).scheme, urlsplit(url).hostname or ""
    except ValueError as error:
        raise InputError("is not a valid address: check it") from error
    if scheme not in ("http", "https"):
        raise InputError("only https:// is downloaded: download it otherwise, and name the file")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if scheme == "http" and not local and len(sha256 or "") != 64:
        raise InputError("plain http may be tampered with: use https, or pass --sha256 with all 64 digits")


def _check_response(response: Any, sha256: str | None) -> None:
    """Refuse a redirection before it is followed, and a web page instead of a file."""
    if response.is_redirect:
        target = urljoin(response.url, response.headers["location"])
        with naming(f"redirected to {target}"):
            if response.url.startswith("https:") and not target.startswith("https:"):
                raise InputError("a step down from https: use another address")
            _check_address(target, sha256)
    elif response.ok and response.headers.get("content-type", "").startswith("text/html"):
        raise InputError(f"the server sends a web page, perhaps a login: {_BY_HAND}")


def _refusal(response: Any) -> str:
    """Say what a status other than success means for the user."""
    fix = "check the address"
    if response.status_code in (401, 403):
        fix = f"if it needs a login, {_BY_HAND}"
    elif response.status_code == 429 or response.status_code >= 500:
        fix = "try again later"
    return f"the server answers {response.status_code} ({response.reason or 'no reason'}): {fix}"


def _fetch_from_hub(source: str) -> Path:
    """Return the weights of a repository, or their index, in a snapshot that has its shards and JSON files too.

    Raises InputError, without the source's name, if the repository or the hub is at fault.
    """
    from huggingface_hub import errors, hf_hub_download

    if not (found := re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)):
        raise InputError("not of the form hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    repository, revision = found.groups()
    refusals = {
        errors.RevisionNotFoundError: f"the repository has no revision {revision}: check it",
        errors.GatedRepoError: f"is gated: request access on its page of the hub, then {_LOGIN}",
        errors.RepositoryNotFoundError: f"no such repository, or a private one: check the name, or {_LOGIN}",
        errors.HFValidationError: "is not a repository's name: check it",
    }
    unreachable = None

    def fetch(name: str) -> Path | None:
        nonlocal revision, unreachable
        try:
            # If the hub could not be reached once, only the cache is searched: no waiting for every file.
            path = Path(hf_hub_download(repository, name, revision=revision, local_files_only=unreachable is not None))
        except errors.LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            return None
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of the HTTP library that huggingface_hub uses, or of the disk
            what = "".join(filter(str.isprintable, f"{type(error).__name__}: {error}"))[:300]
            unknown = f"the hub cannot be used ({what}): check the network, the token and the disk"
            raise InputError(next((refusals[kind] for kind in refusals if isinstance(error, kind)), unknown)) from error
        revision = path.parent.name  # all files come from one commit
        return path

    # JSON files first: they are optional, so if the connection breaks after them, the missing weights show it.
    for name in ("config.json", "preprocessor_config.json"):
        fetch(name)
    path = next(filter(None, map(fetch, _WEIGHTS)), None)
    shards = []
    if path and path.suffix == ".json":
        with naming(f"its {path.name}"):
            shards = sorted(parse_index(path.read_bytes()))
    missing = next((name for name in shards if not fetch(name)), None)
    if path and not missing:
        return path
    if unreachable:
        offline = isinstance(unreachable.__cause__, errors.OfflineModeIsEnabled)
        fix = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        raise InputError(f"the cache lacks {repr(missing) if missing else 'its weights'}, and {fix}")
    if path:
        fix = "name another repository or revision"
        raise InputError(f"its {path.name} names {missing!r}, which does not exist: {fix}")
    raise InputError(f"the repository has none of {', '.join(_WEIGHTS)}: name another, or the file's https:// address")
