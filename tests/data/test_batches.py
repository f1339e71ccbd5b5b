"""Batches: every record once, in order, in one shape, on any number of processes; and no thread is left running."""

import io
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from fcvit_jax.data.augment import Augment
from fcvit_jax.data.batches import LOOKAHEAD, MOST_A_TASK, BadImage, Batch, device_batches, eval_batches, train_batches
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.sources import Record, Source, open_source
from fcvit_jax.errors import InputError

SMALL = Preprocess((4, 6), 1.0)


def source_of(count: int, broken: int | None = None, seen: list[int] | None = None) -> Source:
    """Make a source whose record i is a PNG of one colour, i + 1, with label 100 + i; `seen` notes reads."""

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


@pytest.mark.parametrize("process_count", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4, 9])
def test_starting_later_gives_the_same_batches(start, process_count):
    for index in range(process_count):
        seen: list[int] = []
        of = {"process_index": index, "process_count": process_count}
        whole = list(eval_batches(source_of(13), SMALL, 4, **of))
        assert len(whole) == 4
        assert_equal(list(eval_batches(source_of(13, seen=seen), SMALL, 4, start=start, **of)), whole[start:])
        assert all(i >= 4 * start for i in seen)
    limited = list(eval_batches(source_of(13), SMALL, 4, start=1, limit=6))
    assert [name for batch in limited for name in batch.names] == ["record-4", "record-5", "", ""]


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
        (5, {"limit": 0}, "limit: 0 is not positive"),
        (5, {"workers": 0}, "workers: 0 is not positive"),
    ],
)
def test_bad_numbers_are_reported_at_once(count, options, message):
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
    assert seen == []  # nothing is read before it is requested
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
    decoded = eval_batches(source_of(1000, seen=seen), SMALL, 80, workers=3)  # referenced: only closing may end it
    batches = wrap(decoded)
    next(batches)
    assert len(decoding_threads()) == 3
    read = len(seen)
    batches.close()
    assert decoding_threads() == []
    assert len(seen) <= read + 3 * MOST_A_TASK  # waiting records were dropped, not decoded


def on_devices() -> NamedSharding:
    return NamedSharding(jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))


def test_device_batches_are_sharded_and_equal():
    host = list(eval_batches(source_of(13), SMALL, 8))
    device = list(device_batches(host, on_devices()))
    assert len(device) == 2
    for ours, theirs in zip(device, host, strict=True):
        assert ours.names == theirs.names
        for array, expected in zip(ours[:3], theirs[:3], strict=True):
            assert isinstance(array, jax.Array)
            assert array.dtype == expected.dtype
            assert len(array.addressable_shards) == 2
            assert array.addressable_shards[1].data.shape == (4, *expected.shape[1:])
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_images_before_a_bad_one_come_first(depth):
    batches = device_batches(eval_batches(source_of(13, broken=9), SMALL, 2), on_devices(), depth)
    assert [next(batches).names[0] for _ in range(4)] == [f"record-{i}" for i in (0, 2, 4, 6)]
    with pytest.raises(BadImage, match="record-9"):
        next(batches)
    assert decoding_threads() == []


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


