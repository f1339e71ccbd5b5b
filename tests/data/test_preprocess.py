"""Preprocessing: the same pixels as timm, bit for bit, and a one-line error for each mistake of a user."""

import dataclasses
import io
import json
import math
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from PIL import Image, ImageFile

from fcvit_jax.data.augment import Augment
from fcvit_jax.data.preprocess import CLIP_MEAN, CLIP_STD, HALF, PRESETS, Preprocess, decode, preset
from fcvit_jax.errors import InputError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw coarse noise: edges at every scale, so that a shift of one pixel anywhere changes the result."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
    fine = np.asarray(image).astype(int) + generator.integers(-20, 20, (height, width, 3))
    return Image.fromarray(fine.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def timm_transform(preprocess: Preprocess, **options):
    fields = {**dataclasses.asdict(preprocess), "input_size": (3, *preprocess.image_size)}
    del fields["image_size"], fields["exif_transpose"]
    return pytest.importorskip("timm.data").create_transform(**fields, is_training=False, **options)


def assert_pixels_equal_timm(preprocess: Preprocess, image: Image.Image) -> None:
    pixels = preprocess(image)
    assert pixels.dtype == np.uint8
    theirs = timm_transform(preprocess, use_prefetcher=True)(image)  # does not normalise
    np.testing.assert_array_equal(pixels, theirs.numpy().transpose(1, 2, 0))


SETTINGS = [
    Preprocess((224, 224), 0.9, "center", "bicubic", HALF, HALF),
    Preprocess((224, 224), 0.875, "center", "bilinear", (0, 0, 0), (1, 1, 1)),
    Preprocess((96, 96), 1.0, "center", "lanczos", CLIP_MEAN, CLIP_STD),
    Preprocess((224, 224), 0.95, "squash"),
    Preprocess((160, 224), 0.875, "center"),
    Preprocess((96, 64), 0.9, "squash", "bilinear"),
    Preprocess((224, 224), 0.9, "border"),
    Preprocess((64, 96), 1.0, "border", "lanczos", HALF, HALF),
    Preprocess((64, 64), 1.3, "center"),  # smaller than the crop: a black border
    Preprocess((65, 90), 1.21, "border"),
]


@pytest.mark.parametrize("preprocess", SETTINGS, ids=str)
@pytest.mark.parametrize(
    "size", [(75, 56), (224, 224), (300, 171), (171, 300), (248, 400), (31, 33), (500, 20), (1, 1), (257, 256)]
)
def test_odd_sizes_equal_timm(preprocess, size):
    assert_pixels_equal_timm(preprocess, noise(*size, seed=sum(size)))


@pytest.mark.parametrize("preprocess", SETTINGS, ids=str)
def test_normalized_images_equal_timm(preprocess):
    image = noise(300, 200)
    expected = timm_transform(preprocess)(image).numpy().transpose(1, 2, 0)
    ours = jax.jit(preprocess.normalize)(preprocess(image))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-7)


ODD = ("can_opener", "thunder_snake", "file", "tusker")


def test_real_photos_equal_timm(imagenet_samples):
    files = imagenet_samples[::7] + [file for file in imagenet_samples if file.stem.endswith(ODD)]
    assert len(files) >= 39
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's, on the odd ones, opened as timm does
            theirs = Image.open(file).convert("RGB")
        ours = decode(file.read_bytes(), file.name)
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        for index in (0, 3, 4, 6):  # centre, squash, centre not square, border
            assert_pixels_equal_timm(SETTINGS[index], ours)


def test_resize_size_is_floored():
    table = [(224, 0.9, 248), (224, 0.875, 256), (224, 0.95, 235), (256, 0.95, 269), (384, 1.0, 384), (518, 1.0, 518)]
    for size, crop_pct, expected in table:
        assert Preprocess((size, size), crop_pct).resize_size == (expected, expected)


def test_crop_offset_is_rounded_half_to_even():
    column = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    cropped = Preprocess((4, 4), 1.0)(Image.fromarray(column))  # 1.5 pixels too many on the left: 2
    assert cropped[0, :, 0].tolist() == [2, 3, 4, 5]


def test_border_is_the_mean_colour():
    white = Image.new("RGB", (20, 10), "white")
    pixels = Preprocess((20, 20), 1.0, "border", mean=(0.1, 0.5, 0.9), std=HALF)(white)
    assert pixels[0, 0].tolist() == [26, 128, 230]
    assert (pixels[5:15] == 255).all()
    assert (pixels[:5] == pixels[0, 0]).all()


