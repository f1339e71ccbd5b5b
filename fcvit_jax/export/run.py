"""Classify images with the exported model beside this file, without the library that exported it.

    pip install jax numpy flatbuffers pillow
    python run.py [--program NAME] IMAGE ...

JAX reads programs with flatbuffers, which it does not install by itself; Pillow reads pictures. An IMAGE that ends in
.npy holds uint8 images [n, height, width, 3] and needs no Pillow. In Python: `logits = run.load()(images)`.
"""

import argparse
import collections
import functools
import io
import json
import os
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np

HERE = Path(__file__).resolve().parent
META = json.loads((HERE / "meta.json").read_text())
# By EXIF orientation, 2 to 8.
TURNS = ["FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"]
ODDITIES = {
    "deep": "{} of 16 bits a pixel scaled to 8 bits",
    "turned": "{} with an EXIF orientation read unturned, as in evaluation",
}


def load(program=None):
    """Load a program, by default the first: a function from uint8 images [b, height, width, 3] to logits [b, c].

    b is the program's `batch_size`. With exported features it returns (logits, features). The first call compiles.
    """
    program = program or next(iter(META["programs"]))
    exported = jax.export.deserialize(bytearray((HERE / META["programs"][program]["file"]).read_bytes()))
    with np.load(HERE / "weights.npz") as arrays:
        params = {name: arrays[name] for name in arrays}
    params = {name: x.view(jax.numpy.bfloat16) if x.dtype == np.uint16 else x for name, x in params.items()}
    return functools.partial(jax.jit(exported.call), jax.device_put(params))


def pixels(image):
    """Resize and crop a PIL image as the model expects it: uint8 [height, width, 3]."""
    from PIL import Image

    turn, steps = orientation(image), META["preprocess"]
    image = rgb(image)
    if turn > 1 and steps.get("exif_transpose"):
        image = image.transpose(Image.Transpose[TURNS[turn - 2]])
    (height, width), (to_height, to_width), mode = steps["image_size"], steps["resize_size"], steps["crop_mode"]
    ratio = (max if mode == "border" else min)(image.height / to_height, image.width / to_width)
    size = max(1, round(image.width / ratio)), max(1, round(image.height / ratio))
    if mode == "squash":
        size = to_width, to_height
    elif mode == "center" and to_width == to_height:  # the longer side is truncated, not rounded
        longer = int(to_width * max(image.size) / min(image.size))
        size = (to_width, longer) if image.width <= image.height else (longer, to_width)
    image = image.resize(size, Image.Resampling[steps["interpolation"].upper()])
    fill = tuple(round(255 * value) for value in steps["mean"]) if mode == "border" else (0, 0, 0)
    canvas = Image.new("RGB", (width, height), fill)
    # In the centre; half of an odd number of pixels is rounded as timm does.
    margins = (canvas.width - image.width, canvas.height - image.height)
    left, top = (margin // 2 if margin > 0 else -round(-margin / 2) for margin in margins)
    canvas.paste(image, (left, top))
    return np.asarray(canvas)


def rgb(image):
    """Convert a PIL image to RGB, but take the high byte of 16-bit grey, which PIL would clip."""
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its pixels have no defined range: save it with 8 or 16 bits a pixel")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})  # of TIFF: how many bits, and whether 0 is white
    grey = (np.asarray(image) >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(262) == 0 else grey).convert("RGB")


def orientation(image):
    """Read how a PIL image is turned from its EXIF data: 1 (not at all) to 8."""
    try:
        found = image.getexif().get(274, 1)
    except Exception:  # damaged data raise anything, and say nothing
        return 1
    return found if found in range(1, 9) else 1


def read(path, counts):
    """Read the images of a file, by name, and count their oddities. Raises ValueError that names the file."""
    path = os.path.expanduser(path)
    try:
        if path.endswith(".npy"):
            images = {f"{path}[{row}]": image for row, image in enumerate(np.load(path, allow_pickle=False))}
        else:
            from PIL import Image

            with Image.open(path) as image:
                image.load()
                counts["deep"] += image.mode.startswith("I")
                counts["turned"] += orientation(image) > 1 and not META["preprocess"].get("exif_transpose")
                images = {path: pixels(image)}
    except ImportError:
        raise ValueError(f"{path} is read by Pillow: pip install pillow") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    shape = (*META["preprocess"]["image_size"], 3)
    for name, image in images.items():
        if image.shape != shape or image.dtype != np.uint8:
            raise ValueError(f"{name} is {image.dtype} {image.shape}: the model takes uint8 {shape}")
    return images


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def classify(paths, program):
    """Print the five likeliest classes of each image."""
    counts = collections.Counter()
    images = {name: image for path in paths for name, image in read(path, counts).items()}
    for kind, text in ODDITIES.items():
        if counts[kind]:
            print(f"warning: {text.format(f'{counts[kind]} images')}", file=sys.stderr)
    try:
        jax.devices()
    except RuntimeError as error:
        why = first_line(error)
        raise ValueError(f"JAX does not start, set JAX_PLATFORMS=cpu or check the driver ({why})") from None
    size, names = META["programs"][program]["batch_size"], list(images)
    try:
        run = load(program)
    except RuntimeError:  # from JAX, such as a missing platform
        raise
    except Exception as error:  # zipfile, JSON and JAX raise their own types
        raise ValueError(f"{HERE} is incomplete or damaged ({first_line(error)}): export it again") from None
    for start in range(0, len(names), size):
        some = names[start : start + size]
        batch = np.zeros((size, *META["preprocess"]["image_size"], 3), np.uint8)  # rows left over are black images
        batch[: len(some)] = [images[name] for name in some]
        logits = np.asarray(jax.tree.leaves(run(batch))[0])
        classes = META["class_names"] or range(logits.shape[1])
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        for name, share in zip(some, shares / shares.sum(axis=1, keepdims=True), strict=False):
            best = share.argsort()[::-1][:5]
            print(f"{name}: " + ", ".join(f"{share[index]:.1%} {classes[index]}" for index in best))
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or .npy of uint8 [n, height, width, 3]")
    programs, named = tuple(META["programs"]), "by default the first of these; @ may stand for -"
    parser.add_argument("--program", type=lambda text: text.replace("@", "-"), choices=programs, help=named)
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        classify(args.images, args.program or programs[0])
        if not args.program and len(programs) > 1:
            print(f"program {programs[0]} ran; --program chooses among {', '.join(programs)}", file=sys.stderr)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, RuntimeError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
