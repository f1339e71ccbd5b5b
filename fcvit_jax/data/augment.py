"""Augment training images on the host, with PIL and numpy: one recipe from a decoded image to uint8 pixels.

All randomness comes from the generator passed in, so results do not depend on the order of threads.
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fcvit_jax.data.preprocess import INTERPOLATIONS, Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def _check_order(field: str, pair: tuple[float, float]) -> None:
    if pair[0] > pair[1]:
        raise InputError(f"{field} is {pair}: write the smaller number first")


@dataclass(frozen=True)
class RandomAffine:
    """A random rotation, shift and scale about the centre.

    degrees: the largest angle, either way. shift: the largest share of the height and width. scale: the smallest and
    the largest factor. fill: 0 to 255, for pixels from outside the image.
    """

    degrees: float = setting(0.0, low=0, high=180)
    shift: float = setting(0.0, low=0, high=1)
    scale: tuple[float, float] = setting((1.0, 1.0), low=0.01, high=100)
    fill: int = setting(0, low=0, high=255)

    def __post_init__(self):
        check_settings(self, "augment.affine.")
        _check_order("augment.affine.scale", self.scale)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Transform uint8 [height, width, 3] to the same shape; bilinear."""
        height, width = pixels.shape[:2]
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        down, across = rng.uniform(-self.shift, self.shift, 2) * (height, width)
        shrink = 1 / rng.uniform(*self.scale)
        # PIL requires the inverse map, from a pixel of the result to its source.
        cos, sin = math.cos(angle) * shrink, math.sin(angle) * shrink
        x, y = width / 2, height / 2  # PIL takes pixel i from i + 0.5
        matrix = (
            cos, sin, x - cos * (x + across) - sin * (y + down),
            -sin, cos, y + sin * (x + across) - cos * (y + down),
        )  # fmt: skip
        image = Image.fromarray(pixels).transform(
            (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(self.fill,) * 3
        )
        return np.asarray(image)


@dataclass(frozen=True)
class Augment:
    """The augmentation of a training image; a hashable configuration. Raises InputError for values out of range.

    The order is crop, flip, policy, erase, affine. A step that is off draws no random numbers.

    Args:
      crop: `random_resized`: a box of random area and aspect ratio, resized (the Inception crop, arXiv 1409.4842);
        `resize_crop`: a random crop of the image resized as in the preprocessing; `eval`: that of the preprocessing.
      scale, ratio: of the Inception crop: share of the image's area, and width over height.
      flip: probability of mirroring left to right.
      policy: `none`, or RandAugment as timm writes it: `rand-m9-n2-mstd0.5-inc1` (see `RandAugment.parse`).
      erase: probability that a rectangle, 2 to 33 % of the area, of aspect 0.3 to 3.3, becomes noise clipped to 0..255
        (random erasing, arXiv 1708.04896; timm's `pixel` mode).
    """

    crop: str = setting("random_resized", choices=("random_resized", "resize_crop", "eval"))
    scale: tuple[float, float] = setting((0.08, 1.0), low=1e-4, high=1)
    ratio: tuple[float, float] = setting((3 / 4, 4 / 3), low=0.01, high=100)
    flip: float = setting(0.5, low=0, high=1)
    policy: str = "none"
    erase: float = setting(0.0, low=0, high=1)
    affine: RandomAffine | None = None

    def __post_init__(self):
        check_settings(self, "augment.")
        _check_order("augment.scale", self.scale)
        _check_order("augment.ratio", self.ratio)
        if self.policy != "none":
            RandAugment.parse(self.policy)

    def __call__(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        """Return uint8 `[height, width, 3]`, as `preprocess` does; with crop `eval`, it raises the same errors."""
        height, width = preprocess.image_size
        resample = INTERPOLATIONS[preprocess.interpolation]
        image = preprocess.upright(image)
        if self.crop == "eval":
            image = Image.fromarray(preprocess(image))
        elif self.crop == "resize_crop":
            image = image.resize((width, height), resample, _covering_box(image.size, preprocess, rng))
        else:  # cropped before resizing, so that the filter sees nothing outside the box
            box = random_box(image.size, self.scale, self.ratio, rng) or _center_box(image.size, self.ratio)
            image = image.crop(box).resize((width, height), resample)
        if self.flip and rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy != "none":
            fill = tuple(round(255 * value) for value in preprocess.mean)
            image = RandAugment.parse(self.policy)(image, rng, resample, fill)
        pixels = np.array(image)
        if self.erase and rng.random() < self.erase:
            _erase(pixels, preprocess, rng)
        return self.affine(pixels, rng) if self.affine else pixels


def _erase(pixels: np.ndarray, preprocess: Preprocess, rng: np.random.Generator) -> None:
    height, width = pixels.shape[:2]
    if box := random_box((width, height), (0.02, 1 / 3), (0.3, 1 / 0.3), rng):
        left, top, right, bottom = box
        noise = rng.standard_normal((bottom - top, right - left, 3)) * preprocess.std + preprocess.mean
        pixels[top:bottom, left:right] = np.rint(255 * noise).clip(0, 255)


def random_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Draw (left, top, right, bottom) of uniform area and log-uniform aspect ratio inside `size` (width, height).

    As torchvision's `RandomResizedCrop.get_params`. None if ten boxes in a row do not fit.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return None


def _center_box(size: tuple[int, int], ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Find the largest central box whose width over height is within `ratio`: torchvision's fallback."""
    width, height = size
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _covering_box(size: tuple[int, int], preprocess: Preprocess, rng: np.random.Generator) -> Box:
    """Draw a crop of the image resized to cover `preprocess.resize_size`, in pixels of the image before resizing."""
    (width, height), (to_height, to_width) = size, preprocess.image_size
    # A crop_pct above 1 means a border, which training does not have.
    covered_height, covered_width = map(max, preprocess.resize_size, preprocess.image_size)
    shrink = min(width / covered_width, height / covered_height)
    w, h = min(width, to_width * shrink), min(height, to_height * shrink)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, min(width, left + w), min(height, top + h)


@dataclass(frozen=True)
class RandAugment:
    """Apply `layers` operations, drawn with replacement, each with `probability` (arXiv 1909.13719), as in timm.

    An operation's strength is the magnitude plus normal noise of deviation `std` (above 100: uniform from 0 to the
    magnitude), clipped to 0..`limit`; 10 is full strength, and directions are random. increasing: all operations get
    stronger with the magnitude. Otherwise posterise and solarise get weaker, and enhancements go from 0.1 to 1.9.
    """

    magnitude: float = 10
    layers: int = 2
    probability: float = 0.5
    std: float = 0.0
    limit: float = 10
    increasing: bool = False

    @staticmethod
    @functools.cache
    def parse(text: str) -> "RandAugment":
        """Parse timm's `rand-m9-n2-p0.5-mstd0.5-mmax10-inc1`; all parts but `rand` are optional, in any order.

        Raises InputError, also for a magnitude above the limit, which timm clips silently.
        """
        keys = dict(m="magnitude", n="layers", p="probability", mstd="std", mmax="limit", inc="increasing")
        start, *parts = text.split("-")
        found = [re.fullmatch(r"(m|n|mmax|inc)(\d+)|(p|mstd)(\d*\.?\d+)", part) for part in parts]
        if start != "rand" or not all(found):
            why = "it must be none, or like rand-m9-n2-p0.5-mstd0.5-mmax10-inc1"
            raise InputError(f"augment.policy is {text!r}: {why}")
        given = {keys[match[1] or match[3]]: float(match[2] or match[4]) for match in found if match}
        layers, increasing = int(given.pop("layers", 2)), bool(given.pop("increasing", False))
        policy = RandAugment(layers=layers, increasing=increasing, **given)
        if policy.magnitude > policy.limit:
            why = f"magnitudes are clipped to {policy.limit:g}; add mmax{policy.magnitude:g}, or lower m"
            raise InputError(f"augment.policy is {text!r}: {why}")
        if policy.probability > 1:
            raise InputError(f"augment.policy is {text!r}: p{policy.probability:g} is not a probability")
        return policy

    def __call__(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        fill: tuple[int, ...] = (128, 128, 128),
    ) -> Image.Image:
        """Transform RGB to RGB of the same size; `fill` colours pixels from outside the image."""
        if resample == Image.Resampling.LANCZOS:  # for resizing only
            resample = Image.Resampling.BICUBIC
        operations = list(rand_operations(self.increasing).values())
        for operation in rng.integers(len(operations), size=self.layers):
            if rng.random() < self.probability:
                uniform = self.std > 100
                drawn = rng.uniform(0, self.magnitude) if uniform else rng.normal(self.magnitude, self.std)
                level = min(max(drawn, 0), self.limit) / 10
                sign = -1 if rng.random() < 0.5 else 1
                image = operations[operation](image, sign * level, {"resample": resample, "fillcolor": fill})
        return image


# Arguments: an RGB image, the magnitude / 10 with a sign, PIL's `resample` and `fillcolor`.
Operation = Callable[[Image.Image, float, dict[str, Any]], Image.Image]


@functools.cache
def rand_operations(increasing: bool) -> dict[str, Operation]:
    """Make RandAugment's operations by timm's names, without the suffix `Increasing` and without Cutout."""

    def warp(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
        """Make an affine operation. matrix: the map, by image and level, from a pixel of the result to its source."""
        affine = Image.Transform.AFFINE
        return lambda image, level, look: image.transform(image.size, affine, matrix(image, level), **look)

    def enhance(enhancer: Callable[[Image.Image], Any]) -> Operation:
        if increasing:
            return lambda image, level, _: enhancer(image).enhance(max(0.1, 1 + 0.9 * level))
        return lambda image, level, _: enhancer(image).enhance(0.1 + 1.8 * abs(level))

    def posterize(image: Image.Image, level: float, _) -> Image.Image:
        steps = int(4 * abs(level))
        drop = 8 - (4 - steps if increasing else steps)  # the lowest bits; from 8 on the image is black
        # Not PIL's: since version 13 it refuses to keep 0 bits, which full strength needs.
        return image.point([value >> drop << drop if drop > 0 else value for value in range(256)] * 3)

    def solarize(image: Image.Image, level: float, _) -> Image.Image:
        threshold = min(256, int(256 * abs(level)))
        return ImageOps.solarize(image, 256 - threshold if increasing else threshold)

    def solarize_add(image: Image.Image, level: float, _) -> Image.Image:
        add = min(128, int(110 * abs(level)))
        return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)

    return {
        "AutoContrast": lambda image, level, look: ImageOps.autocontrast(image),
        "Equalize": lambda image, level, look: ImageOps.equalize(image),
        "Invert": lambda image, level, look: ImageOps.invert(image),
        "Rotate": lambda image, level, look: image.rotate(30 * level, **look),
        "Posterize": posterize,
        "Solarize": solarize,
        "SolarizeAdd": solarize_add,
        "Color": enhance(ImageEnhance.Color),
        "Contrast": enhance(ImageEnhance.Contrast),
        "Brightness": enhance(ImageEnhance.Brightness),
        "Sharpness": enhance(ImageEnhance.Sharpness),
        "ShearX": warp(lambda image, level: (1, 0.3 * level, 0, 0, 1, 0)),
        "ShearY": warp(lambda image, level: (1, 0, 0, 0.3 * level, 1, 0)),
        "TranslateXRel": warp(lambda image, level: (1, 0, 0.45 * level * image.width, 0, 1, 0)),
        "TranslateYRel": warp(lambda image, level: (1, 0, 0, 0, 1, 0.45 * level * image.height)),
    }
