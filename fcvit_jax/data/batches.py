"""Records to batches of one fixed shape, decoded by threads ahead of their use, and transferred to the devices.

Threads suffice: PIL releases the interpreter's lock while it decodes and resizes, which is nine tenths of the work.
"""

import functools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from fcvit_jax.data.preprocess import Preprocess, decode
from fcvit_jax.data.records import Source
from fcvit_jax.errors import InputError, naming

Decoded = tuple[np.ndarray, int | tuple[int, ...], str]  # uint8 [height, width, 3], label or labels, name
Transform = Callable[[Image.Image, np.random.Generator], np.ndarray]  # -> uint8 [height, width, 3]

LOOKAHEAD = 2  # batches that are being decoded while another one is in use
MOST_A_TASK = 16  # images per task of a thread: one task per image costs a tenth of the speed


class BadImage(InputError):
    """An image that cannot be read or decoded, and is not to be skipped."""


class Batch(NamedTuple):
    """`b` rows of this process; where `mask` is False the row is padding: zeros, and an empty name.

    An image without any label is masked too, but keeps its pixels and name. If images may have several labels
    (`Source.labels_per_image`), each row is filled up with -1.
    `skipped`: one message per bad image, whose row is padding.
    """

    images: np.ndarray | jax.Array  # uint8 [b, height, width, 3]
    labels: np.ndarray | jax.Array  # int32 [b], or [b, k] with k labels per image
    mask: np.ndarray | jax.Array  # bool [b]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    start: int = 0,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
    on_bad: str = "stop",
) -> Generator[Batch, None, None]:
    """Yield every record once and in order, in batches of one shape: the last is padded, its padding masked.

    Batch k holds the records `k * batch_size` to `(k + 1) * batch_size`. Every process yields its share of the rows of
    each batch; concatenated in the order of the processes they are the batch.

    Args:
      batch_size: rows over all processes.
      start: the first batch to yield, to resume an interrupted run; past the last one, nothing is yielded.
      limit: use only the first so many records.
      workers: decoding threads, by default one per core; use more if images arrive slowly over a network.
      on_bad: what to do about an image that cannot be read or decoded: `stop` raises BadImage in place of the batch;
        `skip` leaves its row as padding and reports it in `Batch.skipped`.

    Raises InputError at once if there is nothing to yield or the numbers do not fit.
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows = _rows(batch_size, process_count, workers, on_bad)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not positive")
    if count < 1:
        raise InputError(f"{source.spec}: no records")
    first = [k * batch_size + process_index * rows for k in range(start, math.ceil(count / batch_size))]
    shares = [range(index, max(index, min(index + rows, count))) for index in first]

    def load(index: int) -> Decoded:
        return _load(source, index, preprocess)

    padding = functools.partial(_padding, rows, preprocess.image_size, source.labels_per_image)
    return _decode_ahead(load, shares, padding, workers, skip=on_bad == "skip")


def train_batches(
    source: Source,
    transform: Transform,
    image_size: tuple[int, int],
    batch_size: int,
    steps: range,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
    on_bad: str = "stop",
) -> Generator[Batch, None, None]:
    """Yield the batches of the given steps: a new permutation each epoch, whose incomplete last batch is dropped.

    Batch k depends on k and the seed alone: not on where `steps` starts, so that a run can be resumed, and not on the
    number of processes, each of which yields its share of the rows. The augmentation of an image depends on the seed,
    its epoch and its index, not on the order of the threads.

    Args:
      transform: maps an RGB image and a generator to pixels; called by threads.
      image_size: (height, width) of those pixels.
      batch_size, workers, on_bad: as in `eval_batches`.

    Raises InputError as `eval_batches` does, and if the data set is smaller than a batch.
    """
    rows = _rows(batch_size, process_count, workers, on_bad)
    if seed < 0:
        raise InputError(f"seed: {seed} is negative")
    if source.labels_per_image > 1:
        raise InputError(f"{source.spec} has several labels per image: it can be evaluated on, not trained on")
    an_epoch = batches_an_epoch(source, batch_size)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def share(step: int) -> list[tuple[int, int]]:
        epoch, place = divmod(step, an_epoch)
        first = place * batch_size + process_index * rows
        return [(epoch, int(index)) for index in order(epoch)[first : first + rows]]

    def load(item: tuple[int, int]) -> Decoded:
        epoch, index = item
        return _load(source, index, lambda image: transform(image, np.random.default_rng((seed, epoch, index))))

    padding = functools.partial(_padding, rows, image_size)
    return _decode_ahead(load, map(share, steps), padding, workers, skip=on_bad == "skip")


def batches_an_epoch(source: Source, batch_size: int) -> int:
    """Count the whole batches of an epoch. Raises InputError if there is none."""
    if batch_size > len(source):
        raise InputError(f"batch_size: {batch_size} is more than the {len(source)} images of {source.spec}")
    return len(source) // batch_size


def _rows(batch_size: int, process_count: int, workers: int | None, on_bad: str) -> int:
    """Rows of one process. Raises InputError if an argument is out of range."""
    if on_bad not in ("stop", "skip"):
        raise InputError(f"on_bad: {on_bad!r} is neither stop nor skip")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size: {batch_size} is not a positive multiple of {process_count}, the process count")
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not positive")
    return batch_size // process_count


def _padding(rows: int, image_size: tuple[int, int], labels_per_image: int = 1) -> Batch:
    several = labels_per_image > 1
    labels = np.full((rows, labels_per_image), -1, np.int32) if several else np.zeros(rows, np.int32)
    return Batch(np.zeros((rows, *image_size, 3), np.uint8), labels, np.zeros(rows, np.bool_), ("",) * rows)


def _load(source: Source, index: int, transform: Callable[[Image.Image], np.ndarray]) -> Decoded:
    record = source[index]
    image = decode(record.image, record.name)
    with naming(f"image {record.name}"):
        return transform(image), record.label, record.name


def _decode_ahead(
    load: Callable[[Any], Decoded],
    shares: Iterable[Sequence[Any]],
    padding: Callable[[], Batch],
    workers: int | None,
    skip: bool,
) -> Generator[Batch, None, None]:
    """Yield one batch per share: threads load its items into a batch of padding."""

    def load_some(items: Sequence[Any], images: Any) -> list[Any]:
        """Write the pixels to their rows; return label and name, or the error, of each item."""
        found: list[Any] = []
        for item, row in zip(items, images, strict=True):
            try:
                row[:], *described = load(item)
                found.append(described)
            except InputError as error:
                found.append(error)
        return found

    def submit(share: Sequence[Any]) -> tuple[Batch, list[Future]]:
        batch, size = padding(), max(1, min(MOST_A_TASK, len(share) // threads))
        parts = [slice(first, min(first + size, len(share))) for first in range(0, len(share), size)]
        return batch, [pool.submit(load_some, share[part], batch.images[part]) for part in parts]

    def assemble(batch: Batch, tasks: list[Future]) -> Batch:
        labels, mask, names, skipped = np.asarray(batch.labels), np.asarray(batch.mask), list(batch.names), []
        for row, found in enumerate(found for task in tasks for found in task.result()):
            if not isinstance(found, InputError):
                label, names[row] = found
                place = (row, slice(len(label))) if isinstance(label, tuple) else row
                labels[place] = label
                mask[row] = label != ()
            elif skip:
                skipped.append(str(found))
            else:
                raise BadImage(str(found)) from found
        return batch._replace(names=tuple(names), skipped=tuple(skipped))

    threads = workers or max(2, usable_cores())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        pending: deque[tuple[Batch, list[Future]]] = deque()
        for share in shares:
            pending.append(submit(share))
            if len(pending) > LOOKAHEAD:
                yield assemble(*pending.popleft())
        while pending:
            yield assemble(*pending.popleft())
    finally:  # also when the caller breaks off: no thread outlives the loop
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_batches(
    batches: Iterable[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yield the batches with images, labels and mask as sharded global arrays, transferred `depth` batches ahead.

    Each process passes its own rows; names and skipped images stay with their process. An error that `batches` raises
    is raised `depth` batches early.
    """
    pending: deque[Batch] = deque()
    try:
        for batch in batches:
            arrays = (jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for rows in batch[:3])
            pending.append(Batch(*arrays, names=batch.names, skipped=batch.skipped))
            if len(pending) > depth:
                yield pending.popleft()
        yield from pending
    finally:
        if close := getattr(batches, "close", None):
            close()
