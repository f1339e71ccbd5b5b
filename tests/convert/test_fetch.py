"""Against servers on this machine that break, lie and change their minds."""

import dataclasses
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcvit_jax.convert import fetch
from fcvit_jax.convert.fetch import download, expected_sha256, locate, weight_file
from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError
from fcvit_jax.models import zoo

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HTML = b"<!DOCTYPE html><html><title>Sign in</title></html>"
ETAG = {"ETag": '"one"'}


def safetensors(value: int) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value])


@dataclass
class Site:
    """What the server answers, and what it was asked."""

    content: bytes = CONTENT
    headers: dict[str, str] = field(default_factory=lambda: dict(ETAG))
    cuts: list[int] = field(default_factory=list)  # bytes that the next answers send before they break
    after: Any = None  # called with the site after each answer
    status: int = 200
    ranges: bool = True  # honours Range
    conditions: bool = True  # honours If-Range
    lie: int = 0  # added to the Content-Length
    excess: bytes = b""  # sent and announced after the rest of a range
    span: str | None = None  # instead of the Content-Range
    chunked: bool = False
    asked: list[tuple[str | None, str | None]] = field(default_factory=list)
    address: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server.site  # pyright: ignore[reportAttributeAccessIssue]
        asked, condition = self.headers["Range"], self.headers["If-Range"]
        site.asked.append((asked, condition))
        body, status, headers = site.content, site.status, {"Content-Type": "application/octet-stream"} | site.headers
        known = condition in (site.headers.get("ETag"), site.headers.get("Last-Modified")) or not site.conditions
        if asked and status == 200 and site.ranges and known:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body) else 416
            headers["Content-Range"] = site.span or f"bytes {start}-{len(body) - 1}/{len(body)}"
            body = body[start:] + site.excess if status == 206 else b""
        self.protocol_version = "HTTP/1.1" if site.chunked else "HTTP/1.0"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body) + site.lie))
        self.end_headers()
        self.wfile.write(body[: site.cuts.pop(0)] if site.cuts else body)
        self.close_connection = True
        if site.after:
            site.after(site)

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
    monkeypatch.setattr(fetch, "_WAITS", (0, 0, 0))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> list[bytes]:
    """The parts; after a refusal there must be nothing else, but for what is noted of them."""
    files = [path for path in cache.glob("*") if not path.name.endswith(".part.json")]
    assert all(".part." in path.name for path in files), files
    return [path.read_bytes() for path in files]


def refuse(text: str, call, *args, **kwargs) -> str:
    with pytest.raises(InputError, match=text) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_downloaded_once(site, cache):
    path = download(site.address)
    assert (path.read_bytes(), path.parent) == (CONTENT, cache)
    assert re.fullmatch(r"[0-9a-f]{12}-model\.pth", path.name)
    assert download(site.address) == path
    assert site.asked == [(None, None)]
    assert os.listdir(cache) == [path.name]
    assert download(site.address.replace("path", "other")) != path  # one name, two addresses


def test_names_in_the_cache(site, cache):
    names = [download(site.address + end).name[13:] for end in ("?download=true", "%20x%2F..%2Fa%20b.pth", "/", "#x")]
    assert names == ["model.pth", "a_b.pth", "weights", "model.pth"]
    long = download(site.address.replace("model", "m" * 300))
    assert len(long.name) < 200
    assert long.suffix == ".pth"


def test_where_the_cache_is(site, tmp_path, monkeypatch):
    monkeypatch.delenv("FCVIT_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert download(site.address).parent == tmp_path / "xdg/fcvit_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert download(site.address).parent == tmp_path / "home/.cache/fcvit_jax"


@pytest.mark.parametrize("headers", [ETAG, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}])
def test_resumes_within_one_call(site, cache, headers):
    site.headers = headers
    site.cuts = [100_000, 50_000]
    path = download(site.address, SHA256[:8])
    validator = next(iter(headers.values()))
    assert site.asked == [(None, None), ("bytes=100000-", validator), ("bytes=150000-", validator)]
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == [path.name]


