"""Downloads from servers on this machine that break, lie, and change between requests."""

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pooch.utils
import pytest
import requests
from huggingface_hub import constants

from fcvit_jax.convert import downloads
from fcvit_jax.convert.downloads import download, locate, weight_file
from fcvit_jax.convert.readers import WeightFile, read_weights
from fcvit_jax.convert.weight_source import expected_sha256, open_weights
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HTML = b"<!DOCTYPE html><html><title>Sign in</title></html>"


def safetensors(value: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value])


def weights(path: Path, name: str) -> WeightFile:
    return read_weights(path)


def anything(path: Path, name: str) -> None:
    """Accept any file."""


@dataclass
class Site:
    """The answers of the server, and how often it was called."""

    content: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes sent before the connection breaks
    status: int = 200
    asked: int = 0
    address: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server.site  # pyright: ignore[reportAttributeAccessIssue]
        site.asked += 1
        self.send_response(site.status)
        for name, value in ({"Content-Type": "application/octet-stream"} | site.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(site.content)))
        self.end_headers()
        self.wfile.write(site.content[: site.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Start servers that are closed at the end of the test."""
    servers = []

    def start(handler, **attributes) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        for name, value in attributes.items():
            setattr(server, name, value)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def site(serve):
    site = Site()
    site.address = serve(Handler, site=site) + "/path/model.pth"
    return site


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(text: str, call, *args, **kwargs) -> str:
    with pytest.raises(InputError, match=text) as caught:
        call(*args, **kwargs)
    assert str(caught.value).isprintable()
    return str(caught.value)


def held(cache: Path) -> list[str]:
    return os.listdir(cache) if cache.exists() else []


def test_downloaded_once(site, cache, capfd):
    path = download(site.address, anything)
    assert (path.read_bytes(), path.parent, path.suffix) == (CONTENT, cache, ".pth")
    assert download(site.address, anything) == path
    assert site.asked == 1
    assert held(cache) == [path.name]
    assert download(site.address.replace("path", "other"), anything) != path  # one name, two addresses
    assert capfd.readouterr() == ("", "")  # no terminal, no progress bar


def test_where_the_cache_is(site, tmp_path, monkeypatch):
    monkeypatch.delenv("FCVIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download(site.address, anything).parent == tmp_path / "xdg/fcvit_jax"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FCVIT_JAX_CACHE", "~/weights")
    assert download(site.address, anything).parent == tmp_path / "home/weights"


def test_a_broken_connection_leaves_nothing(site, cache):
    site.cut = 100_000
    told = refuse(r"cannot be downloaded \(.*\): check the address and the network", download, site.address, anything)
    assert told.startswith(f"{site.address}: ")
    assert held(cache) == []
    site.cut = None
    assert download(site.address, anything).read_bytes() == CONTENT


def test_an_interrupted_download_leaves_nothing(site, cache):
    def interrupt(path, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(site.address, interrupt)
    assert held(cache) == []


def test_sha256(site, cache):
    site.content = safetensors(7)
    right, wrong = hashlib.sha256(site.content).hexdigest(), "0" * 8
    told = f"the file its sha256 begins {right[:8]}, --sha256 says {wrong}: .*download it again"
    refuse(told, open_weights, site.address, False, wrong)
    named = site.address.replace("model", "model-cd65a155")
    refuse(f"sha256 begins {right[:8]}, its name says cd65a155", open_weights, named, False, None)
    assert held(cache) == []
    assert open_weights(named, False, right)[0].arrays["w"] == [7]  # the user's digest overrides that in the name
    named = named.replace("cd65a155", right[:8])
    path = open_weights(named, False, None)[0].path
    asked = site.asked
    path.write_bytes(safetensors(8))  # damaged, but readable
    assert open_weights(named, False, None)[0].arrays["w"] == [7]
    assert site.asked == asked + 1


def test_a_damaged_cache_is_repaired(site):
    site.content = safetensors(7)
    path = download(site.address, weights)
    path.write_bytes(site.content[:-1])
    assert download(site.address, weights) == path
    assert path.read_bytes() == site.content
    assert site.asked == 2


def test_a_file_gets_its_name_when_it_is_checked(site, cache):
    seen = []
    path = download(site.address, lambda path, name: seen.append((path.name, name, path.read_bytes())))
    assert seen == [(seen[0][0], path.name, CONTENT)]
    assert seen[0][0] != path.name
    path.unlink()
    told = refuse("the file is neither a safetensors", download, site.address, weights)
    assert str(cache) not in told
    assert held(cache) == []


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_login_page(site, cache, kind):
    site.content = HTML
    site.headers["Content-Type"] = kind
    refuse("a web page", download, site.address, weights)
    assert held(cache) == []


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, r"the server answers 404 \(Not Found\): check the address"),
        (403, r"the server answers 403 \(Forbidden\): if it needs a login, download it in a browser"),
        (401, r"401 \(Unauthorized\): if it needs a login"),
        (429, r"429 \(Too Many Requests\): try again later"),
        (503, r"503 \(Service Unavailable\): try again later"),
    ],
)
def test_refused_by_the_server(site, cache, status, told):
    site.status = status
    refuse(told, download, site.address, anything)
    assert held(cache) == []


def test_redirects(site, serve, cache):
    hop = Site(status=302, headers={"Location": site.address})
    address = serve(Handler, site=hop) + "/hop.pth"
    path = download(address, anything)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-hop.pth")
    path.unlink()
    for location, told in [
        ("http://example.org/x", "redirected to http://example.org/x: plain http may be tampered with"),
        ("ftp://example.org/x", "redirected to ftp://example.org/x: only https"),
        ("file:///etc/passwd", "redirected to file:///etc/passwd: only https"),
        (address, "cannot be downloaded .*redirects"),  # endlessly
    ]:
        hop.headers = {"Location": location}
        refuse(told, download, address, anything)
        assert held(cache) == []


def test_no_step_down_from_https():
    response = requests.Response()
    response.status_code, response.url = 302, "https://example.org/a"
    for location in ("http://example.org/a", "http://127.0.0.1/a", "//example.org:80/a", "/b"):
        response.headers["location"] = location
        if location.startswith("http:"):
            refuse("a step down from https", downloads._check_response, response, "0" * 64)
        else:
            downloads._check_response(response, None)


def test_addresses():
    for address, told in [
        ("http://example.org/model.pth", "plain http may be tampered with: use https, or pass --sha256 with all 64"),
        ("http://127.0.0.1.example.org/model.pth", "plain http"),
        ("ftp://example.org/model.pth", "only https:// is downloaded"),
        ("s3://bucket/model.pth", "only https:// is downloaded"),
        ("https://[::1/model.pth", "is not a valid address"),
    ]:
        refuse(re.escape(address) + ": " + told, locate, address, anything)
        refuse(told, locate, address, anything, SHA256[:63]) if "plain" in told else None
    for address in ("http://localhost/x", "http://127.1.2.3:1/x", "http://[::1]:1/x", "https://example.org/x"):
        downloads._check_address(address, None)
    downloads._check_address("http://example.org/x", SHA256)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}/x.pth", "http://127.0.0.1:port/x", "http://localhost:1/ä"]
)
def test_unreachable(cache, address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refuse(
            "cannot be downloaded .*: check the address and the network",
            download,
            address.format(port=unused.getsockname()[1]),
            anything,
        )
    assert held(cache) == []


def test_a_silent_server(serve, monkeypatch):
    release = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            release.wait(10)

    monkeypatch.setattr(downloads, "_TIMEOUT", 0.1)
    address = serve(Silent)
    refuse("cannot be downloaded .*timed out", download, address + "/x.pth", anything)
    release.set()


def test_a_cache_that_cannot_be_written(site, cache):
    cache.write_text("a file")
    refuse("cache.* cannot be written .*: make room, or set FCVIT_JAX_CACHE", download, site.address, anything)


def test_expected_sha256():
    for name, expected in {
        "deit_small_patch16_224-cd65a155.pth": "cd65a155",
        "model-0123abcd.pth.tar": "0123abcd",
        "model-20230101.pth": None,
        "vit-00010000.pth": None,
        "run-48213377.pth": None,
        "model-cd65a15.pth": None,
        "model_cd65a155.pth": None,
        "model-cd65a155-v2.pth": None,
        "S_16-i21k-300ep-lr_0.001-aug_light1--imagenet2012-steps_20k-lr_0.03-res_224.npz": None,
    }.items():
        assert expected_sha256(name, local=False) == expected
        assert expected_sha256(name, local=True) is None
    for name in ("vit_b_16-c867db91.pth", "renamed-c867db91.pth"):  # the zoo has it
        assert expected_sha256(name, local=True) == "c867db91"


def test_weight_file(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).write_bytes(b"")
        return weight_file(tmp_path).name

    refuse(r"holds no files, no weights \(\.safetensors", weight_file, tmp_path)
    refuse(r"cannot be read \(No such file", weight_file, tmp_path / "absent")
    (tmp_path / "model.safetensors").mkdir()
    refuse(r"holds 'config.json', no weights", put, "config.json")
    assert put("epoch1.pth") == "epoch1.pth"
    refuse(r"holds 2 weight files \('epoch1.pth', 'epoch2.npz'\): name one", put, "epoch2.npz")
    assert put("pytorch_model.bin.index.json") == "pytorch_model.bin.index.json"
    assert put("pytorch_model.bin") == "pytorch_model.bin"
    assert put("model.safetensors.index.json") == "model.safetensors.index.json"
    (tmp_path / "model.safetensors").rmdir()
    assert put("model.safetensors") == "model.safetensors"


def test_names(site, tmp_path, monkeypatch):
    assert locate(str(tmp_path), anything) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("deit_small_patch16_224.fb_in1k").write_bytes(b"")
    assert locate("deit_small_patch16_224.fb_in1k", anything) == Path("deit_small_patch16_224.fb_in1k")
    assert locate(site.address, anything, SHA256).read_bytes() == CONTENT


def test_a_zoo_name_of_torchvision_is_at_its_address(cache):
    name = "vit_base_patch32_224.tv_in1k"
    cached = cache / pooch.utils.unique_file_name(str(zoo.get(name).source))
    cache.mkdir()
    cached.write_bytes(b"w")
    assert locate(name, anything) == cached


def test_timm_publishes_every_other_name_of_the_zoo_on_the_hub():
    cfg = pytest.importorskip("timm.models").get_pretrained_cfg
    names = [name for name in zoo.names() if "." in name and ".tv_" not in name]
    assert len(names) > 50
    published = {name: f"hf-hub:{hub}" if (hub := cfg(name).hf_hub_id) else cfg(name).url for name in names}
    assert {name: zoo.get(name).source for name in names} == published


def test_unknown_names():
    refuse(
        "deit_smal_patch16_224.fb_in1k: no such file.*nearest are deit_small_patch16_224.fb_in1k",
        locate,
        "deit_smal_patch16_224.fb_in1k",
        anything,
    )
    # For an architecture, its weights are suggested.
    told = refuse("no such file", locate, "deit3_small_patch16_224", anything)
    assert told.endswith("deit3_small_patch16_224.fb_in1k, deit3_small_patch16_224.fb_in22k_ft_in1k")
    refuse("^checkpoints/last.pth: no such file: check the path$", locate, "checkpoints/last.pth", anything)
    refuse("no such file", locate, "", anything)


# The hub: https://github.com/huggingface/huggingface_hub requests /OWNER/NAME/resolve/REVISION/FILE alone.

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
