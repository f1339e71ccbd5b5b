import collections
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fcvit_jax as fc
from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params, save_checkpoint
from fcvit_jax.compiling import PRECISIONS
from fcvit_jax.data.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess, decode
from fcvit_jax.export.__main__ import main
from fcvit_jax.files import file_name
from fcvit_jax.models.config import Rotary

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "serving.md").read_text()

# 4 x 6 patches: windows of six tokens, and all sides different.
CONFIG = fc.ViTConfig((32, 48), 8, 32, 3, 2, 64, num_classes=7, layer_scale=0.1, pre_norm=True)
SCHEDULES = "dense,tome_r5,s2winc2_r6"
PREPROCESS = Preprocess((32, 48), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))

# A separate process that finds only Python's library, numpy, jax and what jax needs.
ALONE = """
import os, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
ALLOWED = {*sys.stdlib_module_names, "jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"}
class Alone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.split(".")[0]
        return super().find_spec(name, path, target) if top in ALLOWED or top.startswith("_sysconfigdata") else None
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Alone]
for name in ("fcvit_jax", "flax"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is found")
out, images, results = sys.argv[1:]
run = runpy.run_path(os.path.join(out, "run.py"), run_name="run")
import numpy as np
images = np.load(images)
named = run["META"]["programs"].items()
logits = {name: run["load"](name)(images[: program["batch_size"]]) for name, program in named}
np.savez(results, **logits)
"""


