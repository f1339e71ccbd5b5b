import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

import fcvit_jax as fc
from fcvit_jax.convert.__main__ import main
from fcvit_jax.convert.pytorch import write_safetensors
from states import CONFIG, in_layout, state_dict

NUMBERS = np.random.default_rng(0)
SHAPES = {name: array.shape for name, array in state_dict(replace(CONFIG, depth=1)).items()}


def safetensors_bytes(arrays):
    header, data = {}, b""
    for name, array in arrays.items():
        kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[array.dtype.name]
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def weights(tmp_path):
    arrays = {name: NUMBERS.standard_normal(shape).astype(bfloat16) for name, shape in SHAPES.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes(arrays))
    return path


def error(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


GIVEN = ("--num_heads", "2", "--preprocess", "timm/deit")


def test_a_file_becomes_a_checkpoint(weights, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\nelk\n")
    out = tmp_path / "checkpoint"
    main([str(weights), str(out), *GIVEN, "--num_classes", "5", "--class_names", str(names)])
    assert (
        "128 wide, 1 layers, 2 heads, patch 8 at 32x32 (4x4 patches and 1 prefix tokens), 5 classes"
        in capsys.readouterr().out
    )
    loaded = fc.load_checkpoint(out)
    assert loaded.config.grid == (4, 4)
    assert loaded.preprocess.image_size == (32, 32)
    assert loaded.meta["class_names"] == ["ant", "bee", "cat", "dog", "elk"]
    assert loaded.meta["provenance"]["source"] == "model.safetensors"
    assert len(loaded.meta["provenance"]["files"]["model.safetensors"]) == 64
    keys = {row["key"]: row for row in loaded.meta["provenance"]["keys"]}
    assert keys.keys() == SHAPES.keys()
    assert keys["head.weight"] == {
        "key": "head.weight",
        "shape": [5, 128],
        "path": "head/kernel",
        "leaf_shape": [128, 5],
        "transform": "linear",
    }
    logits, _ = fc.ViT(loaded.config).apply({"params": loaded.params}, np.zeros((1, 32, 32, 3), np.float32))
    assert np.isfinite(logits).all()


def test_another_size_warns_and_the_head_may_be_left_out(weights, tmp_path, capsys):
    main([str(weights), str(tmp_path / "out"), *GIVEN, "--image_size", "48x64", "--num_classes", "0"])
    printed = capsys.readouterr().out
    assert "warning: position embedding 4x4, the model's grid 6x8" in printed
    assert "dropped: head.weight (the head was not asked for)" in printed
    assert fc.load_checkpoint(tmp_path / "out").config.num_classes == 0


def test_overwriting_requires_an_option(weights, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(weights), str(out), *GIVEN])
    assert "pass --overwrite" in error(capsys, weights, out, *GIVEN)
    main([str(weights), str(out), *GIVEN, "--overwrite", "--image_size", "64"])
    assert fc.load_checkpoint(out).config.grid == (8, 8)


def test_inspect_prints_and_writes_nothing(weights, tmp_path, capsys):
    main(["--inspect", str(weights), "--num_heads", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"^sha256 [0-9a-f]{64}  model.safetensors$", printed, re.MULTILINE)
    assert "20 tensors" in printed
    assert "20 bfloat16" in printed
    assert re.search(r"blocks.#.attn.qkv.weight +384x128 +-> +blocks_#/attn/qkv/kernel +128x384 +linear\n", printed)
    assert "layout: timm" in printed
    assert "model: ViT 128 wide, 1 layers, 2 heads" in printed
    main(["--inspect", str(weights)])
    assert "model: the number of heads of a 128-wide model cannot be inferred" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_pth_of_torch_converts_to_the_same(weights, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    torch.save({"model": arrays, "epoch": 3}, tmp_path / "model.pth")
    main([str(tmp_path / "model.pth"), str(tmp_path / "out"), *GIVEN])
    loaded = fc.load_checkpoint(tmp_path / "out")
    kernel = loaded.params["blocks_0"]["attn"]["qkv"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["blocks.0.attn.qkv.weight"].numpy().T)
    assert loaded.meta["provenance"]["wrapper"] == "model"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad_files(folder):
    import pickle

    good = safetensors_bytes({"cls_token": np.zeros((1, 1, 8), np.float32)})
    (folder / "truncated.safetensors").write_bytes(good[:-3])
    (folder / "page.pth").write_text("<!DOCTYPE html><html>Sign in</html>")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (folder / "pointer.safetensors").write_text(pointer)
    with zipfile.ZipFile(folder / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(folder / "executed")))
        archive.writestr("archive/version", "3")
    (folder / "other.safetensors").write_bytes(safetensors_bytes({"conv1.weight": np.zeros((3, 3), np.float32)}))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.pth", "missing.pth"),
        ("truncated.safetensors", "truncated.safetensors"),
        ("page.pth", "web page"),
        ("pointer.safetensors", "git lfs pull"),
        ("evil.pth", "posix.system"),
        ("other.safetensors", "unknown layout"),
    ],
)
@pytest.mark.parametrize("inspect", [False, True])
def test_a_bad_file_is_one_line_and_leaves_nothing(name, says, inspect, tmp_path, capsys):
    bad_files(tmp_path)
    before = sorted(os.listdir(tmp_path))
    arguments = ["--inspect", tmp_path / name] if inspect else [tmp_path / name, tmp_path / "out", *GIVEN]
    assert says in error(capsys, *arguments)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--num_classes", "10", *GIVEN), "the head has 5 classes, you asked for 10"),
        (("--model", "vit_smal_patch16_224"), "the nearest names are vit_small_patch16_224"),
        (("--model", "deit_small_patch16_224.fb_in1k"), "not a deit_small_patch16_224.fb_in1k: patch_size is 8"),
        (("--num_heads", "2"), "the normalisation cannot be inferred from the file"),
        (("--num_heads", "2"), "fields can follow, as in timm/dinov2,crop_pct=0.875"),
        (("--preprocess", "timm/deit"), "pass --model or --num_heads"),
        (("--num_heads", "2", "--preprocess", "timm/dait"), "did you mean timm/deit"),
        (("--num_heads", "3", "--preprocess", "timm/deit"), "128 does not divide into 3 heads"),
        (("--image_size", "36", *GIVEN), "36x36 does not divide into patches of 8"),
        (("--norm_eps", "0", *GIVEN), "norm_eps is 0.0: it must be a number, above 0 and below 1, or none"),
        (("--patch_size", "5", *GIVEN), "32x32 does not divide into patches of 5"),
        (("--pos_embed", "spline", *GIVEN), "invalid choice: 'spline'"),
        (("--ema", *GIVEN), "averaged"),
        (("--sha256", "0" * 64, *GIVEN), "its sha256 begins"),
        (("--sha256", "0" * 7, *GIVEN), "'0000000' is not a sha256"),
        (("--to", "timm", *GIVEN), "--to timm writes one file"),
        (("--to", "hf", "--pool", "avg", *GIVEN), "have no average pooling without the class token"),
        (("--image_size", "0", *GIVEN), "'0' is not a size in pixels"),
        (("--num_classes", "-1", *GIVEN), "num_classes is -1: it must be a whole number, 0 or more, or none"),
        (("--num_classes", "many", *GIVEN), "argument --num_classes: invalid int value: 'many'"),
        (("--colour", *GIVEN), "unrecognized arguments: --colour"),
        (("--class_names", "/nowhere.txt", *GIVEN), "class_names /nowhere.txt cannot be read"),
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(arguments, says, weights, tmp_path, capsys):
    assert says in error(capsys, weights, tmp_path / "out", *arguments)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_pooling_may_be_given(weights, tmp_path):
    main([str(weights), str(tmp_path / "out"), *GIVEN, "--pool", "avg"])
    assert fc.load_checkpoint(tmp_path / "out").config.pool == "avg"


