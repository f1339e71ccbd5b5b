"""Augmentation against timm's and torchvision's: pixel for pixel, or by moments if something is drawn."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image

from fcvit_jax.data import augment
from fcvit_jax.data.augment import Augment, RandAugment, RandomAffine, rand_operations, random_box
from fcvit_jax.data.preprocess import Preprocess
from fcvit_jax.errors import InputError
from fcvit_jax.settings import from_fields

SQUARE = Preprocess((32, 32), mean=(0.5, 0.25, 0.75))
OFF = {"crop": "eval", "flip": 0.0}


def random_pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Draw pixels smooth enough for interpolation to matter, but not so smooth that all filters agree."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    return (np.asarray(coarse) * 0.8 + rng.integers(0, 51, (height, width, 3))).astype(np.uint8)


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(random_pixels(height, width, seed))


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


# RandomAffine


def test_without_options_nothing_changes():
    pixels = random_pixels(16, 24)
    np.testing.assert_array_equal(RandomAffine()(pixels, rng()), pixels)


def test_shift_moves_by_whole_pixels_and_fills():
    class Fixed:
        def uniform(self, low, high, size=None):
            return 0.0 if low == high == 0 else 1.0 if size is None else np.asarray([0.25, 0.5])

    pixels = np.random.default_rng(0).integers(1, 256, (8, 8, 3), dtype=np.uint8)
    moved = RandomAffine(shift=0.5, fill=7)(pixels, Fixed())  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(moved[2:, 4:], pixels[:-2, :-4])  # 0.25 of 8 down, 0.5 of 8 across
    assert (moved[:2] == 7).all()
    assert (moved[:, :4] == 7).all()


def test_a_quarter_turn_about_the_centre():
    class Quarter:
        def uniform(self, low, high, size=None):
            return 90.0 if high == 90 else 1.0 if size is None else np.zeros(2)

    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    turned = RandomAffine(degrees=90)(pixels, Quarter())  # pyright: ignore[reportArgumentType]
    inner = np.s_[1:-1, 1:-1]  # clockwise, except for rounding
    np.testing.assert_allclose(turned[inner].astype(int), np.rot90(pixels, -1)[inner].astype(int), atol=1)


def test_the_same_seed_draws_the_same():
    pixels = random_pixels(16, 16)
    affine = RandomAffine(degrees=20, shift=0.1, scale=(0.8, 1.2))
    first, again, other = (affine(pixels, rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# The recipe


def test_all_off_is_the_evaluation():
    image = random_image(50, 70)
    np.testing.assert_array_equal(Augment(**OFF)(image, SQUARE, rng()), SQUARE(image))


def test_the_digits_recipe_is_the_affine_of_the_evaluation():
    affine = RandomAffine(degrees=12, shift=0.06, scale=(0.88, 1.12))
    image = random_image(8, 8)
    ours = Augment(**OFF, affine=affine)(image, SQUARE, rng(3))
    np.testing.assert_array_equal(ours, affine(SQUARE(image), rng(3)))  # disabled steps draw nothing


def test_flip_is_left_to_right_and_as_often_as_configured():
    image = random_image(40, 40)
    plain = SQUARE(image)
    np.testing.assert_array_equal(Augment(crop="eval", flip=1.0)(image, SQUARE, rng()), plain[:, ::-1])
    generator, recipe = rng(), Augment(crop="eval", flip=0.3)
    flipped = [bool((recipe(image, SQUARE, generator) != plain).any()) for _ in range(1000)]
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.05)


RECIPES = [
    Augment(policy="rand-m9-mstd0.5", erase=1.0, affine=RandomAffine(degrees=10)),
    Augment(crop="resize_crop", policy="rand-m10-n4-p1.0-inc1", erase=1.0),
    Augment(crop="eval", policy="rand-m7-mstd101-inc1", erase=1.0),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.crop)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 300), (300, 2), (31, 33), (50, 37)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_size_and_mode(recipe, size, mode):
    image = random_image(size[1], size[0]).convert(mode)
    for preprocess in (
        Preprocess((24, 16), 0.9),
        Preprocess((16, 16), 1.2, interpolation="lanczos"),
        Preprocess((1, 1)),
    ):
        for seed in range(3):
            pixels = recipe(image, preprocess, rng(seed))
            assert (pixels.shape, pixels.dtype) == ((*preprocess.image_size, 3), np.uint8)


@pytest.mark.parametrize("crop", ["random_resized", "resize_crop"])
def test_a_strip_takes_no_memory(crop):
    image = Image.new("RGB", (1, 60_000), (1, 2, 3))  # the evaluation refuses it
    pixels = Augment(crop=crop)(image, Preprocess(), rng())
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.asarray([1, 2, 3], np.uint8), (224, 224, 3)))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.crop)
def test_all_randomness_comes_from_the_generator(recipe):
    image = random_image(60, 80)
    first, again, other = (recipe(image, SQUARE, rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    np.testing.assert_array_equal(np.asarray(image), random_pixels(60, 80))  # the image itself is unchanged


def test_hashable_equal_and_back_from_json():
    fields = json.loads('{"scale": [0.3, 1], "affine": {"degrees": 12, "scale": [0.9, 1.1]}}')
    recipe = from_fields(Augment, fields)
    assert recipe == Augment(scale=(0.3, 1.0), affine=RandomAffine(degrees=12.0, scale=(0.9, 1.1)))
    assert len({recipe, from_fields(Augment, dataclasses.asdict(recipe)), Augment()}) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "center"}, "augment.crop is 'center': choose one of random_resized, resize_crop, eval"),
        ({"scale": (0.5, 0.1)}, r"augment.scale is \(0.5, 0.1\): write the smaller number first"),
        ({"scale": (0, 1)}, r"augment.scale is \(0, 1\)"),
        ({"scale": 0.5}, "augment.scale is 0.5: it must be 2 numbers from 0.0001 to 1"),
        ({"ratio": ("1", 2)}, "augment.ratio is .*: it must be 2 numbers from 0.01 to 100"),
        ({"ratio": (0.75, math.nan)}, "augment.ratio is"),
        ({"flip": 50}, "augment.flip is 50: it must be a number from 0 to 1"),
        ({"flip": True}, "augment.flip is True: it must be a number from 0 to 1"),
        ({"scale": (False, True)}, r"augment.scale is \(False, True\): it must be 2 numbers"),
        ({"erase": None}, "augment.erase is None: it must be a number from 0 to 1"),
        ({"policy": "light1"}, "augment.policy is 'light1': it must be none, or like rand-m9"),
        ({"policy": None}, "augment.policy is None: it must be text"),
        ({"policy": "rand-x3"}, "augment.policy is 'rand-x3'"),
        ({"policy": "rand-m9.5"}, "augment.policy is 'rand-m9.5'"),
        ({"policy": "rand-m15"}, "augment.policy is 'rand-m15': magnitudes are clipped to 10; add mmax15, or lower m"),
        ({"policy": "rand-p2"}, "augment.policy is 'rand-p2': p2 is not a probability"),
        ({"affine": {"angle": 3}}, "augment.affine.angle: there is no such field; did you mean 'scale'"),
        ({"affine": {"degrees": -3}}, "augment.affine.degrees is -3: it must be a number from 0 to 180"),
        ({"affine": {"scale": (0, 1)}}, r"augment.affine.scale is \(0, 1\)"),
        ({"affine": {"scale": (1, 0.5)}}, r"augment.affine.scale is \(1.0, 0.5\): write the smaller number first"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        from_fields(Augment, fields, "augment.")


# Crops


@pytest.mark.parametrize("size", [(400, 533), (640, 200), (97, 101)])
@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.9), (0.5, 1.5))])
def test_boxes_are_distributed_as_torchvisions(size, scale, ratio):
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    width, height = size
    image, generator, count = Image.new("L", size), rng(), 4000
    ours, fallen_back = [], 0
    for _ in range(count):
        box = random_box(size, scale, ratio, generator)
        fallen_back += box is None
        left, top, right, bottom = box or augment._center_box(size, ratio)
        ours.append((left / width, top / height, (right - left) / width, (bottom - top) / height))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)]  # type: ignore
    theirs = [(j / width, i / height, w / width, h / height) for i, j, h, w in drawn]
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert (ours[:, :2] + ours[:, 2:]).max() <= 1
    columns = lambda boxes: np.c_[boxes, boxes[:, 2] * boxes[:, 3], np.log(boxes[:, 2] / boxes[:, 3])]  # noqa: E731
    # Standard deviations are at most 0.5: a mean of 4000 is good to 0.008, and the difference of two to 0.011.
    np.testing.assert_allclose(columns(ours).mean(0), columns(theirs).mean(0), atol=0.03)
    np.testing.assert_allclose(columns(ours).std(0), columns(theirs).std(0), atol=0.02)


@pytest.mark.parametrize("size", [(300, 3), (3, 300), (7, 1), (1, 7), (1, 1), (100, 99), (20, 13)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.5, 0.6)])
def test_the_fallback_is_torchvisions(size, ratio):
    transforms = pytest.importorskip("torchvision.transforms")
    too_much = (4.0, 5.0)  # no draw fits
    assert random_box(size, too_much, ratio, rng()) is None
    left, top, right, bottom = augment._center_box(size, ratio)
    i, j, h, w = transforms.RandomResizedCrop.get_params(Image.new("L", size), too_much, ratio)
    assert (left, top, right - left, bottom - top) == (j, i, max(1, w), max(1, h))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(3, 5, 60, 41), (0, 0, 90, 70), (10, 20, 22, 30), (50, 1, 51, 2)])
def test_a_fixed_box_is_resized_as_torchvisions(monkeypatch, interpolation, box):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image, preprocess = random_image(70, 90), Preprocess((32, 24), interpolation=interpolation)
    monkeypatch.setattr(augment, "random_box", lambda *_: box)
    left, top, right, bottom = box
    theirs = functional.resized_crop(
        image, top, left, bottom - top, right - left, [32, 24], functional.InterpolationMode(interpolation)
    )
    np.testing.assert_array_equal(Augment(flip=0)(image, preprocess, rng()), np.asarray(theirs))


def test_resize_crop_is_a_crop_of_the_resized_image():
    class Fixed:
        """Left 3 and top 1 of the resized image, whose pixels are two of the image's."""

        def uniform(self, low, high):
            return {64: 6.0, 16: 2.0}[round(high)]

    image, preprocess = random_image(80, 128), Preprocess((32, 32), 0.8)  # 80x128 -> 40x64 -> 32x32
    resized = np.asarray(image.resize((64, 40), Image.Resampling.BICUBIC))
    ours = Augment(crop="resize_crop", flip=0)(image, preprocess, Fixed())  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(ours, resized[1:33, 3:35])


