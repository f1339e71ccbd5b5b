"""Records to batches of one fixed shape, decoded by threads ahead of their use, and transferred to the devices.

Threads suffice: PIL releases the interpreter's lock while it decodes and resizes, which is nine tenths of the work.
"""

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from fcvit_jax.data.preprocess import Preprocess, decode
from fcvit_jax.data.records import Source
from fcvit_jax.errors import InputError, naming
from fcvit_jax.parallel import usable_cores

Key = tuple[int, ...]  # of an image to be loaded: its record's index, after the seed and the epoch in training

LOOKAHEAD = 2  # batches that are being decoded while another one is in use
MOST_A_TASK = 16  # images per task of a thread: one task per image costs a tenth of the speed


class BadImage(InputError):
    """An image that cannot be read or decoded, and must not be skipped."""


class Batch(NamedTuple):
    """`b` rows of this process. A row whose `mask` is False is padding: zeros, and an empty name.

    An image without any label is masked too, but keeps its pixels and name. Rows of several labels are filled up with
    -1. `skipped`: one message per bad image, whose row is padding. `oddities`: kinds of `preprocess.ODDITIES`, one
    entry per odd image.
    """

    images: np.ndarray | jax.Array  # uint8 [b, height, width, 3]
    labels: np.ndarray | jax.Array  # int32 [b], or [b, k] with k labels per image
    mask: np.ndarray | jax.Array  # bool [b]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()


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

    Every process yields its share of the rows of each batch; concatenated in the order of the processes they are the
    batch.

    Args:
      batch_size: rows over all processes.
      start: the first batch to yield; past the last one, nothing is yielded.
      limit: use only the first `limit` records.
      workers: decoding threads, by default one per core; use more if images arrive slowly over a network.
      on_bad: for an image that cannot be read or decoded, `stop` raises BadImage in place of the batch; `skip` leaves
        its row as padding and reports it in `Batch.skipped`.

    Raises InputError at once if there is nothing to yield or the numbers do not fit.
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows = _rows(batch_size, process_count, workers, on_bad)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not positive")
    if count < 1:
        raise InputError(f"{source.spec}: no records")
    first = (k * batch_size + process_index * rows for k in range(start, math.ceil(count / batch_size)))
    shares = ([(index,) for index in range(row, min(row + rows, count))] for row in first)
    shape = (rows, *preprocess.image_size, 3)
    return _decode_ahead(source, lambda image, key: preprocess(image), shares, shape, workers, on_bad)


def train_batches(
    source: Source,
    transform: Callable[[Image.Image, np.random.Generator], np.ndarray],
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

    Batch k depends on k and the seed alone, so that a run can be resumed on another number of processes. Each process
    yields its share of the rows. An image's augmentation depends on the seed, its epoch and its index.

    Args:
      transform: maps an RGB image and a generator to pixels; called by threads.
      image_size: (height, width) of those pixels.

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

    def share(step: int) -> list[Key]:
        epoch, place = divmod(step, an_epoch)
        first = place * batch_size + process_index * rows
        return [(seed, epoch, int(index)) for index in order(epoch)[first : first + rows]]

    def augment(image: Image.Image, key: Key) -> np.ndarray:
        return transform(image, np.random.default_rng(key))

    return _decode_ahead(source, augment, map(share, steps), (rows, *image_size, 3), workers, on_bad)


def batches_an_epoch(source: Source, batch_size: int) -> int:
    """Count the whole batches of an epoch. Raises InputError if there is none."""
    if batch_size > len(source):
        raise InputError(f"batch_size: {batch_size} is more than the {len(source)} images of {source.spec}")
    return len(source) // batch_size


def _rows(batch_size: int, process_count: int, workers: int | None, on_bad: str) -> int:
    """Count the rows of one process. Raises InputError if an argument is out of range."""
    if on_bad not in ("stop", "skip"):
        raise InputError(f"on_bad: {on_bad!r} is neither stop nor skip")
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size: {batch_size} is not a positive multiple of {process_count}, the process count")
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not positive")
    return batch_size // process_count


def _decode_ahead(
    source: Source,
    transform: Callable[[Image.Image, Key], np.ndarray],
    shares: Iterable[list[Key]],
    shape: tuple[int, ...],
    workers: int | None,
    on_bad: str,
) -> Generator[Batch, None, None]:
    """Yield one batch per share, loaded by threads; shape: of its pixels, [b, height, width, 3]."""

    def load(
        arrays: tuple[np.ndarray, ...], first: int, keys: list[Key]
    ) -> list[tuple[str | InputError, tuple[str, ...]]]:
        """Write images, labels and mask to the rows from the first on; return the name, or the error, of each image,
        and its oddities."""
        (images, labels, mask), found = arrays, []
        for row, key in enumerate(keys, first):
            try:
                record = source[key[-1]]
                image = decode(record.image, record.name)
                with naming(f"image {record.name}"):
                    images[row] = transform(image, key)
            except InputError as error:
                found.append((error, ()))
                continue
            labels[(row, slice(len(record.label))) if isinstance(record.label, tuple) else row] = record.label
            mask[row] = record.label != ()
            found.append((record.name, image.info.get("oddities", ())))
        return found

    def submit(keys: list[Key]) -> tuple[tuple[np.ndarray, ...], list[Future]]:
        most = source.labels_per_image
        labels = np.full((shape[0], most), -1, np.int32) if most > 1 else np.zeros(shape[0], np.int32)
        arrays = np.zeros(shape, np.uint8), labels, np.zeros(shape[0], np.bool_)
        size = max(1, min(MOST_A_TASK, len(keys) // threads))
        starts = range(0, len(keys), size)
        return arrays, [pool.submit(load, arrays, first, keys[first : first + size]) for first in starts]

    def assemble(arrays: tuple[np.ndarray, ...], tasks: list[Future]) -> Batch:
        found, oddities = zip(*(each for task in tasks for each in task.result()), strict=True) if tasks else ((), ())
        errors = [each for each in found if isinstance(each, InputError)]
        if errors and on_bad == "stop":
            raise BadImage(str(errors[0])) from errors[0]
        names = ["" if isinstance(each, InputError) else each for each in found]
        return Batch(
            *arrays,
            names=(*names, *[""] * (shape[0] - len(names))),
            skipped=tuple(map(str, errors)),
            oddities=tuple(itertools.chain.from_iterable(oddities)),
        )

    threads = workers or max(2, usable_cores())
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    pending: deque[tuple[tuple[np.ndarray, ...], list[Future]]] = deque()
    try:
        for share in shares:
            pending.append(submit(share))
            if len(pending) > LOOKAHEAD:
                yield assemble(*pending.popleft())
        while pending:
            yield assemble(*pending.popleft())
    finally:  # even if the caller breaks off: no thread outlives the loop
        pool.shutdown(cancel_futures=True)


def device_batches(
    batches: Iterable[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[Batch, None, None]:
    """Yield the batches with images, labels and mask as sharded global arrays, transferred `depth` batches ahead.

    Each process passes its own rows. A BadImage is raised in its place, after the batches before it.
    """
    pending: deque[Batch] = deque()
    try:
        for batch in batches:
            arrays = (jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for rows in batch[:3])
            pending.append(Batch(*arrays, names=batch.names, skipped=batch.skipped, oddities=batch.oddities))
            if len(pending) > depth:
                yield pending.popleft()
        yield from pending
    except BadImage:
        yield from pending
        raise
    finally:
        if close := getattr(batches, "close", None):
            close()
