import argparse
import collections
import copyreg
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError

ZIP_AND_LEGACY = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz complex128 complex64 "
    "int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def save(torch, tree, path: Path, new: bool = True) -> Path:
    torch.save(tree, path, _use_new_zipfile_serialization=new)
    return path


def torch_bytes(torch, tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(path: Path) -> str:
    """The one line with which a file is refused, less the path that it must begin with."""
    with pytest.raises(InputError) as caught:
        read_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert message.isprintable()
    return message.removeprefix(f"{path} ")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- torch: values


@ZIP_AND_LEGACY
def test_every_dtype_agrees_with_torch(tmp_path, torch, new):
    values = torch.tensor([[0.0, 1.0, -1.5], [2.0, 3.0, 96.0]])
    tree = {name: values.abs().to(getattr(torch, name)) for name in DTYPES.split()}
    read = read_weights(save(torch, tree, tmp_path / "w.pth", new))
    assert list(read.arrays) == DTYPES.split()
    for name, array in read.arrays.items():
        assert array.dtype == np.dtype(getattr(ml_dtypes, name, name))
        assert array.shape == (2, 3)
        assert array.tobytes() == torch_bytes(torch, tree[name]), name
    assert read.arrays["bfloat16"].astype(np.float32)[1].tolist() == [2.0, 3.0, 96.0]
    assert (read.format, read.wrapper, read.skipped) == ("torch zip" if new else "torch legacy", None, ())
    assert read.sha256 == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()


@ZIP_AND_LEGACY
def test_views_share_and_keep_their_strides(tmp_path, torch, new):
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "base": base,
        "transposed": base.t(),
        "strided": base[1::2, 1::3],
        "late": base.reshape(-1)[20:],
        "scalar": torch.tensor(7, dtype=torch.int32),
        "element": base[2, 3],
        "empty": torch.empty(0, 3),
        "empty view": base[4:],
        "odd strides": base.reshape(-1).as_strided((1, 4), (999, 6)),
        "parameter": torch.nn.Parameter(base[0]),
        "bf16 transposed": base.bfloat16().t(),
    }
    arrays = read_weights(save(torch, tree, tmp_path / "w.pth", new)).arrays
    assert arrays.keys() == tree.keys()
    for name, tensor in tree.items():
        assert arrays[name].shape == tuple(tensor.shape), name
        assert arrays[name].astype(np.float64).tolist() == tensor.detach().double().tolist(), name
    assert np.shares_memory(arrays["base"], arrays["transposed"])
    assert np.shares_memory(arrays["base"], arrays["late"])
    assert arrays["scalar"].shape == ()