def test_a_place_that_cannot_be_written_is_reported_first(weights, tmp_path, capsys):
    assert "cannot be written" in error(capsys, weights, weights / "out", *GIVEN)


def test_class_names_must_fit_the_head(weights, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("ant\nbee\nbee\n")
    said = error(capsys, weights, tmp_path / "out", *GIVEN, "--class_names", tmp_path / "names.txt")
    assert "has 2 different names, one a line; the head has 5" in said


def test_out_is_needed(weights, capsys):
    assert "OUT is missing" in error(capsys, weights)


def test_assumptions_are_printed(weights, tmp_path, capsys):
    main([str(weights), str(tmp_path / "out"), *GIVEN])
    assert "are assumed" not in capsys.readouterr().out
    wider = {128: 192, 384: 576, 256: 768}
    shapes = {name: [wider.get(side) or side for side in shape] for name, shape in SHAPES.items()}
    arrays = {name: NUMBERS.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    (tmp_path / "tiny.safetensors").write_bytes(safetensors_bytes(arrays))
    main([str(tmp_path / "tiny.safetensors"), str(tmp_path / "tiny"), "--preprocess", "timm/deit"])
    assert "warning: 3 heads, GELU exact and epsilon 1e-06 are assumed" in capsys.readouterr().out


def test_a_key_chooses_one_of_several_models(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    models = {
        name: {key: torch.tensor(x) for key, x in state_dict(seed=seed).items()} for seed, name in enumerate("ab")
    }
    torch.save({f"net_{name}": model for name, model in models.items()}, tmp_path / "w.pth")
    assert "(net_a, net_b): choose one with --key NAME" in error(capsys, tmp_path / "w.pth", tmp_path / "out", *GIVEN)
    assert not (tmp_path / "out").exists()
    main([str(tmp_path / "w.pth"), str(tmp_path / "out"), *GIVEN, "--key", "net_b"])
    found = fc.load_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(found.params["head"]["kernel"], models["b"]["head.weight"].numpy().T)
    assert found.meta["provenance"]["wrapper"] == "net_b"


def test_a_head_that_is_not_understood_is_left_out_on_request(tmp_path, capsys):
    arrays: Any = {f"encoder.{key}": array for key, array in state_dict().items()}
    arrays["neck.weight"] = np.ones(3, np.float32)
    np.savez(tmp_path / "w.npz", **arrays)
    assert "pass --num_classes 0 to convert the backbone" in error(capsys, tmp_path / "w.npz", tmp_path / "out", *GIVEN)
    main([str(tmp_path / "w.npz"), str(tmp_path / "out"), *GIVEN, "--num_classes", "0"])
    assert "dropped: neck.weight (not part of the backbone)" in capsys.readouterr().out
    assert "head" not in fc.load_checkpoint(tmp_path / "out").params


def test_only_a_checkpoint_is_overwritten(weights, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(weights), str(out), *GIVEN])
    (out / "thesis.tex").write_text("years of work")
    assert "it contains other files (thesis.tex)" in error(capsys, weights, out, *GIVEN, "--overwrite")
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_checkpoint_is_a_source_too(weights, tmp_path, capsys):
    larger = ("--image_size", "64", "--preprocess", "timm/augreg,crop_pct=1.0")
    main(["packaged:digits", str(tmp_path / "digits"), *larger])
    loaded = fc.load_checkpoint(tmp_path / "digits")
    assert loaded.config.grid == (16, 16)
    assert loaded.meta["class_names"] == list("0123456789")
    assert loaded.meta["provenance"]["from"]["trained_by"] == "train_sam.py"
    main(["packaged:digits", str(tmp_path / "digits.safetensors"), "--to", "timm", "--image_size", "64"])
    assert (tmp_path / "digits.safetensors").is_file()
    main([str(weights), str(tmp_path / "wide"), *GIVEN])
    capsys.readouterr()
    assert "another size" not in error(capsys, tmp_path / "wide", tmp_path / "w2", "--image_size", "64")
    assert not (tmp_path / "w2").exists()


def test_a_model_that_config_json_names_is_refused_by_its_name(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes({"layer.0.q": np.zeros((3, 3), np.float32)}))
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    assert "model_type 'siglip2', supported are" in error(capsys, tmp_path, tmp_path / "out")


@pytest.mark.skipif(sys.platform != "linux", reason="reads VmHWM of /proc")
def test_a_dinov3_as_large_as_vit_l_converts_within_three_times_its_size(tmp_path):
    source = tmp_path / "model.safetensors"
    write_safetensors(source, in_layout("timm", fc.zoo.get("vit_large_patch16_dinov3").config))
    size = source.stat().st_size
    assert 1.2e9 < size < 1.25e9
    program = (
        "import sys; from fcvit_jax.convert.__main__ import main; main(sys.argv[1:]); "
        "print(open('/proc/self/status').read())"
    )
    flags = ["--model", "vit_large_patch16_dinov3.lvd1689m"]
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "at 256x256" in done.stdout  # no leaf shows the size: it is the name's
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", done.stdout)
    assert int(peak) * 1024 < 3 * size
