"""benchmarks/inference.py on a tiny checkpoint: its sums, its checks, and Token Merging in PyTorch."""

import csv
import dataclasses
import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

import fcvit_jax as fc
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.data.preprocess import preset
from fcvit_jax.errors import InputError
from fcvit_jax.files import file_name
from fcvit_jax.models.config import Rotary

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # so that scripts can import each other
contenders = importlib.import_module("contenders")
inference = importlib.import_module("inference")

TINY = fc.ViTConfig((64, 64), 16, 48, 2, 3, 96, num_classes=7)
SCHEDULES = "dense,tome_r3,local:1:r4:w2x2,global:1:r3"
DOCS = (ROOT / "docs" / "performance.md").read_text()
COMMANDS = [
    shlex.split(command.replace("\\\n", ""))
    for command in re.findall(r"python benchmarks/inference\.py((?:[^\n`]*\\\n)*[^\n`]+)\n", DOCS)
]


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "tiny"
    fc.save_checkpoint(path, TINY, contenders.random_params(TINY), preset("timm/augreg", (64, 64)))
    return path


@pytest.fixture
def run(checkpoint, monkeypatch, tmp_path):
    """Return a function that runs the benchmark quickly on the tiny checkpoint, and returns its rows."""
    monkeypatch.setitem(contenders.SQUARES, "cpu", (64,))
    quick = ["--batch_sizes", "2", "--blocks", "2", "--block_seconds", "0.01", "--json", str(tmp_path / "rows.jsonl")]

    def run(*flags):
        inference.main(["--checkpoint", str(checkpoint), "--schedules", SCHEDULES, *quick, *flags])
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run


def test_every_contender_gets_a_row_with_its_conditions(run, tmp_path, capsys):
    pytest.importorskip("timm")
    rows = run("--dtypes", "float32,bfloat16", "--peer", "timm", "--plot", str(tmp_path / "bars.png"))
    names = ["dense", "tome_r3", "local:1:r4:w2x2,global:1:r3"]
    expected = [("fcvit_jax", name) for name in names] + [("timm", name) for name in names[:2]]
    for dtype, smallest, largest in (("float32", 0.0, 1e-4), ("bfloat16", 1e-4, 0.2)):
        members = [row for row in rows if row["dtype"] == dtype]
        assert [(row["contender"], row["schedule"]) for row in members] == expected
        rates = {(row["contender"], row["schedule"]): row["images_per_second"] for row in members}
        for row in members:
            schedule = fc.MergeSchedule.parse(row["schedule"], TINY.depth)
            count = fc.flops.executed_gmacs if row["contender"] == "fcvit_jax" else fc.flops.gmacs
            assert row["gmacs"] == fc.flops.gmacs(TINY, schedule)
            assert row["gmacs_cut"] == fc.flops.gmacs(TINY) / row["gmacs"]
            assert row["over_dense"] == rates[row["contender"], row["schedule"]] / rates[row["contender"], "dense"]
            assert row["of_cut"] == pytest.approx(row["over_dense"] / row["gmacs_cut"])
            dense = next(
                each for each in members if (each["contender"], each["schedule"]) == (row["contender"], "dense")
            )
            cut = dense["gmacs_executed"] / row["gmacs_executed"]
            assert row["of_executed_cut"] == pytest.approx(row["over_dense"] / cut)
            assert row["gmacs_executed"] == count(TINY, schedule)
            work = 2 * row["gmacs_executed"] * row["images_per_second"]
            assert row["peak_share"] == pytest.approx(work / row["matmul_gflops"])
            assert smallest <= row["max_difference"] < largest
            assert {"device", "cores", "torch_threads", "malloc", "versions", "date", "batch_size"} <= row.keys()
        assert [row["over_timm"] for row in members[1:3]] == [rates[expected[1]] / rates[expected[4]], None]
        numbers = 2 * 64 * 64 * 3 + sum(leaf.size for leaf in jax.tree.leaves(abstract_params(TINY)))
        for row in members[:3]:
            assert row["compile_seconds"] > 0
            assert 2 * numbers < row["memory_bytes"] < 12 * numbers
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("matmul:") == 2


def test_a_batch_is_spread_over_devices(run):
    rows = run("--devices", "1,2", "--schedules", "dense,tome_r3", "--blocks", "6")
    assert [(row["contender"], row["schedule"], row["devices"]) for row in rows] == [
        ("fcvit_jax", "dense", 1),
        ("fcvit_jax", "tome_r3", 1),
        ("fcvit_jax, 2 devices", "dense", 2),
        ("fcvit_jax, 2 devices", "tome_r3", 2),
    ]
    for whole, spread in zip(rows[:2], rows[2:], strict=True):
        low, high = spread["over_first_interval"]
        assert low <= spread["over_first"] <= high
        assert whole["over_first"] is whole["over_first_interval"] is None
        assert spread["gmacs_executed"] == whole["gmacs_executed"]
        assert spread["memory_bytes"] < whole["memory_bytes"]  # of each device


