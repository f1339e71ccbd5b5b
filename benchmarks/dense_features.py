"""A linear segmentation probe on patch features, under merge schedules; and pictures of the features.

  python benchmarks/dense_features.py CHECKPOINT PHOTOS --schedules dense,tome_r8,tome_r13 --workdir workdir/dense

PHOTOS is a folder of photos of one object on a plain background. A photo's mask is everything that differs from the
colour of its rim. Photos whose background is not plain are left out. Every other photo trains a logistic regression of
"is this patch mostly foreground?" on the dense features. The rest judges it under each schedule, pixel by pixel.

Writes dense_features.json and dense_features.png: a photo, its features under dense and under the last schedule.
Colours are the first three principal components of the foreground patches, the same for both.
"""

import argparse
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

import fcvit_jax as fc
from fcvit_jax.data.sources import open_images
from fcvit_jax.errors import one_line_errors
from fcvit_jax.evaluation.visualize import Panel, draw_sheet
from fcvit_jax.files import writable_directory, write_whole
from fcvit_jax.models.schedule import fit_schedules

BATCH = 8


def foreground(pixels: np.ndarray) -> np.ndarray | None:
    """Mask the object in a photo, uint8 [h, w, 3], as bool [h, w]; None if the background is not plain."""
    smooth = ndimage.gaussian_filter(pixels.astype(np.float32), (2, 2, 0))
    rim = np.concatenate([smooth[:8].reshape(-1, 3), smooth[:, :8].reshape(-1, 3), smooth[:, -8:].reshape(-1, 3)])
    apart = np.linalg.norm(smooth - np.median(rim, axis=0), axis=-1)
    cut = otsu(apart)
    strange = np.linalg.norm(rim - np.median(rim, axis=0), axis=-1) > cut
    found: Any = ndimage.label(ndimage.binary_opening(apart > cut, iterations=2))
    pieces, count = found
    sizes = np.bincount(pieces.ravel(), minlength=count + 1) / pieces.size
    kept = np.flatnonzero(sizes > 0.03)
    thing: Any = ndimage.binary_fill_holes(np.isin(pieces, kept[kept > 0]))
    plain = cut > 25 and strange.mean() < 0.02 and 0.1 < np.mean(thing) < 0.7
    return thing if plain else None


def otsu(values: np.ndarray) -> float:
    """Find the threshold that separates two groups best (Otsu 1979)."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(counts)[:-1]
    means = np.cumsum(counts * centres)
    above = counts.sum() - below
    difference = means[:-1] / np.maximum(below, 1) - (means[-1] - means[:-1]) / np.maximum(above, 1)
    return float(centres[np.argmax(below * above * difference**2)])


def read_photos(folder: str, preprocess: fc.Preprocess, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Read photos on a plain background, uint8 [n, h, w, 3], and masks, bool [n, h, w], spread over the folder."""
    source, found = open_images(folder), []
    for index in np.random.default_rng(0).permutation(len(source)):
        record = source[int(index)]
        pixels = preprocess(Image.open(io.BytesIO(record.image)))  # pyright: ignore[reportArgumentType]
        if (mask := foreground(pixels)) is not None:
            found.append((pixels, mask))
        if len(found) == limit:
            break
    if len(found) < 4:
        raise fc.InputError(f"{folder}: {len(found)} photos have a plain background; give more photos")
    photos, masks = zip(*found, strict=True)
    return np.stack(photos), np.stack(masks)


def compute(checkpoint: fc.Checkpoint, schedule: fc.MergeSchedule, photos: np.ndarray) -> np.ndarray:
    """Compute patch features, float32 [n, rows, columns, d]."""
    run = jax.jit(partial(fc.patch_features, fc.ViT(checkpoint.config, schedule)))
    batches = [photos[start : start + BATCH] for start in range(0, len(photos), BATCH)]
    normalised = map(checkpoint.preprocess.normalize, batches)
    return np.concatenate([np.asarray(run(checkpoint.params, batch).patches) for batch in normalised])