def jitter(image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    return (SMALL(image) // 2 + rng.integers(0, 100, (4, 6, 3))).astype(np.uint8)


def train(count=13, batch_size=4, steps=range(9), seed=3, transform=jitter, source=None, **options) -> list[Batch]:
    return list(train_batches(source or source_of(count), transform, (4, 6), batch_size, steps, seed, **options))


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    for batch, other in zip(ours, theirs, strict=True):
        assert (batch.names, batch.skipped) == (other.names, other.skipped)
        for array, expected in zip(batch[:3], other[:3], strict=True):
            np.testing.assert_array_equal(array, expected)
            assert array.dtype == expected.dtype


def test_an_epoch_is_a_permutation_cut_to_whole_batches():
    batches = train()
    assert all(batch.mask.all() and batch.skipped == () for batch in batches)
    # Three batches an epoch: twelve different records, one left out. The next epoch has another order and other pixels.
    first, second = ([name for batch in batches[k : k + 3] for name in batch.names] for k in (0, 3))
    assert len({*first}) == len({*second}) == 12
    assert first != second
    order = [*np.random.default_rng((3, 0)).permutation(13)[:12], *np.random.default_rng((3, 1)).permutation(13)[:12]]
    assert first + second == [f"record-{i}" for i in order]
    assert [label for batch in batches[:6] for label in np.asarray(batch.labels)] == [100 + i for i in order]
    row, again = first.index("record-5"), second.index("record-5")
    assert (batches[row // 4].images[row % 4] != batches[3 + again // 4].images[again % 4]).any()


def test_pixels_depend_on_seed_epoch_and_index():
    (batch,) = train(steps=range(7, 8))  # the third epoch's second
    source, index = source_of(13), np.random.default_rng((3, 2)).permutation(13)[4]
    data = source[index].image
    assert isinstance(data, bytes)
    expected = jitter(Image.open(io.BytesIO(data)), np.random.default_rng((3, 2, index)))
    np.testing.assert_array_equal(batch.images[0], expected)


@pytest.mark.parametrize("start", [1, 4, 8])
def test_training_resumes_anywhere(start):
    assert_equal(train(steps=range(start, 9)), train()[start:])


@pytest.mark.parametrize("workers", [1, 3])
def test_training_workers_change_nothing(workers):
    assert_equal(train(workers=workers), train())


def test_training_seeds_differ():
    assert [batch.names for batch in train()] != [batch.names for batch in train(seed=4)]


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
@pytest.mark.parametrize("process_count", [2, 4])
def test_training_processes_put_together_give_the_same_batches(process_count, on_bad):
    broken = 6 if on_bad == "skip" else None
    whole = train(source=source_of(13, broken), on_bad=on_bad)
    seen: list[list[int]] = [[] for _ in range(process_count)]
    parts = [
        train(source=source_of(13, broken, seen[p]), process_index=p, process_count=process_count, on_bad=on_bad)
        for p in range(process_count)
    ]
    joined = [
        Batch(
            *(np.concatenate([row[field] for row in rows]) for field in range(3)),
            names=sum((row.names for row in rows), ()),
            skipped=sum((row.skipped for row in rows), ()),
        )
        for rows in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)
    assert [len(read) for read in seen] == [9 * 4 // process_count] * process_count  # only its own records


def test_a_broken_training_image_stops_in_place_of_its_batch():
    place = np.random.default_rng((3, 0)).permutation(13).tolist().index(6)
    batches = train_batches(source_of(13, broken=6), jitter, (4, 6), 4, range(9), 3)
    assert all(next(batches).mask.all() for _ in range(place // 4))
    with pytest.raises(BadImage, match="image record-6 cannot be decoded"):
        next(batches)
    assert decoding_threads() == []


def test_a_broken_training_image_is_skipped_and_reported():
    sound, batches = train(), train(source=source_of(13, broken=6), on_bad="skip")
    skipped = 0
    for expected, batch in zip(sound, batches, strict=True):
        bad = [name == "record-6" for name in expected.names]
        assert batch.mask.tolist() == [not skip for skip in bad]
        assert batch.names == tuple("" if skip else name for name, skip in zip(expected.names, bad, strict=True))
        assert not batch.images[bad].any()
        assert not batch.labels[bad].any()
        np.testing.assert_array_equal(batch.images[batch.mask], expected.images[batch.mask])
        assert [message[: len("image record-6 ")] for message in batch.skipped] == ["image record-6 "] * sum(bad)
        skipped += len(batch.skipped)
    assert skipped == sum("record-6" in batch.names for batch in sound) > 0
    device = list(device_batches(train(batch_size=8, source=source_of(9, broken=6), on_bad="skip"), on_devices()))
    assert sum(len(batch.skipped) for batch in device) == 9 * 8 - sum(int(batch.mask.sum()) for batch in device) > 0


def test_refusals_of_a_transform_are_reported_by_name_and_its_bugs_are_not_skipped():
    def refuse(image, rng):
        raise InputError("it is a strip")

    def crash(image, rng):
        raise ZeroDivisionError

    with pytest.raises(BadImage, match=r"image record-\d+: it is a strip"):
        train(transform=refuse)
    (batch,) = train(transform=refuse, on_bad="skip", steps=range(1))
    assert len(batch.skipped) == 4
    assert not batch.mask.any()
    with pytest.raises(ZeroDivisionError):
        train(transform=crash, on_bad="skip")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 14}, "batch_size: 14 is more than the 13 images of test:13"),
        ({"batch_size": 0}, "batch_size: 0 is not a positive multiple of 1"),
        ({"process_count": 3}, "batch_size: 4 is not a positive multiple of 3, the process count"),
        ({"workers": 0}, "workers: 0 is not positive"),
        ({"on_bad": "ignore"}, "on_bad: 'ignore' is neither stop nor skip"),
        ({"seed": -1}, "seed: -1 is negative"),
    ],
)
def test_bad_training_numbers_are_reported_at_once(options, message):
    with pytest.raises(InputError, match=message):
        train_batches(source_of(13), jitter, (4, 6), **{"batch_size": 4, "steps": range(1), "seed": 0, **options})


def test_photos_are_augmented(clothing_test):
    augment, preprocess = Augment(policy="rand-m9-mstd0.5-inc1", erase=0.25), Preprocess((64, 48))
    photos = open_source(f"folder:{clothing_test}")
    transform = lambda image, rng: augment(image, preprocess, rng)  # noqa: E731
    first, again = (list(train_batches(photos, transform, (64, 48), 8, range(2), 0, workers=w)) for w in (1, 3))
    assert_equal(first, again)
    assert first[0].images.shape == (8, 64, 48, 3)


def test_a_strip_that_would_take_all_memory_is_refused_by_name():
    thin = Source("thin", ("class",), 1, lambda i: Record(np.zeros((20_000, 1, 3), np.uint8), 0, "thin.png"))
    with pytest.raises(InputError, match=r"image thin\.png: it is 1x20000 and would be resized to 248x4960000"):
        next(eval_batches(thin, Preprocess((224, 224), 0.9), 1))