def test_progress_renews_the_attempts(site):
    site.cuts = [30_000] * 9  # three attempts, were they counted in all
    assert download(site.address).read_bytes() == CONTENT
    assert len(site.asked) == 10


def test_breaks_for_good_and_resumes_in_a_later_call(site, cache):
    site.cuts = [100_000, 0, 0, 0]
    told = refuse("broke off at 100000 of 300000 bytes: run the same command again, it goes on", download, site.address)
    assert told.startswith(f"{site.address}: ")
    assert kept(cache) == [CONTENT[:100_000]]
    assert download(site.address).read_bytes() == CONTENT
    assert site.asked[-1] == ("bytes=100000-", '"one"')


def test_a_whole_part_needs_no_network(site, cache, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(site.address, check=interrupt)
    assert kept(cache) == [CONTENT]
    assert download(site.address).read_bytes() == CONTENT
    assert len(site.asked) == 1


def test_interrupted(site, cache, monkeypatch):
    chunks = fetch._chunks

    def interrupt(response):
        yield next(chunks(response))
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_chunks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(site.address)
    monkeypatch.setattr(fetch, "_chunks", chunks)
    assert kept(cache) == [CONTENT[: fetch._CHUNK]]
    assert download(site.address).read_bytes() == CONTENT
    assert site.asked[-1][0] == f"bytes={fetch._CHUNK}-"


@pytest.mark.parametrize("conditions", [True, False], ids=["If-Range", "no If-Range"])
@pytest.mark.parametrize("between_calls", [True, False])
def test_a_changed_file_is_never_spliced(site, cache, conditions, between_calls):
    changed = CONTENT[::-1]  # of the same length

    def change(site):
        site.content, site.headers = changed, {"ETag": '"two"'}

    site.conditions = conditions
    site.cuts = [100_000, 0, 0, 0] if between_calls else [100_000]
    if between_calls:
        refuse("broke off", download, site.address)
        change(site)
    else:
        site.after = change
    path = download(site.address)
    assert path.read_bytes() == changed
    assert os.listdir(cache) == [path.name]


def test_server_without_range(site):
    site.ranges = False
    site.cuts = [200_000, 100_000]
    assert download(site.address, SHA256).read_bytes() == CONTENT
    assert len(site.asked) == 3


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"weak"'}])
def test_server_without_validator(site, cache, headers):
    site.headers = headers
    site.cuts = [200_000, 100_000]
    assert download(site.address).read_bytes() == CONTENT
    assert site.asked == [(None, None)] * 3
    os.remove(download(site.address))
    site.cuts = [200_000, 100_000, 10, 10]
    assert refuse("broke off", download, site.address).endswith("run the same command again")
    assert kept(cache) == []  # nobody could tell of which version it is


@pytest.mark.parametrize(
    "answer",
    [
        {"span": "bytes 0-299999/300000"},
        {"span": "bytes 100000-299999/300001"},
        {"span": "nonsense"},
        {"span": "bytes 100000-299999/*"},
    ],
)
def test_wrong_content_range_restarts(site, answer):
    site.cuts = [100_000]
    for name, value in answer.items():
        setattr(site, name, value)
    assert download(site.address).read_bytes() == CONTENT
    assert [asked for asked, _ in site.asked] == [None, "bytes=100000-", None]


def test_a_range_out_of_reach_restarts(site):
    def shorten(site):
        site.content = CONTENT[:50_000]

    site.cuts = [100_000]
    site.after = shorten
    assert download(site.address).read_bytes() == CONTENT[:50_000]
    assert [asked for asked, _ in site.asked] == [None, "bytes=100000-", None]


def test_shorter_than_announced(site, cache):
    site.lie = 10
    site.ranges = False
    refuse("broke off at 300000 of 300010 bytes", download, site.address)
    assert kept(cache) == [CONTENT]


def test_longer_than_announced(site, cache):
    site.cuts = [100_000]
    site.excess = b"x"
    refuse("more comes than the 300000 bytes announced", download, site.address)
    assert kept(cache) == []
    # What stands behind the announced end of a whole answer is not read: only the content can tell.
    site.content, site.lie = safetensors(1), -1
    refuse("the file is damaged", download, site.address, check=read_weights)
    refuse("its sha256 is", download, site.address, SHA256)
    assert kept(cache) == []


def test_length_not_told(site, cache):
    site.chunked = True
    refuse("does not tell the length.*--sha256", download, site.address)
    assert kept(cache) == []
    assert download(site.address, SHA256).read_bytes() == CONTENT
    os.remove(download(site.address, SHA256))
    site.cuts = [100_000]
    refuse("its sha256 is", download, site.address, SHA256)
    assert kept(cache) == []


def test_sha256(site, cache):
    wrong = "0" * 8
    refuse(f"its sha256 is {SHA256}, not {wrong}: run the same command again", download, site.address, wrong)
    assert kept(cache) == []
    named = site.address.replace("model", "model-cd65a155")
    refuse(f"its sha256 is {SHA256}, not cd65a155", download, named)
    assert kept(cache) == []
    assert download(named, SHA256.upper()).read_bytes() == CONTENT  # what the user says goes before the name
    os.remove(download(named, SHA256))
    assert download(named.replace("cd65a155", SHA256[:8])).read_bytes() == CONTENT
    for bad in ("cd65a15", "x" * 64, SHA256 + "0", "--------"):
        refuse("is no sha256", download, site.address, bad)


def test_a_damaged_cache_is_mended(site):
    path = download(site.address, SHA256)
    path.write_bytes(b"damaged")
    assert download(site.address, SHA256) == path
    assert path.read_bytes() == CONTENT
    assert len(site.asked) == 2


def test_check(site, cache):
    seen = []

    def check(path):
        seen.append((path.name, path.suffix, path.read_bytes()))

    path = download(site.address, check=check)
    assert seen == [(seen[0][0], ".pth", CONTENT)]
    assert seen[0][0] != path.name
    os.remove(path)
    told = refuse("the file is neither a safetensors", download, site.address, check=read_weights)
    assert ".part" not in told
    assert kept(cache) == []
    site.content = safetensors(7)
    assert read_weights(download(site.address, check=read_weights)).arrays["w"] == [7]


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
@pytest.mark.parametrize("check", [None, read_weights])
def test_login_page(site, cache, kind, check):
    site.content = HTML
    site.headers["Content-Type"] = kind
    refuse("a web page, perhaps a login: download it in a browser", download, site.address, check=check)
    assert kept(cache) == []


def test_a_web_page_leaves_the_part(site, cache):
    site.cuts = [100_000, 0, 0, 0]
    refuse("broke off", download, site.address)
    good, site.content, site.headers = dataclasses.replace(site), HTML, {"Content-Type": "text/html"}
    refuse("web page", download, site.address)
    assert kept(cache) == [CONTENT[:100_000]]
    site.content, site.headers = good.content, good.headers
    assert download(site.address).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, r"the server answers 404 \(Not Found\): check the address"),
        (403, r"the server answers 403 \(Forbidden\): if it needs a login, download it in a browser"),
        (401, r"401 \(Unauthorized\): if it needs a login"),
        (204, "answers 204"),
        (206, "answers 206"),
        (416, "answers 416"),
        (599, r"answers 599 \(unknown\)"),
        (503, r"503 \(Service Unavailable\): try again later"),
    ],
)
def test_refused_by_the_server(site, cache, status, told):
    site.status = status
    refuse(told, download, site.address)
    assert kept(cache) == []
    assert len(site.asked) == 1


