"""Repositories of the Hugging Face hub, by huggingface_hub."""

import re
from pathlib import Path

from fcvit_jax.convert.readers import parse_index
from fcvit_jax.errors import InputError, naming

# As transformers saves them; the first that is there is taken.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def fetch_from_hub(source: str) -> Path:
    """The weights of a repository, or their index, in a snapshot that has the shards and the JSON files too.

    source: hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION. The cache, the token and the offline mode are those of
    huggingface_hub. Raises InputError, without the name, where the repository or the hub is at fault.
    """
    if not (found := re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)):
        raise InputError("not of the form hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise InputError("needs the package huggingface_hub: pip install 'fcvit-jax[hub]'") from error
    repository, revision = found.groups()
    refusals = {
        errors.RevisionNotFoundError: f"the repository has no revision {revision}: check it",
        errors.GatedRepoError: "is gated: ask for access on its page of the hub, then run `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or a private one: check it, or run `hf auth login`",
        errors.HFValidationError: "is no name of a repository: check it",
    }
    unreachable = None

    def fetch(name: str) -> Path | None:
        nonlocal revision, unreachable
        try:
            # Once the hub has not been reached, what is cached is all there is: no further waiting for it.
            path = Path(hf_hub_download(repository, name, revision=revision, local_files_only=unreachable is not None))
        except errors.LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            return None
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # of whatever HTTP library huggingface_hub is built on by now, or of the disk
            told = "".join(filter(str.isprintable, f"{type(error).__name__}: {error}"))[:300]
            told = f"the hub cannot be used ({told}): check the network, the token and the disk"
            told = next((text for kind, text in refusals.items() if isinstance(error, kind)), told)
            raise InputError(told) from error
        revision = path.parent.name  # whatever else is fetched is of the same commit
        return path

    # The JSON files first: if the connection breaks after them, the missing weights tell; they themselves are optional.
    for name in ("config.json", "preprocessor_config.json"):
        fetch(name)
    path = next(filter(None, map(fetch, WEIGHTS)), None)
    shards = []
    if path and path.suffix == ".json":
        with naming(f"its {path.name}"):
            shards = sorted(parse_index(path.read_bytes()))
    missing = next((name for name in shards if not fetch(name)), None)
    if path and not missing:
        return path
    if unreachable:
        offline = isinstance(unreachable.__cause__, errors.OfflineModeIsEnabled)
        mend = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        raise InputError(f"the cache lacks {repr(missing) if missing else 'its weights'}, and {mend}")
    if path:
        raise InputError(f"its {path.name} names {missing!r}, which is not there: name another repository or revision")
    raise InputError(f"the repository has none of {', '.join(WEIGHTS)}: name another, or the file's https:// address")
