import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError
from states import refusal, torch_bytes, write

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz complex128 complex64 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- safetensors


def test_safetensors_by_hand(tmp_path):
    data = np.arange(6, dtype="<f4").tobytes() + np.array([1, -2], "<i8").tobytes() + b"\x80\x3f\x00\xc0" + b"\x07"
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "n": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [40, 44]},
        "s": {"dtype": "U8", "shape": [], "data_offsets": [44, 45]},
        "e": {"dtype": "F16", "shape": [0, 4], "data_offsets": [45, 45]},
    }
    read = read_weights(write(tmp_path / "no_suffix", safetensors_bytes(header, data)))
    assert (read.format, read.wrapper, read.skipped) == ("safetensors", None, ())
    assert list(read.arrays) == ["w", "n", "b", "s", "e"]
    assert read.arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read.arrays["n"].tolist() == [1, -2]
    assert read.arrays["b"].dtype == ml_dtypes.bfloat16
    assert read.arrays["b"].astype(np.float32).tolist() == [1, -2]
    assert (read.arrays["s"].shape, int(read.arrays["s"])) == ((), 7)
    assert (read.arrays["e"].shape, read.arrays["e"].dtype) == ((0, 4), np.float16)


def test_safetensors_agrees_with_its_library(tmp_path, torch):
    library = pytest.importorskip("safetensors.torch")
    names = [name for name in DTYPES.split() if name != "complex128" and "fnuz" not in name]
    values = torch.tensor([[0.0, 1.0, 1.5], [2.0, 3.0, 96.0]])
    tree = {name: values.to(getattr(torch, name)) for name in names}
    library.save_file(tree, tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors")
    assert sorted(read.arrays) == sorted(names)
    for name, array in read.arrays.items():
        assert array.dtype == np.dtype(getattr(ml_dtypes, name, name))
        assert array.tobytes() == torch_bytes(torch, tree[name]), name
    assert read.arrays["bfloat16"].astype(np.float32).tolist() == values.tolist()


def entry(**changes) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


WHOLE = entry(shape=[1000], data_offsets=[0, 4000])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors_bytes(entry(data_offsets=[0, 80], shape=[20]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[8, 0]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[-8, 0]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[0, 2**70]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(shape=[2**40]), bytes(8)), "'w' has 8 bytes for shape"),
        (safetensors_bytes(entry(shape=[-1, -2]), bytes(8)), "'w' has 8 bytes for shape"),
        (safetensors_bytes(entry(shape=[True, 2]), bytes(8)), "'w' has 8 bytes for shape"),
        (safetensors_bytes(entry(shape=[1] * 99 + [2]), bytes(8)), "'w' has 8 bytes for shape"),
        (safetensors_bytes(dict.fromkeys("abcdefgh", WHOLE["w"]), bytes(4000)), "unpacks to 32000 bytes from 4"),
        (safetensors_bytes({"a\x1b[2J": entry()["w"]}, bytes(8)), "a tensor is called 'a"),
        (safetensors_bytes(entry(dtype="F4"), bytes(8)), "in dtype 'F4', which is not read"),
        (safetensors_bytes(entry(dtype=["F32"]), bytes(8)), "is damaged (TypeError"),
        (safetensors_bytes({"w": 1}), "is damaged (TypeError"),
        (safetensors_bytes({"w": {}}), "is damaged (KeyError"),
        (safetensors_bytes([1]), "its header is not an object"),
        (safetensors_bytes(b"\xff\xfe{}"), "is damaged (UnicodeDecodeError"),
        (safetensors_bytes(b"{" * 100), "is damaged (JSONDecodeError"),
        (safetensors_bytes(b'{"w":' + b"[" * 200_000), "is damaged (RecursionError"),
        (safetensors_bytes({}), "holds no tensors"),
        (struct.pack("<Q", 2**63) + b'{"w":1}', "a header of 9223372036854775808 bytes in a file of 15"),
        (struct.pack("<Q", 99) + b'{"w":1}', "a header of 99 bytes in a file of 15"),
        (b"\x05\0\0", "a header of 5 bytes in a file of 3"),
        (safetensors_bytes(entry(), bytes(7)), "'w' lies outside the file"),
    ],
)
def test_lying_safetensors(tmp_path, content, message):
    assert message in refusal(write(tmp_path / "w.safetensors", content))


