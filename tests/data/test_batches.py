"""Batches: every record once, in order, in one shape, on every number of processes; and no thread left behind."""

import io
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from fcvit_jax.data.batches import LOOKAHEAD, Batch, device_batches, eval_batches, train_batches
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.errors import InputError

SMALL = Preprocess((4, 6), 1.0)


def source_of(count: int, broken: int | None = None, seen: list[int] | None = None) -> Source:
    """Record i is a PNG of one colour, i + 1, with label 100 + i; `seen` notes which were read."""

    def read(i: int) -> Record:
        if seen is not None:
            seen.append(i)
        buffer = io.BytesIO()
        Image.new("RGB", (9, 7), (i + 1, 0, 255)).save(buffer, "PNG")
        data = buffer.getvalue()
        return Record(data[:40] if i == broken else data, 100 + i, f"record-{i}")

    return Source(f"test:{count}", ("class",) * 200, count, read)


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_every_record_once_in_order_and_padding_masked():
    batches = list(eval_batches(source_of(13), SMALL, 8))
    assert len(batches) == 2
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((8, 4, 6, 3), np.uint8)
        assert (batch.labels.shape, batch.labels.dtype) == ((8,), np.int32)
        assert (batch.mask.shape, batch.mask.dtype) == ((8,), np.bool_)
        assert len(batch.names) == 8
    images, labels, mask = (np.concatenate(rows) for rows in list(zip(*batches, strict=True))[:3])
    assert mask.tolist() == [True] * 13 + [False] * 3
    assert labels[:13].tolist() == list(range(100, 113))
    assert images[:13, 2, 3].tolist() == [[i + 1, 0, 255] for i in range(13)]
    assert not images[13:].any()
    assert batches[1].names == (*(f"record-{i}" for i in range(8, 13)), "", "", "")
    assert decoding_threads() == []


@pytest.mark.parametrize("batch_size", [1, 5, 13, 64])
def test_masked_count_is_the_number_of_records(batch_size):
    batches = list(eval_batches(source_of(13), SMALL, batch_size))
    assert sum(int(batch.mask.sum()) for batch in batches) == 13
    assert {batch.images.shape[0] for batch in batches} == {batch_size}


@pytest.mark.parametrize("process_count", [2, 4, 8])
@pytest.mark.parametrize("count", [13, 16, 9])
def test_processes_put_together_give_the_same_batches(process_count, count):
    whole = list(eval_batches(source_of(count), SMALL, 8))
    parts = [
        list(eval_batches(source_of(count), SMALL, 8, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    assert [len(part) for part in parts] == [len(whole)] * process_count
    for batch, rows in zip(whole, zip(*parts, strict=True), strict=True):
        assert {row.images.shape[0] for row in rows} == {8 // process_count}
        for field in ("images", "labels", "mask"):
            np.testing.assert_array_equal(
                np.concatenate([getattr(row, field) for row in rows]), getattr(batch, field), err_msg=field
            )
        assert sum((row.names for row in rows), ()) == batch.names


def test_limit_takes_the_first_records():
    seen: list[int] = []
    batches = list(eval_batches(source_of(13, seen=seen), SMALL, 4, limit=5))
    assert [name for batch in batches for name in batch.names if name] == [f"record-{i}" for i in range(5)]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert sum(int(batch.mask.sum()) for batch in eval_batches(source_of(3), SMALL, 4, limit=99)) == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers):
    expected = list(eval_batches(source_of(7), SMALL, 4))
    for batch, other in zip(expected, eval_batches(source_of(7), SMALL, 4, workers=workers), strict=True):
        np.testing.assert_array_equal(batch.images, other.images)
        assert batch.names == other.names


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "test:0: no records"),
        (5, {"batch_size": 0}, "batch_size: 0 is not a positive multiple of 1"),
        (5, {"process_count": 3}, "batch_size: 4 is not a positive multiple of 3, the process count"),
        (5, {"process_count": 2, "process_index": 2}, "process_index: 2 is not within 0 and 1"),
        (5, {"limit": 0}, "limit: 0 is not positive"),
        (5, {"workers": 0}, "workers: 0 is not positive"),
    ],
)
def test_bad_numbers_are_told_at_once(count, options, message):
    with pytest.raises(InputError, match=message):
        eval_batches(source_of(count), SMALL, **{"batch_size": 4, **options})


def test_a_broken_image_surfaces_in_place_of_its_batch():
    batches = eval_batches(source_of(20, broken=9), SMALL, 4)
    assert [next(batches).names[0] for _ in range(2)] == ["record-0", "record-4"]
    with pytest.raises(InputError, match="image record-9 cannot be decoded"):
        next(batches)
    assert decoding_threads() == []


