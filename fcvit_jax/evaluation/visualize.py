"""Draw which patches of an image became one token.

  python -m fcvit_jax.evaluation.visualize                              the packaged model on digits, offline
  python -m fcvit_jax.evaluation.visualize --checkpoint DIR --images photos --schedules tome_r8,s2winc7_r16
  python -m fcvit_jax.evaluation.visualize ... --stages                 the steps, layer by layer

Writes one PNG an image, NNN_name.png: the image as the model sees it, resized and cropped, and beside it the tokens
that each schedule leaves after the last layer. A token's patches are filled with the mean colour of their pixels and
outlined in one colour, wherever they lie in the image. A patch that has not merged is outlined in a shade of its own
colour. Patches that a pruning rule has dropped are hatched in grey. With --stages, rows are schedules, and columns are
the ends of the merging stages of any schedule, and the layers half-way to them. Prefix tokens (class, registers) never
merge, and are not counted.
"""

import contextlib
import functools
import io
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from fcvit_jax import compiling
from fcvit_jax.checkpoint import Checkpoint, load_checkpoint
from fcvit_jax.data.batches import eval_batches
from fcvit_jax.data.listing import EXTENSIONS
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.data.records import Source, sample
from fcvit_jax.data.sources import FORMS, open_images
from fcvit_jax.errors import InputError, OneLineParser, one_line_errors
from fcvit_jax.files import file_name, local_path, writable_directory, write_whole
from fcvit_jax.models.schedule import Dense, MergeSchedule, fit_schedules
from fcvit_jax.models.vit import ViT

PANEL = 320  # pixels: smaller images are enlarged, by a whole factor, to at least this
MARGIN, LINE, FONT = 10, 19, 15  # pixels: around a panel, of a line of its caption, of the letters


class Regions(NamedTuple):
    """The token of each patch after a layer.

    token: int32 [b, grid_h, grid_w], from 0 to the layer's patch tokens - 1, each of them used. pruned: bool [b,
    grid_h, grid_w], true if a rule has dropped the patch: its content is in no token, and its `token` is a stand-in.
    """

    token: np.ndarray
    pruned: np.ndarray


class Panel(NamedTuple):
    """A picture, uint8 [h, w, 3], and the two lines above it."""

    title: str
    detail: str
    picture: np.ndarray


def regions(checkpoint: Checkpoint, schedule: MergeSchedule, images: np.ndarray) -> list[Regions]:
    """Find the regions after each layer; compiles once per schedule and batch size.

    images: uint8 [b, height, width, 3], as `checkpoint.preprocess` gives them. Raises InputError if they do not fit.
    """
    config = checkpoint.config
    with jax.default_matmul_precision("highest"):  # as in evaluation: coarser keys merge other tokens
        compiled = _compiled(len(images), config.num_tokens)
        layers = compiled(ViT(config, schedule), checkpoint.preprocess, checkpoint.params, images)
    found = []
    for source, pruned in layers:
        token = np.asarray(source).reshape(-1, *config.grid) - np.int32(config.num_prefix_tokens)
        found.append(Regions(token, np.zeros(token.shape, bool) if pruned is None else np.reshape(pruned, token.shape)))
    return found


@functools.cache
def _compiled(images: int, tokens: int) -> Callable[..., list[tuple[jax.Array, jax.Array | None]]]:
    def sources(model: ViT, preprocess: Preprocess, params: Any, images: jax.Array) -> list[tuple[Any, Any]]:
        out: Any = model.apply({"params": params}, preprocess.normalize(images))[1]
        return [(layer["source"], layer["pruned"]) for layer in out["layers"]]

    return jax.jit(sources, static_argnums=(0, 1), compiler_options=compiling.options(images, tokens, np.float32))


