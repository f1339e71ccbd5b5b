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
from PIL import ExifTags, Image, UnidentifiedImageError

from fcvit_jax.errors import InputError
from fcvit_jax.settings import check_settings, setting

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
_BYTES = "divide 0..255 values by 255"
_WARNING_FILTERS = threading.Lock()
_TELL_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # entries of `Image.info`
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

MAX_RESIZED_PIXELS = 2**26  # a strip one pixel wide would otherwise take all memory
CROP_MODES = ("center", "squash", "border")
OVERRIDES = ("crop_pct", "crop_mode", "interpolation", "mean", "std", "exif_transpose")
# Kinds that `decode` notes in an image's `info["oddities"]` -> the warning for a number of images.
ODDITIES = {
    "sixteen_bit": "{} of 16 bits a pixel scaled to 8 bits",
    "turned": "{} with an EXIF orientation read unturned, as timm does (preprocess field exif_transpose turns them)",
}
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
    border. mean, std: per channel, in units of the pixel range: 0.5 is mid-grey. exif_transpose: turn images first as
    their EXIF orientation says, which timm ignores.

    Raises InputError if a field is out of range; when called, if the resized image exceeds `MAX_RESIZED_PIXELS`.
    """

    image_size: tuple[int, int] = setting((224, 224), low=1)
    crop_pct: float = setting(0.875, low=0.1, high=2, hint="a share, not percent")
    crop_mode: str = setting("center", choices=CROP_MODES)
    interpolation: str = setting("bicubic", choices=tuple(INTERPOLATIONS))
    mean: tuple[float, float, float] = setting(IMAGENET_MEAN, low=0, high=1, hint=_BYTES)
    std: tuple[float, float, float] = setting(IMAGENET_STD, above=0, high=1, hint=_BYTES)
    exif_transpose: bool = False

    def __post_init__(self):
        check_settings(self, "preprocess.")

    @property
    def resize_size(self) -> tuple[int, int]:
        """(height, width) from which the crop is taken: `floor(image_size / crop_pct)`."""
        height, width = self.image_size
        return max(1, math.floor(height / self.crop_pct)), max(1, math.floor(width / self.crop_pct))

    @property
    def oddities(self) -> dict[str, str]:
        """The kinds of `ODDITIES` that matter with this preprocessing."""
        return {kind: text for kind, text in ODDITIES.items() if kind != "turned" or not self.exif_transpose}

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop on the host: uint8 `[height, width, 3]`, which `normalize` takes."""
        image = self.upright(image)
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

    def upright(self, image: Image.Image) -> Image.Image:
        """Convert the image to RGB, and turn it by its EXIF orientation if `exif_transpose` is on."""
        turn = _TURNS.get(_orientation(image)) if self.exif_transpose else None
        image = to_rgb(image)
        if turn is not None:
            image = image.transpose(turn)
            image.info["orientation"] = 1
        return image

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Compute (width, height) of the resized image. The long side is floored or rounded exactly as in timm."""
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
        turned = ", turned as EXIF says" if self.exif_transpose else ""
        return f"{self.interpolation} {'->'.join(sizes)} {self.crop_mode}, mean {mean} std {std}{turned}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields for JSON, with tuples as lists. `exif_transpose` is left out if it is off."""
        fields = dataclasses.asdict(self)
        if not self.exif_transpose:  # earlier versions do not know it
            del fields["exif_transpose"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Preprocess":
        """Invert `to_dict`. Raises InputError that names fields that are unknown, missing or out of range."""
        known = {field.name for field in dataclasses.fields(cls)}
        if odd := sorted(known ^ {"exif_transpose", *fields}):
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

    Raises InputError if there is no such preset or field, or a value is not a number.
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
            raise InputError(f"preprocess: {override!r} is not an override; {fix}")
        values[field] = {"true": True, "false": False}.get(value.lower(), value)
        with contextlib.suppress(ValueError):  # text stays text
            channels = [float(part) for part in value.split("/")]
            values[field] = channels if len(channels) > 1 else channels[0]
    return dataclasses.replace(PRESETS[name], **values)


def decode(data: bytes | np.ndarray, name: str) -> Image.Image:
    """Decode a file's bytes, or pixels `[h, w, 3]` or `[h, w]`, to an RGB image; from any thread.

    The image is not turned, but keeps its EXIF orientation; `info["oddities"]` lists its kinds of `ODDITIES`. Raises
    InputError, naming the image, if it cannot be decoded completely, or `to_rgb` refuses its values.
    """
    try:
        if isinstance(data, np.ndarray):
            return to_rgb(Image.fromarray(data))
        # PIL warns of odd metadata. Filters are global to the process: one thread at a time, and briefly.
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\b")
            image = Image.open(io.BytesIO(data))
            if image.format == "TIFF":  # PIL parses its tags on loading too, and warns
                image.load()
        image.load()
        orientation = _orientation(image)
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # the same colours as straight to RGB, but without a warning
        image = to_rgb(image)
        if orientation in _TURNS:
            image.info["orientation"] = orientation  # after a conversion PIL may not find it again
            image.info["oddities"] = (*image.info.get("oddities", ()), "turned")
        return image
    except UnidentifiedImageError:
        why = "no known image format" if data else "the file is empty"
    except Exception as error:  # decoders raise anything on damaged bytes
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"image {name} cannot be decoded: {why}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB as PIL does, but take the high byte of 16-bit grey, as of 16-bit colour; PIL would clip it.

    Raises InputError for 32-bit integers and floating-point numbers, where no value is known to be white.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # PIL widens theirs
        kind = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
        raise InputError(f"its pixels are {kind}, which have no defined range: save it with 8 or 16 bits a pixel")
    if not image.mode.startswith("I"):
        return image.convert("RGB")
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]  # TIFF has 12 too
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is zero
        grey = 255 - grey
    rgb = Image.fromarray(grey).convert("RGB")
    rgb.info["oddities"] = ("sixteen_bit",)
    return rgb


def _orientation(image: Image.Image) -> int:
    """Read from EXIF or XMP data how an image is turned: 1 (not at all) to 8. PIL itself turns TIFF files."""
    if "orientation" in image.info or not image.info.keys() & _TELL_ORIENTATION:
        return image.info.get("orientation", 1)
    with contextlib.suppress(Exception), _WARNING_FILTERS, warnings.catch_warnings():  # damaged data raise anything
        warnings.simplefilter("ignore")
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _offset(length: int, to: int) -> int:
    """Return where a centred image of that length starts along one axis of the crop, rounded as in torchvision."""
    return (to - length) // 2 if length < to else -round((length - to) / 2)


def _short(values: tuple[float, ...]) -> str:
    """Shorten `(0.5, 0.5, 0.5)` to `".5"`; join three values that differ by slashes."""
    return "/".join(f"{x:.4g}".removeprefix("0") or "0" for x in (values if len({*values}) > 1 else values[:1]))
