import numpy as np

from fcvit_jax.data.augment import RandomAffine


def test_nothing_asked_nothing_done():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(RandomAffine()(pixels, np.random.default_rng(1)), pixels)


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
    inner = np.s_[1:-1, 1:-1]  # clockwise, but for rounding
    np.testing.assert_allclose(turned[inner].astype(int), np.rot90(pixels, -1)[inner].astype(int), atol=1)


def test_the_same_seed_draws_the_same():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    augment = RandomAffine(degrees=20, shift=0.1, scale=(0.8, 1.2))
    first, again, other = (augment(pixels, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