def test_busy_after_a_break(site):
    def recover(site):
        site.status = 503 if len(site.asked) < 3 else 200

    site.cuts = [100_000]
    site.after = recover
    assert download(site.address).read_bytes() == CONTENT
    assert [asked for asked, _ in site.asked] == [None, *["bytes=100000-"] * 3]


def test_gone_after_a_break(site, cache):
    site.cuts = [100_000]
    site.after = lambda site: setattr(site, "status", 404)
    refuse("answers 404", download, site.address)
    assert kept(cache) == [CONTENT[:100_000]]


def test_redirects(site, serve, cache):
    hop = Site(status=302, headers={"Location": site.address})
    address = serve(Handler, site=hop) + "/hop.pth"
    site.cuts = [100_000]
    path = download(address)
    assert path.read_bytes() == CONTENT
    assert path.name.endswith("-hop.pth")
    assert site.asked[1] == ("bytes=100000-", '"one"')
    path.unlink()
    for location, told in [
        ("http://example.org/x", "redirected to http://example.org/x: plain http may be tampered with"),
        ("ftp://example.org/x", "redirected to ftp://example.org/x: only https"),
        ("file:///etc/passwd", "answers 302"),
        (address, "answers 302"),  # for ever
    ]:
        hop.headers = {"Location": location}
        refuse(told, download, address)
        assert kept(cache) == []


