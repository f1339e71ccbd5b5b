"""Weights from a hub on this machine.

The client requests /OWNER/NAME/resolve/REVISION/FILE alone (https://github.com/huggingface/huggingface_hub).
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from downloading import anything, refuse
from fcvit_jax.convert.downloads import locate, weight_file

pytestmark = pytest.mark.usefixtures("cache")
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
CONFIG = b'{"model_type": "vit"}'


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        repositories, asked = self.server.repositories, self.server.asked  # pyright: ignore[reportAttributeAccessIssue]
        owner, name, _, revision, file = self.path[1:].split("/", 4)
        asked.append((self.command, file))
        repository = repositories.get(f"{owner}/{name}")
        commit = COMMITS.get(revision, revision)
        if repository is None:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if repository == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if commit not in COMMITS.values():
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if file not in repository:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        body = repository[file] + (b"1" if commit == COMMITS["v1"] else b"")
        etag = hashlib.sha256(body).hexdigest()
        return self.answer(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, body)

    do_HEAD = do_GET

    def answer(self, status, headers, body=b""):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@dataclass
class FakeHub:
    repositories: dict[str, Any]
    asked: list[tuple[str, str]]
    endpoint: str
    home: Path


@pytest.fixture
def hub(serve, tmp_path, monkeypatch):
    repositories, asked = {}, []
    endpoint = serve(Hub, repositories=repositories, asked=asked)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield FakeHub(repositories, asked, endpoint, tmp_path / "hf")
    huggingface_hub.close_session()


def test_hub(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": b"weights", "config.json": CONFIG, "pytorch_model.bin": b"old"}
    path = locate("hf-hub:timm/vit", anything)
    assert (path.name, path.read_bytes()) == ("model.safetensors", b"weights")
    assert (path.parent.name, path.is_relative_to(hub.home)) == (COMMITS["main"], True)
    assert sorted(os.listdir(path.parent)) == ["config.json", "model.safetensors"]
    assert weight_file(path.parent) == path
    gets = [file for method, file in hub.asked if method == "GET"]
    assert gets == ["config.json", "model.safetensors"]
    locate("hf-hub:timm/vit", anything)
    assert [file for method, file in hub.asked if method == "GET"] == gets


def test_hub_revision(hub):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": b"w", "config.json": CONFIG, "preprocessor_config.json": b"{}"}
    path = locate("hf-hub:timm/vit@v1", anything)
    assert (path.parent.name, path.read_bytes()) == (COMMITS["v1"], b"w1")
    assert sorted(os.listdir(path.parent)) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    assert locate(f"hf-hub:timm/vit@{COMMITS['v1']}", anything) == path
    refuse("hf-hub:timm/vit@v2: the repository has no revision v2", locate, "hf-hub:timm/vit@v2", anything)


def test_hub_files_of_one_commit(hub, monkeypatch):
    """A branch moves on between two files."""
    hub.repositories["timm/vit"] = {"model.safetensors": b"w", "config.json": CONFIG}
    answer = Hub.answer

    def move(self, *args):
        answer(self, *args)
        if self.command == "GET":
            monkeypatch.setitem(COMMITS, "main", COMMITS["v1"])

    monkeypatch.setitem(COMMITS, "first", COMMITS["main"])
    monkeypatch.setattr(Hub, "answer", move)
    path = locate("hf-hub:timm/vit", anything)
    assert (path.parent.name, path.read_bytes()) == ("a" * 40, b"w")


@pytest.mark.parametrize("name", ["vit_base_patch16_224.augreg2_in21k_ft_in1k", "deit_tiny_patch16_224.fb_in1k"])
def test_hub_zoo_name(hub, name):
    hub.repositories[f"timm/{name}"] = {"model.safetensors": b"w"}
    assert locate(name, anything).read_bytes() == b"w"


def test_hub_offline(hub, monkeypatch):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": b"weights", "config.json": CONFIG}
    online = locate("hf-hub:timm/vit", anything)
    count = len(hub.asked)
    environment = os.environ | {"HF_HOME": str(hub.home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    code = "from fcvit_jax.convert.downloads import locate; print(locate('hf-hub:timm/vit', print))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(online)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate("hf-hub:timm/vit", anything) == online
    refuse(
        "hf-hub:timm/other: the cache lacks its weights, and HF_HUB_OFFLINE is set",
        locate,
        "hf-hub:timm/other",
        anything,
    )
    assert len(hub.asked) == count


def test_hub_unreachable(hub, monkeypatch):
    hub.repositories["timm/vit"] = {"model.safetensors": b"weights"}
    online = locate("hf-hub:timm/vit", anything)
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")
    assert locate("hf-hub:timm/vit", anything) == online
    waits.clear()
    refuse("the cache lacks its weights, and the hub cannot be reached", locate, "hf-hub:timm/other", anything)
    assert len(waits) <= 5  # waited for once, not for every file


def test_hub_shards(hub):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-1.safetensors": b"1"}
    hub.repositories["timm/vit"] = files
    refuse("names 'model-2.safetensors', which does not exist", locate, "hf-hub:timm/vit", anything)
    files["model-2.safetensors"] = b"2"
    path = locate("hf-hub:timm/vit", anything)
    assert path.name == "model.safetensors.index.json"
    assert [(path.parent / f"model-{k}.safetensors").read_bytes() for k in (1, 2)] == [b"1", b"2"]


@pytest.mark.parametrize(
    "index",
    ["[", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": [1]}}']
    + [json.dumps({"weight_map": {"a": name}}) for name in ("../x", "/etc/x", "a\\b", "", "..", "C:x", "sub/x")],
)
def test_hub_bad_index(hub, index):
    hub.repositories["timm/vit"] = {"pytorch_model.bin.index.json": index.encode()}
    refuse(
        "hf-hub:timm/vit: its pytorch_model.bin.index.json: (is damaged|names the shard .*, which is not a plain)",
        locate,
        "hf-hub:timm/vit",
        anything,
    )


def test_hub_shard_offline(hub, monkeypatch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.repositories["timm/vit"] = {"model.safetensors.index.json": index}
    refuse("does not exist", locate, "hf-hub:timm/vit", anything)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse("the cache lacks 'model-1.safetensors', and HF_HUB_OFFLINE is set", locate, "hf-hub:timm/vit", anything)


def test_hub_refusals(hub):
    hub.repositories.update({"timm/gated": "gated", "timm/empty": {"config.json": CONFIG, "model.gguf": b""}})
    for source, told in {
        "hf-hub:timm/absent": "no such repository, or a private one: check the name, or run `hf auth login`",
        "hf-hub:timm/gated": "is gated: request access",
        "hf-hub:timm/empty": "the repository has none of model.safetensors, ",
        "hf-hub:timm": "not of the form hf-hub:OWNER/NAME",
        "hf-hub:timm/a/b": "not of the form",
        "hf-hub:timm/a--b": "is not a repository's name",
    }.items():
        assert refuse(told, locate, source, anything).startswith(f"{source}: ")


def test_a_hub_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    hub.repositories["timm/vit"] = {"model.safetensors": b"w"}
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    refuse(
        "hf-hub:timm/vit: the hub cannot be used .*: check the network, the token and the disk",
        locate,
        "hf-hub:timm/vit",
        anything,
    )