def random_checkpoint(config=CONFIG, preprocess=PREPROCESS):
    leaves, tree = jax.tree.flatten(abstract_params(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [0.5 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    meta = {"class_names": [f"class {index}" for index in range(config.num_classes)], "provenance": {}}
    return fc.Checkpoint(Path("made-up"), config, jax.tree.unflatten(tree, params), preprocess, meta)


def some_images(count, config=CONFIG):
    return np.random.default_rng(0).integers(0, 256, (count, *config.image_size, 3), np.uint8)


def by_the_model(checkpoint, name, images, dtype="float32"):
    """Compute (logits, pooled) by the library's own model."""
    compute, precision = PRECISIONS[dtype]
    model = fc.ViT(checkpoint.config, fc.MergeSchedule.parse(name, checkpoint.config.depth), compute)

    @jax.jit
    def run(params, images):
        logits, out = model.apply({"params": params}, checkpoint.preprocess.normalize(images))
        return logits, out["pooled"]

    with jax.default_matmul_precision(precision):
        return run(checkpoint.params, images)


def read(out, program):
    """Read a program and its parameters."""
    meta = json.loads((out / "meta.json").read_text())
    data = bytearray((out / meta["programs"][program]["file"]).read_bytes())
    with np.load(out / "weights.npz") as arrays:
        params = {name: x.view(jnp.bfloat16) if x.dtype == np.uint16 else x for name, x in arrays.items()}
    return jax.export.deserialize(data), params


def load_script(out):
    spec = importlib.util.spec_from_file_location("served_run", out / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint():
    return random_checkpoint()


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    return fc.export(checkpoint, SCHEDULES, (1, 4), tmp_path_factory.mktemp("export") / "out")


def test_programs_run_without_this_library_and_give_its_logits(checkpoint, exported, tmp_path):
    images = some_images(4)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", ALONE, str(exported), "images.npy", "logits.npz"]
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}  # must not matter: the program has its own
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "logits.npz") as logits:
        assert set(logits) == {f"{name}_b{size}" for name in SCHEDULES.split(",") for size in (1, 4)}
        for name in SCHEDULES.split(","):
            wanted, _ = by_the_model(checkpoint, name, images)
            assert np.ptp(wanted, axis=0).max() > 0.1  # the images matter
            assert name == "dense" or np.abs(wanted - logits["dense_b4"]).max() > 0.001  # and the schedule
            for size in (1, 4):
                found = logits[f"{name}_b{size}"]
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, wanted[:size], rtol=0, atol=1e-5)


def test_a_directory_matches_its_metadata(checkpoint, exported):
    meta = json.loads((exported / "meta.json").read_text())
    assert sorted(file.name for file in exported.iterdir()) == ["meta.json", "programs", "run.py", "weights.npz"]
    assert list(meta["programs"]) == [f"{name}_b{size}" for name in SCHEDULES.split(",") for size in (1, 4)]
    assert meta["programs"]["s2winc2_r6_b4"]["stages"] == "dense:1,local:1:r6:w2x2,global:1:r6"
    assert meta["programs"]["s2winc2_r6_b4"]["batch_size"] == 4
    assert meta["class_names"][6] == "class 6"
    assert meta["platforms"] == ["cpu", "cuda"]
    assert Preprocess.from_dict({k: v for k, v in meta["preprocess"].items() if k not in ("text", "resize_size")}) == (
        checkpoint.preprocess
    )
    assert meta["preprocess"]["resize_size"] == list(PREPROCESS.resize_size) == [36, 54]
    assert meta["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(checkpoint.params))


def test_a_program_is_portable(exported):
    for program in ("dense_b1", "s2winc2_r6_b4"):
        found, _ = read(exported, program)
        assert found.platforms == ("cpu", "cuda")
        assert found.nr_devices == 1
        assert "custom_call" not in found.mlir_module()
        names = (exported / "programs" / f"{program}.stablehlo").read_bytes()
        assert b"blocks_2/attn" in names
        assert b".py" not in names
        assert str(ROOT).encode() not in names


def test_a_program_has_the_precision_of_its_dtype(checkpoint, tmp_path):
    # In float32, GPUs round to TF32 by default.
    for dtype, precision in (("float32", "HIGHEST"), ("tf32", "HIGH"), ("bfloat16", "DEFAULT")):
        with jax.default_matmul_precision("float32" if dtype == "bfloat16" else "bfloat16"):
            out = fc.export(checkpoint, "dense", 1, tmp_path / dtype, dtype=dtype)
        products = [line for line in read(out, "dense_b1")[0].mlir_module().splitlines() if "dot_general" in line]
        asked = {word for line in products for word in re.findall(r"precision = \[(\w+), (\w+)\]", line)}
        assert len(products) >= 3 * 6
        assert asked <= {(precision, precision)}
        assert asked or precision == "DEFAULT"  # DEFAULT may be left out


@pytest.mark.devices(8)
def test_a_batch_may_be_spread_over_devices(checkpoint, tmp_path):
    out = fc.export(checkpoint, "s2winc2_r6", 8, tmp_path / "out")
    program, params = read(out, "s2winc2_r6_b8")
    images, mesh = some_images(8), parallel.data_mesh()
    placed = jax.device_put(params, parallel.replicated(mesh)), jax.device_put(images, parallel.batched(mesh))
    logits = jax.jit(program.call)(*placed)
    assert len(logits.sharding.device_set) == mesh.size > 1
    np.testing.assert_allclose(logits, by_the_model(checkpoint, "s2winc2_r6", images)[0], rtol=0, atol=1e-5)


def test_bfloat16_halves_the_weights_and_changes_no_logit(checkpoint, exported, tmp_path):
    out = fc.export(checkpoint, "tome_r5", 4, tmp_path / "out", dtype="bfloat16")
    program, params = read(out, "tome_r5_b4")
    assert params["blocks_0/attn/qkv/kernel"].dtype == jnp.bfloat16
    assert params["blocks_0/norm1/scale"].dtype == np.float32
    assert (out / "weights.npz").stat().st_size < 0.6 * (exported / "weights.npz").stat().st_size
    images = some_images(4)
    np.testing.assert_array_equal(
        jax.jit(program.call)(params, images), by_the_model(checkpoint, "tome_r5", images, "bfloat16")[0]
    )


def test_pooled_features_come_along_on_demand(checkpoint, tmp_path):
    out = fc.export(checkpoint, fc.MergeSchedule.parse("tome_r5", 3), 2, tmp_path / "out", features=True)
    program, params = read(out, "global-3-r5_b2")
    images = some_images(2)
    logits, features = jax.jit(program.call)(params, images)
    assert features.shape == (2, 32)
    wanted = by_the_model(checkpoint, "tome_r5", images)
    np.testing.assert_allclose(logits, wanted[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(features, wanted[1], rtol=0, atol=1e-5)


def test_rotary_positions_a_gate_and_a_probe(tmp_path):
    newer = dict(learned_positions=False, rotary=Rotary(), gated=True, key_bias=False, pool="map")
    checkpoint, name = random_checkpoint(replace(CONFIG, **newer)), "tome_r5@nearest(turned=true)"
    program, params = read(fc.export(checkpoint, name, 2, tmp_path / "out"), f"{file_name(name)}_b2")
    images = some_images(2)
    wanted = by_the_model(checkpoint, name, images)[0]
    np.testing.assert_allclose(jax.jit(program.call)(params, images), wanted, rtol=0, atol=1e-5)
    assert np.abs(wanted - by_the_model(checkpoint, "dense", images)[0]).max() > 0.001


def test_an_export_of_vit_s_is_hardly_larger_than_its_weights(tmp_path):
    model = fc.zoo.get("vit_small_patch16_224.augreg_in21k_ft_in1k")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract_params(model.config))
    meta = {"class_names": None, "provenance": {}}
    vit_s = fc.Checkpoint(Path("zeros"), model.config, params, model.preprocess or Preprocess(), meta)
    out = fc.export(vit_s, "s2winc7_r16", 32, tmp_path / "out")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    assert 22_050_664 * 4 < size < 22_050_664 * 4 * 1.01


@pytest.fixture(scope="module")
def script(exported):
    return load_script(exported)


@pytest.mark.parametrize("mode", CROP_MODES)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pixels_are_those_of_the_library_bit_for_bit(mode, interpolation, script, monkeypatch):
    rng = np.random.default_rng(0)
    for image_size in ((32, 32), (30, 45), (33, 20)):
        for crop_pct in (0.875, 1.0, 1.2):
            preprocess = Preprocess(image_size, crop_pct, mode, interpolation)
            told = preprocess.to_dict() | {"resize_size": preprocess.resize_size}
            monkeypatch.setattr(script, "META", {"preprocess": told})
            for height, width in ((50, 50), (61, 40), (40, 61), (33, 97), (7, 200), (32, 32)):
                image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
                np.testing.assert_array_equal(script.pixels(image), preprocess(image))


def test_the_script_takes_the_text_of_a_schedule_as_a_program(exported, script, tmp_path, monkeypatch, capsys):
    programs = script.META["programs"]
    monkeypatch.setitem(programs, "tome_r5-tome_b4", programs["tome_r5_b4"])
    np.save(tmp_path / "b.npy", some_images(1))
    told = []
    for name in ("tome_r5_b4", "tome_r5@tome_b4"):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "b.npy"), "--program", name])
        script.main()
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] != ""


