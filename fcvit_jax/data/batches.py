"""Records to batches of one fixed shape, decoded by threads ahead of their use, and on to the devices.

Threads suffice, because PIL lets others run while it decodes and resizes: what remains for one at a time is a tenth.
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
from fcvit_jax.errors import InputError

Row = tuple[np.ndarray, int | tuple[int, ...], str]  # uint8 [height, width, 3], label or labels, name
Transform = Callable[[Image.Image, np.random.Generator], np.ndarray]  # -> uint8 [height, width, 3]

LOOKAHEAD = 2  # batches that are being decoded while another one is in use
MOST_A_TASK = 16  # images that a thread takes at a time: to hand them over one by one costs a tenth of the speed


class BadImage(InputError):
    """An image that cannot be read or decoded, where such images are not skipped."""


class Batch(NamedTuple):
    """`b` rows of this process; where `mask` is False the row is padding: zeros, and the name is empty.

    A row whose image has no label at all is masked too, but has its pixels and its name. Where an image may have
    several labels (`Source.labels_per_image`), -1 stands behind those it has.
    `skipped` tells why, one message an image, for rows that are padding because their image is bad.
    """

    images: np.ndarray | jax.Array  # uint8 [b, height, width, 3]
    labels: np.ndarray | jax.Array  # int32 [b], or [b, k] with k labels an image
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
    """Every record once and in order, in batches of one shape: the last is padded, and its padding masked.

    Batch k holds the records `k * batch_size` to `(k + 1) * batch_size`; of its rows, this process yields its share, so
    all processes yield equally many batches, and their rows put together are the batch.

    Args:
      batch_size: rows over all processes.
      start: the first batch to yield, for a run that goes on; past the last one, there is none.
      limit: take the first so many records.
      workers: decoding threads, by default as many as cores; where images come slowly, over a network, take more.
      on_bad: as in `train_batches`.

    Raises:
      InputError: at once, if there is nothing to yield or the numbers do not fit; later, in place of the batch that
        holds it, for an image that cannot be decoded (`BadImage`).
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows, skip = _rows(batch_size, process_index, process_count, workers), _skips(on_bad)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not positive")
    if start < 0:
        raise InputError(f"start: {start} is negative")
    if count < 1:
        raise InputError(f"{source.spec}: no records")
    first = [k * batch_size + process_index * rows for k in range(start, math.ceil(count / batch_size))]
    shares = [range(index, max(index, min(index + rows, count))) for index in first]

    def load(index: int) -> Row:
        return _load(source, index, preprocess)

    return _decode_ahead(load, preprocess.image_size, source.labels_per_image, shares, rows, workers, skip)


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
    """Batches of the given steps: each epoch a new permutation, what does not fill a batch at its end left out.

    What step k sees depends on k and the seed alone: not on where `steps` starts, so that a run may be resumed, and not
    on the number of processes, whose rows put together are the batch. What an image becomes depends on the seed, its
    epoch and its index, not on the order of the threads.

    Args:
      transform: an RGB image and a generator to pixels, such as `Augment` with its preprocessing; called by threads.
      image_size: (height, width) of those pixels.
      batch_size: rows over all processes; each yields its share, and reads no more than that.
      workers: decoding threads, by default as many as cores.
      on_bad: what an image does that cannot be read or decoded: `stop` raises; `skip` leaves its row as padding, and
        tells why in `Batch.skipped`.

    Raises:
      InputError: at once, if the data set is smaller than a batch or the numbers do not fit; later, in place of the
        batch that holds it, for a bad image (`BadImage`).
    """
    rows, skip = _rows(batch_size, process_index, process_count, workers), _skips(on_bad)
    if seed < 0:
        raise InputError(f"seed: {seed} is negative")
    if source.labels_per_image > 1:
        raise InputError(f"{source.spec} has several labels an image: it can be evaluated on, not trained on")
    an_epoch = batches_an_epoch(source, batch_size)

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def share(step: int) -> list[tuple[int, int]]:
        epoch, place = divmod(step, an_epoch)
        first = place * batch_size + process_index * rows
        return [(epoch, int(index)) for index in order(epoch)[first : first + rows]]

    def load(item: tuple[int, int]) -> Row:
        epoch, index = item
        return _load(source, index, lambda image: transform(image, np.random.default_rng((seed, epoch, index))))

    return _decode_ahead(load, image_size, 1, map(share, steps), rows, workers, skip)


