"""Ten thousand damaged weight files: each is read or refused in one line, soon, and within a bound of memory."""

import io
import json
import random
import re
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fcvit_jax.convert.readers import read_weights
from fcvit_jax.errors import InputError

Files = dict[str, bytes]  # by name; the first is the one to read

# Memory that does not grow with the files, some 130 kB: the 64 KiB pieces in which a deflated member is unpacked, held
# twice for a moment, and the interpreter's own objects for names, members and the steps of a pickle.
OVERHEAD = 2**18
TRIALS = {
    "safetensors": 1500,
    "sharded": 1000,
    "npz": 1500,
    "npz deflated": 1500,
    "torch zip": 2500,
    "torch legacy": 2000,
}


def values() -> dict[str, np.ndarray]:
    random_state = np.random.default_rng(0)
    return {
        "module.patch_embed.proj.weight": random_state.standard_normal((96, 3, 8, 8)).astype(np.float32),
        "module.blocks.0.attn.qkv.weight": random_state.standard_normal((288, 96)).astype(np.float16).T,
        "module.cls_token": random_state.standard_normal((1, 1, 48)),
        "module.steps": np.array(7, np.int64),
        "module.mask": np.array([True, False]),
        "module.none": np.empty((0, 3), np.float32),
    }


def safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    tags = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "bool": "BOOL"}
    header, data = {}, b""
    for name, array in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": tags[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def saved(save: Callable[..., None], *args: object, **kwargs: object) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def make(kind: str) -> Files:
    """Make an undamaged file, or several, of a kind."""
    arrays = values()
    if kind == "safetensors":
        return {"w": safetensors(arrays)}
    if kind == "npz":
        return {"w": saved(np.savez, **arrays)}
    if kind == "npz deflated":
        return {"w": saved(np.savez_compressed, **arrays)}
    if kind == "sharded":
        names = list(arrays)
        parts = {"1.safetensors": names[:2], "2.safetensors": names[2:]}
        places = {name: part for part, held in parts.items() for name in held}
        index = json.dumps({"metadata": {}, "weight_map": places}).encode()
        return {"w": index} | {part: safetensors({name: arrays[name] for name in parts[part]}) for part in parts}
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in arrays.items()}
    qkv = state["module.blocks.0.attn.qkv.weight"]
    state |= {"module.bf16": qkv.bfloat16().t(), "module.view": qkv[1::2, 3:]}
    averaged = {"module.cls_token": torch.ones(5)}
    tree = {"model": state, "model_ema": averaged, "epoch": 3, "args": {"lr": 0.1, "betas": (0.9, 0.999)}}
    return {"w": saved(lambda file: torch.save(tree, file, _use_new_zipfile_serialization=kind == "torch zip"))}


# Bytes that say where the others are.
MARKS = re.compile(rb"PK[\x01-\x07]|NUMPY|\x80\x02|data_offsets|shape|weight_map|storage|safetensors")
NUMBER = re.compile(rb"\d+|\Z")
EXTREMES = [b"\xff" * 8, b"\xff" * 4, b"\xff" * 2, b"\xff", bytes(8), bytes(4), b"\0", b"\xff\xff\xff\x7f"]
EXTREMES += [struct.pack("<Q", 1 << power) for power in (16, 24, 30, 31, 32, 40, 62, 63)]


def damage(rng: random.Random, content: bytes, donor: bytes) -> bytes:
    """Damage the content in one way."""
    marks = [found.start() for found in MARKS.finditer(content)] or [0]

    def place() -> int:
        somewhere = rng.choice((rng.randrange(len(content)), rng.choice(marks) + rng.randrange(-8, 96)))
        return min(max(somewhere, 0), len(content) - 1)

    i, j = sorted((place(), place()))
    match rng.randrange(10):
        case 0:
            changed = bytearray(content)
            for _ in range(rng.randrange(1, 9)):
                changed[place()] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 1:
            changed = bytearray(content)
            changed[place()] = rng.randrange(256)
            return bytes(changed)
        case 2:
            return content[: rng.choice((i, j, max(1, len(content) - rng.randrange(99))))]
        case 3:
            return content[:i] + rng.randbytes(rng.choice((1, 2, 8, 300))) + content[i:]
        case 4:
            return content[:i] + content[rng.choice((i + 1, i + 4, j)) :]
        case 5:
            changed, width = bytearray(content), rng.choice((1, 4, 64))
            changed[i : i + width], changed[j : j + width] = content[j : j + width], content[i : i + width]
            return bytes(changed)
        case 6:
            number = rng.choice(EXTREMES)
            return content[:i] + number + content[i + len(number) :]
        case 7:
            number = str(rng.choice((-1, 0, 1, 2**31, 2**63, 10**30, 1e99, rng.randrange(10**5)))).encode()
            begin, end = next(NUMBER.finditer(content, i)).span()
            return content[:begin] + number + content[end:]
        case 8:
            return content + rng.choice((rng.randbytes(99), donor, content, bytes(999)))
        case _:
            return content[:i] + donor[rng.randrange(len(donor)) :]


def damage_inside(rng: random.Random, content: bytes, donor: bytes) -> bytes:
    """Damage the bytes that a checksum or a length guards, and correct these: as an attacker would."""
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            chosen = rng.choice([name for name in old.namelist() if name.endswith(("npy", "pkl"))])
            members = {name: old.read(name) for name in old.namelist()}
            members[chosen] = damage(rng, members[chosen], donor)
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", old.getinfo(chosen).compress_type) as new:
                for name, member in members.items():
                    new.writestr(name, member)
            return buffer.getvalue()
    if content[8:9] == b"{":
        end = 8 + int.from_bytes(content[:8], "little")
        header = damage(rng, content[8:end], donor)
        return struct.pack("<Q", len(header)) + header + content[end:]
    return damage(rng, content, donor)


def check(path: Path, size: int, ema: bool) -> bool:
    """Return whether files of `size` bytes are read; check that others are refused correctly."""
    tracemalloc.start()
    begun = time.perf_counter()
    arrays = {}
    try:
        arrays = read_weights(path, ema).arrays
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path} ")
        assert message.isprintable()
    finally:
        seconds, peak = time.perf_counter() - begun, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert seconds < 5
    assert peak <= 4 * size + OVERHEAD
    assert sum(array.nbytes for array in arrays.values()) <= 4 * size
    for array in arrays.values():
        array.tobytes()  # every element can be reached
    return bool(arrays)


@pytest.mark.parametrize("kind", TRIALS)
def test_damaged_files(tmp_path, kind):
    rng = random.Random(kind)
    files = make(kind)
    donors = [content for other in ("safetensors", "npz", "npz deflated") for content in make(other).values()]
    donors += files.values()
    path = tmp_path / "w"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert check(path, sum(map(len, files.values())), ema=False)
    read = 0
    for trial in range(TRIALS[kind]):
        name = rng.choice(list(files))
        change = damage_inside if trial % 2 else damage
        damaged = change(rng, files[name], rng.choice(donors))
        (tmp_path / name).write_bytes(damaged)
        size = sum(len(content) for other, content in files.items() if other != name) + len(damaged)
        try:
            read += check(path, size, ema=rng.random() < 0.1)
        except AssertionError:
            print(f"{kind}, trial {trial}: {path} is kept")
            raise
        (tmp_path / name).write_bytes(files[name])
    assert TRIALS[kind] // 20 < read < TRIALS[kind] * 19 // 20  # some are refused, and some are read