def test_the_script_classifies_pictures_and_arrays(checkpoint, exported, script, tmp_path, monkeypatch, capsys):
    images = some_images(5)
    Image.fromarray(images[0]).resize((90, 60)).convert("L").save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "a.png", "b.npy", "--program", "tome_r5_b4"])
    script.main()
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a.png", *(f"b.npy[{row}]" for row in range(5))]
    with Image.open("a.png") as picture:
        batch = np.stack([checkpoint.preprocess(picture), *images])
    shares = jax.nn.softmax(by_the_model(checkpoint, "tome_r5", batch)[0])
    for line, share in zip(lines, np.asarray(shares), strict=True):
        best = np.argsort(share)[::-1][:5]
        assert line.split(": ")[1] == ", ".join(f"{share[index]:.1%} class {index}" for index in best)

    np.save(tmp_path / "b.npy", images.transpose(0, 2, 1, 3))
    monkeypatch.setattr(sys, "argv", ["run.py", "b.npy"])
    with pytest.raises(SystemExit):
        script.main()
    told = "error: b.npy[0] is uint8 (48, 32, 3): the model takes uint8 (32, 48, 3)\n"
    assert capsys.readouterr().err == told


def test_errors_of_the_script_are_one_line(exported, script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((90, 60, 3), np.uint8)).save("whole.png")
    content = Path("whole.png").read_bytes()
    files = {"cut.png": content[: len(content) // 2], "text.png": b"x", "empty.png": b"", "text.npy": b"x"}
    for name, damaged in files.items():
        Path(name).write_bytes(damaged)
    np.save("scalar.npy", np.uint8(3))
    for name in (*files, "scalar.npy", "none.png", "."):
        monkeypatch.setattr(sys, "argv", ["run.py", name])
        with pytest.raises(SystemExit) as caught:
            script.main()
        error = capsys.readouterr().err
        assert (caught.value.code, error.count("\n")) == (2, 1)
        assert error.startswith(f"error: {name} cannot be read: ")
    odd = os.fsdecode(b"caf\xe9.png")
    Path("whole.png").rename(odd)
    monkeypatch.setattr(sys, "argv", ["run.py", odd])
    script.main()
    printed = capsys.readouterr()
    assert printed.out.startswith("caf\\udce9.png: ")
    assert printed.err.startswith("program dense_b1 ran; --program chooses among dense_b1, dense_b4, tome_r5_b1, ")

    def broken(program):
        raise ValueError("it is\nof another version")

    monkeypatch.setattr(script, "load", broken)
    with pytest.raises(SystemExit):
        script.main()
    assert capsys.readouterr().err == f"error: {script.HERE} is incomplete or damaged (it is): export it again\n"


def odd_images(folder):
    """Write files of 16-bit grey and with EXIF orientations, by name."""
    rng, exif = np.random.default_rng(1), Image.Exif()
    grey = Image.fromarray(rng.integers(0, 65536, (60, 90), np.uint16))
    grey.save(folder / "deep.png")
    grey.save(folder / "deep.tif")
    colour = Image.fromarray(rng.integers(0, 256, (60, 90, 3), np.uint8))
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        colour.save(folder / f"turned{orientation}.png", exif=exif)
    return sorted(folder.glob("*.*"))


@pytest.mark.parametrize("transpose", [False, True])
def test_the_script_reads_odd_images_as_evaluation_does(transpose, script, tmp_path, monkeypatch):
    preprocess = Preprocess((33, 20), exif_transpose=transpose)
    told = preprocess.to_dict() | {"resize_size": preprocess.resize_size}
    monkeypatch.setattr(script, "META", {"preprocess": told})
    counts, pictures = collections.Counter(), []
    for file in odd_images(tmp_path):
        (found,) = script.read(str(file), counts).values()
        np.testing.assert_array_equal(found, preprocess(decode(file.read_bytes(), file.name)))
        pictures.append(found.tobytes())
    assert counts == {"deep": 2, "turned": 0 if transpose else 7}
    assert len(set(pictures)) == (9 if transpose else 2)


def test_the_script_counts_odd_images_once(exported, script, tmp_path, monkeypatch, capsys):
    files = odd_images(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, files), "--program", "dense_b4"])
    script.main()
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(files)
    assert printed.err.splitlines() == [
        "warning: 2 images of 16 bits a pixel scaled to 8 bits",
        "warning: 7 images with an EXIF orientation read unturned, as in evaluation",
    ]