def test_blocks_are_compared_one_with_its_neighbour():
    rates = [2.0, 4.0, 6.0, 8.0, 10.0, 13.0]
    assert inference.compare_blocks(rates, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, (2.0, 13 / 6))
    assert inference.compare_blocks(rates[:5], [1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, None)


def test_what_a_choice_gains_is_measured_against_the_model_with_all_of_them(tmp_path, capsys):
    tuning = importlib.import_module("tuning")
    named = "the older emitter of loops,softmax divided after its product"
    model = "--models=vit_tiny_patch16_224", "--image_size=32", "--schedules=dense,tome_r1"
    quick = "--batch_sizes=2", "--devices=1", "--blocks=6", "--block_seconds=0.001", f"--json={tmp_path}/rows.jsonl"
    tuning.main([*model, *quick, "--choices", named])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    expected = [(name, choice) for name in ("dense", "tome_r1") for choice in (None, *named.split(","))]
    assert [(row["schedule"], row["without"]) for row in rows] == expected
    for row in rows:
        low, high = row["time_ratio_interval"]
        assert low <= row["time_ratio"] <= high
        assert row["without"] or (low == high == row["compile_ratio"] == 1)
    assert "without softmax divided after its product" in capsys.readouterr().out


def test_a_wrong_peer_is_not_timed_even_if_rounding_would_hide_it(run, monkeypatch, capsys):
    peer = pytest.importorskip("pytorch_tome")
    attend = peer.attend
    monkeypatch.setattr(peer, "attend", lambda attention, x, size: attend(attention, x, None))
    monkeypatch.setitem(contenders.TOLERANCES, "bfloat16", (100.0, 100.0))
    with pytest.raises(SystemExit) as stopped:
        run("--dtypes", "bfloat16", "--peer", "timm", "--schedules", "tome_r3")
    assert stopped.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: tiny at 64x64, batch 2, bfloat16: timm tome_r3 in float32: logits are .* are not timed", told
    )


def test_models_that_torch_cannot_compile_are_reported_and_left_out(run, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")

    def fail(*_, **__):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fail)
    rows = run("--peer", "timm", "--compile", "--schedules", "tome_r3")
    assert [row["contender"] for row in rows] == ["fcvit_jax", "timm"]
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert told.endswith("float32: torch.compile of tome_r3 is left out: RuntimeError: no compiler")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dtypes float16", "error: --dtypes: 'float16' is none of float32, tf32, bfloat16"),
        ("--dtypes tf32", "error: --dtypes: tf32 is a format of NVIDIA GPUs, and there is none here: leave it out"),
        ("--kernels flash", "error: --kernels: 'flash' is none of xla, triton"),
        ("--kernels triton", "error: --kernels: triton requires an NVIDIA GPU and --dtypes bfloat16: leave it out"),
        (
            "--models vit_small_patch14_dinov2 --schedules s2winc7_r8",
            "error: schedule dense:1,local:6:r8:w2x2,global:5:r8",
        ),
        ("--compile", "error: --compile and --peer_schedules: these are PyTorch's: pass --peer timm with them"),
        ("--checkpoint x --image_size 64", "error: --image_size: the checkpoint has its own: leave it out"),
        ("--devices 9", "error: --devices: 9 is not from 1 to 2, the devices available"),
        ("--devices 2 --batch_sizes 8,7", "error: --batch_sizes: 7 images do not spread evenly over 2 devices"),
        ("--blocks 0", "error: --blocks and --block_seconds: both must be positive"),
        ("--models vit", "error: unknown model 'vit'"),
        ("--image_size 0", "error: image_size is (0, 0): it must be 2 whole numbers, 1 or more"),
        ("--batch_sizes x", "error: argument --batch_sizes: 'x' is not a list of positive numbers: write 8,32"),
    ],
)
def test_options_that_cannot_work_are_a_one_line_error(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        inference.main(flags.split())
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(message)


def test_blocks_alternate_and_rates_are_calls_over_seconds(monkeypatch):
    now, order = [0.0], []

    def costing(name, seconds):
        def run(calls):
            order.append((name, calls))
            now[0] += seconds * calls

        return run

    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(inference, "time", clock)
    done = []
    rates = inference.time_blocks([costing("a", 0.5), costing("b", 0.125)], 3, 2.0, lambda: done.append(1))
    np.testing.assert_allclose(rates, [[2.0] * 3, [8.0] * 3])
    assert order[-6:] == [("a", 4), ("b", 16)] * 3
    assert len(done) == 6


def test_the_difference_is_in_standard_deviations_and_a_flipped_merge_may_pass():
    reference = np.tile([[2.0, -2.0]], (4, 1))  # standard deviation 2
    assert contenders.largest_difference("x", reference + 0.001, reference, "float32") == pytest.approx(0.0005)
    one = reference.copy()
    one[3, 0] += 1.0
    assert contenders.largest_difference("x", one, reference, "float32") == 0.5
    two = one.copy()
    two[1, 1] += 1.0
    for wrong in (reference + 0.01, one + (one - reference) * 2, two, np.full_like(reference, np.nan)):
        with pytest.raises(InputError, match="x: logits are"):
            contenders.largest_difference("x", wrong, reference, "float32")


@pytest.mark.parametrize("extra", [{}, {"reg_tokens": 3, "no_embed_class": True}, {"distilled": True}], ids=str)
def test_token_merging_in_pytorch_equals_the_oracle(extra):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    peer = pytest.importorskip("pytorch_tome")
    reference = pytest.importorskip("reference")

    size = dict(img_size=64, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7)
    torch.manual_seed(0)
    if extra.get("distilled"):
        model = timm.models.deit.VisionTransformerDistilled(**size)
    else:
        model = timm.models.vision_transformer.VisionTransformer(**size, **extra)
    model = model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected = reference.merged_forward(model, images, [("dense", 1), ("global", 1, 9), ("global", 1, 40)])
    with torch.inference_mode():
        logits, dense = peer.TokenMerging(model, (0, 9, 27))(images), model(images)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)
    assert ((logits - dense).abs().amax(dim=1) > 0.01).all()