def test_resize_crop_reaches_every_edge():
    image = Image.fromarray(np.repeat(np.arange(0, 256, 2, dtype=np.uint8)[None], 64, 0)).convert("RGB")  # 64x128 ramp
    preprocess, recipe, generator = Preprocess((32, 32), 1.0), Augment(crop="resize_crop", flip=0), rng()
    pixels = np.stack([recipe(image, preprocess, generator)[0, :, 0] for _ in range(300)]).astype(int)
    assert pixels[:, 0].min() <= 4
    assert pixels[:, -1].max() >= 250
    assert np.abs((pixels[:, -1] - pixels[:, 0]) - 124).max() <= 2  # always half of the ramp: the aspect is kept


# Random erasing


def test_erasing_draws_rectangles_like_timm_and_normal_noise():
    erasing = pytest.importorskip("timm.data.random_erasing")
    torch = pytest.importorskip("torch")
    import random

    recipe, generator, image = Augment(**OFF, erase=0.5), rng(), Image.new("RGB", (32, 32), (9, 9, 9))
    images = np.stack([recipe(image, SQUARE, generator) for _ in range(3000)])
    theirs = erasing.RandomErasing(0.5, mode="pixel", device="cpu")
    random.seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes = np.stack([theirs(torch.zeros(1, 32, 32)).numpy()[0] != 0 for _ in range(3000)])
    ours = (images != 9).any(-1)
    assert ours.any((1, 2)).mean() == pytest.approx(boxes.any((1, 2)).mean(), abs=0.04)
    for moment in (np.mean, np.std):
        assert moment(ours.mean((1, 2))) == pytest.approx(moment(boxes.mean((1, 2))), abs=0.01)
        assert moment(ours.any(1).sum(1)) == pytest.approx(moment(boxes.any(1).sum(1)), abs=0.7)
    noise = images[ours] / 255
    expected = np.clip(rng(0).standard_normal((100_000, 3)) * SQUARE.std + SQUARE.mean, 0, 1)
    np.testing.assert_allclose(noise.mean(0), expected.mean(0), atol=0.005)
    np.testing.assert_allclose(noise.std(0), expected.std(0), atol=0.005)


