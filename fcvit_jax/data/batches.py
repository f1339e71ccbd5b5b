"""Records to batches of one fixed shape, decoded by threads ahead of their use, and on to the devices."""

import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from fcvit_jax.data.preprocess import Preprocess, decode
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError

Row = tuple[np.ndarray, int, str]  # uint8 [height, width, 3], label, name
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [height, width, 3] -> the same

LOOKAHEAD = 2  # batches that are being decoded while another one is in use


class Batch(NamedTuple):
    """`b` rows of this process; where `mask` is False the row is padding: zeros, and the name is empty."""

    images: np.ndarray | jax.Array  # uint8 [b, height, width, 3]
    labels: np.ndarray | jax.Array  # int32 [b]
    mask: np.ndarray | jax.Array  # bool [b]
    names: tuple[str, ...]


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
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f"batch_size: {batch_size} is not a positive multiple of {process_count}, the process count")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index: {process_index} is not within 0 and {process_count - 1}")
    if workers is not None and workers < 1:
        raise InputError(f"workers: {workers} is not positive")
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is not positive")
    if count < 1:
        raise InputError(f"{source.spec}: no records")
    rows = batch_size // process_count
    first = [k * batch_size + process_index * rows for k in range(math.ceil(count / batch_size))]
    shares = [range(start, max(start, min(start + rows, count))) for start in first]

    def load(index: int) -> Row:
        return _load(source, preprocess, index)

    return _decode_ahead(load, preprocess.image_size, shares, rows, workers)


def train_batches(
    source: Source,
    preprocess: Preprocess,
    batch_size: int,
    steps: range,
    seed: int,
    augment: Augment | None = None,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """Batches of the given steps: each epoch a new permutation, what does not fill a batch at its end left out.

    What step k sees depends on k and the seed alone, not on where `steps` starts, so that a run may be resumed; what
    an image becomes depends on the seed, its epoch and its index, not on the order of the threads.

    Raises:
      InputError: the data set is smaller than a batch; later, for an image that cannot be decoded.
    """
    an_epoch = len(source) // batch_size
    if an_epoch < 1:
        raise InputError(f"batch_size: {batch_size} is more than the {len(source)} images of {source.spec}")

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(len(source))

    def share(step: int) -> list[tuple[int, int]]:
        epoch, place = divmod(step, an_epoch)
        return [(epoch, int(index)) for index in order(epoch)[place * batch_size : (place + 1) * batch_size]]

    def load(item: tuple[int, int]) -> Row:
        epoch, index = item
        pixels, label, name = _load(source, preprocess, index)
        return augment(pixels, np.random.default_rng((seed, epoch, index))) if augment else pixels, label, name

    return _decode_ahead(load, preprocess.image_size, map(share, steps), batch_size, workers)


def _load(source: Source, preprocess: Preprocess, index: int) -> Row:
    record = source[index]
    image = decode(record.image, record.name)
    try:
        return preprocess(image), record.label, record.name
    except InputError as error:
        raise InputError(f"image {record.name}: {error}") from error


def _decode_ahead(
    load: Callable[[Any], Row],
    image_size: tuple[int, int],
    shares: Iterable[Sequence[Any]],
    rows: int,
    workers: int | None,
) -> Generator[Batch, None, None]:
    """One batch a share, each of its items loaded by a thread; what is left of `rows` is padding."""

    def assemble(futures: list[Future]) -> Batch:
        images = np.zeros((rows, *image_size, 3), np.uint8)
        labels = np.zeros(rows, np.int32)
        names = [""] * rows
        for row, future in enumerate(futures):
            images[row], labels[row], names[row] = future.result()
        return Batch(images, labels, np.arange(rows) < len(futures), tuple(names))

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

    Each process passes its own rows. The names stay with their process.
    """
    pending: deque[Batch] = deque()
    try:
        for batch in batches:
            arrays = (jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for rows in batch[:3])
            pending.append(Batch(*arrays, names=batch.names))
            if len(pending) > depth:
                yield pending.popleft()
        yield from pending
    finally:
        if close := getattr(batches, "close", None):
            close()
