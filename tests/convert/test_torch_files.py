import argparse
import collections
import copyreg
import dataclasses
import datetime
import decimal
import enum
import functools
import hashlib
import os
import pathlib
import pickle
import re
import struct
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError
from states import refusal, torch_bytes, write

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


def fill(torch, tree: dict) -> dict:
    """Replace the numbers of a tree by tensors, except an epoch."""
    return {
        key: fill(torch, leaf)
        if isinstance(leaf, dict)
        else torch.tensor(leaf)
        if isinstance(leaf, int) and key != "epoch"
        else leaf
        for key, leaf in tree.items()
    }


# --- values


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
    assert read.files == {"w.pth": hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()}


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


# --- what stands around the tensors


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
        ({"module._orig_mod.a": 1, "module._orig_mod.b": 2}, None, ["module.a", "module.b"]),
        ({"student": {"backbone.a": 1}, "teacher": {"backbone.z": 2}}, "teacher", ["backbone.z"]),
        ({"state_dict_ema": {"a": 1}, "state_dict": {"b": 2}}, "state_dict", ["b"]),
        ({"state_dict_ema": {"a": 1}, "state_dict": {}}, "state_dict_ema", ["a"]),
        ({"model": {"a": 1}, "a": 5}, "model", ["a"]),
        ({"weights": {"a": 1, "b": 2}, "epoch": 3}, "weights", ["a", "b"]),
        ({"state": {"model": {"a": 1}}}, "state, model", ["a"]),
        ({"x": {"y": {"z": {"a": 1, "b": 2, "c": 3}}}, "scores": {"s": 1}, "loss": 2}, "x, y, z", ["a", "b", "c"]),
    ],
)
def test_wrappers_and_prefixes(tmp_path, torch, tree, wrapper, names):
    read = read_weights(save(torch, fill(torch, tree), tmp_path / "w.pth"))
    assert (read.wrapper, list(read.arrays)) == (wrapper, names)
    if names == ["a"] and wrapper == "model":
        assert read.arrays["a"] == 1
        assert read.skipped == ("a",)