def test_extreme_shapes_keep_a_pixel():
    assert Preprocess((32, 32), 1.0, "border")(noise(2000, 1)).shape == (32, 32, 3)


def test_grey_images_become_rgb():
    grey = noise(40, 30).convert("L")
    pixels = Preprocess((16, 16))(grey)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_normalize_by_hand_any_rank_and_jit():
    preprocess = Preprocess((2, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    images = np.array([0, 51, 255], np.uint8)[:, None].repeat(3, 1)  # [3 pixels, 3 channels]
    expected = [[0, -1, -4], [0.2, -0.6, -3.2], [1, 1, 0]]
    np.testing.assert_allclose(preprocess.normalize(images), expected, atol=1e-6)
    batch = np.broadcast_to(images, (2, 4, 3, 3))
    np.testing.assert_allclose(jax.jit(preprocess.normalize)(batch)[1, 2], expected, atol=1e-6)


# Fields, text and JSON


def test_str_is_one_readable_line():
    assert str(PRESETS["timm/augreg"]) == "bicubic 248->224 center, mean .5 std .5"
    assert str(Preprocess()) == "bicubic 256->224 center, mean .485/.456/.406 std .229/.224/.225"
    wide = Preprocess((224, 288), 1.0, "squash", "bilinear", (0, 0, 0), (1, 1, 1))
    assert str(wide) == "bilinear 224x288->224x288 squash, mean 0 std 1"


@pytest.mark.parametrize("preprocess", SETTINGS, ids=str)
def test_dict_survives_json(preprocess):
    fields = preprocess.to_dict()
    assert json.loads(json.dumps(fields)) == fields
    again = Preprocess.from_dict(json.loads(json.dumps(fields)))
    assert again == preprocess
    assert hash(again) == hash(preprocess)


def test_dict_names_fields_unknown_and_missing():
    fields = Preprocess().to_dict()
    with pytest.raises(InputError, match="unknown or missing fields antialias, size"):
        Preprocess.from_dict({**fields, "size": 224, "antialias": True})
    with pytest.raises(InputError, match="unknown or missing fields crop_mode, mean"):
        Preprocess.from_dict({name: value for name, value in fields.items() if name not in ("crop_mode", "mean")})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 224),
        ("image_size", (224.0, 224.0)),
        ("image_size", (0, 224)),
        ("image_size", "ab"),
        ("crop_pct", 90),
        ("crop_pct", 0),
        ("crop_pct", "0.9"),
        ("crop_pct", math.nan),
        ("crop_mode", "centre"),
        ("interpolation", "nearest"),
        ("interpolation", ["bicubic"]),
        ("mean", (0.5, 0.5)),
        ("mean", (123.675, 116.28, 103.53)),
        ("mean", 0.5),
        ("std", (0.0, 0.5, 0.5)),
        ("std", (58.4, 57.1, 57.4)),
        ("std", (math.inf, 1, 1)),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(InputError, match=rf"^preprocess\.{field} is {re.escape(repr(value))}: ") as caught:
        Preprocess(**{field: value})
    assert "\n" not in str(caught.value)


def test_presets():
    assert preset("timm/augreg", (384, 384)) == Preprocess((384, 384), 0.9, mean=HALF, std=HALF)
    assert preset("timm/deit", (224, 224)).resize_size == (248, 248)
    assert preset("deit/official", (224, 224)).resize_size == (256, 256)
    assert preset("hf/vit", (224, 224)).crop_mode == "squash"
    assert preset("timm/clip", (224, 224)).mean == CLIP_MEAN
    assert {name for name, p in PRESETS.items() if p.interpolation == "bilinear"} == {
        "timm/miil",
        "torchvision/v1",
        "hf/vit",
    }
    assert [str(PRESETS[name]).split(", ")[1] for name in ("timm/miil", "timm/deit3-in22k")] == [
        "mean 0 std 1",
        "mean .485/.456/.406 std .229/.224/.225",
    ]
    assert [PRESETS[name].crop_pct for name in ("timm/deit3-in22k", "timm/dinov2", "torchvision/v1")] == [1, 1, 0.875]


def test_preset_overrides():
    text = "timm/augreg, crop_pct=1.0,interpolation=bilinear,crop_mode=squash,mean=0.4/.5/0.6"
    expected = Preprocess((32, 48), 1.0, "squash", "bilinear", (0.4, 0.5, 0.6), HALF)
    assert preset(text, (32, 48)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("timm/augregg", r"no preset 'timm/augregg' \(did you mean timm/augreg.*there are timm/augreg, timm/deit"),
        ("", "no preset ''; there are"),
        ("timm/deit,crop=1", "'crop=1' is not an override; write FIELD=VALUE, FIELD one of crop_pct, crop_mode"),
        ("timm/deit,bilinear", "'bilinear' is not an override"),
        ("timm/deit,crop_pct=all", r"preprocess\.crop_pct is 'all': it must be a number from 0\.1 to 2"),
        ("timm/deit,mean=.5", r"preprocess\.mean is 0\.5: it must be 3 numbers"),
        ("timm/deit,crop_mode=tile", r"preprocess\.crop_mode is 'tile': choose one of center, squash, border"),
    ],
)
def test_preset_errors_name_the_fix(text, message):
    with pytest.raises(InputError, match=message):
        preset(text, (224, 224))


