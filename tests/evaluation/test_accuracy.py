import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fcvit_jax import compiling, parallel
from fcvit_jax.data.batches import device_batches, eval_batches
from fcvit_jax.data.preprocess import preset
from fcvit_jax.data.sources import Record, Source
from fcvit_jax.errors import InputError
from fcvit_jax.evaluation.accuracy import (
    Accuracy,
    StepConfig,
    classify,
    compile_comparison,
    compile_step,
    divergence,
    eval_step,
    measure_accuracy,
)
from fcvit_jax.evaluation.throughput import measure_throughput
from fcvit_jax.evaluation.times import Times
from fcvit_jax.models.config import ViTConfig
from fcvit_jax.models.schedule import MergeSchedule
from fcvit_jax.models.vit import ViT

CONFIG = ViTConfig((16, 16), 4, 16, 3, 2, 32, num_classes=7)
PREPROCESS = preset("timm/augreg,crop_pct=1.0", (16, 16))
SCHEDULES = ("dense", "tome_r3", "s1winc1_r4")


def noise(count, size=16):
    """Make a source of random images with random labels."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 7, count)
    names = tuple(f"class {index}" for index in range(7))
    return Source("noise", names, count, lambda i: Record(pixels[i], int(labels[i]), f"image {i}"))


@pytest.fixture(scope="module")
def params():
    params = jax.jit(ViT(CONFIG).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)])


def mesh_of(count):
    return jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))


def compiled(params, batch_size, count, schedules=SCHEDULES):
    mesh = mesh_of(count)
    params = jax.device_put(params, parallel.replicated(mesh))
    steps = {
        name: compile_step(ViT(CONFIG, MergeSchedule.parse(name, 3)), params, StepConfig(PREPROCESS, mesh, batch_size))
        for name in schedules
    }
    return steps, params, parallel.batched(mesh)


def by_hand(params, source, schedule):
    """Rank the label among the logits, image by image."""
    model = ViT(CONFIG, MergeSchedule.parse(schedule, 3))
    apply = jax.jit(lambda image: model.apply({"params": params}, PREPROCESS.normalize(image[None]))[0][0])
    ranks = []
    for index in range(len(source)):
        record = source[index]
        ranks.append(np.argsort(-np.asarray(apply(record.image)), kind="stable").tolist().index(record.label))
    return sum(rank < 1 for rank in ranks), sum(rank < 5 for rank in ranks)


EIGHT = pytest.param(8, 8, marks=pytest.mark.devices(8))


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 1), (6, 2), (5, 1), EIGHT])
def test_every_image_counts_once_on_any_number_of_devices(params, batch_size, devices):
    source = noise(13)
    steps, placed, rows = compiled(params, batch_size, devices)
    results = measure_accuracy(steps, placed, device_batches(eval_batches(source, PREPROCESS, batch_size), rows))
    for name in SCHEDULES:
        assert (results[name].correct, results[name].correct5) == by_hand(params, source, name)
        assert results[name].num_images == 13
        assert results[name].top1 == results[name].correct / 13


@pytest.mark.parametrize("labels", [np.array([3, 0, 5, 6, 2, 1, 0, 4]), np.array([[3, 0], [5, -1]] * 4)])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_in_parts_has_the_outcome_of_the_whole(params, labels, devices, monkeypatch):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8))
    mask = jnp.asarray([True] * 7 + [False])
    several = labels.shape[1] if labels.ndim > 1 else 1
    labels, model = jnp.asarray(labels, jnp.int32), ViT(CONFIG, MergeSchedule.parse("tome_r3", 3))
    whole, logits = jax.jit(eval_step, static_argnums=(0, 1, 2))(
        model, PREPROCESS, (0, 3, 4, 5), params, images, labels, mask
    )
    monkeypatch.setattr(compiling, "_TOKENS", 2 * devices * CONFIG.num_tokens)
    mesh = mesh_of(devices)
    params = jax.device_put(params, parallel.replicated(mesh))
    step = compile_step(model, params, StepConfig(PREPROCESS, mesh, 8, "float32", (0, 3, 4, 5), several))
    if jax.default_backend() == "cpu":
        assert f"f32[{4 // devices},2,7]" in str(step.call.as_text())  # two images at a time
    found, in_parts = step.call(params, *jax.device_put((images, labels, mask), parallel.batched(mesh)))
    np.testing.assert_allclose(in_parts, logits, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


ROWS = [[3, 1, 2, 0, 0, 0, 0], [1] * 7, [1] * 7, [0, 9, 8, 7, 6, 5, 4], [np.nan] * 7, [3, np.nan, 2, 0, 0, 0, 0]]
MASK = [True, True, True, True, True, False]


class Fixed:
    """A model that always answers the same."""

    def apply(self, variables, images):
        return jnp.asarray(ROWS, jnp.float32), {}


def outcome(labels, scored=None):
    images = jnp.zeros((6, 16, 16, 3), jnp.uint8)
    labels, mask = jnp.asarray(labels, jnp.int32), jnp.asarray(MASK)
    found, logits = eval_step(Fixed(), PREPROCESS, scored, {}, images, labels, mask)  # pyright: ignore
    np.testing.assert_array_equal(logits, np.asarray(ROWS, np.float32))
    return found


def test_ranks_ties_padding_and_numbers_that_are_not_finite():
    found = outcome([0, 0, 1, 0, 0, 0])
    assert found.rank.tolist()[:4] == [0, 0, 1, 6]  # of seven equal logits, class 0 comes first
    assert found.rank.tolist()[5] == -1
    assert found.prediction.tolist()[:4] == [0, 0, 0, 1]
    assert found.finite.tolist() == [True, True, True, True, False, True]
    assert Accuracy.of(np.asarray(found.rank)) == Accuracy(correct=3, correct5=4, num_images=5)


def test_a_prediction_among_some_classes_only():
    found = outcome([2, 5, 5, 5, 2, 2], scored=(5, 2, 6))
    assert found.prediction.tolist()[:4] == [2, 2, 2, 2]
    assert found.rank.tolist()[:4] == [0, 1, 1, 1]


def test_any_of_several_labels_is_right():
    labels = [[2, 0, -1], [6, 4, -1], [3, -1, -1], [0, 6, 2], [0, -1, -1], [0, 1, -1]]
    assert outcome(labels).rank.tolist()[:4] == [0, 4, 3, 1]
    assert outcome(labels, scored=(0, 2, 3, 4, 6)).rank.tolist()[:4] == [0, 3, 2, 0]


def test_divergence_by_hand():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    dense, other = (jnp.log(jnp.asarray([row, row], jnp.float32)) for row in (p, q))
    shifted = jnp.asarray([[0.0], [7.0]], jnp.float32)  # the softmax does not see it
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    np.testing.assert_allclose(divergence(None, dense, other + shifted), [expected] * 2, atol=1e-6)
    np.testing.assert_allclose(divergence(None, other, other + shifted), [0, 0], atol=1e-6)
    # Among classes 0 and 2 alone: 2/3 and 1/3 against 1/3 and 2/3.
    np.testing.assert_allclose(divergence((2, 0), dense, other), [np.log(2) / 3] * 2, atol=1e-6)
    mesh = mesh_of(2)
    spread = jax.device_put([dense, other], parallel.batched(mesh))
    compare = compile_comparison(
        dataclasses.replace(CONFIG, num_classes=3), StepConfig(PREPROCESS, mesh, 2, scored=(0, 2))
    )
    np.testing.assert_allclose(compare(spread[0], spread[1])["kl"], [np.log(2) / 3] * 2, atol=1e-6)
    np.testing.assert_allclose(compare(spread[0], spread[0])["kl"], [0, 0], atol=1e-6)


def test_logits_that_are_not_finite_stop_the_evaluation(params):
    broken = jax.tree.map(lambda x: x * np.float32(np.inf), params)
    steps, placed, rows = compiled(broken, 8, 1, ["dense"])
    with pytest.raises(InputError, match=r"dense: the logits of 8 of 8 images are not finite \(image 0, "):
        measure_accuracy(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 8), rows))


def test_one_compile_a_schedule_and_none_for_later_batches(params):
    compilations = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(kwargs.get("fun_name", event))

    steps, placed, rows = compiled(params, 8, 1)
    batches = device_batches(eval_batches(noise(8), PREPROCESS, 8), rows)
    measure_accuracy(steps, placed, batches)  # compiles small host-side helpers
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.clear_caches()
        steps, placed, rows = compiled(params, 8, 1)
        after_compile = len(compilations)
        assert after_compile >= len(SCHEDULES)
        measure_accuracy(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 8), rows))
        first_batch = len(compilations)
        measure_accuracy(steps, placed, device_batches(eval_batches(noise(40), PREPROCESS, 8), rows))
        assert len(compilations) == first_batch
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("eval_step" in str(name) for name in compilations) == len(SCHEDULES)
    with pytest.raises(TypeError):  # another shape is refused instead of compiling a second program
        measure_accuracy(steps, placed, device_batches(eval_batches(noise(8), PREPROCESS, 4), rows))


def test_one_batch_is_computed_while_another_is_handed_out_and_never_more(params):
    steps, placed, rows = compiled(params, 8, 1)
    log: list[str] = []

    def watched(batches):
        for number, batch in enumerate(batches):
            log.append(f"read {number}")
            yield batch

    spied = {"dense": dataclasses.replace(steps["dense"], call=Spy(steps["dense"].call, lambda: log.append("start")))}
    batches = watched(device_batches(eval_batches(noise(20), PREPROCESS, 8), rows))
    for number, (batch, outcomes, _) in enumerate(classify(spied, placed, batches)):
        assert isinstance(outcomes["dense"].rank, np.ndarray)
        assert batch.names[0] == f"image {8 * number}"
        log.append(f"out {number}")
    assert log == ["read 0", "start", "read 1", "start", "out 0", "read 2", "start", "out 1", "out 2"]


def test_several_cpu_devices_finish_each_program_before_the_next(params, monkeypatch):
    steps, placed, rows = compiled(params, 8, 1, ["dense"])
    batch = next(device_batches(eval_batches(noise(8), PREPROCESS, 8), rows, depth=0))
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda arrays: waited.append(arrays) or arrays)
    assert steps["dense"](placed, batch) is waited[0]
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    steps["dense"](placed, batch)
    assert len(waited) == 1


def test_waiting_is_timed_apart_from_computing(params):
    steps, placed, rows = compiled(params, 8, 1, ["dense"])
    times = Times()

    def late(batches):
        for batch in batches:
            time.sleep(0.1)
            yield batch

    batches = late(device_batches(eval_batches(noise(16), PREPROCESS, 8), rows))
    assert len(list(classify(steps, placed, batches, times=times))) == 2
    assert times.seconds.keys() == {"waiting for data", "computing"}
    assert times.seconds["waiting for data"] >= 0.2


def test_memory_on_the_device_does_not_grow_with_the_images(params):
    steps, placed, rows = compiled(params, 8, 1)
    alive: list[int] = []
    compare = compile_comparison(CONFIG, StepConfig(PREPROCESS, mesh_of(1), 8))
    for _ in classify(steps, placed, device_batches(eval_batches(noise(120), PREPROCESS, 8), rows), compare):
        alive.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(alive) == 15
    assert max(alive[3:12]) == min(alive[3:12])  # in between, as many batches are ahead


class Spy:
    """A compiled program that reports each call."""

    def __init__(self, call, tell):
        self._call, self._tell = call, tell

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
    rates = measure_throughput(spied, placed, batch, blocks=3, block_seconds=0.0)
    assert list(rates) == list(SCHEDULES)
    assert called[2 * len(SCHEDULES) :] == list(SCHEDULES) * 3  # after two calls each to warm up
    assert all(rate.images_per_second > 0 and rate.spread >= 0 for rate in rates.values())


def test_dtype_and_batch_size_are_checked(params):
    model = ViT(CONFIG)
    with pytest.raises(InputError, match="dtype is 'float16'"):
        compile_step(model, params, StepConfig(PREPROCESS, mesh_of(1), 8, "float16"))
    with pytest.raises(InputError, match="batch_size is 13: it must be a positive multiple of the 2 devices"):
        compile_step(model, params, StepConfig(PREPROCESS, mesh_of(2), 13))
    for wrong, nearest in ((1, 2), (0, 2), (-3, 2), (19, 20), (21, 20)):
        with pytest.raises(
            InputError, match=rf"batch_size is {wrong}: .*; the nearest is config\.batch_size={nearest}$"
        ):
            parallel.check_batch_size(wrong, mesh_of(2))
    step = compile_step(model, params, StepConfig(PREPROCESS, mesh_of(1), 8, "bfloat16"))
    assert step.model.dtype == jnp.bfloat16