@ZIP_AND_LEGACY
def test_expanded_tensors_are_bounded_by_their_storage(tmp_path, torch, new):
    kept = {"position_ids": torch.arange(5).expand(1, -1)}
    assert read_weights(save(torch, kept, tmp_path / "a.pth", new)).arrays["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    wild = save(torch, {"wild": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "b.pth", new)
    assert "'wild' expanded" in refusal(wild)


def test_negated_view_is_refused_not_misread(tmp_path, torch):
    imaginary = torch.tensor([1 + 2j]).conj().imag
    assert "resolve_neg" in refusal(save(torch, {"x": imaginary}, tmp_path / "x.pth"))


def test_big_endian_zip(tmp_path, torch):
    values = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.0, -2.0]).bfloat16()}
    source = zipfile.ZipFile(save(torch, values, tmp_path / "little.pth"))
    with source, zipfile.ZipFile(tmp_path / "big.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("byteorder"):
                content = b"big"
            elif name.endswith("data/0"):
                content = np.frombuffer(content, "<f4").astype(">f4").tobytes()
            elif name.endswith("data/1"):
                content = np.frombuffer(content, "<u2").astype(">u2").tobytes()
            target.writestr(name, content)
    arrays = read_weights(tmp_path / "big.pth").arrays
    assert arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["b"].astype(np.float32).tolist() == [1, -2]


# --- torch: what stands around the tensors


@ZIP_AND_LEGACY
def test_training_checkpoint_is_unwrapped(tmp_path, torch, new):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    tree = {
        "model_ema": collections.OrderedDict(weight=torch.full((3, 2), 9.0)),
        "model": model.state_dict() | {"note": "text"},
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": torch.tensor(81.5),
        "args": argparse.Namespace(
            lr=1e-3, out=pathlib.PurePosixPath("a/b"), score=np.float64(0.5), kind=np.dtype("f4")
        ),
        "meters": collections.defaultdict(list, a=[1]),
        "seen": collections.Counter("ab"),
        "classes": {1, 2},
        "dtype": torch.float16,
        "shape": torch.Size([3]),
    }
    read = read_weights(save(torch, tree, tmp_path / "w.pth", new))
    assert read.wrapper == "model"
    assert read.arrays["weight"].tolist() == model.weight.tolist()
    assert list(read.arrays) == ["weight", "bias"]
    assert read.skipped == (*(key for key in tree if key != "model"), "note")


@pytest.mark.parametrize(
    ("tree", "wrapper", "names"),
    [
        ({"state_dict": {"module.a": 1, "module.b": 2}}, "state_dict, module.", ["a", "b"]),
        ({"module._orig_mod.a": 1, "module._orig_mod.b": 2}, "module._orig_mod.", ["a", "b"]),
        ({"module.a": 1, "b": 2}, None, ["module.a", "b"]),
        ({"student": {"backbone.a": 1}, "teacher": {"backbone.z": 2}}, "teacher, backbone.", ["z"]),
        ({"state_dict_ema": {"a": 1}, "state_dict": {"b": 2}}, "state_dict", ["b"]),
        ({"state_dict_ema": {"a": 1}, "state_dict": {}}, "state_dict_ema", ["a"]),
        ({"model": {"a": 1}, "a": 5}, "model", ["a"]),
    ],
)
def test_wrappers_and_prefixes(tmp_path, torch, tree, wrapper, names):
    def fill(node):
        return {key: fill(leaf) if isinstance(leaf, dict) else torch.tensor(leaf) for key, leaf in node.items()}

    read = read_weights(save(torch, fill(tree), tmp_path / "w.pth"))
    assert (read.wrapper, list(read.arrays)) == (wrapper, names)
    if names == ["a"] and wrapper == "model":
        assert read.arrays["a"] == 1
        assert read.skipped == ("a",)


@ZIP_AND_LEGACY
def test_files_without_named_tensors(tmp_path, torch, new):
    assert refusal(save(torch, torch.ones(2), tmp_path / "a.pth", new)).startswith("holds a tensor without a name")
    assert refusal(save(torch, [torch.ones(2)], tmp_path / "b.pth", new)).startswith("holds a list, not a dictionary")
    assert refusal(save(torch, {"epoch": 1}, tmp_path / "c.pth", new)).startswith("holds no tensors")


# --- torch: what must not run


class Evil:
    """Unpickles by running a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_payload_is_not_executed(tmp_path, torch, kind):
    mark = tmp_path / "mark"
    tree = {"weight": torch.ones(2), "evil": Evil(f"touch {mark}")}
    path = tmp_path / "x.pth"
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"evil": tree["evil"]}, protocol=int(kind[-1])))
    else:
        save(torch, tree, path, new=kind == "zip")
    message = refusal(path)
    assert message.startswith(f"refers to {os.system.__module__}.system, which is not tensor data: it was not executed")
    assert not mark.exists()
    pickle.loads(pickle.dumps(tree["evil"]))  # the payload does run where nothing holds it back
    assert mark.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cposix\nsystem\n(Utouch MARK\n.",
        b"\x80\x02(S'touch MARK'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85\x81.",  # NEWOBJ
        b"\x80\x02cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x02ctorch._utils\n__builtins__\n.",
        b"\x80\x02ctorch\nFloatStorage\n(S'x'\ntR.",  # a storage is no callable
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n(tR.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02(lp0\nh\x00h\x00a.",
        b"\x80\x02q\x00.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINBYTES8 of 8 EiB
        b"\x80\x02}(I1\nI2\nu.",
        b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
    ],
)
def test_pickle_programs_are_refused(tmp_path, program):
    refusal(write(tmp_path / "x.pth", program.replace(b"MARK", bytes(tmp_path / "mark"))))
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pth"]


def test_build_cannot_change_the_reader(tmp_path, torch):
    """BUILD would set attributes of any object on the stack: here the defaults of the function that makes tensors."""
    path = save(torch, {"w": torch.ones(2)}, tmp_path / "w.pth")
    attack = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}(X\x0c\x00\x00\x00__defaults__(I1\nI1\nI1\ntu\x86b."
    refusal(
        rewrite_zip(path, tmp_path / "x.pth", lambda name, content: attack if name.endswith("data.pkl") else content)
    )
    assert read_weights(path).arrays["w"].tolist() == [1, 1]


def test_extension_codes_reach_no_function(tmp_path):
    """Once another unpickler has met an extension code, its function is cached and no longer asked for by name."""
    mark = tmp_path / "mark"
    command = f"touch {mark}".encode()
    program = b"\x80\x02\x82\xf0(X" + struct.pack("<I", len(command)) + command + b"tR."
    copyreg.add_extension(os.system.__module__, "system", 0xF0)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf0.") is os.system
        refusal(write(tmp_path / "x.pth", program))
        assert not mark.exists()
    finally:
        copyreg.remove_extension(os.system.__module__, "system", 0xF0)


def test_pickled_module_is_refused_by_name(tmp_path, torch):
    message = refusal(save(torch, torch.nn.Linear(2, 2), tmp_path / "net.pt"))
    assert message.startswith("refers to torch.nn.modules.linear.Linear, which is not tensor data")
    assert message.endswith("save the model's state_dict alone")


# --- torch: lying archives


def rewrite_zip(source: Path, target: Path, change, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "'w' reaches past the end of its storage"),  # size (2, 4)
        (b"K\x03K\x01\x86", b"K\x09K\x01\x86", "'w' reaches past the end of its storage"),  # stride (9, 1)
        (b"K\x03K\x01\x86", b"K\x00K\x00\x86", None),  # stride 0, no more elements than stored
        (b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86", "'w' does not fit its storage"),  # stride -1
        (b"K\x03K\x01\x86", b"K\x03K\x01K\x01\x87", "'w' does not fit its storage"),
        (b"K\x02K\x03\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\x00\x86", "'w' does not fit its storage"),
        (b"K\x02K\x03\x86", b"\x8a\x08" + b"\0" * 7 + b"\x10K\x03\x86", "'w' reaches past"),
        (b"K\x06t", b"\x8a\x06" + b"\0" * 5 + b"\x10t", "'w' does not fit its storage"),  # numel of the storage
        (b"K\x06t", b"J\xff\xff\xff\xfft", "is damaged (ValueError"),
    ],
)
def test_lying_sizes(tmp_path, torch, old, new, message):
    path = save(torch, {"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "w.pth")

    def change(name, content):
        assert not name.endswith("data.pkl") or content.count(old) == 1
        return content.replace(old, new) if name.endswith("data.pkl") else content

    path = rewrite_zip(path, tmp_path / "x.pth", change)
    if message is None:
        assert read_weights(path).arrays["w"].tolist() == [[0, 0, 0], [0, 0, 0]]
    else:
        assert message in refusal(path)


def test_compressed_and_missing_members(tmp_path, torch):
    path = save(torch, {"w": torch.zeros(10_000)}, tmp_path / "w.pth")
    same = lambda name, content: content  # noqa: E731
    assert "compressed members" in refusal(rewrite_zip(path, tmp_path / "a.pth", same, zipfile.ZIP_DEFLATED))
    lacking = rewrite_zip(path, tmp_path / "b.pth", lambda name, content: None if "data/0" in name else content)
    assert refusal(lacking).startswith("is damaged (KeyError")
    short = rewrite_zip(
        path, tmp_path / "c.pth", lambda name, content: content[:39_996] if "data/0" in name else content
    )
    assert refusal(short).startswith("is damaged ('w' does not fit its storage")


def test_members_that_overlap_are_refused(tmp_path, torch):
    """A small file whose directory names the same bytes many times would unpack to any size."""
    content = save(torch, {"w": torch.zeros(1000)}, tmp_path / "w.pth").read_bytes()
    directory = content.rindex(b"PK\x01\x02", 0, content.rindex(b"data/0"))
    name_length, extra, comment = struct.unpack("<HHH", content[directory + 28 : directory + 34])
    entry = content[directory : directory + 46 + name_length + extra + comment]
    start = content.index(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entries = content[start : content.index(b"PK\x06\x06", start) if b"PK\x06\x06" in content[start:] else end]
    count = entries.count(b"PK\x01\x02") + 5
    many = entries + entry * 5
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(many), start, 0)
    message = refusal(write(tmp_path / "x.pth", content[:start] + many + tail))
    assert message == "is damaged (its members are larger than the file): download it again"


def test_legacy_cut_inside_its_tensors(tmp_path, torch):
    content = save(torch, {"w": torch.ones(100)}, tmp_path / "w.pth", new=False).read_bytes()
    for end in (-1, -399, -401):
        message = refusal(write(tmp_path / "x.pth", content[:end]))
        assert message == "is damaged (it ends inside its tensors): download it again"
    lying = content[:-408] + struct.pack("<Q", 99) + content[-400:]
    assert "it ends inside its tensors" in refusal(write(tmp_path / "y.pth", lying))


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
    assert all(array.flags.aligned for array in read.arrays.values())


def test_safetensors_agrees_with_its_library(tmp_path, torch):
    library = pytest.importorskip("safetensors.torch")
    names = [name for name in DTYPES.split() if name != "complex128" and "fnuz" not in name]
    values = torch.tensor([[0.0, 1.0, 1.5], [2.0, 3.0, 96.0]])
    tree = {f"module.{name}": values.to(getattr(torch, name)) for name in names}
    library.save_file(tree, tmp_path / "w.safetensors")
    read = read_weights(tmp_path / "w.safetensors")
    assert read.wrapper == "module."
    assert sorted(read.arrays) == sorted(names)
    for name, array in read.arrays.items():
        assert array.dtype == np.dtype(getattr(ml_dtypes, name, name))
        assert array.tobytes() == torch_bytes(torch, tree[f"module.{name}"]), name
    assert read.arrays["bfloat16"].astype(np.float32).tolist() == values.tolist()


def entry(**changes) -> dict:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors_bytes(entry(data_offsets=[0, 80], shape=[20]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[8, 0]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[-8, 0]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(data_offsets=[0, 2**70]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(shape=[2**40]), bytes(8)), "'w' has 8 bytes for shape"),
        (safetensors_bytes(entry(shape=[-1, -2]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(shape=[True, 2]), bytes(8)), "'w' lies outside the file"),
        (safetensors_bytes(entry(shape=[1] * 99 + [2]), bytes(8)), "is damaged (ValueError"),
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


# --- everything else


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def npz(save_arrays) -> bytes:
    buffer = io.BytesIO()
    save_arrays(buffer, w=np.ones(3))
    return buffer.getvalue()


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
        ("x.npz", npz(np.savez), "is a NumPy .npz file, which is not read yet"),
        ("x.npz", npz(np.savez_compressed), "is a NumPy .npz file, which is not read yet"),
        ("x.npy", b"\x93NUMPY\x01\0", "is a file of .npy kind, which is not read"),
        ("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(8), "is a file of HDF5 kind, which is not read"),
        ("x.onnx", b"\x08\x08\x12\x07pytorch", "is a file of .onnx kind, which is not read"),
        ("x.msgpack", b"\x81\xa6params\x80", "is a file of .msgpack kind, which is not read"),
        ("x.pth.gz", gzip.compress(b"weights"), "is packed by gzip, which is not read: unpack it first"),
        ("x.pth.tar", tar(), "is a tar archive, which is not read: unpack it first"),
        ("x.zip", zip_of(readme=b"text"), "is a zip archive that torch.save did not write"),
        ("x.pt", zip_of(net__data_pkl=b"."), "is a zip archive that torch.save did not write"),
        ("model.safetensors.index.json", b'{"metadata": {}}', "several shards, which are not read yet"),
        ("index.json", b'{"metadata": {}, "weight_map": {}}', "several shards, which are not read yet"),
        ("x.pth", b"hello", "is neither a safetensors nor a torch.save file"),
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


def test_torchscript_is_named(tmp_path):
    archive = {"net/data.pkl": b"\x80\x02}.", "net/constants.pkl": b"\x80\x02).", "net/code/__torch__.py": b""}
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as file:
        for name, content in archive.items():
            file.writestr(name, content)
    assert refusal(tmp_path / "net.pt").startswith("is a TorchScript archive: export its state_dict")


def test_messages_show_no_control_characters_of_the_file(tmp_path):
    name = "x\x1b[31m\nerror: all is well"
    refusal(write(tmp_path / "w.safetensors", safetensors_bytes({name: entry(shape=[3])["w"]}, bytes(8))))
    program = b"\x80\x04\x8c\x05\x1b[2Jo\x8c\x03x\ny\x93."
    assert refusal(write(tmp_path / "w.pth", program)).startswith("refers to ?[2Jo.x?y, which is not")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_never_escapes(tmp_path, torch, kind):
    """Changed bytes, cut ends and moved pieces of a real file are read, or refused in one line: nothing else."""
    rng = random.Random(kind)
    tree = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(3)}
    if kind == "safetensors":
        header = {"a": entry(shape=[2, 3], data_offsets=[0, 24])["w"], "b": entry(data_offsets=[24, 32])["w"]}
        content = safetensors_bytes(header, bytes(range(32)))
    else:
        content = save(torch, {"model": tree, "epoch": 1}, tmp_path / "w.pth", kind == "zip").read_bytes()
    # The interesting bytes are those that are not tensor data; in a zip most of the rest is padding.
    places = [i for i in range(len(content)) if content[max(0, i - 2) : i + 3].strip(b"\0FB")]
    path = tmp_path / "damaged.bin"
    messages = []
    for trial in range(300):
        damaged = bytearray(content)
        if trial % 3 == 0:
            del damaged[rng.randrange(1, len(damaged)) :]
        elif trial % 3 == 1:
            damaged[rng.choice(places)] = rng.randrange(256)
        else:
            for _ in range(rng.randrange(1, 9)):
                damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            arrays = read_weights(path).arrays
        except InputError as error:
            messages.append(str(error))
        else:
            assert sum(array.nbytes for array in arrays.values()) <= 4 * len(content)
            for array in arrays.values():
                array.tobytes()  # every element can be reached
    assert all(message.startswith(f"{path} ") and message.isprintable() for message in messages)
    assert 100 <= len(messages) < 300  # every cut, and some of the changes