def test_no_step_down_from_https():
    request = urllib.request.Request("https://example.org/a")
    with open(os.devnull, "rb") as body:
        for location in ("http://example.org/a", "http://127.0.0.1/a"):
            refuse(
                "a step down from https",
                fetch._Redirects("0" * 64).redirect_request,
                request,
                body,
                302,
                "",
                {},
                location,
            )
            assert body.closed


def test_addresses():
    for address, told in [
        ("http://example.org/model.pth", "plain http may be tampered with: use https, or pass --sha256 with all 64"),
        ("http://127.0.0.1.example.org/model.pth", "plain http"),
        ("ftp://example.org/model.pth", "only https:// is fetched"),
        ("s3://bucket/model.pth", "only https:// is fetched"),
        ("https://[::1/model.pth", "is no valid address"),
    ]:
        refuse(re.escape(address) + ": " + told, locate, address)
        refuse(told, locate, address, SHA256[:63]) if "plain" in told else None
    for address in ("http://localhost/x", "http://127.1.2.3:1/x", "http://[::1]:1/x", "https://example.org/x"):
        fetch._check_address(address, None)
    fetch._check_address("http://example.org/x", SHA256)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{port}/x.pth", "http://127.0.0.1:port/x", "http://localhost:1/ä"]
)
def test_unreachable(site, cache, address):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refuse(
            "cannot be reached .*: check the address and the network",
            download,
            address.format(port=unused.getsockname()[1]),
        )
    assert kept(cache) == []


def test_a_silent_server(serve, cache, monkeypatch):
    release = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            release.wait(10)

    monkeypatch.setattr(fetch, "_TIMEOUT", 0.1)
    address = serve(Silent)
    refuse("cannot be reached .*timed out", download, address + "/x.pth")
    release.set()


def test_two_at_once(site, cache):
    """A second call, as another process would make it, while the first is in the middle of the file."""
    inner = []
    chunks = fetch._chunks

    def race(response):
        for count, chunk in enumerate(chunks(response)):
            yield chunk
            if count == 1 and not inner:
                inner.append(None)
                inner[0] = download(site.address)

    fetch._chunks, path = race, None
    try:
        path = download(site.address, check=Path.read_bytes)
    finally:
        fetch._chunks = chunks
    assert inner == [path]
    assert path.read_bytes() == CONTENT
    assert os.listdir(cache) == [path.name]
    assert site.asked == [(None, None), (f"bytes={2 * fetch._CHUNK}-", '"one"')]


def test_a_damaged_note(site, cache):
    site.cuts = [100_000, 0, 0, 0]
    refuse("broke off", download, site.address)
    next(cache.glob("*.part.json")).write_text("[1")
    assert download(site.address).read_bytes() == CONTENT
    assert site.asked[-1] == (None, None)


def test_unwritable(site, cache, monkeypatch, tmp_path):
    cache.write_text("a file")
    refuse("cache cannot be written .*: make room, or set FCVIT_JAX_CACHE", download, site.address)
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "other"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_write", full)
    refuse(r"cannot be written \(No space left on device\)", download, site.address)


