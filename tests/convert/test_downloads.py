"""Downloads from servers on this machine that break, lie, and change between requests."""

import hashlib
import http.server
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pooch.utils
import pytest
import requests

from downloading import anything, refuse
from fcvit_jax.convert import downloads
from fcvit_jax.convert.downloads import download, locate, weight_file
from fcvit_jax.convert.readers import WeightFile, read_weights
from fcvit_jax.convert.weight_source import expected_sha256, open_weights
from fcvit_jax.models import zoo

pytestmark = pytest.mark.usefixtures("cache")
CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HTML = b"<!DOCTYPE html><html><title>Sign in</title></html>"


def safetensors(value: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value])


def weights(path: Path, name: str) -> WeightFile:
    return read_weights(path)


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
def site(serve):
    site = Site()
    site.address = serve(Handler, site=site) + "/path/model.pth"
    return site


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
