"""Records to batches of one fixed shape, decoded by threads ahead of their use, and on to the devices."""

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from fcvit_jax.data.preprocess import Preprocess, decode
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError

Row = tuple[np.ndarray, int, str]  # uint8 [height, width, 3], label, name
Transform = Callable[[Image.Image, np.random.Generator], np.ndarray]  # -> uint8 [height, width, 3]

LOOKAHEAD = 2  # batches that are being decoded while another one is in use


class Batch(NamedTuple):
    """`b` rows of this process; where `mask` is False the row is padding: zeros, and the name is empty.

    `skipped` tells why, one message an image, for rows that are padding because their image is bad.
    """

    images: np.ndarray | jax.Array  # uint8 [b, height, width, 3]
    labels: np.ndarray | jax.Array  # int32 [b]
    mask: np.ndarray | jax.Array  # bool [b]
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def eval_batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    *,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Every record once and in order, in batches of one shape: the last is padded, and its padding masked.

    Batch k holds the records `k * batch_size` to `(k + 1) * batch_size`; of its rows, this process yields its share, so
    all processes yield equally many batches, and their rows put together are the batch.

    Args:
      batch_size: rows over all processes.
      limit: take the first so many records.
      workers: decoding threads; by default what `ThreadPoolExecutor` finds fit for the machine.

    Raises:
      InputError: at once, if there is nothing to yield or the numbers do not fit; later, in place of the batch that
        holds it, for an image that cannot be decoded.
    """
    count = len(source) if limit is None else min(limit, len(source))
    rows = _rows(batch_size, process_index, process_count, workers)
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not positive")
    if count < 1:
        raise InputError(f"{source.spec}: no records")
    first = [k * batch_size + process_index * rows for k in range(math.ceil(count / batch_size))]
    shares = [range(start, max(start, min(start + rows, count))) for start in first]

    def load(index: int) -> Row:
        return _load(source, index, preprocess)

    return _decode_ahead(load, preprocess.image_size, shares, rows, workers)


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
      workers: decoding threads; by default what `ThreadPoolExecutor` finds fit for the machine.
      on_bad: what an image does that cannot be read or decoded: `stop` raises in place of its batch; `skip` leaves its
        row as padding, and tells why in `Batch.skipped`.

    Raises:
      InputError: at once, if the data set is smaller than a batch or the numbers do not fit; later, for a bad image.
    """
    rows = _rows(batch_size, process_index, process_count, workers)
    if on_bad not in ("stop", "skip"):
        raise InputError(f"on_bad: {on_bad!r} is neither stop nor skip")
    if seed < 0:
        raise InputError(f"seed: {seed} is negative")
    an_epoch = len(source) // batch_size
    if an_epoch < 1:
        raise InputError(f"batch_size: {batch_size} is more than the {len(source)} images of {source.spec}")

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

    return _decode_ahead(load, image_size, map(share, steps), rows, workers, skip=on_bad == "skip")


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
    shares: Iterable[Sequence[Any]],
    rows: int,
    workers: int | None,
    skip: bool = False,
) -> Generator[Batch, None, None]:
    """One batch a share, each of its items loaded by a thread; what is left of `rows`, or skipped, is padding."""

    def assemble(futures: list[Future]) -> Batch:
        images = np.zeros((rows, *image_size, 3), np.uint8)
        labels = np.zeros(rows, np.int32)
        mask = np.zeros(rows, np.bool_)
        names, skipped = [""] * rows, []
        for row, future in enumerate(futures):
            try:
                images[row], labels[row], names[row] = future.result()
                mask[row] = True
            except InputError as error:
                if not skip:
                    raise
                skipped.append(str(error))
        return Batch(images, labels, mask, tuple(names), tuple(skipped))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        pending: deque[list[Future]] = deque()
        for share in shares:
            pending.append([pool.submit(load, item) for item in share])
            if len(pending) > LOOKAHEAD:
                yield assemble(pending.popleft())
        while pending:
            yield assemble(pending.popleft())
    finally:  # also when the caller breaks off: no thread outlives the loop
        pool.shutdown(cancel_futures=True)


def device_batches(
    batches: Iterable[Batch], sharding: jax.sharding.Sharding, depth: int = 2
) -> Generator[Batch, None, None]:
    """The batches with images, labels and mask as global arrays, sharded; transfers run `depth` batches ahead.

    Each process passes its own rows. The names, and what was skipped, stay with their process.
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