def batches_an_epoch(source: Source, batch_size: int) -> int:
    """Whole batches, of which there must be one: else it raises InputError."""
    if batch_size > len(source):
        raise InputError(f"batch_size: {batch_size} is more than the {len(source)} images of {source.spec}")
    return len(source) // batch_size


def _skips(on_bad: str) -> bool:
    """Whether bad images are skipped. Raises InputError where the word is another."""
    if on_bad not in ("stop", "skip"):
        raise InputError(f"on_bad: {on_bad!r} is neither stop nor skip")
    return on_bad == "skip"


def _rows(batch_size: int, process_index: int, process_count: int, workers: int | None) -> int:
    """Rows of one process. Raises InputError if the numbers do not fit."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size: {batch_size} is not a positive multiple of {process_count}, the process count")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index: {process_index} is not within 0 and {process_count - 1}")
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not positive")
    return batch_size // process_count


def _load(source: Source, index: int, transform: Callable[[Image.Image], np.ndarray]) -> Row:
    record = source[index]
    image = decode(record.image, record.name)
    try:
        return transform(image), record.label, record.name
    except InputError as error:
        raise InputError(f"image {record.name}: {error}") from error


def _decode_ahead(
    load: Callable[[Any], Row],
    image_size: tuple[int, int],
    labels_per_image: int,
    shares: Iterable[Sequence[Any]],
    rows: int,
    workers: int | None,
    skip: bool = False,
) -> Generator[Batch, None, None]:
    """One batch a share, its items loaded by threads; what is left of `rows`, or skipped, is padding."""

    def load_some(items: Sequence[Any], images: np.ndarray) -> list[tuple[Any, str] | InputError]:
        """Pixels go to their place; labels and names, or errors, come back."""
        told = []
        for item, row in zip(items, images, strict=True):
            try:
                row[:], label, name = load(item)
                told.append((label, name))
            except InputError as error:
                told.append(error)
        return told

    def submit(share: Sequence[Any]) -> tuple[np.ndarray, list[Future]]:
        images = np.zeros((rows, *image_size, 3), np.uint8)
        size = max(1, min(MOST_A_TASK, len(share) // threads))
        parts = [slice(first, min(first + size, len(share))) for first in range(0, len(share), size)]
        return images, [pool.submit(load_some, share[part], images[part]) for part in parts]

    def assemble(images: np.ndarray, tasks: list[Future]) -> Batch:
        several = labels_per_image > 1
        labels = np.full((rows, labels_per_image), -1, np.int32) if several else np.zeros(rows, np.int32)
        mask = np.zeros(rows, np.bool_)
        names, skipped = [""] * rows, []
        for row, told in enumerate(told for task in tasks for told in task.result()):
            if isinstance(told, InputError):
                if not skip:
                    raise BadImage(str(told)) from told
                skipped.append(str(told))
                continue
            label, names[row] = told
            if isinstance(label, tuple):
                labels[row, : len(label)] = label
            else:
                labels[row] = label
            mask[row] = label != ()
        return Batch(images, labels, mask, tuple(names), tuple(skipped))

    threads = workers or max(2, usable_cores())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        pending: deque[tuple[np.ndarray, list[Future]]] = deque()
        for share in shares:
            pending.append(submit(share))
            if len(pending) > LOOKAHEAD:
                yield assemble(*pending.popleft())
        while pending:
            yield assemble(*pending.popleft())
    finally:  # also when the caller breaks off: no thread outlives the loop
        pool.shutdown(cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_batches(
    batches: Iterable[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[Batch, None, None]:
    """The batches with images, labels and mask as global arrays, sharded; transfers run `depth` batches ahead.

    Each process passes its own rows. The names, and what was skipped, stay with their process. What `batches` raises
    comes as early, in place of the batch that is `depth` before.
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
