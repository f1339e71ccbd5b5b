"""Listings: every file once, nothing silently left out, and an index that any change to a folder invalidates."""

import os
import time
from pathlib import Path

import pytest

from fcvit_jax.data import listing
from fcvit_jax.data.listing import JUNK, Names, list_below, list_images
from fcvit_jax.data.sources import open_source
from fcvit_jax.errors import InputError


@pytest.fixture
def files(tmp_path):
    """Return a function that makes empty files below a folder, and returns the folder."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / name).touch()
        return tmp_path / "root"

    return make


def test_names_are_those_of_a_list():
    plain = ["a/1.png", "b/ü.png", os.fsdecode(b"caf\xe9/x.png"), ""]
    names = Names(b"".join(os.fsencode(name) + b"\0" for name in plain))
    assert [*names] == plain
    assert names[-1] == ""
    assert names[1:3] == plain[1:3]
    assert len(Names(b"")) == 0
    with pytest.raises(IndexError):
        names[4]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../b", "/"])
def test_a_link_that_leads_back_is_not_followed(files, target):
    root = files("a/1.png", "a/deep/2.png", "b/3.png")
    (root.parent / "beside.png").touch()
    (root / "a" / "deep" / "link").symlink_to(target)
    found = list_images(root)
    assert [*found.names] == ["a/1.png", "a/deep/2.png", "b/3.png"]
    assert found.not_followed == ("a/deep/link",)
    assert any("a/deep/link" in line for line in found.remarks)


def test_links_to_elsewhere_are_followed_once(files, tmp_path):
    root = files("a/1.png", "b/2.png")
    store = tmp_path / "store"
    for name in ("one/3.png", "one/in/4.png", "two/5.png"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).touch()
    (root / "c").symlink_to(store / "two")  # a class
    (root / "a" / "more").symlink_to(store / "one")
    (root / "b" / "again").symlink_to(store / "one" / "in")  # inside the folder of a
    (store / "one" / "back").symlink_to(root)
    (root / "b" / "6.png").symlink_to(store / "two" / "5.png")  # a file, under another name
    found = list_images(root)
    assert [*found.names] == ["a/1.png", "a/more/3.png", "a/more/in/4.png", "b/2.png", "b/6.png", "c/5.png"]
    assert found.counts == {"a": 3, "b": 2, "c": 1}
    assert found.not_followed == ("b/again", "a/more/back")


def test_a_class_may_have_another_name(files):
    root = files("a/1.png", "a/deep/2.png", "b/3.png")
    (root / "c").symlink_to("a")
    (root / "b" / "a").symlink_to("../a")
    (root / "all").symlink_to(".")
    found = list_images(root)
    assert [*found.names] == ["a/1.png", "a/deep/2.png", "b/3.png", "c/1.png", "c/deep/2.png"]
    assert found.not_followed == ("all", "b/a")


def test_a_link_to_a_hidden_folder_is_followed(files):
    """As in volumes of Kubernetes."""
    root = files("..2024/a/1.png", "b/2.png")
    (root / "..data").symlink_to("..2024")
    (root / "a").symlink_to("..data/a")
    assert [*list_images(root).names] == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize("junk", [*sorted(JUNK), "notes", "deep"])
def test_folders_without_an_image_are_no_classes(files, junk):
    root = files(
        "0/1.png", "10/2.png", "9/3.png", f"{junk}/._1.png", f"{junk}/x/readme.txt", ".ipynb_checkpoints/1.png"
    )
    found = list_images(root)
    assert found.counts == {"0": 1, "9": 1, "10": 1}  # numbers still, whatever the empty folder is called
    assert found.empty == (() if junk in JUNK else (junk,))
    assert any(junk in line for line in found.remarks)


def test_copies_that_systems_make_are_left_out_and_counted(files):
    root = files("a/1.jpg", "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg", "b/2.jpg", "b/@eaDir/2.jpg", "__MACOSX/a/1.jpg")
    found = list_images(root)
    assert [*found.names] == ["a/1.jpg", "b/2.jpg"]
    assert found.remarks == ("left out: 2 @eaDir folders, 1 __MACOSX folders",)


def test_files_that_are_left_out_are_counted_by_their_suffix(files):
    root = files("a/1.jfif", "a/2.ppm", "a/3.avif", "a/4.heic", "a/5.HEIC", "a/6.txt", "a/README", "b/7.jpg", "8.jpg")
    found = list_images(root)
    assert [*found.names] == ["a/1.jfif", "a/2.ppm", "a/3.avif", "b/7.jpg"]
    assert found.left_out == {".heic": 2, ".txt": 1, "without a suffix": 1, ".jpg beside the class folders": 1}
    assert found.remarks == ("left out: 2 .heic, 1 .jpg beside the class folders, 1 .txt, 1 without a suffix",)
    source = open_source(f"folder:{root}")
    assert source.remarks == tuple(f"folder:{root}: {line}" for line in found.remarks)


def test_a_folder_named_as_an_image_is_a_folder(files):
    root = files("a/x.png/1.png", "a/2.png")
    assert [*list_images(root).names] == ["a/2.png", "a/x.png/1.png"]
    assert [*list_below(root).names] == ["a/2.png", "a/x.png/1.png"]


def test_images_at_any_depth_without_classes(files):
    root = files("1.png", "a/2.png", "a/.hidden/3.png", "a/@eaDir/4.png")
    (root / "up").symlink_to("..")
    assert [*list_below(root).names] == ["1.png", "a/2.png"]


def test_a_folder_that_cannot_be_read_is_reported(files, monkeypatch):
    root, scandir = files("a/1.png", "b/2.png"), os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match="b/ cannot be read: Permission denied"):
        list_images(root)


# The index


@pytest.fixture
def indexed(files, tmp_path, monkeypatch):
    """A folder whose listing is kept, and a function that returns whether the next listing reads the folders again."""
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "INDEXED_FROM", 2)
    root = files("a/1.png", "a/deep/2.png", "b/3.png", "empty/x.txt", "c/@eaDir/4.png")
    (root / "b" / "up").symlink_to("..")
    time.sleep(0.12)  # a listing of folders that have just been changed is not kept
    first = list_images(root)
    scanned = []
    scan = listing._Scan.classes
    monkeypatch.setattr(listing._Scan, "classes", lambda self: scanned.append(self) or scan(self))

    def scans() -> bool:
        scanned.clear()
        found = list_images(root)
        again = _plain(list_images(root)) if scanned else _plain(found)
        assert _plain(found) == again
        return bool(scanned)

    assert not scans()
    assert _plain(list_images(root)) == _plain(first)
    return root, scans


def _plain(found):
    return [*found.names], found.counts, found.empty, found.left_out, found.not_followed


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "a" / "deep" / "5.png").touch(),
        lambda root: (root / "a" / "1.png").unlink(),
        lambda root: (root / "b" / "3.png").rename(root / "b" / "4.png"),
        lambda root: (root / "d").mkdir(),
        lambda root: (root / "empty" / "6.png").touch(),
        lambda root: (root / "a").rename(root / "z"),
    ],
)
def test_any_change_to_a_folder_is_seen(indexed, change):
    root, scans = indexed
    change(root)
    assert scans()
    time.sleep(0.12)
    list_images(root)
    assert not scans()


def test_another_folder_of_the_same_times_is_seen(indexed, tmp_path):
    root, scans = indexed
    before = os.stat(root / "b")
    (root / "b").rename(tmp_path / "aside")
    (root / "b").mkdir()
    for place, status in (("b", before), (".", os.stat(root))):
        os.utime(root / place, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scans()


def test_a_changed_file_changes_no_listing(indexed):
    root, scans = indexed
    (root / "a" / "1.png").write_bytes(b"other pixels")
    assert not scans()


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04", b"no index", None])
def test_a_damaged_index_is_written_again(indexed, tmp_path, damage):
    _, scans = indexed
    (index,) = (tmp_path / "cache" / "folders").iterdir()
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert scans()
    assert not scans()
    assert [path.name for path in index.parent.iterdir()] == [index.name]


def test_a_folder_that_has_just_changed_is_not_kept(files, tmp_path, monkeypatch):
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "INDEXED_FROM", 2)
    root = files("a/1.png", "b/2.png")
    os.utime(root / "a")
    list_images(root)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_ignored(files, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(listing, "INDEXED_FROM", 2)
    root = files("a/1.png", "b/2.png")
    time.sleep(0.12)
    assert len(list_images(root).names) == 2


def test_small_folders_are_not_indexed(files, tmp_path, monkeypatch):
    monkeypatch.setenv("FCVIT_JAX_CACHE", str(tmp_path / "cache"))
    list_images(files("a/1.png", "b/2.png"))
    assert not (tmp_path / "cache").exists()
