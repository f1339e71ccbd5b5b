"""Turn image bytes into the pixels a model was trained on: decode, resize, crop on the host; normalise on the device.

All sources use the same PIL code, because weights expect one decoder, one filter and one rounding. The uint8 pixels
equal those of timm's evaluation transform bit for bit.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
_BYTES = "divide 0..255 values by 255"
_WARNING_FILTERS = threading.Lock()

MAX_RESIZED_PIXELS = 2**26  # a strip one pixel wide would otherwise take all memory
CROP_MODES = ("center", "squash", "border")
OVERRIDES = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input; hashable, and part of a checkpoint.

    The image is resized to `floor(image_size / crop_pct)`, antialiased, and `image_size` is cut from its centre:

    * `center` keeps the aspect ratio and covers that size (the shorter side fits); the rest is cut off;
    * `squash` resizes both sides to it, whatever the aspect ratio;
    * `border` keeps the aspect ratio and stays inside it (the longer side fits); the mean colour fills the rest.

    image_size: (height, width) in pixels. crop_pct: share of the resized image that is kept; above 1 the image gets a
    border. mean, std: per channel, in units of the pixel range: 0.5 is mid-grey.

    Raises InputError if a field is out of range; when called, if the resized image exceeds `MAX_RESIZED_PIXELS`.
    """

    image_size: tuple[int, int] = setting((224, 224), low=1)
    crop_pct: float = setting(0.875, low=0.1, high=2, hint="a share, not percent")
    crop_mode: str = setting("center", choices=CROP_MODES)
    interpolation: str = setting("bicubic", choices=tuple(INTERPOLATIONS))
    mean: tuple[float, float, float] = setting(IMAGENET_MEAN, low=0, high=1, hint=_BYTES)
    std: tuple[float, float, float] = setting(IMAGENET_STD, above=0, high=1, hint=_BYTES)

    def __post_init__(self):
        check_settings(self, "preprocess.")

    @property
    def resize_size(self) -> tuple[int, int]:
        """(height, width) the crop is taken from: `floor(image_size / crop_pct)`."""
        height, width = self.image_size
        return max(1, math.floor(height / self.crop_pct)), max(1, math.floor(width / self.crop_pct))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop on the host: uint8 `[height, width, 3]`, which `normalize` takes."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        width, height = self._resized(*image.size)
        if width * height > MAX_RESIZED_PIXELS:
            sizes = f"it is {image.width}x{image.height} and would be resized to {width}x{height}"
            raise InputError(f"{sizes}: crop it first")
        resized = image.resize((width, height), INTERPOLATIONS[self.interpolation])
        fill = tuple(round(255 * value) for value in self.mean) if self.crop_mode == "border" else (0, 0, 0)
        to_height, to_width = self.image_size
        cropped = Image.new("RGB", (to_width, to_height), fill)
        cropped.paste(resized, (_offset(width, to_width), _offset(height, to_height)))
        return np.asarray(cropped)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the resized image. The long side is floored or rounded exactly as in timm."""
        to_height, to_width = self.resize_size
        if self.crop_mode == "squash":
            return to_width, to_height
        if self.crop_mode == "center" and to_height == to_width:
            longer = int(to_height * max(width, height) / min(width, height))
            return (to_width, longer) if width <= height else (longer, to_height)
        fit = max if self.crop_mode == "border" else min
        ratio = fit(height / to_height, width / to_width)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def normalize(self, images: jax.typing.ArrayLike) -> jax.Array:
        """Compute `(images / 255 - mean) / std` in float32, inside jit; images: uint8 `[..., height, width, 3]`."""
        images = jnp.asarray(images)
        channels = (1,) * (images.ndim - 1) + (3,)
        # XLA replaces division by a constant by a product: one division is within 2.5e-7 of exact, two within 7e-7.
        mean, std = (np.float32(255 * np.asarray(values)).reshape(channels) for values in (self.mean, self.std))
        return (images.astype(jnp.float32) - mean) / std

    def __str__(self) -> str:
        square = self.image_size[0] == self.image_size[1]
        sizes = [f"{size[0]}" if square else f"{size[0]}x{size[1]}" for size in (self.resize_size, self.image_size)]
        mean, std = _short(self.mean), _short(self.std)
        return f"{self.interpolation} {'->'.join(sizes)} {self.crop_mode}, mean {mean} std {std}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON has them: tuples are lists."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocess":
        """Inverse of `to_dict`. Raises InputError naming the fields that are unknown, missing or out of range."""
        if odd := sorted({field.name for field in dataclasses.fields(cls)} ^ fields.keys()):
            raise InputError(f"preprocess: unknown or missing fields {', '.join(odd)}")
        return cls(**fields)


PRESETS: dict[str, Preprocess] = {
    "timm/augreg": Preprocess(crop_pct=0.9, mean=HALF, std=HALF),
    "timm/deit": Preprocess(crop_pct=0.9),
    "timm/deit3-in22k": Preprocess(crop_pct=1.0),
    "timm/dinov2": Preprocess(crop_pct=1.0),
    "timm/miil": Preprocess(interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1)),
    "timm/clip": Preprocess(crop_pct=0.9, mean=CLIP_MEAN, std=CLIP_STD),
    "timm/siglip": Preprocess(crop_pct=1.0, crop_mode="squash", mean=HALF, std=HALF),  # as Google trained them
    "deit/official": Preprocess(),
    "torchvision/v1": Preprocess(interpolation="bilinear"),
    "torchvision/swag": Preprocess(crop_pct=1.0),
    "hf/vit": Preprocess(crop_pct=1.0, crop_mode="squash", interpolation="bilinear", mean=HALF, std=HALF),
}


def preset(text: str, image_size: tuple[int, int]) -> Preprocess:
    """Look up a preset, with overrides: `"timm/augreg"`, `"timm/augreg,crop_pct=1.0,mean=.5/.5/.5"`.

    Raises InputError if there is no such preset or field, or a value is no number.
    """
    name, *overrides = (part.strip() for part in text.split(","))
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise InputError(f"preprocess: no preset {name!r}{hint}; there are {', '.join(PRESETS)}")
    values: dict[str, Any] = {"image_size": image_size}
    for override in overrides:
        field, equals, value = (part.strip() for part in override.partition("="))
        if not equals or field not in OVERRIDES:
            fix = f"write FIELD=VALUE, FIELD one of {', '.join(OVERRIDES)}"
            raise InputError(f"preprocess: {override!r} is no override; {fix}")
        values[field] = value
        with contextlib.suppress(ValueError):  # text stays text
            channels = [float(part) for part in value.split("/")]
            values[field] = channels if len(channels) > 1 else channels[0]
    return dataclasses.replace(PRESETS[name], **values)


def decode(data: bytes | np.ndarray, name: str) -> Image.Image:
    """Decode a file's bytes, or uint8 pixels `[h, w, 3]` or `[h, w]`, to an RGB image; from any thread.

    EXIF orientation is ignored, as in timm. Raises InputError, naming the image, if it cannot be decoded completely.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data).convert("RGB")
    try:
        # PIL warns of odd metadata. Filters are global to the process: one thread at a time, and briefly.
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            image = Image.open(io.BytesIO(data))
            if image.format == "TIFF":  # parses tags, and warns of them, on loading too
                image.load()
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # the same colours as straight to RGB, but without a warning
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        why = "no known image format" if data else "the file is empty"
    except Exception as error:  # decoders raise anything on damaged bytes
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"image {name} cannot be decoded: {why}")


def _offset(length: int, to: int) -> int:
    """Where a centred image of that length starts along one axis of the crop, rounded as in torchvision."""
    return (to - length) // 2 if length < to else -round((length - to) / 2)


def _short(values: tuple[float, ...]) -> str:
    """`(0.5, 0.5, 0.5)` -> `".5"`; three values that differ are joined by slashes."""
    return "/".join(f"{x:.4g}".removeprefix("0") or "0" for x in (values if len({*values}) > 1 else values[:1]))