# RandAugment


@pytest.mark.parametrize("increasing", [False, True])
def test_the_operations_are_timms(increasing):
    timm = pytest.importorskip("timm.data.auto_augment")
    names = timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS
    assert list(rand_operations(increasing)) == [name.removesuffix("Increasing") for name in names]


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", [*rand_operations(True)])
def test_an_operation_equals_timms_pixel_for_pixel(monkeypatch, name, increasing):
    timm = pytest.importorskip("timm.data.auto_augment")
    names = timm._RAND_INCREASING_TRANSFORMS if increasing else timm._RAND_TRANSFORMS
    theirs = {operation.removesuffix("Increasing"): operation for operation in names}[name]
    images = [random_image(40, 56), random_image(33, 33, 1), Image.new("RGB", (1, 1), (200, 100, 0))]
    for resample, magnitude, sign in itertools.product(
        (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC), (0, 1, 3.7, 5, 9, 10, 15, 25), (-1, 1)
    ):
        look = {"resample": resample, "fillcolor": (128, 64, 191)}
        hparams = {"interpolation": resample, "img_mean": look["fillcolor"], "magnitude_max": 30}
        operation = timm.AugmentOp(theirs, prob=1.0, magnitude=magnitude, hparams=hparams)
        monkeypatch.setattr(timm.random, "random", lambda sign=sign: 0.5 - 0.25 * sign)
        steps = int(magnitude / 10 * 4)
        black = name == "Posterize" and (4 - steps if increasing else steps) < 1  # where Pillow 13 makes timm crash
        for image in images:
            ours = rand_operations(increasing)[name](image, sign * magnitude / 10, look)
            expected = Image.new("RGB", image.size) if black else operation(image)
            np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected), f"{magnitude} {sign} {resample}")