def test_look_ahead_is_bounded():
    seen: list[int] = []
    batches = eval_batches(source_of(100, seen=seen), SMALL, 4)
    time.sleep(0.05)
    assert seen == []  # nothing is read before it is asked for
    for used in (1, 2, 3):
        next(batches)
        ahead = 4 * (used + LOOKAHEAD)
        deadline = time.monotonic() + 5
        while len(seen) < ahead and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)  # time enough to read too much
        assert sorted(seen) == list(range(ahead))
    batches.close()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("wrap", [lambda batches: batches, lambda batches: device_batches(batches, on_devices())])
def test_breaking_off_leaves_no_threads(wrap):
    seen: list[int] = []
    decoded = eval_batches(source_of(1000, seen=seen), SMALL, 80, workers=3)  # held on to: closing must do it
    batches = wrap(decoded)
    next(batches)
    assert len(decoding_threads()) == 3
    read = len(seen)
    batches.close()
    assert decoding_threads() == []
    assert len(seen) <= read + 10  # what waited was dropped, not decoded


def on_devices() -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))


def test_device_batches_are_sharded_and_equal():
    host = list(eval_batches(source_of(13), SMALL, 8))
    device = list(device_batches(host, on_devices()))
    assert len(device) == 2
    for ours, theirs in zip(device, host, strict=True):
        assert ours.names == theirs.names
        for array, expected in zip(ours[:3], theirs[:3], strict=True):
            assert isinstance(array, jax.Array)
            assert array.dtype == expected.dtype
            assert len(array.addressable_shards) == 8
            assert array.addressable_shards[3].data.shape == (1, *expected.shape[1:])
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_device_batches_run_that_far_ahead(depth):
    made = []

    def make() -> Iterator[Batch]:
        for batch in eval_batches(source_of(80), SMALL, 8):
            made.append(batch.names[0])
            yield batch

    batches = device_batches(make(), on_devices(), depth)
    for used in (1, 2):
        assert next(batches).names[0] == f"record-{8 * (used - 1)}"
        assert len(made) == used + depth
    assert [batch.names[0] for batch in batches] == [f"record-{i}" for i in range(16, 80, 8)]


def test_digits_and_photos_go_through_the_same_path(clothing_test):
    digits = next(eval_batches(open_source("digits:test"), Preprocess((8, 8), 1.0), 4))
    first = open_source("digits:test")[0]
    np.testing.assert_array_equal(digits.images[0], first.image)  # 8x8 to 8x8: not a pixel changes
    assert digits.names[0] == first.name
    photos = open_source(f"folder:{clothing_test}")
    (batch,) = eval_batches(photos, Preprocess((32, 32)), 6, limit=6)
    image = Image.open(clothing_test / photos[5].name).convert("RGB")
    np.testing.assert_array_equal(batch.images[5], Preprocess((32, 32))(image))


def test_training_batches_depend_on_step_and_seed_alone():
    source = source_of(13)
    steps = lambda *span, seed=3, workers=2: [  # noqa: E731
        (batch.names, np.asarray(batch.images))
        for batch in train_batches(source, SMALL, 4, range(*span), seed, jitter, workers)
    ]
    whole = steps(9)
    assert [names for names, _ in whole[5:]] == [names for names, _ in steps(5, 9)]
    for (_, images), (_, again) in zip(whole, steps(9, workers=1), strict=True):
        np.testing.assert_array_equal(images, again)
    assert [names for names, _ in whole] != [names for names, _ in steps(9, seed=4)]
    # Three batches an epoch: twelve different records, one left out; another order and other pixels in the next.
    first, second = ([name for names, _ in whole[start : start + 3] for name in names] for start in (0, 3))
    assert len({*first}) == len({*second}) == 12
    assert first != second
    with pytest.raises(InputError, match="more than the 13 images"):
        train_batches(source, SMALL, 14, range(1), 0)


def jitter(pixels, rng):
    return (pixels + rng.integers(0, 50)).astype(np.uint8)


def test_a_strip_that_would_take_all_memory_is_refused_by_name():
    thin = Source("thin", ("class",), 1, lambda i: Record(np.zeros((20_000, 1, 3), np.uint8), 0, "thin.png"))
    with pytest.raises(InputError, match=r"image thin\.png: it is 1x20000 and would be resized to 248x4960000"):
        next(eval_batches(thin, Preprocess((224, 224), 0.9), 1))