def test_expected_sha256():
    for name, expected in {
        "deit_small_patch16_224-cd65a155.pth": "cd65a155",
        "model-0123abcd.pth.tar": "0123abcd",
        "model-20230101.pth": None,
        "model-cd65a15.pth": None,
        "model_cd65a155.pth": None,
        "model-cd65a155-v2.pth": None,
        "S_16-i21k-300ep-lr_0.001-aug_light1--imagenet2012-steps_20k-lr_0.03-res_224.npz": None,
    }.items():
        assert expected_sha256(name) == expected


def test_sources_of_the_zoo():
    sources = [source for name in zoo.names() if (source := zoo.get(name).source)]
    assert all(source.startswith(("https://", "hf-hub:")) for source in sources)
    hashed = [source for source in sources if re.search("-[0-9a-f]{8}.pth$", source)]
    assert len(hashed) >= 12
    assert None not in map(expected_sha256, hashed)  # one of them has decimal digits alone


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
    assert locate(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    Path("deit_small_patch16_224.fb_in1k").write_bytes(b"")
    assert locate("deit_small_patch16_224.fb_in1k") == Path("deit_small_patch16_224.fb_in1k")
    name = "deit_tiny_patch16_224.fb_in1k"
    model = dataclasses.replace(zoo.get(name), source=site.address)
    monkeypatch.setattr(zoo, "get", {name: model}.__getitem__)
    assert locate(name, SHA256).read_bytes() == CONTENT
    assert locate(site.address) == locate(name)


def test_zoo_name_goes_to_its_address(monkeypatch):
    monkeypatch.setattr(fetch, "download", lambda *args: args)
    address = "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth"
    assert locate("deit_small_patch16_224.fb_in1k", None, read_weights) == (address, None, read_weights)


def test_unknown_names():
    refuse(
        "deit_smal_patch16_224.fb_in1k: no such file.*nearest are deit_small_patch16_224.fb_in1k",
        locate,
        "deit_smal_patch16_224.fb_in1k",
    )
    told = refuse("no such file", locate, "deit3_small_patch16_224")  # an architecture: its weights are offered
    assert told.endswith("deit3_small_patch16_224.fb_in1k, deit3_small_patch16_224.fb_in22k_ft_in1k")
    refuse("^checkpoints/last.pth: no such file: check the path$", locate, "checkpoints/last.pth")
    refuse("no such file", locate, "")


# The hub: https://github.com/huggingface/huggingface_hub asks for /OWNER/NAME/resolve/REVISION/FILE alone.

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
    module = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    repositories, asked = {}, []
    endpoint = serve(Hub, repositories=repositories, asked=asked)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield FakeHub(repositories, asked, endpoint, tmp_path / "hf")
    module.close_session()


def test_hub(hub):
    hub.repositories["timm/vit"] = {"model.safetensors": b"weights", "config.json": CONFIG, "pytorch_model.bin": b"old"}
    path = locate("hf-hub:timm/vit")
    assert (path.name, path.read_bytes()) == ("model.safetensors", b"weights")
    assert (path.parent.name, path.is_relative_to(hub.home)) == (COMMITS["main"], True)
    assert sorted(os.listdir(path.parent)) == ["config.json", "model.safetensors"]
    assert weight_file(path.parent) == path
    gets = [file for method, file in hub.asked if method == "GET"]
    assert gets == ["config.json", "model.safetensors"]
    locate("hf-hub:timm/vit")
    assert [file for method, file in hub.asked if method == "GET"] == gets


def test_hub_revision(hub):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": b"w", "config.json": CONFIG, "preprocessor_config.json": b"{}"}
    path = locate("hf-hub:timm/vit@v1")
    assert (path.parent.name, path.read_bytes()) == (COMMITS["v1"], b"w1")
    assert sorted(os.listdir(path.parent)) == ["config.json", "preprocessor_config.json", "pytorch_model.bin"]
    assert locate(f"hf-hub:timm/vit@{COMMITS['v1']}") == path
    refuse("hf-hub:timm/vit@v2: the repository has no revision v2", locate, "hf-hub:timm/vit@v2")


def test_hub_files_of_one_commit(hub, monkeypatch):
    """A branch that moves on between two files."""
    hub.repositories["timm/vit"] = {"model.safetensors": b"w", "config.json": CONFIG}
    answer = Hub.answer

    def move(self, *args):
        answer(self, *args)
        if self.command == "GET":
            monkeypatch.setitem(COMMITS, "main", COMMITS["v1"])

    monkeypatch.setitem(COMMITS, "first", COMMITS["main"])
    monkeypatch.setattr(Hub, "answer", move)
    path = locate("hf-hub:timm/vit")
    assert (path.parent.name, path.read_bytes()) == ("a" * 40, b"w")


def test_hub_zoo_name(hub, monkeypatch):
    name = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    hub.repositories[f"timm/{name}"] = {"model.safetensors": b"w"}
    assert locate(name).read_bytes() == b"w"


def test_hub_offline(hub, monkeypatch):
    hub.repositories["timm/vit"] = {"pytorch_model.bin": b"weights", "config.json": CONFIG}
    online = locate("hf-hub:timm/vit")
    count = len(hub.asked)
    environment = os.environ | {"HF_HOME": str(hub.home), "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    code = "from fcvit_jax.convert.fetch import locate; print(locate('hf-hub:timm/vit'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(online)
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    assert locate("hf-hub:timm/vit") == online
    refuse("hf-hub:timm/other: the cache lacks its weights, and HF_HUB_OFFLINE is set", locate, "hf-hub:timm/other")
    assert len(hub.asked) == count


def test_hub_unreachable(hub, monkeypatch):
    hub.repositories["timm/vit"] = {"model.safetensors": b"weights"}
    online = locate("hf-hub:timm/vit")
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/{revision}/{filename}")
    assert locate("hf-hub:timm/vit") == online
    waits.clear()
    refuse("the cache lacks its weights, and the hub cannot be reached", locate, "hf-hub:timm/other")
    assert len(waits) <= 5  # waited for once, not for every file


def test_hub_shards(hub):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode(), "model-1.safetensors": b"1"}
    hub.repositories["timm/vit"] = files
    refuse("names 'model-2.safetensors', which is not there", locate, "hf-hub:timm/vit")
    files["model-2.safetensors"] = b"2"
    path = locate("hf-hub:timm/vit")
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
        "hf-hub:timm/vit: its pytorch_model.bin.index.json: (is damaged|names .* no plain file name)",
        locate,
        "hf-hub:timm/vit",
    )


def test_hub_shard_offline(hub, monkeypatch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors"}}).encode()
    hub.repositories["timm/vit"] = {"model.safetensors.index.json": index}
    refuse("not there", locate, "hf-hub:timm/vit")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuse("the cache lacks 'model-1.safetensors', and HF_HUB_OFFLINE is set", locate, "hf-hub:timm/vit")


def test_hub_refusals(hub):
    hub.repositories.update({"timm/gated": "gated", "timm/empty": {"config.json": CONFIG, "model.gguf": b""}})
    for source, told in {
        "hf-hub:timm/absent": "no such repository, or a private one: check it, or run `hf auth login`",
        "hf-hub:timm/gated": "is gated: ask for access",
        "hf-hub:timm/empty": "the repository has none of model.safetensors, ",
        "hf-hub:timm": "not of the form hf-hub:OWNER/NAME",
        "hf-hub:timm/a/b": "not of the form",
        "hf-hub:timm/a--b": "is no name of a repository",
    }.items():
        assert refuse(told, locate, source).startswith(f"{source}: ")


def test_hub_disk_full(hub, monkeypatch):
    module = pytest.importorskip("huggingface_hub")
    error = OSError(28, "No space left\non device")
    monkeypatch.setattr(module, "hf_hub_download", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    refuse("the hub cannot be used .*No space left", locate, "hf-hub:timm/vit")


def test_hub_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuse(
        r"hf-hub:timm/vit: needs the package huggingface_hub: pip install 'fcvit-jax\[hub\]'", locate, "hf-hub:timm/vit"
    )
