"""Classify images with the exported model beside this file, without the library that exported it.

    pip install jax numpy flatbuffers pillow
    python run.py [--program NAME] IMAGE ...

JAX reads programs with flatbuffers, which it does not install by itself; Pillow reads pictures. An IMAGE that ends in
.npy holds uint8 images [n, height, width, 3] and needs no Pillow. In Python: `logits = run.load()(images)`.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np

HERE = Path(__file__).resolve().parent
META = json.loads((HERE / "meta.json").read_text())


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

    image, steps = image.convert("RGB"), META["preprocess"]
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
    # In the centre; half of an odd number of pixels to cut off is rounded as timm does.
    margins = (canvas.width - image.width, canvas.height - image.height)
    canvas.paste(image, tuple(margin // 2 if margin > 0 else -round(-margin / 2) for margin in margins))
    return np.asarray(canvas)


def read(path):
    """Read the images of a file, by name."""
    path = os.path.expanduser(path)
    if path.endswith(".npy"):
        return {f"{path}[{row}]": image for row, image in enumerate(np.load(path))}
    from PIL import Image

    with Image.open(path) as image:
        return {path: pixels(image)}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def attempt(what, function, *args):
    """Call a function; if it fails, end with one line."""
    try:
        return function(*args)
    except Exception as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        fail(f"{what} ({why[:300]})")


def main():
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold any bytes
    try:
        classify()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def classify():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or .npy of uint8 [n, height, width, 3]")
    parser.add_argument("--program", choices=tuple(META["programs"]), help="by default the first of these")
    args = parser.parse_args()
    program = args.program or next(iter(META["programs"]))
    shape = (META["programs"][program]["batch_size"], *META["preprocess"]["image_size"], 3)
    files = [attempt(f"{path} cannot be read as an image", read, path) for path in args.images]
    images = {name: image for file in files for name, image in file.items()}
    for name, image in images.items():
        if image.shape != shape[1:] or image.dtype != np.uint8:
            fail(f"{name} is {image.dtype} {image.shape}: the model takes uint8 {shape[1:]}")
    attempt("JAX does not start, set JAX_PLATFORMS=cpu or check the driver", jax.devices)
    run, names = attempt(f"{program} cannot be loaded, export it again", load, program), list(images)
    for start in range(0, len(names), shape[0]):
        some = names[start : start + shape[0]]
        batch = np.zeros(shape, np.uint8)  # of a fixed size: rows left over are black images
        batch[: len(some)] = [images[name] for name in some]
        logits = np.asarray(jax.tree.leaves(attempt(f"{program} does not run here", run, batch))[0])
        classes = META["class_names"] or range(logits.shape[1])
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        for name, share in zip(some, shares / shares.sum(axis=1, keepdims=True), strict=False):
            best = share.argsort()[::-1][:5]
            print(f"{name}: " + ", ".join(f"{share[index]:.1%} {classes[index]}" for index in best))


if __name__ == "__main__":
    main()
