"""Images a second of the input pipeline alone: read, decoded, resized and cropped, in batches, compared in one run.

    python benchmarks/input.py folder:photos/val
    python benchmarks/input.py tfds:imagenet2012/validation@/data/tfds --workers 1,2,16 --images 20000

Contenders:
- the library, whose workers are threads;
- a plain loop over PIL in as many processes, which reads, decodes, resizes and crops, and makes no batches;
- Grain, if it is installed, with the library's function in its threads and processes.

Blocks of all contenders alternate, so that other load on the machine affects all alike; the median counts. A block is a
pass over --images records, timed from its third batch on, when threads and processes have started. The records are read
once beforehand, so that disks do not count.
"""

import argparse
import functools
import io
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.features
from PIL import Image
from tqdm import tqdm

from fcvit_jax.data.batches import eval_batches
from fcvit_jax.data.preprocess import INTERPOLATIONS, Preprocess, decode, preset
from fcvit_jax.data.sources import Source, open_source
from fcvit_jax.errors import one_line_errors
from fcvit_jax.parallel import usable_cores

WARM_UP = 3  # batches


@dataclass(frozen=True)
class Block:
    """The work of a contender in one block."""

    spec: str
    images: int
    preprocess: Preprocess
    batch_size: int

    def source(self) -> Source:
        """Repeat the data set up to `images` records."""
        source = opened(self.spec)
        return Source(self.spec, source.class_names, self.images, lambda index: source[index % len(source)])


@functools.cache
def opened(spec: str) -> Source:
    return open_source(spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder:PATH or tfds:NAME/SPLIT[@DATA_DIR]")
    parser.add_argument("--preprocess", default="timm/augreg", help="a preset, with overrides after commas")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", help=f"how many, separated by commas; default: 1,{usable_cores()} (all cores)")
    parser.add_argument("--images", type=int, default=2000, help="in a block; a smaller data set is repeated")
    parser.add_argument("--blocks", type=int, default=5, help="timed blocks of each contender")
    args = parser.parse_args()
    if args.images <= WARM_UP * args.batch_size:
        parser.error(f"--images must be more than {WARM_UP} batches")
    with one_line_errors():
        preprocess = preset(args.preprocess, (args.image_size, args.image_size))
        block = Block(args.dataset, args.images, preprocess, args.batch_size)
        source = block.source()
    workers = sorted({int(count) for count in (args.workers or f"1,{usable_cores()}").split(",")})
    contenders = make_contenders(block, workers)

    size = sum(len(source[i].image) for i in tqdm(range(args.images), desc="reading", unit="img", leave=False))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with tqdm(total=args.blocks * len(contenders), desc="timing", unit="block", leave=False) as bar:
        for _ in range(args.blocks):
            for name, measure in contenders.items():
                rates[name].append(measure())
                bar.update()

    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{args.dataset}: {size / args.images / 1e3:.0f} kB an image; {preprocess}; batches of {args.batch_size}")
    turbo = PIL.features.version_feature("libjpeg_turbo")
    print(f"{usable_cores()} cores, Pillow {PIL.__version__}, libjpeg-turbo {turbo}")
    print(f"{'contender, workers':<22}{'images/s':>10}{'spread':>9}{'/ 1 worker':>12}{'/ plain PIL':>13}")
    for name, rate in median.items():
        kind, _, count = name.rpartition(" ")
        single = f"{rate / median[f'{kind} 1']:.2f}x" if f"{kind} 1" in median else "-"
        plain = f"{rate / median[f'plain PIL, {count}']:.2f}x"
        spread = (max(rates[name]) - min(rates[name])) / rate
        print(f"{name:<22}{rate:>10.1f}{spread:>9.1%}{single:>12}{plain:>13}")
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


def make_contenders(block: Block, workers: list[int]) -> dict[str, Callable[[], float]]:
    """Make functions that measure a contender's images/s in one block, by its name and number of workers."""
    makers: dict[str, Callable[..., float]] = {"plain PIL": plain_rate, "fcvit_jax": own_rate}
    try:
        import grain  # pyright: ignore[reportMissingImports]
        from absl import flags
    except ImportError:
        print("Grain is not installed (pip install grain): left out", file=sys.stderr)
    else:
        flags.FLAGS(sys.argv[:1])  # Grain's processes require parsed flags
        for kind in ("threads", "processes"):
            makers[f"Grain, {kind}"] = functools.partial(grain_rate, grain, kind)
    return {
        f"{name}, {count}": functools.partial(rate, block, count) for count in workers for name, rate in makers.items()
    }


def steady_rate(counts: Iterator[int]) -> float:
    """Measure images a second, from the number of images in each batch as it comes."""
    for _ in range(WARM_UP):
        next(counts)
    started = time.perf_counter()
    images = sum(counts)
    return images / (time.perf_counter() - started)


def own_rate(block: Block, workers: int) -> float:
    batches = eval_batches(block.source(), block.preprocess, block.batch_size, workers=workers)
    return steady_rate(int(batch.mask.sum()) for batch in batches)


def plain_rate(block: Block, workers: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, spans = context.Barrier(workers), context.Queue()
    shares = [range(first, block.images, workers) for first in range(workers)]
    processes = [context.Process(target=plain_loop, args=(block, share, barrier, spans)) for share in shares]
    for process in processes:
        process.start()
    started, ended = zip(*(spans.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return block.images / (max(ended) - min(started))


def plain_loop(block: Block, share: range, barrier: Any, spans: Any) -> None:
    """Run the usual simple loop: photos to a square, without care for odd files."""
    source, resample = block.source(), INTERPOLATIONS[block.preprocess.interpolation]
    side, shorter = block.preprocess.image_size[0], block.preprocess.resize_size[0]
    barrier.wait()
    started = time.monotonic()
    for index in share:
        image = Image.open(io.BytesIO(bytes(source[index].image)))
        image = image if image.mode == "RGB" else image.convert("RGB")
        scale = shorter / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), resample)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        np.asarray(image.crop((left, top, left + side, top + side)))
    spans.put((started, time.monotonic()))


def grain_rate(grain: Any, kind: str, block: Block, workers: int) -> float:
    data = grain.MapDataset.source(range(block.images)).map(functools.partial(load_for_grain, block))
    data = data.batch(block.batch_size, drop_remainder=False)
    if kind == "threads":
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=workers))
    else:
        data = data.to_iter_dataset(grain.ReadOptions(num_threads=1))
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return steady_rate(len(images) for images in data)


def load_for_grain(block: Block, index: int) -> np.ndarray:
    source = opened(block.spec)
    record = source[index % len(source)]
    return block.preprocess(decode(record.image, record.name))


if __name__ == "__main__":
    main()
