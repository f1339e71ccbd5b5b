"""Weights in repositories of the Hugging Face hub, downloaded by huggingface_hub."""

import re
from pathlib import Path

from fcvit_jax.convert.readers import parse_index
from fcvit_jax.errors import InputError, naming

# The names under which transformers saves weights; the first found is taken.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LOGIN = "run `hf auth login` or set HF_TOKEN"


def fetch_from_hub(source: str) -> Path:
    """Return the weights of a repository, or their index, in a snapshot that has its shards and JSON files too.

    source: hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION. Cache, token and offline mode are those of huggingface_hub.
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
        errors.HFValidationError: "is no name of a repository: check it",
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
            what = f"the hub cannot be used ({what}): check the network, the token and the disk"
            raise InputError(
                next((text for kind, text in refusals.items() if isinstance(error, kind)), what)
            ) from error
        revision = path.parent.name  # all files come from one commit
        return path

    # JSON files first: they are optional, so if the connection breaks after them, the missing weights show it.
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
        fix = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        raise InputError(f"the cache lacks {repr(missing) if missing else 'its weights'}, and {fix}")
    if path:
        raise InputError(f"its {path.name} names {missing!r}, which is not there: name another repository or revision")
    raise InputError(f"the repository has none of {', '.join(WEIGHTS)}: name another, or the file's https:// address")
