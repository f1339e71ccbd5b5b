"""Records to batches of one fixed shape, decoded by threads ahead of their use, and on to the devices."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from fcvit_jax.data.preprocess import Preprocess, decode
from fcvit_jax.data.sources import Source
from fcvit_jax.errors import InputError

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
) -> Iterator[Batch]:
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
    return _decode_ahead(source, preprocess, shares, rows, workers)


def _decode_ahead(
    source: Source, preprocess: Preprocess, shares: list[range], rows: int, workers: int | None
) -> Iterator[Batch]:
    def load(index: int) -> tuple[np.ndarray, int, str]:
        record = source[index]
        return preprocess(decode(record.image, record.name)), record.label, record.name

    def assemble(futures: list[Future]) -> Batch:
        images = np.zeros((rows, *preprocess.image_size, 3), np.uint8)
        labels = np.zeros(rows, np.int32)
        names = [""] * rows
        for row, future in enumerate(futures):
            images[row], labels[row], names[row] = future.result()
        return Batch(images, labels, np.arange(rows) < len(futures), tuple(names))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        pending: deque[list[Future]] = deque()
        for share in shares:
            pending.append([pool.submit(load, index) for index in share])
            if len(pending) > LOOKAHEAD:
                yield assemble(pending.popleft())
        while pending:
            yield assemble(pending.popleft())
    finally:  # also when the caller breaks off: no thread outlives the loop
        pool.shutdown(cancel_futures=True)


def device_batches(batches: Iterable[Batch], sharding: jax.sharding.Sharding, depth: int = 2) -> Iterator[Batch]:
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