def draw_regions(image: np.ndarray, token: np.ndarray, pruned: np.ndarray, patch_size: int, scale: int) -> np.ndarray:
    """Fill and outline the regions of an image, uint8 [h, w, 3], enlarged by `scale`; hatch the pruned patches.

    token, pruned: [grid_h, grid_w], as in `Regions`.
    """
    alone = token.max() + 1 + np.arange(token.size).reshape(token.shape)
    shown = np.where(pruned, alone, token)  # pruned patches have no part in a token's colour
    width = max(1, round(scale * patch_size / 16))
    picture = outline(_enlarge(fill(image, shown, patch_size), scale), shown, width)
    side = scale * patch_size
    rows, columns = np.indices(picture.shape[:2])
    stripes = np.where((rows + columns) // max(1, side // 8) % 2, 120, 70).astype(np.uint8)
    return np.where(_enlarge(pruned, side)[..., None], stripes[..., None], picture)


def fill(image: np.ndarray, regions: np.ndarray, patch_size: int) -> np.ndarray:
    """Fill every region of an image, uint8 [h, w, 3], with the mean colour of its pixels.

    regions: int [grid_h, grid_w], any numbers from 0. Exact: integers are summed, divided once in float64, rounded.
    """
    rows, columns = regions.shape
    patches = image.reshape(rows, patch_size, columns, patch_size, 3).sum(axis=(1, 3), dtype=np.int64)
    pixels = patch_size**2 * np.maximum(np.bincount(regions.flat), 1)
    sums = [np.bincount(regions.flat, patches[..., channel].flat) for channel in range(3)]
    return _enlarge(np.rint(np.stack(sums, axis=-1) / pixels[:, None]).astype(np.uint8)[regions], patch_size)


def outline(picture: np.ndarray, regions: np.ndarray, width: int = 1) -> np.ndarray:
    """Draw a line `width` pixels wide along the inside of every region's border on a picture, uint8 [h, w, 3].

    A region of several patches has one colour around all its parts; one of a single patch has a shade of its own.
    """
    from scipy import ndimage  # takes a second to import

    side = picture.shape[0] // regions.shape[0]
    _, first, index, count = np.unique(regions, return_index=True, return_inverse=True, return_counts=True)
    index = _enlarge(index.reshape(regions.shape), side)
    around: Any = dict(size=2 * width + 1, mode="constant", cval=-1)
    border = ndimage.minimum_filter(index, **around) != ndimage.maximum_filter(index, **around)
    bright = picture.mean(axis=-1, keepdims=True) > 127
    shade = np.where(bright, picture - picture // 6, picture + (255 - picture) // 6)
    rank = np.argsort(np.argsort(np.where(count > 1, first, regions.size)))  # in reading order, single patches last
    line = np.where(count[index][..., None] > 1, _colours(rank)[index], shade)
    return np.where(border[..., None], line, picture)


def _colours(index: np.ndarray) -> np.ndarray:
    """Choose colours, uint8 [_, 3], for numbers 0, 1, ...: hues a golden angle apart; bright, pale, dark in turn."""
    saturation, value = np.array([(0.85, 1.0), (0.4, 1.0), (0.95, 0.65)])[index % 3].T[..., None]
    place = (np.array([5, 3, 1]) + 6 * 0.618034 * index[:, None]) % 6
    return np.rint(255 * value * (1 - saturation * np.clip(np.minimum(place, 4 - place), 0, 1))).astype(np.uint8)


def _enlarge(array: np.ndarray, factor: int) -> np.ndarray:
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def first_images(
    source: Source, checkpoint: Checkpoint, limit: int, on_bad: str = "stop"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read the first images, uint8 [n, height, width, 3], as the model sees them, and their names.

    If a source is ordered by class, they are spread over all classes. on_bad: as in `eval_batches`.
    """
    source = sample(source, limit)
    with contextlib.closing(eval_batches(source, checkpoint.preprocess, len(source), on_bad=on_bad)) as batches:
        batch = next(batches)
    kept = [row for row, name in enumerate(batch.names) if name]
    for why in batch.skipped:
        print(f"skipped: {why}")
    return np.asarray(batch.images)[kept], tuple(batch.names[row] for row in kept)


def draw_gallery(
    checkpoint: Checkpoint,
    schedules: Mapping[str, MergeSchedule],
    images: np.ndarray,
    names: Sequence[str],
    folder: Path,
    *,
    stages: bool = False,
    columns: int | None = None,
) -> None:
    """Write `folder/NNN_name.png` for every image, each whole or not at all.

    images: as in `regions`. stages: one row per schedule, one column per layer of `stage_layers`. columns: panels in a
    row, without stages; by default all. Raises InputError as `regions` does, and if the folder cannot be written.
    """
    config = checkpoint.config
    checkpoint = replace(checkpoint, params=jax.device_put(checkpoint.params))  # once, and not with every call
    layers = stage_layers(schedules.values(), config.depth) if stages else [config.depth]
    scale = -(-PANEL // max(config.image_size))
    digits = max(3, len(str(len(images) - 1)))
    writable_directory(folder)
    with tqdm(desc="drawing", total=len(images) * len(schedules), unit="panel", leave=False, disable=None) as bar:
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            original = Panel("original", f"{config.grid[0]}x{config.grid[1]} patches", _enlarge(image, scale))
            panels = [original]
            for row, (title, schedule) in enumerate(schedules.items()):
                panels += [original] if stages and row else []
                panels += _panels(checkpoint, title, schedule, image, layers, scale)
                bar.update()
            many = 1 + len(layers) if stages else columns or len(panels)
            rows = [panels[start : start + many] for start in range(0, len(panels), many)]
            picture = io.BytesIO()
            draw_sheet(rows).save(picture, "PNG")
            stem, suffix = os.path.splitext(name)
            stem = file_name(stem if suffix.lower() in EXTENSIONS else name)[:100]
            write_whole(folder / f"{number:0{digits}}_{stem}.png", picture.getvalue())


def _panels(
    checkpoint: Checkpoint, title: str, schedule: MergeSchedule, image: np.ndarray, layers: Sequence[int], scale: int
) -> list[Panel]:
    """Draw the regions of an image under a schedule after each of the layers."""
    found, panels = regions(checkpoint, schedule, image[None]), []
    for layer in layers:
        token, pruned = (array[0] for array in found[layer - 1])
        detail = f"{token.max() + 1} of {token.size} tokens after layer {layer}"
        detail += f", {pruned.sum()} pruned" if pruned.any() else ""
        panels.append(Panel(title, detail, draw_regions(image, token, pruned, checkpoint.config.patch_size, scale)))
    return panels


def stage_layers(schedules: Iterable[MergeSchedule], depth: int) -> list[int]:
    """List the layers, from 1, that end a merging stage of any schedule, the last layer, and those half-way between."""
    ends = {0, depth}
    for schedule in schedules:
        reached = itertools.accumulate(stage.layers for stage in schedule.stages)
        ends |= {end for stage, end in zip(schedule.stages, reached, strict=True) if not isinstance(stage, Dense)}
    pairs = itertools.pairwise(sorted(ends))
    return sorted({layer for start, end in pairs for layer in ((start + end + 1) // 2, end)})


def draw_sheet(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Arrange panels of one size in rows, under their captions."""
    font = ImageFont.load_default(FONT)
    panels = [panel for row in rows for panel in row]
    height, width = panels[0].picture.shape[:2]
    height += 2 * LINE + MARGIN
    width = MARGIN + max(width, *(int(font.getlength(text)) + 1 for panel in panels for text in panel[:2]))
    sheet = Image.new("RGB", (max(map(len, rows)) * width + MARGIN, len(rows) * height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for down, row in enumerate(rows):
        for across, panel in enumerate(row):
            x, y = MARGIN + across * width, MARGIN + down * height
            pen.text((x, y), panel.title, "black", font)
            pen.text((x, y + LINE), panel.detail, "dimgrey", font)
            sheet.paste(Image.fromarray(panel.picture), (x, y + 2 * LINE))
    return sheet


def main(argv: list[str] | None = None) -> None:
    """Run the command; see the module's docstring."""
    parser = OneLineParser(prog="python -m fcvit_jax.evaluation.visualize", description=__doc__)
    for flag, metavar, default, what in (
        ("--checkpoint", "DIR", "packaged:digits", "a checkpoint, a train_sam.py working directory, or packaged:NAME"),
        ("--images", "PATH", "digits:test", f"a file, a folder (images at any depth), or a data set: {FORMS}"),
        ("--schedules", "A,B", "tome_r12,s2dfe_r15?,s2winc5_r16?", "names or explicit forms, as for evaluate.py"),
        ("--workdir", "W", Path("workdir/visualize"), "where to write the pictures; same names are overwritten"),
        ("--limit", "N", 12, "draw N images: the first, or of a data set sorted by class, some of all classes"),
        ("--on_bad", "stop|skip", "stop", "what to do with an image that cannot be read"),
    ):
        text = f"{what}; default: {default}"
        parser.add_argument(flag, metavar=metavar, default=default, type=type(default), help=text)
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--stages", action="store_true", help="one row per schedule, with layers in between")
    layout.add_argument("--columns", metavar="N", type=int, help="panels in a row; default: all")
    args = parser.parse_args(argv)
    with one_line_errors():
        for option in ("limit", "columns"):
            if (value := getattr(args, option)) is not None and value < 1:
                raise InputError(f"--{option}: {value} is not positive")
        source = open_images(args.images)
        checkpoint = load_checkpoint(args.checkpoint)
        schedules, remarks = fit_schedules(args.schedules, checkpoint.config, checkpoint.recommended)
        for line in (*source.remarks, *remarks):
            print(f"warning: {line}")
        images, names = first_images(source, checkpoint, args.limit, args.on_bad)
        if not names:
            raise InputError(f"images {args.images!r}: none can be read")
        draw_gallery(
            checkpoint, schedules, images, names, local_path(args.workdir), stages=args.stages, columns=args.columns
        )
        print(f"written: {len(names)} pictures in {args.workdir}")


if __name__ == "__main__":
    main()