def iou(scores: np.ndarray, masks: np.ndarray) -> float:
    """Compute IoU over all pixels: scores of patches, resized bilinearly, above 0 against the masks."""
    size = masks.shape[2], masks.shape[1]
    pictures = (Image.fromarray(each.astype(np.float32)) for each in scores)
    thing = np.stack([np.asarray(each.resize(size, Image.Resampling.BILINEAR)) for each in pictures]) > 0
    return float((thing & masks).sum() / (thing | masks).sum())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Average the cosines of vectors, the last axis."""
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


def colours(found: dict[str, np.ndarray], thing: np.ndarray) -> dict[str, np.ndarray]:
    """Colour patches by the dense foreground's principal components, uint8 [n, rows, columns, 3]; white background."""
    inside = found["dense"][thing]
    centre = inside.mean(axis=0)
    axes = np.linalg.svd(inside - centre, full_matrices=False)[2][:3].T
    low, high = np.percentile((inside - centre) @ axes, (2, 98), axis=0)
    scaled = {name: np.clip(((x - centre) @ axes - low) / (high - low), 0, 1) for name, x in found.items()}
    return {name: np.where(thing[..., None], 255 * x, 255).astype(np.uint8) for name, x in scaled.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("photos", metavar="PHOTOS")
    parser.add_argument("--schedules", default="tome_r8,tome_r13,tome_r13@nearest", help="beside dense")
    parser.add_argument("--limit", type=int, default=64, help="photos; half of them train")
    parser.add_argument("--shown", type=int, default=4, help="photos in the picture")
    parser.add_argument("--workdir", type=Path, default=Path("workdir/dense_features"))
    args = parser.parse_args(argv)
    with one_line_errors():
        run(args)


def run(args: Any) -> None:
    checkpoint, workdir = fc.load_checkpoint(args.checkpoint), writable_directory(args.workdir)
    schedules, _ = fit_schedules(f"dense,{args.schedules}", checkpoint.config)
    photos, masks = read_photos(args.photos, checkpoint.preprocess, args.limit)
    found = {name: compute(checkpoint, schedule, photos) for name, schedule in schedules.items()}
    (rows, columns), side = checkpoint.config.grid, checkpoint.config.patch_size
    cells = masks[:, : rows * side, : columns * side].reshape(len(masks), rows, side, columns, side)
    thing = cells.mean(axis=(2, 4)) > 0.5
    train, test = np.arange(len(photos)) % 2 == 0, np.arange(len(photos)) % 2 == 1
    probe = LogisticRegression(C=0.01, max_iter=1000)
    probe.fit(found["dense"][train].reshape(-1, found["dense"].shape[-1]), thing[train].ravel())
    table = []
    for name, features in found.items():
        scores = probe.decision_function(features[test].reshape(-1, features.shape[-1])).reshape(-1, rows, columns)
        near = cosine(features[test], found["dense"][test])
        table.append({"schedule": name, "gmacs": fc.flops.gmacs(checkpoint.config, schedules[name])})
        table[-1] |= {"iou": iou(scores, masks[test]), "cosine": near}
        print("{schedule:<24} {gmacs:6.2f} GMACs   IoU {iou:.3f}   cosine {cosine:.4f}".format(**table[-1]))
    facts = {"train": int(train.sum()), "test": int(test.sum()), "rows": table}
    write_whole(workdir / "dense_features.json", (json.dumps(facts, indent=1) + "\n").encode())
    write_whole(workdir / "dense_features.png", picture(photos, found, thing, np.flatnonzero(test)[: args.shown]))
    print(f"written: dense_features.json, dense_features.png in {workdir}")


def picture(photos: np.ndarray, found: dict[str, np.ndarray], thing: np.ndarray, shown: np.ndarray) -> bytes:
    """Draw one row per photo: the photo, its dense features, and those of the last schedule."""
    painted, side = colours(found, thing), photos.shape[1] // thing.shape[1]
    last = list(found)[-1]
    sheet = []
    for index in shown:
        panels = [Panel("photo", "", photos[index])]
        for name in ("dense", last):
            panels.append(Panel(name, "", painted[name][index].repeat(side, axis=0).repeat(side, axis=1)))
        sheet.append(panels)
    content = io.BytesIO()
    draw_sheet(sheet).save(content, "PNG")
    return content.getvalue()


if __name__ == "__main__":
    main()