def test_the_script_reports_a_bad_image_in_one_line(script, tmp_path, monkeypatch, capsys):
    buffer = io.BytesIO()
    Image.fromarray(some_images(1)[0]).save(buffer, "JPEG")
    contents = {
        "half.jpg": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "empty.png": b"",
        "text.png": b"no image",
        "text.npy": b"no array",
        "cut.npy": b"\x93NUMPY",
    }
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "float.tif", "none.png", "none.npy", "."):
        monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / name)])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        printed = capsys.readouterr()
        assert stopped.value.code == 2
        assert printed.err.startswith(f"error: {tmp_path / name} cannot be read: ")
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_the_script_ends_quietly_if_its_output_is_not_read(exported, tmp_path):
    np.save(tmp_path / "many.npy", some_images(4))
    many = [str(tmp_path / "many.npy")] * 1000  # their output is more than a pipe holds
    command = [sys.executable, str(exported / "run.py"), *many]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_broken_export_and_a_missing_platform_are_one_line(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    np.save(tmp_path / "one.npy", some_images(1))
    command = [sys.executable, str(tmp_path / "out" / "run.py"), str(tmp_path / "one.npy")]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "nowhere"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: ")
    os.truncate(tmp_path / "out" / "weights.npz", 1000)
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is incomplete or damaged" in done.stderr


def test_arguments_that_do_not_fit_are_reported_and_nothing_is_written(checkpoint, tmp_path):
    out = tmp_path / "out"
    for schedules, batch_sizes, options, told in [
        ("dense", 0, {}, "batch_sizes is .0,.: give at least one, each 1 or more"),
        ("dense", (), {}, "batch_sizes is ..: give at least one"),
        ("dense", 1, {"dtype": "float16"}, "dtype is 'float16': choose one of float32, tf32, bfloat16"),
        ("dense", 1, {"platforms": ["cpu", "gpu"]}, "platforms is 'cpu,gpu': choose some of cpu, cuda, rocm, tpu"),
        ("dense:2", 1, {}, "covers 2 layers, the model has 3"),
        ("dense:1,local:2:r4:w3x3", 1, {}, "a 4x6 grid does not divide into 3x3 windows"),
    ]:
        with pytest.raises(fc.InputError, match=told):
            fc.export(checkpoint, schedules, batch_sizes, out, **options)
    with pytest.raises(fc.InputError, match="there is no such checkpoint directory"):
        fc.export(tmp_path / "nothing", "dense", 1, out)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_written_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    out = fc.export(checkpoint, "dense", 1, tmp_path / "out")
    (out / "__pycache__").mkdir()  # as Python makes when run.py is imported
    with pytest.raises(fc.InputError, match="exists already"):
        fc.export(checkpoint, "tome_r5", 1, out)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", lambda *args, **kwargs: {}["broken"])  # the last file
        with pytest.raises(KeyError):
            fc.export(checkpoint, "tome_r5", 1, out, overwrite=True)
    assert (out / "programs" / "dense_b1.stablehlo").exists()
    fc.export(checkpoint, "tome_r5", 1, out, overwrite=True)
    assert [file.name for file in (out / "programs").iterdir()] == ["tome_r5_b1.stablehlo"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_checkpoint_is_never_overwritten(checkpoint, tmp_path):
    path = save_checkpoint(tmp_path / "vit", CONFIG, checkpoint.params, PREPROCESS)
    with pytest.raises(fc.InputError, match=r"it contains other files \(params\)"):
        fc.export(path, "dense", 1, path, overwrite=True)


def test_the_command_line_reports_mistakes_in_one_line(tmp_path, capsys):
    for flags, told in [
        ("--schedules dense --batch_sizes 1,x", "'1,x' is not a batch size: write 32, or several as 1,32"),
        ("--schedules sparse --batch_sizes 1", "'sparse' is not a schedule"),
        ("--schedules dense --batch_sizes 1 --platforms gpu", "platforms is 'gpu'"),
        ("--batch_sizes 1", "the following arguments are required: --schedules"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main(["packaged:digits", str(tmp_path / "out"), *flags.split()])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert told in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_comes_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "fcvit_jax.export", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "A program runs with the JAX that wrote it" in done.stdout


def test_the_documentation_runs_as_written(tmp_path, monkeypatch):
    source = fc.load_checkpoint("packaged:digits")
    images = some_images(2, source.config)
    monkeypatch.chdir(tmp_path)
    np.save("digits.npy", images)
    Image.fromarray(images[0]).save("digit.png")
    make, *serve = re.findall(r"^    (python .*)", DOCS, flags=re.MULTILINE)
    assert len(serve) == 2
    main(shlex.split(make)[3:])
    for command in serve:
        done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("digit.png: ")
        assert done.stdout.count("%") == 5 * done.stdout.count("\n")
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["logits"].shape == (32, 10)
    wanted, _ = by_the_model(source, "dense", names["images"])
    np.testing.assert_allclose(names["logits"], wanted, rtol=0, atol=1e-5)