@pytest.mark.parametrize(
    "text", ["rand", "rand-m9-mstd0.5", "rand-n3-m7-inc1", "rand-m5-mstd101-p0.7", "rand-m15-n1-mmax30-inc0-p1.0"]
)
def test_strings_are_parsed_as_timm_does(text):
    timm = pytest.importorskip("timm.data.auto_augment")
    theirs, ours = timm.rand_augment_transform(text), RandAugment.parse(text)
    operation = theirs.ops[6]
    increasing = theirs.ops[5].name.endswith("Increasing")
    assert (ours.magnitude, ours.layers, ours.probability, ours.limit, ours.increasing) == (
        operation.magnitude, theirs.num_layers, operation.prob, operation.magnitude_max or 10, increasing,
    )  # fmt: skip
    assert min(ours.std, 101) == min(operation.magnitude_std, 101)


@pytest.mark.parametrize(
    ("text", "mean", "std", "highest"),
    [
        ("rand-m6-n3-mstd0.5", 0.6, 0.05, 1.0),
        ("rand-m8-mstd101-p0.8", 0.4, 0.8 / math.sqrt(12), 0.8),
        ("rand-m9-p1.0", 0.9, 0, 0.9),
        ("rand-m10-mstd1", 1 - 0.1 / math.sqrt(2 * math.pi), 0.1 * math.sqrt(0.5 - 0.5 / math.pi), 1.0),
    ],
)
def test_operations_levels_and_signs_are_drawn_as_stated(monkeypatch, text, mean, std, highest):
    """The last case is a half normal, as values above the limit are clipped to it."""
    drawn: list[tuple[int, float]] = []
    recorders = {str(k): lambda image, level, look, k=k: drawn.append((k, level)) or image for k in range(15)}
    monkeypatch.setattr(augment, "rand_operations", lambda increasing: recorders)
    policy, generator, image = RandAugment.parse(text), rng(), Image.new("RGB", (4, 4))
    for _ in range(4000):
        policy(image, generator)
    assert len(drawn) == pytest.approx(4000 * policy.layers * policy.probability, rel=0.04)
    operations, levels = (np.asarray(column) for column in zip(*drawn, strict=True))
    np.testing.assert_allclose(np.bincount(operations, minlength=15) / len(drawn), 1 / 15, atol=0.015)
    assert np.mean(levels > 0) == pytest.approx(0.5, abs=0.04)
    assert np.abs(levels).mean() == pytest.approx(mean, abs=0.01)
    assert np.abs(levels).std() == pytest.approx(std, abs=0.01)
    assert np.abs(levels).max() == pytest.approx(highest, abs=0.21 if std == 0.05 else 0.001)


def test_the_policy_sees_the_preprocessings_mean_and_interpolation(monkeypatch):
    seen = []
    monkeypatch.setattr(
        augment, "rand_operations", lambda increasing: {"": lambda image, level, look: seen.append(look) or image}
    )
    for interpolation in ("bilinear", "bicubic", "lanczos"):
        preprocess = dataclasses.replace(SQUARE, interpolation=interpolation)
        Augment(policy="rand-n1-p1.0")(random_image(20, 20), preprocess, rng())
    assert [look["fillcolor"] for look in seen] == [(128, 64, 191)] * 3
    resample = Image.Resampling  # PIL's affine maps know no lanczos
    assert [look["resample"] for look in seen] == [resample.BILINEAR, resample.BICUBIC, resample.BICUBIC]