def named(*names: str) -> bytes:
    """Make a safetensors file with tensors of these names, each of one number: its place."""
    header = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [place, place + 1]} for place, name in enumerate(names)
    }
    return safetensors_bytes(header, bytes(range(len(names))))


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        ("_orig_mod.a _orig_mod.b", "a b"),
        ("blocks.0._orig_mod.a blocks.1.a", "blocks.0.a blocks.1.a"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.a", "blocks.0.a"),
        ("module.blocks.0.module.a", "module.blocks.0.a"),
        ("a._orig_mod.b a.b", "a._orig_mod.b a.b"),  # two versions of one tensor
        ("my_orig_mod.a submodule.b", "my_orig_mod.a submodule.b"),
    ],
)
def test_additions_of_wrappers_to_names_are_removed(tmp_path, names, plain):
    read = read_weights(write(tmp_path / "w.safetensors", named(*names.split())))
    assert list(read.arrays) == plain.split()
    assert [int(array[0]) for array in read.arrays.values()] == [*range(len(names.split()))]


def test_other_formats_hold_no_averaged_weights(tmp_path):
    path = write(tmp_path / "w.safetensors", named("a", "b"))
    assert refusal(path, ema=True) == "holds no averaged weights; its entries are a, b: leave ema out"
    np.savez(tmp_path / "w.npz", a=np.ones(2))
    assert refusal(tmp_path / "w.npz", ema=True) == "holds no averaged weights; its entries are a: leave ema out"


# --- several files


def index_of(places: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 9}, "weight_map": places}).encode()


@pytest.fixture
def sharded(tmp_path) -> Path:
    write(tmp_path / "model-1.safetensors", named("model.a", "model.b"))
    write(tmp_path / "model-2.safetensors", named("model.c", "model.d", "model.e"))
    places = {f"model.{name}": f"model-{'12'[name > 'b']}.safetensors" for name in "abcde"}
    return write(tmp_path / "model.safetensors.index.json", index_of(places))


def test_shards_are_joined(sharded):
    read = read_weights(sharded)
    assert (read.format, read.wrapper, read.skipped) == ("safetensors, 2 shards", None, ())
    places = {f"model.{name}": place for name, place in dict(a=0, b=1, c=0, d=1, e=2).items()}
    assert {name: int(array[0]) for name, array in read.arrays.items()} == places
    files = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    assert list(read.files) == files
    for name in files:
        assert read.files[name] == hashlib.sha256((sharded.parent / name).read_bytes()).hexdigest()
    assert "holds no averaged weights; its entries are model.a, model.b" in refusal(sharded, ema=True)


