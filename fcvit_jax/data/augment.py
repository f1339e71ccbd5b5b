"""Training augmentation, on the host, of uint8 images that are cut to the model's size."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class RandomAffine:
    """A random rotation, shift and scale about the centre; what comes into view is filled with `fill`.

    degrees: up to so many, either way. shift: up to this share of the height and width. scale: a factor between its
    two numbers.
    """

    degrees: float = 0.0
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    fill: int = 0

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [height, width, 3] -> the same shape; bilinear."""
        height, width = pixels.shape[:2]
        angle = math.radians(rng.uniform(-self.degrees, self.degrees))
        down, across = rng.uniform(-self.shift, self.shift, 2) * (height, width)
        shrink = 1 / rng.uniform(*self.scale)
        # PIL wants the inverse map, from a pixel of the result to its source: rotate and scale about the centre.
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