LIVE_AND_AVERAGED = {
    "live first": ({"model_ema": {"e": 1}, "epoch": 3, "model": {"a": 2}}, "model", "a", "model_ema", "e"),
    "timm": ({"state_dict": {"a": 1}, "state_dict_ema": {"e": 2}}, "state_dict", "a", "state_dict_ema", "e"),
    "only averaged": ({"ema": {"e": 1}, "epoch": 3}, "ema", "e", "ema", "e"),
    "two deep": (
        {"state_dict": {"model": {"a": 1}, "ema": {"e": 2}}}, "state_dict, model", "a", "state_dict, ema", "e",
    ),
    "averaged deep": ({"model": {"ema": {"e": 1}}, "net": {"a": 2}}, "net", "a", "model, ema", "e"),
    "live inside averaged": ({"ema": {"module": {"e": 1}}, "module": {"a": 2}}, "module", "a", "ema, module", "e"),
    "names beside averaged": ({"a": 1, "model_ema": {"e": 2}}, None, "a", "model_ema", "e"),
    "DINO": ({"student": {"s": 1}, "teacher": {"a": 2}, "dino_loss": {"center": 3}}, "teacher", "a", "teacher", "a"),
    "I-JEPA": (
        {"encoder": {"module.a": 1}, "predictor": {"p": 2}, "target_encoder": {"module.e": 3}},
        "encoder", "module.a", "target_encoder", "module.e",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("tree", "live", "a", "averaged", "e"), LIVE_AND_AVERAGED.values(), ids=LIVE_AND_AVERAGED)
def test_live_and_averaged_weights(tmp_path, torch, tree, live, a, averaged, e):
    path = save(torch, fill(torch, tree), tmp_path / "w.pth")
    for ema, wrapper, name in ((False, live, a), (True, averaged, e)):
        read = read_weights(path, ema=ema)
        assert (read.wrapper, list(read.arrays)) == (wrapper, [name])
        walked = {key.rstrip(".") for key in (wrapper or "").split(", ")}
        assert set(tree) - walked - {name} <= set(read.skipped)  # everything left out is reported
        assert read.arrays[name].shape == ()


def test_the_sibling_of_a_nested_wrapper_is_reported(tmp_path, torch):
    tree = {"state_dict": {"model": {"a": 1, "note": "x"}, "model_ema": {"e": 2}}, "epoch": 5}
    path = save(torch, fill(torch, tree), tmp_path / "w.pth")
    assert read_weights(path).skipped == ("epoch", "model_ema", "note")
    assert read_weights(path, ema=True).skipped == ("epoch", "model")


def test_missing_averaged_weights(tmp_path, torch):
    path = save(torch, fill(torch, {"model": {"a": 1}, "optimizer": {}, "epoch": 3}), tmp_path / "a.pth")
    said = "holds no averaged weights; its entries are model, optimizer, epoch: leave ema out"
    assert refusal(path, ema=True) == said
    path = save(torch, {f"w{i}": torch.ones(2) for i in range(10)}, tmp_path / "b.pth")
    assert "its entries are w0, w1, w2, w3, w4, w5, w6, w7 and 2 more: leave ema out" in refusal(path, ema=True)


def test_wrappers_are_opened_four_deep(tmp_path, torch):
    tree = {"module": {"module": {"model": {"net": {"a": 1}}}}}
    assert read_weights(save(torch, fill(torch, tree), tmp_path / "a.pth")).wrapper == "module, module, model, net"
    assert refusal(save(torch, fill(torch, {"model": tree}), tmp_path / "b.pth")).startswith("holds no tensors")
    endless = {}
    endless["model"] = endless
    assert refusal(save(torch, endless, tmp_path / "c.pth")).startswith("holds no tensors")


def test_one_of_several_dictionaries_is_chosen_by_its_key(tmp_path, torch):
    tree = {"net_a": {"a": 1, "b": 2, "c": 3}, "deep": {"net_b": {"a": 3, "b": 4, "c": 5}}, "scores": {"best": 5}}
    path = save(torch, fill(torch, tree), tmp_path / "w.pth")
    assert refusal(path) == "holds 2 dictionaries of tensors (net_a, deep.net_b): choose one with --key NAME"
    for key in ("net_b", "deep.net_b"):
        read = read_weights(path, key=key)
        assert (read.wrapper, int(read.arrays["b"])) == ("deep, net_b", 4)
    assert int(read_weights(path, key="scores").arrays["best"]) == 5
    dino = save(torch, fill(torch, {"student": {"s": 1}, "teacher": {"t": 2}}), tmp_path / "dino.pth")
    assert list(read_weights(dino, key="student").arrays) == ["s"]
    same = fill(torch, {"a": 1})
    path = save(torch, {"one": same, "two": same}, tmp_path / "same.pth")
    assert [read_weights(path, key=key).wrapper for key in (None, "one", "two")] == ["one", "one", "two"]


def test_the_beginning_of_names_may_be_the_key(tmp_path, torch):
    names = {"state_dict": {"net.student.a": 1, "net.student.b": 2, "net.teacher.a": 3}, "epoch": 1}
    path = save(torch, fill(torch, names), tmp_path / "w.pth")
    read = read_weights(path, key="student")
    assert (read.wrapper, {**read.arrays}) == ("state_dict, net.student.", {"a": 1, "b": 2})
    assert read.skipped == ("epoch", "net.teacher.a")
    assert read_weights(path, key="net.teacher").arrays["a"] == 3
    with pytest.raises(InputError, match=r"holds nothing under 'ema' .--key.; its names begin with net"):
        read_weights(path, key="ema")


@ZIP_AND_LEGACY
def test_files_without_named_tensors(tmp_path, torch, new):
    assert refusal(save(torch, torch.ones(2), tmp_path / "a.pth", new)).startswith("holds a tensor without a name")
    assert refusal(save(torch, [torch.ones(2)], tmp_path / "b.pth", new)).startswith("holds a list, not a dictionary")
    assert refusal(save(torch, {"epoch": 1}, tmp_path / "c.pth", new)).startswith("holds no tensors")


# --- what must not run


class Evil:
    """Unpickles by running a shell command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@ZIP_AND_LEGACY
def test_payload_is_not_executed_and_the_tensors_are_read(tmp_path, torch, new):
    mark = tmp_path / "mark"
    evil = Evil(f"touch {mark}")
    path = save(torch, {"weight": torch.ones(2), "evil": evil}, tmp_path / "x.pth", new)
    read = read_weights(path)
    assert (list(read.arrays), read.skipped) == (["weight"], ("evil",))
    name = f"{os.system.__module__}.system"
    told = f"holds no tensors but a {name}, which was not executed: save the model's state_dict alone"
    assert refusal(save(torch, {"evil": evil}, tmp_path / "y.pth", new)) == told
    assert not mark.exists()
    pickle.loads(pickle.dumps(evil))  # without protection, the payload does run
    assert mark.exists()


TWINS = b")" + b"2\x86" * 99  # (), ((), ()), ... : 99 deep, each a pair of the one before


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cposix\nsystem\n(Utouch MARK\n.",
        b"\x80\x02(S'touch MARK'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85\x81.",  # NEWOBJ
        b"\x80\x02cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x02ctorch._utils\n__builtins__\n.",
        b"\x80\x02ctorch\nFloatStorage\n(S'x'\ntR.",  # a storage is not callable
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n(tR.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02(lp0\nh\x00h\x00a.",
        b"\x80\x02q\x00.",
        b"\x80\x02r\xff\xff\xff\xff.",
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # BINBYTES8 of 8 EiB
        b"\x80\x02}(I1\nI2\nu.",
        b"\x80\x02" + b"(" * 50_000 + b"t" * 50_000 + b".",
        b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b".",  # BYTEARRAY8 of 16 GiB
        b"\x80\x02}" + TWINS + b"Ns}" + TWINS + b"(" + TWINS + b"NdcX\nY\n.",  # SETITEM and DICT hash their keys
        b"\x80\x02ccollections\nOrderedDict\n(]" + TWINS + b"N\x86atR0cX\nY\n.",
        b"\x80\x04\x8f(" + TWINS + b"\x900cX\nY\n.",  # ADDITEMS
        b"\x80\x04(" + TWINS + b"\x91.",  # FROZENSET
        b"\x80\x02(X\x07\x00\x00\x00storage" + TWINS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02M\xe9\x03.\x80\x02}.\x80\x02}.\x80\x02]"
        + TWINS
        + b"a.",  # the name of a storage that is looked up, and printed
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
    """Once another unpickler has met an extension code, its function is cached and no longer looked up by name."""
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


class Settings(dict):
    """A dictionary of a class that the reader does not know."""


@dataclasses.dataclass
class Arguments:
    rate: float
    names: tuple = ("a", "b")


class Kind(enum.Enum):
    ONE = 1


@pytest.mark.filterwarnings("ignore:torch.quantize")
@ZIP_AND_LEGACY
def test_objects_beside_the_weights_stay_inert(tmp_path, torch, new):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    objects = [
        *(datetime.datetime(2024, 1, 1), datetime.timedelta(1), types.SimpleNamespace(a=1), Settings(a=1), Kind.ONE),
        *(
            Arguments(1.0),
            decimal.Decimal("1"),
            collections.deque([1, 2]),
            functools.partial(print, 1),
            re.compile("a"),
        ),
        *(np.random.default_rng(0), np.array([{}, None]), np.array(["a"]), np.float32(1), ValueError("x"), "a".upper),
        *(torch.optim.lr_scheduler.StepLR(optimizer, 5), torch.nn.Linear(2, 2), torch.eye(3).to_sparse()),
        *(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), torch.empty(3, device="meta")),
    ]
    beside = {f"object {index}": each for index, each in enumerate(objects)}
    path = save(torch, {"model": {"w": torch.arange(3.0), **beside}, "all": objects}, tmp_path / "w.pth", new)
    read = read_weights(path)
    assert {name: array.tolist() for name, array in read.arrays.items()} == {"w": [0, 1, 2]}
    assert set(read.skipped) == {"all", *beside}


class OnDevice:
    """A tensor as torch pickles those of XLA and of other devices."""

    def __init__(self, tensor, dtype, rebuild):
        self.arguments = rebuild, (tensor, dtype, "xla:0", False)

    def __reduce__(self):
        return self.arguments


@ZIP_AND_LEGACY
def test_tensors_are_read_however_they_are_rebuilt(tmp_path, torch, monkeypatch, new):
    class Tagged(torch.Tensor):
        pass

    monkeypatch.setattr(sys.modules[__name__], "Tagged", Tagged, raising=False)
    Tagged.__qualname__ = "Tagged"
    values = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(values.clone())
    tagged = values.clone()
    parameter.tag = tagged.tag = "x"
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {
        "attribute": tagged,
        "parameter with attribute": parameter,
        "subclass": values.as_subclass(Tagged),
        "buffer": torch.nn.Buffer(values),
        "from numpy": OnDevice(values.numpy(), torch.float32, torch._utils._rebuild_device_tensor_from_numpy),
        "from cpu": OnDevice(values, torch.float32, torch._utils._rebuild_device_tensor_from_cpu_tensor),
        "numpy": rows,
        "numpy, by columns": np.asfortranarray(rows),
        "numpy, big-endian": rows.astype(">f4"),
        "numpy, half": rows.astype(np.float16),
        "numpy, bfloat16": rows.astype(ml_dtypes.bfloat16),
    }
    kinds = [Settings(tree), collections.defaultdict(list, tree), collections.OrderedDict(tree)]
    for kind, protocol in zip(kinds, (2, 4, 5), strict=True):
        path = tmp_path / "w.pth"
        torch.save(kind, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
        arrays = read_weights(path).arrays
        assert arrays.keys() == tree.keys()
        for name, array in arrays.items():
            assert array.astype(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]], name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_of_arrays_is_read(tmp_path, protocol):
    tree = {"model": {"a": np.arange(3.0), "scalar": np.array(7, np.int32)}, "author": "x"}
    read = read_weights(write(tmp_path / "x.pkl", pickle.dumps(tree, protocol)))
    assert (read.wrapper, read.arrays["a"].tolist(), read.arrays["scalar"].tolist()) == ("model", [0, 1, 2], 7)


@ZIP_AND_LEGACY
def test_the_parameters_of_a_pickled_module_are_read(tmp_path, torch, new):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    module[1].running_mean += 5
    for tree in (module, {"model": module, "epoch": 3}, {"ema": module}):
        read = read_weights(save(torch, tree, tmp_path / "net.pt", new))
        assert {name: array.tolist() for name, array in read.arrays.items()} == {
            name: tensor.tolist() for name, tensor in module.state_dict().items()
        }


def test_small_pickles_cannot_make_many_bytes(tmp_path):
    """Text that is encoded, and attributes that are set, again and again from the memo."""
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"q\x01"
    encoding = b"c_codecs\nencode\nq\x02" + text + b"00" + b"h\x02h\x01\x85R" * 5000
    attributes = b"}(" + b"".join(b"K%cK\0" % (i % 256) + b"" for i in range(256)) + b"uq\x03"
    setting = b"cx\ny\nq\x04" + attributes + b"00" + b"h\x04)\x81h\x03b" * 20_000
    for program in (encoding, setting):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + program + b"}.")
        tracemalloc.start()
        try:
            refusal(tmp_path / "x.pth")
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


def test_dictionaries_and_modules_that_hold_themselves_end(tmp_path, torch):
    tree = {"a": {"w": torch.ones(2)}}
    tree["a"]["back"] = tree
    assert read_weights(save(torch, tree, tmp_path / "x.pth")).wrapper == "a"
    module = torch.nn.Linear(1, 1)
    module._modules["again"] = module
    assert list(read_weights(save(torch, module, tmp_path / "y.pth")).arrays) == ["weight", "bias"]


# --- lying archives


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
    path = save(torch, {"w": torch.rand(10_000)}, tmp_path / "w.pth")
    same = lambda name, content: content  # noqa: E731
    assert "compressed members" in refusal(rewrite_zip(path, tmp_path / "a.pth", same, zipfile.ZIP_DEFLATED))
    lacking = rewrite_zip(path, tmp_path / "b.pth", lambda name, content: None if "data/0" in name else content)
    assert refusal(lacking).startswith("is damaged (KeyError")
    short = rewrite_zip(
        path, tmp_path / "c.pth", lambda name, content: content[:39_996] if "data/0" in name else content
    )
    assert refusal(short).startswith("is damaged ('w' does not fit its storage")


def test_a_directory_that_names_bytes_many_times_is_refused(tmp_path, torch):
    path = save(torch, {"w": torch.zeros(1000)}, tmp_path / "w.pth")
    content = rewrite_zip(path, tmp_path / "plain.pth", lambda name, content: content).read_bytes()
    begin, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    place = content.index(b"w/data/0", begin)
    entry = content[place - 46 : place + 8]
    for name, message in (("w/data/0", "it has two members 'w/data/0'"), ("w/data/{}", "unpacks to 40")):
        more = b"".join(entry.replace(b"w/data/0", name.format(i).encode()) for i in range(1, 10))
        count = content.count(b"PK\x01\x02") + 9
        tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, end - begin + len(more), begin, 0)
        lying = write(tmp_path / "x.pth", content[:begin] + more + content[begin:end] + tail)
        assert message in refusal(lying)


def test_tensors_that_share_cannot_multiply_a_file(tmp_path, torch):
    base = torch.zeros(1000)
    assert refusal(save(torch, {str(i): base.view(10, 100) for i in range(9)}, tmp_path / "x.pth")).startswith(
        "unpacks to 36000 bytes from"
    )


def test_damage_in_tensors_is_found_by_the_checksum(tmp_path, torch):
    path = save(torch, {"w": torch.full((100,), 3.0)}, tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 3.0)) + 200] ^= 1
    assert refusal(write(tmp_path / "x.pth", bytes(content))) == (
        "is damaged (the checksum of 'w/data/0' is wrong): download it again"
    )


def test_torch_may_be_made_to_leave_checksums_out(tmp_path, torch):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(torch, {"w": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(path).getinfo("w/data/0").CRC == 0
    assert read_weights(path).arrays["w"].tolist() == [1, 1, 1]


def test_a_member_must_agree_with_the_directory(tmp_path, torch):
    content = save(torch, {"w": torch.ones(100)}, tmp_path / "w.pth").read_bytes()
    renamed = content.replace(b"w/data/0", b"w/data/1", 1)  # the first stands before the bytes, the second in the list
    assert "differ" in refusal(write(tmp_path / "a.pth", renamed))
    place = content.index(b"w/data/0") - 4
    longer = content[:place] + struct.pack("<HH", 8, 65535) + content[place + 4 :]
    assert "is damaged" in refusal(write(tmp_path / "b.pth", longer))


def test_a_zip_is_mapped_not_copied(tmp_path, torch):
    path = save(torch, {"w": torch.arange(2_000_000.0), "half": torch.ones(7).half()}, tmp_path / "w.pth")
    tracemalloc.start()
    try:
        arrays = read_weights(path).arrays
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert all(array.flags.aligned and not array.flags.writeable for array in arrays.values())
    np.testing.assert_array_equal(arrays["w"], np.arange(2e6, dtype=np.float32))
    moved = read_weights(rewrite_zip(path, tmp_path / "moved.pth", lambda name, content: content)).arrays
    assert all(array.flags.aligned for array in moved.values())
    np.testing.assert_array_equal(moved["w"], arrays["w"])


def test_legacy_cut_inside_its_tensors(tmp_path, torch):
    content = save(torch, {"w": torch.ones(100)}, tmp_path / "w.pth", new=False).read_bytes()
    for end in (-1, -399, -401):
        message = refusal(write(tmp_path / "x.pth", content[:end]))
        assert message == "is damaged (it ends inside its tensors): download it again"
    lying = content[:-408] + struct.pack("<Q", 99) + content[-400:]
    assert "it ends inside its tensors" in refusal(write(tmp_path / "y.pth", lying))


def test_torchscript_is_named(tmp_path):
    archive = {"net/data.pkl": b"\x80\x02}.", "net/constants.pkl": b"\x80\x02).", "net/code/__torch__.py": b""}
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as file:
        for name, content in archive.items():
            file.writestr(name, content)
    assert refusal(tmp_path / "net.pt").startswith("is a TorchScript archive: export its state_dict")