def test_the_commands_of_the_page_are_valid_and_the_one_for_gpus_is_in_the_help():
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        args = inference.parse(command)
        for model in args.models:
            config = fc.zoo.get(model).config
            assert inference.parse_schedules(args.schedules, config.depth)
    command = r"( {4}python benchmarks/inference\.py --models vit_small_patch16_224,vit_base.*?gpu\.png)"
    (told,) = re.findall(command, DOCS, flags=re.DOTALL)
    assert told in str(inference.__doc__)


def test_the_schedules_that_compare_stages_leave_equal_numbers_of_tokens():
    args = inference.parse(COMMANDS[-1])
    config = fc.zoo.get(args.models[0]).config
    _, windows, everywhere = inference.parse_schedules(args.schedules, config.depth).values()
    assert any(layer.windows for layer in windows.plan(config))
    assert not any(layer.windows for layer in everywhere.plan(config))
    assert windows.tokens(config) == everywhere.tokens(config)
    assert fc.flops.gmacs(config, windows) == fc.flops.gmacs(config, everywhere)


def test_rules_are_compared_with_the_first(tmp_path):
    rules = importlib.import_module("rules")
    rules.main(
        f"packaged:digits digits:test --rules tome,nearest(attention=0,size=0) --schedules tome_r24 --limit 32 "
        f"--out {tmp_path}".split()
    )
    table = list(csv.DictReader((tmp_path / "rules.csv").read_text().splitlines()))
    assert [row["rule"] for row in table] == ["tome", "nearest(attention=0,size=0)"]
    assert {"rules.md", "rules.png"} <= {path.name for path in tmp_path.iterdir()}
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    fc.evaluate(
        "packaged:digits", "digits:test", [row["schedule"] for row in results], workdir=tmp_path / "logits", limit=32,
        batch_size=16, save_logits=True, throughput_blocks=0,
    )  # fmt: skip
    files = (tmp_path / "logits" / f"logits_{file_name(row['schedule'])}.npz" for row in results)
    dense, *merged = (np.load(file)["logits"].astype(np.float64) for file in files)
    for row, result, logits in zip(table, results[1:], merged, strict=True):
        assert float(row["KL"]) == pytest.approx(result["kl"])
        logs = log_softmax(dense, axis=1) - log_softmax(logits, axis=1)
        assert (softmax(dense, axis=1) * logs).sum(axis=1).mean() == pytest.approx(result["kl"], rel=1e-3)
    assert float(table[1]["ratio"]) == pytest.approx(float(table[1]["KL"]) / float(table[0]["KL"]), rel=1e-3)
    assert rules.ratio_of_means(np.arange(9.0) * 3, np.arange(9.0)) == pytest.approx((3, 3, 3))


def test_positions_of_merged_tokens_are_compared(tmp_path):
    """Without merging all choices are the dense model; with it they differ."""
    config = dataclasses.replace(TINY, num_classes=10, learned_positions=False, rotary=Rotary())
    fc.save_checkpoint(
        tmp_path / "rotary", config, contenders.random_params(config), preset("timm/augreg", config.image_size)
    )
    flags = ["--schedules", "tome_r0,tome_r6", "--limit", "6", "--out", str(tmp_path / "positions.md")]
    importlib.import_module("positions").main([str(tmp_path / "rotary"), "digits:test", *flags])
    rows = [line.split(" | ") for line in (tmp_path / "positions.md").read_text().splitlines()[2:]]
    assert [row[1] for row in rows] == ["mean", "stays", "angles", "directions", "row-major"] * 2
    values = [float(row[2]) for row in rows]
    assert max(values[:5]) < 1e-9
    assert len(set(values[5:])) == 5
    assert min(values[5:]) > 1e-6