def test_shards_of_torch_and_the_library_agree(tmp_path, torch):
    torch.save({"backbone.a": torch.ones(2)}, tmp_path / "pytorch_model-1.bin")
    torch.save({"head.mlp.0.bias": torch.ones(2)}, tmp_path / "pytorch_model-2.bin")
    places = {"backbone.a": "pytorch_model-1.bin", "head.mlp.0.bias": "pytorch_model-2.bin"}
    read = read_weights(write(tmp_path / "pytorch_model.bin.index.json", index_of(places)))
    assert (read.format, read.wrapper, read.skipped) == ("torch zip, 2 shards", None, ())
    assert list(read.arrays) == ["backbone.a", "head.mlp.0.bias"]
    one = write(tmp_path / "one.index.json", index_of({"backbone.a": "pytorch_model-1.bin"}))
    assert read_weights(one).format == "torch zip, 1 shard"


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "../x.safetensors"}, "names the shard '../x.safetensors', which is not a plain file name"),
        ({"a": "/etc/passwd"}, "which is not a plain file name"),
        ({"a": "sub/x"}, "which is not a plain file name"),
        ({"a": "sub\\x"}, "which is not a plain file name"),
        ({"a": "C:x"}, "which is not a plain file name"),
        ({"a": ".."}, "which is not a plain file name"),
        ({"a": "."}, "which is not a plain file name"),
        ({"a": ""}, "which is not a plain file name"),
        ({"a": 1}, "which is not a plain file name"),
        ({"a": None}, "which is not a plain file name"),
        ({"a": "x.index.json"}, "needs the shard 'x.index.json', which is an index itself"),
        ({"a": "sub"}, "needs the shard 'sub', which is a directory"),
        ({"a": "x\0"}, "needs the shard 'x?x00' beside it"),
        ({"a": "1", "b": "2", "c": "s"}, "needs the shard '1' beside it (2 of 3 are missing): download it too"),
        ({"a": "s"}, "needs the shard 's', which also holds 'b', against the index"),
        ({"a": "s", "b": "s", "c": "s"}, "needs the shard 's', which lacks 'c', against the index"),
        ({"a": "s", "b": "t"}, "needs the shard 's', which also holds 'b', against the index"),
        ({"a": "page"}, "needs the shard 'page', which starts like HTML: this is a web page"),
        ({"a": "cut"}, "needs the shard 'cut', which is damaged"),
        ({}, "is damaged (its weight_map names no tensors)"),
        ([], "is damaged (its weight_map names no tensors)"),
    ],
)
def test_lying_indexes(tmp_path, places, message):
    write(tmp_path / "s", named("a", "b"))
    write(tmp_path / "t", named("b"))
    write(tmp_path / "page", b"<html>")
    write(tmp_path / "cut", named("a", "b")[:-1])
    (tmp_path / "sub").mkdir()
    said = refusal(write(tmp_path / "x.index.json", index_of(places)))
    assert message.replace("x?x00", "x\\x00") in said


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"weight_map": {"a": "b"', b'{"weight_map": ' + b"[" * 99_999])
def test_damaged_indexes(tmp_path, content):
    assert refusal(write(tmp_path / "x.index.json", content)).startswith("is damaged (")


# --- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_every_dtype(tmp_path, save):
    values = np.arange(24.0).reshape(2, 3, 4) / 2
    dtypes = [*(name for name in DTYPES.split() if "float8" not in name), ">f4", ">i2", ">f8", ">c8"]
    arrays = {f"Transformer/block/{dtype}": values.astype(getattr(ml_dtypes, dtype, dtype)) for dtype in dtypes}
    arrays |= {
        "scalar": np.float32(3.5),
        "empty": np.empty((0, 7), np.float16),
        "fortran": np.asfortranarray(values.astype(np.float32)),
        "fortran big": np.asfortranarray(values.astype(">f8")),
        "fortran bf16": np.asfortranarray(values.astype(ml_dtypes.bfloat16)),
        "large": np.random.default_rng(0).random((300, 500)),
    }
    save(tmp_path / "w.npz", **arrays)
    read = read_weights(tmp_path / "w.npz")
    assert (read.format, read.wrapper, read.skipped) == ("npz", None, ())
    assert list(read.arrays) == list(arrays)
    for name, array in read.arrays.items():
        assert array.dtype == arrays[name].dtype.newbyteorder("=")
        assert array.dtype.isnative
        assert array.shape == arrays[name].shape
        assert array.tolist() == arrays[name].tolist(), name
    assert read.arrays["Transformer/block/bfloat16"].dtype == ml_dtypes.bfloat16
    assert read.arrays["fortran"].flags.f_contiguous


def npy(values: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, version)
    return buffer.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + data


def described(data: bytes = bytes(8), **changes: str) -> bytes:
    fields = {"descr": "'<f4'", "fortran_order": "False", "shape": "(2,)"} | changes
    return header("{" + ", ".join(f"{key!r}: {value}" for key, value in fields.items()) + "}\n", data)


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return buffer.getvalue()


def test_npz_by_hand(tmp_path):
    python2 = described(shape="(2L,)")
    content = zip_of(a__npy=npy(np.ones(3), (2, 0)), b__npy=described(), readme__txt=b"text", old__npy=python2)
    read = read_weights(write(tmp_path / "x.bin", content))
    assert {name: array.tolist() for name, array in read.arrays.items()} == {"a": [1, 1, 1], "b": [0, 0], "old": [0, 0]}
    assert read.skipped == ("readme.txt",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array([print], object)), "has pickled objects in 'w.npy', which are not read"),
        (described(descr="'|O'"), "has pickled objects in 'w.npy'"),
        (described(descr="[('a', '|O')]"), "has pickled objects in 'w.npy'"),
        (described(descr="[('a', '<f4')]"), "in dtype [('a', '<f4')], which is not read"),
        (described(descr="'<U1'"), "in dtype <U1, which is not read"),
        (described(descr="'<M8[s]'"), "which is not read"),
        (described(descr="'|V1'"), "in dtype |V1, which is not read"),
        (described(descr="'(2,)u1'"), "which is not read"),
        (described(descr="'<f16'"), "which is not read"),
        (described(descr="'<f1'"), "is damaged (ValueError"),
        (described(shape="(3,)"), "'w.npy' has 8 bytes for shape (3,)"),
        (described(shape="(1,)"), "'w.npy' has 8 bytes for shape (1,)"),
        (described(shape="(2**60,)"), "is damaged (ValueError"),
        (described(shape="(1000000000000000000000,)"), "'w.npy' has 8 bytes for shape"),
        (described(shape="(-1, -2)"), "'w.npy' has 8 bytes for shape"),
        (described(shape="(True, 2)"), "'w.npy' has 8 bytes for shape"),
        (described(shape="(2,) + (1,) * 99"), "is damaged (ValueError"),
        (described(shape=str((2, *[1] * 99))), "'w.npy' has 8 bytes for shape"),
        (described(shape="2"), "is damaged (ValueError"),
        (described(fortran_order="1"), "is damaged (ValueError"),
        (described(more="1"), "is damaged (ValueError"),
        (header("(" * 9000), "is damaged"),
        (header(" " * 20_000), "is damaged (ValueError"),
        (header("{}")[:-1], "is damaged (ValueError"),
        (b"\x93NUMPY\3\0" + described()[8:], "has 'w.npy' in version (3, 0)"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff", "is damaged (ValueError"),
        (b"\x93NUMPX" + described()[6:], "is damaged (ValueError"),
        (b"", "is damaged (ValueError"),
    ],
)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_lying_npz(tmp_path, content, message, compression):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("w.npy", content)
        archive.writestr("filler", bytes(range(256)) * 99, zipfile.ZIP_STORED)  # not a bomb
    assert message in refusal(write(tmp_path / "x.npz", buffer.getvalue()))


def test_npz_bombs(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros(1_000_000))
    assert refusal(tmp_path / "a.npz").startswith("unpacks to 8000128 bytes from 7")
    # The directory and the header state little data, but the stream does not end.
    np.savez_compressed(tmp_path / "b.npz", w=np.zeros(30_000_000, np.uint8))
    content = (tmp_path / "b.npz").read_bytes()
    place = content.rindex(b"PK\x01\x02") + 24
    assert struct.unpack("<I", content[place : place + 4]) == (30_000_128,)
    tracemalloc.start()
    try:
        said = refusal(write(tmp_path / "b.npz", content[:place] + struct.pack("<I", 4096) + content[place + 4 :]))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert said.startswith("is damaged (BadZipFile: Bad CRC-32")


def test_npz_members_twice_and_packed_otherwise(tmp_path):
    twice = zip_of(w__npy=described(), v__npy=described()).replace(b"v.npy", b"w.npy")
    assert "it has two members 'w.npy'" in refusal(write(tmp_path / "a.npz", twice))
    with zipfile.ZipFile(tmp_path / "b.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("w.npy", described())
    assert "has 'w.npy' packed otherwise than by deflate" in refusal(tmp_path / "b.npz")
    assert refusal(write(tmp_path / "c.npz", zip_of(readme=b"x" * 99))).startswith("is a zip archive that torch.save")


def test_stored_npz_is_mapped_where_it_is_aligned(tmp_path):
    np.savez(tmp_path / "w.npz", bytes=np.zeros(1_000_000, np.uint8), one=np.float64(1))
    tracemalloc.start()
    try:
        arrays = read_weights(tmp_path / "w.npz").arrays
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert not arrays["bytes"].flags.writeable
    assert arrays["one"] == 1


# --- everything else


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights"), io.BytesIO())
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 346284714\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pth", b"", "is empty: download it again"),
        (
            "x.pth",
            b"\n <!DOCTYPE html><html>Not found</html>",
            "this is a web page, not a checkpoint: the download failed",
        ),
        ("x.safetensors", b"<html><body>404", "this is a web page, not a checkpoint"),
        ("x.pth", LFS, "is a Git LFS pointer of 346284714 bytes, not the weights: run `git lfs pull`"),
        ("x.npy", b"\x93NUMPY\x01\0", "is a file of .npy kind, which is not read"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(8), "is a file of HDF5 kind, which is not read"),
        ("x.onnx", b"\x08\x08\x12\x07pytorch", "is a file of .onnx kind, which is not read"),
        ("x.msgpack", b"\x81\xa6params\x80", "is a file of .msgpack kind, which is not read"),
        ("x.pth.gz", gzip.compress(b"weights", mtime=0), "is packed by gzip, which is not read: unpack it first"),
        ("x.pth.tar", tar(), "is a tar archive, which is not read: unpack it first"),
        ("x.zip", zip_of(readme=b"text"), "is a zip archive that torch.save did not write"),
        ("x.pt", zip_of(data__pkl=b"."), "is a zip archive that torch.save did not write"),
        ("config.json", b'{"hidden_size": 768}', "is neither a safetensors, a torch.save nor an .npz file"),
        ("x.pth", b"hello", "is neither a safetensors, a torch.save nor an .npz file"),
        ("x.pkl", pickle.dumps({"w": [1.0]}), "is a pickle that torch.save did not write"),
        ("x.pth", b"PK\x03\x04", "is damaged (BadZipFile"),
        ("x.pth", b"\x80", "is damaged (IndexError"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path / name, content))


def test_paths_that_are_no_files(tmp_path):
    assert refusal(tmp_path / "absent.pth") == "does not exist: check the path"
    assert refusal(tmp_path) == "is a directory: name the weight file inside it"
    assert refusal(Path(os.devnull)).startswith("is not a regular file")
    with pytest.raises(InputError, match=r"cannot be read .File name too long"):
        read_weights(tmp_path / ("x" * 5000))


def test_messages_show_no_control_characters_of_the_file(tmp_path):
    name = "x\x1b[31m\nerror: all is well"
    refusal(write(tmp_path / "w.safetensors", safetensors_bytes({name: entry(shape=[3])["w"]}, bytes(8))))
    program = b"\x80\x04\x8c\x05\x1b[2Jo\x8c\x03x\ny\x93."
    named = b"\x80\x02}X\x01\x00\x00\x00a" + program[2:-1] + b"s."
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", named)
    assert refusal(tmp_path / "w.pth").startswith("holds no tensors but a ?[2Jo.x?y, which was not")
