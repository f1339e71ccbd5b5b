import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax import parallel
from fcvit_jax.checkpoint import abstract_params
from fcvit_jax.data.batches import device_batches, eval_batches
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import compile_step, eval_step, evaluate
from fcvit_jax.evaluation.logits import LogitsWriter, file_name
from fcvit_jax.evaluation.throughput import measure_throughput
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT, ViTConfig

CONFIG = ViTConfig((16, 16), 4, 16, 3, 2, 32, num_classes=7)
PREPROCESS = preset("timm/augreg,crop_pct=1.0", (16, 16))
SCHEDULES = ("dense", "tome_r3", "s1winc1_r4")


def noise(count, size=16):
    """A source of random images, each with a label of its own draw."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 7, count)
    names = tuple(f"class {index}" for index in range(7))
    return Source("noise", names, count, lambda i: Record(pixels[i], int(labels[i]), f"image {i}"))


@pytest.fixture(scope="module")
def params():
    params = ViT(CONFIG).init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


def mesh_of(count):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def compiled(params, batch_size, count, schedules=SCHEDULES):
    mesh = mesh_of(count)
    params = jax.device_put(params, parallel.replicated(mesh))
    steps = {
        name: compile_step(ViT(CONFIG, MergeSchedule.parse(name, 3)), PREPROCESS, params, batch_size, mesh)
        for name in schedules
    }
    return steps, params, parallel.batched(mesh)


def by_hand(params, source, schedule):
    """Image by image: the place of the label in the order of the logits."""
    model = ViT(CONFIG, MergeSchedule.parse(schedule, 3))
    apply = jax.jit(lambda image: model.apply({"params": params}, PREPROCESS.normalize(image[None]))[0][0])
    ranks = []
    for index in range(len(source)):
        record = source[index]
        ranks.append(np.argsort(-np.asarray(apply(record.image)), kind="stable").tolist().index(record.label))
    return sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks)


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 1), (8, 8), (16, 8), (5, 1)])
def test_every_image_counts_once_on_any_number_of_devices(params, batch_size, devices):
    source = noise(13)
    steps, placed, rows = compiled(params, batch_size, devices)
    results = evaluate(steps, placed, device_batches(eval_batches(source, PREPROCESS, batch_size), rows))
    for name in SCHEDULES:
        assert (results[name].correct, results[name].correct5) == by_hand(params, source, name)
        assert results[name].num_images == 13
        assert results[name].top1 == results[name].correct / 13


def test_ranks_ties_padding_and_numbers_that_are_not_finite():
    rows = [[3, 1, 2, 0, 0, 0, 0], [1] * 7, [1] * 7, [0, 9, 8, 7, 6, 5, 4], [np.nan] * 7, [3, 1, 2, 0, 0, 0, 0]]
    logits = jnp.asarray(rows, jnp.float32)

    class Fixed:
        def apply(self, variables, images):
            return logits, {}

    labels = jnp.asarray([0, 0, 1, 0, 0, 0], jnp.int32)
    mask = jnp.asarray([True, True, True, True, True, False])
    images = jnp.zeros((6, 16, 16, 3), jnp.uint8)
    totals, _ = eval_step(Fixed(), PREPROCESS, {}, jnp.ones(4, jnp.int32), images, labels, mask)  # pyright: ignore
    # Right: the first and, of seven equal logits, class 0; in the first five also the second of the seven.
    assert totals.tolist() == [1 + 2, 1 + 3, 1 + 5, 1 + 1]


def test_logits_that_are_not_finite_stop_the_evaluation(params):
    broken = jax.tree.map(lambda x: x * np.float32(np.inf), params)
    steps, placed, rows = compiled(broken, 8, 1, ["dense"])
    with pytest.raises(InputError, match="dense: the logits of 8 of 8 images are not finite"):
        evaluate(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 8), rows))


def test_one_compile_a_schedule_and_none_for_later_batches(params):
    compilations = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(kwargs.get("fun_name", event))

    steps, placed, rows = compiled(params, 8, 1)
    evaluate(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 8), rows))  # small host-side helpers
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.clear_caches()
        steps, placed, rows = compiled(params, 8, 1)
        after_compile = len(compilations)
        assert after_compile >= len(SCHEDULES)
        evaluate(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 8), rows))
        first_batch = len(compilations)
        evaluate(steps, placed, device_batches(eval_batches(noise(40), PREPROCESS, 8), rows))
        assert len(compilations) == first_batch
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("eval_step" in str(name) for name in compilations) == len(SCHEDULES)
    with pytest.raises(TypeError):  # another shape cannot compile a second program: it is refused
        evaluate(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 4), rows))


def test_a_batch_is_computed_before_the_next_is_asked_for():
    # Otherwise the host runs ahead, and batches and logits pile up on the device.
    config = ViTConfig((64, 64), 4, 128, 4, 2, 512, num_classes=7)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(config))
    step = compile_step(ViT(config), preset("timm/augreg", (64, 64)), params, 64, mesh_of(1))
    computed: list[bool] = []

    def on_batch(batch: Any, logits: Any) -> None:
        computed.append(logits["dense"].is_ready())

    rows = parallel.batched(mesh_of(1))
    batches = device_batches(eval_batches(noise(128, 64), preset("timm/augreg", (64, 64)), 64), rows)
    evaluate({"dense": step}, params, batches, on_batch)
    assert computed == [True, True]


def test_saved_logits_are_those_of_the_model(params, tmp_path):
    source = noise(13)
    steps, placed, rows = compiled(params, 8, 8)
    with LogitsWriter(tmp_path, steps, 13, 7) as writer:
        evaluate(steps, placed, device_batches(eval_batches(source, PREPROCESS, 8), rows), writer.add)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"logits_{name}.npz" for name in sorted(SCHEDULES)]
    for name in SCHEDULES:
        saved = np.load(tmp_path / f"logits_{name}.npz", allow_pickle=False)
        model = ViT(CONFIG, MergeSchedule.parse(name, 3))
        pixels = np.stack([np.asarray(source[index].image) for index in range(13)])
        expected, _ = model.apply({"params": params}, PREPROCESS.normalize(pixels))
        np.testing.assert_allclose(saved["logits"], expected, atol=1e-4)
        assert saved["labels"].tolist() == [source[index].label for index in range(13)]
        assert saved["names"].tolist() == [f"image {index}" for index in range(13)]
        assert (saved["logits"].argmax(1) == saved["labels"]).sum() == by_hand(params, source, name)[0]


def test_an_interrupted_evaluation_leaves_no_logits(tmp_path):
    with pytest.raises(KeyError), LogitsWriter(tmp_path, ["dense"], 13, 7):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert file_name("dense:2,local:5:r16:w2x2") == "dense-2-local-5-r16-w2x2"


class Spy:
    """A compiled program that tells when it is called."""

    def __init__(self, call, tell):
        self._call, self._tell = call, tell
        self.input_shardings = call.input_shardings

    def __call__(self, *args):
        self._tell()
        return self._call(*args)


def test_throughput_alternates_and_is_positive(params):
    steps, placed, rows = compiled(params, 8, 1)
    batch = next(device_batches(eval_batches(noise(8), PREPROCESS, 8), rows, depth=0))
    called = []

    def spy(name, step):
        return dataclasses.replace(step, call=Spy(step.call, lambda: called.append(name)))

    spied = {name: spy(name, step) for name, step in steps.items()}
    blocks = []
    rates = measure_throughput(
        spied, placed, batch, blocks=3, block_seconds=0.0, on_block=lambda: blocks.append(called[-1])
    )
    assert list(rates) == list(SCHEDULES)
    assert blocks == list(SCHEDULES) * 3
    assert all(rate.images_per_second > 0 and rate.spread >= 0 for rate in rates.values())


def test_dtype_and_batch_size_are_checked(params):
    model = ViT(CONFIG)
    with pytest.raises(InputError, match="dtype is 'float16'"):
        compile_step(model, PREPROCESS, params, 8, mesh_of(1), "float16")
    with pytest.raises(InputError, match="batch_size is 12: it must be a positive multiple of the 8 devices"):
        compile_step(model, PREPROCESS, params, 12, mesh_of(8))
    step = compile_step(model, PREPROCESS, params, 8, mesh_of(1), "bfloat16")
    assert step.model.dtype == jnp.bfloat16