# Decoding


def test_decode_takes_bytes_and_pixels():
    image = noise(20, 10)
    pixels = np.asarray(image)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image), "x")), pixels)
    np.testing.assert_array_equal(np.asarray(decode(pixels, "x")), pixels)
    np.testing.assert_array_equal(np.asarray(decode(pixels[..., 0], "x")), pixels[..., :1].repeat(3, 2))


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(noise(20, 10), "JPEG", exif=exif), "x").size == (20, 10)


def png_of_size(width: int, height: int) -> bytes:
    """Make a PNG that claims this size, and contains nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "no known image format"),
        (encoded(noise(64, 64), "JPEG")[:-200], "image file is truncated"),
        (encoded(noise(64, 64), "PNG")[:-200], "."),
        (encoded(noise(64, 64), "WEBP", lossless=True)[:-200], "."),
        (encoded(noise(64, 64), "GIF")[:-200], "image file is truncated"),
        (png_of_size(20_000, 20_000), r"Image size \(400000000 pixels\) exceeds limit"),
        (
            png_of_size(10_000, 10_000),
            "(?!Image size)",
        ),  # PIL only warns of this size: allowed, but empty
    ],
    ids=["empty", "web page", "jpeg", "png", "webp", "gif", "bomb", "large"],
)
def test_data_that_cannot_be_decoded_are_named(data, why):
    with pytest.raises(InputError, match=rf"^image a/b\.jpg cannot be decoded: {why}") as caught:
        decode(data, "a/b.jpg")
    assert "\n" not in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def palette_with_transparency() -> bytes:
    return encoded(noise(16, 16).quantize(8), "PNG", transparency=bytes(range(0, 240, 30)))


def tiff_with_two_compressions() -> bytes:
    entry = struct.pack("<HHI", 259, 3, 1)  # tag, type, count; the value follows, with room for a second one
    data = encoded(noise(16, 16), "TIFF")
    assert data.count(entry) == 1
    return data.replace(entry, struct.pack("<HHI", 259, 3, 2))


def tiff_with_exif_beyond_its_end() -> bytes:
    data = encoded(noise(16, 16), "TIFF", description="a tag to overwrite")
    start = data.index(struct.pack("<HH", 270, 2))
    return data[:start] + struct.pack("<HHII", 34665, 4, 1, len(data) - 1) + data[start + 12 :]


@pytest.mark.parametrize(
    ("make", "remark"),
    [
        (palette_with_transparency, "Transparency"),
        (tiff_with_two_compressions, "too many entries"),  # raised on opening
        (tiff_with_exif_beyond_its_end, "Corrupt EXIF"),  # raised on loading
    ],
)
def test_odd_files_decode_without_output(make, remark, capfd):
    data = make()
    with pytest.warns(UserWarning, match=remark):  # PIL alone does warn: the file is odd
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_array_equal(np.asarray(decode(data, "odd")), expected)
    assert caught == []
    assert capfd.readouterr() == ("", "")


def test_decoding_in_threads_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    files = [encoded(noise(32, 32, seed), form) for seed in range(20) for form in ("PNG", "JPEG", "TIFF")]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda data: decode(data, "x"), files * 4))
    assert len(images) == 240
    assert list(warnings.filters) == before


# Depth of 16 bits, and EXIF orientation


def test_grey_of_sixteen_bits_is_the_same_photo(tmp_path):
    grey = np.asarray(noise(40, 30).convert("L"))
    deep = grey.astype(np.uint16) * 257
    expected = np.repeat(grey[..., None], 3, axis=2)
    image = Image.fromarray(deep)
    raw = b"P5 40 30 65535\n" + deep.astype(">u2").tobytes()
    for data in (encoded(image), encoded(image, "TIFF"), encoded(image, "JPEG2000", irreversible=False), raw, deep):
        decoded = decode(data, "x")
        np.testing.assert_array_equal(np.asarray(decoded), expected)
        assert decoded.info["oddities"] == ("sixteen_bit",)
        np.testing.assert_array_equal(Preprocess((30, 40), 1.0)(decoded), expected)
    for shifted in (grey.astype(np.uint16) * 256, grey.astype(np.uint16) * 256 + 255):
        np.testing.assert_array_equal(np.asarray(decode(shifted, "x")), expected)
    np.testing.assert_array_equal(Preprocess((30, 40), 1.0)(image), expected)  # opened by a user
    assert "oddities" not in decode(encoded(Image.fromarray(grey)), "x").info


def test_grey_of_twelve_bits_in_a_tiff():
    """A hand-made TIFF: no available library writes 12 bits."""
    grey = np.arange(0, 256, 2, dtype=np.uint16).reshape(8, 16)
    deep = (grey * 16 + 5).ravel()
    first, second = deep[::2], deep[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    tags = [(256, 16), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, len(packed))]
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags) + struct.pack("<I", 0)
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory
    np.testing.assert_array_equal(np.asarray(decode(data, "x"))[..., 0], grey)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.ones((4, 4), np.float32), "floating-point numbers, which have no defined range"),
        (np.full((4, 4), 70_000, np.int32), "signed or 32-bit integers, which have no defined range"),
    ],
)
def test_values_without_a_range_are_refused(pixels, message):
    image = Image.fromarray(pixels)
    for data in (encoded(image, "TIFF"), pixels):
        with pytest.raises(InputError, match=f"image x cannot be decoded: its pixels are {message}") as caught:
            decode(data, "x")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        Preprocess((4, 4))(image)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_counted_or_applied(form, orientation):
    upright = noise(24, 16)
    back = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM}  # fmt: skip
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    decoded = decode(encoded(stored, form, exif=exif, **lossless), "x")
    assert decoded.size == stored.size
    assert decoded.info.get("oddities", ()) == (("turned",) if orientation > 1 else ())
    turning = Preprocess((16, 24), 1.0, exif_transpose=True)
    np.testing.assert_allclose(turning(decoded).astype(int), np.asarray(upright), atol=60 if form == "JPEG" else 0)
    if orientation not in (1, 2, 4, 3):  # as timm: as stored
        np.testing.assert_array_equal(Preprocess((24, 16), 1.0)(decoded), np.asarray(decoded))
    rng = np.random.default_rng(0)
    still = Augment("eval", flip=0.0)(decoded, turning, rng)
    np.testing.assert_array_equal(still, turning(decoded))


def test_an_image_of_a_palette_keeps_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(24, 16).convert("P")
    decoded = decode(encoded(image, exif=exif), "x")
    turned = Preprocess((24, 16), 1.0, exif_transpose=True)(decoded)
    np.testing.assert_array_equal(turned, np.asarray(image.convert("RGB").transpose(Image.Transpose.ROTATE_270)))


def test_damaged_exif_prints_nothing():
    image = noise(24, 16)
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + bytes(9), b"nonsense"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = encoded(image, "JPEG", exif=exif)
        assert "oddities" not in decode(data, "x").info


def test_the_field_that_turns_is_kept_and_may_be_absent():
    plain, turning = Preprocess(), Preprocess(exif_transpose=True)
    assert "exif_transpose" not in plain.to_dict()  # so that earlier versions read it
    for each in (plain, turning):
        assert Preprocess.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert str(turning) == f"{plain}, turned as EXIF says"
    assert preset("timm/deit,exif_transpose=true", (224, 224)).exif_transpose
    assert not preset("timm/deit,exif_transpose=False", (224, 224)).exif_transpose
    with pytest.raises(InputError, match=r"preprocess\.exif_transpose is 'yes': it must be true or false"):
        preset("timm/deit,exif_transpose=yes", (224, 224))
