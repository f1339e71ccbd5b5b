"""Each convention against the code that its weights were published with, and patch kernels against timm."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import DTypeLike

from fcvit_jax.convert.posembed import RESAMPLINGS, resample, resample_patch, sincos_2d
from fcvit_jax.errors import InputError

WIDTH = 8
SQUARE = [((7, 7), (14, 14)), ((24, 24), (14, 14)), ((14, 14), (37, 37)), ((1, 1), (3, 3)), ((5, 5), (1, 1))]
FROM_SQUARE = [*SQUARE, ((14, 14), (16, 11)), ((14, 14), (14, 28)), ((6, 6), (4, 9)), ((37, 37), (16, 40))]
ANY = [*FROM_SQUARE, ((7, 9), (16, 11)), ((12, 5), (5, 12)), ((1, 4), (3, 1)), ((3, 1), (1, 5))]


def random_grid(size, dtype: DTypeLike = np.float64):
    """Draw in float64, so that torch computes in it: in float32 coordinates alone cost 1e-5 in a large grid."""
    return np.random.default_rng(size).standard_normal((*size, WIDTH)).astype(dtype)


def assert_close(actual, expected):
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=0, atol=1e-5)


def interpolate(grid, **how):
    """Call torch.nn.functional.interpolate on [rows, columns, d] as on an image."""
    torch = pytest.importorskip("torch")
    image = torch.from_numpy(grid).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(image, **how)[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("old", "new"), ANY)
@pytest.mark.parametrize(
    ("convention", "how"),
    [("timm", {}), ("timm-npz", {"interpolation": "bilinear", "antialias": False})],
)
def test_timm(convention, how, old, new):
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip("timm.layers")
    grid = random_grid(old)
    flat = torch.from_numpy(grid.reshape(1, -1, WIDTH))
    expected = layers.resample_abs_pos_embed(flat, list(new), list(old), num_prefix_tokens=0, **how)
    assert_close(resample(grid, new, convention), expected.numpy().reshape(*new, WIDTH))


@pytest.mark.parametrize(("old", "new"), ANY)
def test_dinov2_with_registers_is_as_timm(old, new):
    grid = random_grid(old)
    assert_close(resample(grid, new, "timm"), interpolate(grid, size=new, mode="bicubic", antialias=True))


@pytest.mark.parametrize(("old", "new"), ANY)
def test_deit(old, new):
    grid = random_grid(old)
    expected = interpolate(grid, size=new, mode="bicubic", align_corners=False)
    assert_close(resample(grid, new, "torch-bicubic"), expected)


@pytest.mark.parametrize(("old", "new"), FROM_SQUARE)
def test_hugging_face(old, new):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    vit = pytest.importorskip("transformers.models.vit.modeling_vit")
    grid, patch = random_grid(old), 2
    config = transformers.ViTConfig(hidden_size=WIDTH, image_size=patch * old[0], patch_size=patch)
    embeddings = vit.ViTEmbeddings(config).double()
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = torch.from_numpy(grid.reshape(-1, WIDTH))
        tokens = torch.zeros(1, 1 + math.prod(new), WIDTH)
        expected = embeddings.interpolate_pos_encoding(tokens, patch * new[0], patch * new[1])
    assert_close(resample(grid, new, "torch-bicubic"), expected[0, 1:].numpy().reshape(*new, WIDTH))


@pytest.mark.parametrize(("old", "new"), ANY)
def test_dino(old, new):
    grid = random_grid(old)
    scale = tuple((after + 0.1) / before for before, after in zip(old, new, strict=True))
    assert_close(resample(grid, new, "dino"), interpolate(grid, scale_factor=scale, mode="bicubic"))


@pytest.mark.parametrize(("old", "new"), ANY)
def test_bilinear_antialiased(old, new):
    grid = random_grid(old)
    assert_close(resample(grid, new, "bilinear"), interpolate(grid, size=new, mode="bilinear", antialias=True))


@pytest.mark.parametrize(("old", "new"), SQUARE)
def test_torchvision(old, new):
    torch = pytest.importorskip("torch")
    torchvision_vit = pytest.importorskip("torchvision.models.vision_transformer")
    grid = random_grid(old)
    tokens = torch.cat([torch.zeros(1, 1, WIDTH).double(), torch.from_numpy(grid.reshape(1, -1, WIDTH))], dim=1)
    state = torchvision_vit.interpolate_embeddings(16 * new[0], 16, {"encoder.pos_embedding": tokens})
    expected = state["encoder.pos_embedding"][0, 1:].numpy().reshape(*new, WIDTH)
    assert_close(resample(grid, new, "align-corners"), expected)


@pytest.mark.parametrize(("old", "new"), ANY)
def test_aligned_corners(old, new):
    grid = random_grid(old)
    expected = interpolate(grid, size=new, mode="bicubic", align_corners=True)
    assert_close(resample(grid, new, "align-corners"), expected)


@pytest.mark.parametrize(("old", "new"), ANY)
def test_scipy_zoom(old, new):
    ndimage = pytest.importorskip("scipy.ndimage")
    grid = random_grid(old)
    expected = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    assert_close(resample(grid, new, "zoom"), expected)


@pytest.mark.parametrize(("old", "new"), [((24, 24), (22, 22)), ((32, 32), (16, 16)), ((16, 16), (30, 7))])
def test_zoom_keeps_the_corners_where_scipy_loses_them(old, new):
    # (old - 1) / (new - 1) * (new - 1) rounds to more than old - 1: scipy's `mode` sets the value there, by default 0.
    ndimage = pytest.importorskip("scipy.ndimage")
    grid = random_grid(old)
    actual = resample(grid, new, "zoom")
    expected = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1, mode="nearest")
    assert_close(actual, expected)
    corners = [0, 0, -1, -1], [0, -1, 0, -1]
    np.testing.assert_array_equal(actual[corners], grid[corners].astype(np.float32))


@pytest.mark.parametrize("new", [(5, 7), (14, 20)])
def test_conventions_differ(new):
    # If two of them were mixed up, the tests above, at 1e-5, would fail.
    grid = random_grid((9, 12))
    results = {convention: resample(grid, new, convention) for convention in RESAMPLINGS}
    same = {"timm-npz", "bilinear"} if new == (14, 20) else set()  # antialiasing has no effect when the grid grows
    for first, second in itertools.combinations(results, 2):
        if {first, second} == same:
            assert_close(results[first], results[second])
        else:
            assert abs(results[first] - results[second]).max() > 0.05


@pytest.mark.parametrize("convention", RESAMPLINGS)
def test_properties_of_every_convention(convention):
    for dtype in (np.float16, np.float32, np.float64):
        grid = random_grid((4, 6), dtype)
        same = resample(grid, (4, 6), convention)
        assert same.dtype == np.float32
        np.testing.assert_array_equal(same, grid.astype(np.float32))
        assert_close(resample(grid, (7, 3), convention), resample(grid.astype(np.float32), (7, 3), convention))
    # A constant stays constant, and rows and columns are treated alike.
    assert_close(resample(np.full((4, 6, 2), 3.0), (9, 2), convention), np.full((9, 2, 2), 3.0))
    transposed = resample(grid.swapaxes(0, 1), (3, 7), convention).swapaxes(0, 1)
    assert_close(resample(grid, (7, 3), convention), transposed)


@pytest.mark.parametrize("size", [(4, 6), (8, 8)])
def test_an_unknown_convention_names_the_known(size):
    with pytest.raises(InputError, match=r"unknown resampling 'bicubic': expected one of timm, timm-npz, .*, zoom"):
        resample(random_grid((4, 6)), size, "bicubic")


@pytest.mark.parametrize(("old", "new"), [(16, 14), (16, 8), (32, 16), (14, 16)])
def test_patch_kernels_equal_timm(old, new):
    torch = pytest.importorskip("torch")
    layers = pytest.importorskip("timm.layers")
    # Of the size of trained weights: timm inverts in float32.
    kernel = np.random.default_rng(old).normal(0, 0.1, (old, old, 3, WIDTH)).astype(np.float32)
    expected = layers.resample_patch_embed(torch.from_numpy(kernel.transpose(3, 2, 0, 1)), [new, new])
    assert_close(resample_patch(kernel, new), expected.numpy().transpose(2, 3, 1, 0))


def test_a_larger_patch_gives_the_same_token():
    """FlexiViT, section 3.4: the response to a patch does not change if patch and kernel grow together."""
    rng = np.random.default_rng(0)
    kernel, patch = rng.standard_normal((8, 8, 3, WIDTH)), rng.standard_normal((8, 8, 3))
    larger = resample_patch(kernel, 12)
    assert larger.dtype == np.float32
    token = np.einsum("ijc,ijcd->d", resample(patch, (12, 12), "timm"), larger)
    np.testing.assert_allclose(token, np.einsum("ijc,ijcd->d", patch, kernel), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(resample_patch(kernel, 8), kernel.astype(np.float32))


def test_sincos_2d_element_by_element():
    (rows, columns), quarter = (2, 3), 3
    expected = np.zeros((1, rows * columns, 4 * quarter))
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / (quarter - 1))
                waves = math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)
                expected[0, row * columns + column, k::quarter] = waves
    actual = sincos_2d((rows, columns), 4 * quarter)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(actual, expected.astype(np.float32))


@pytest.mark.parametrize("width", [4, 10, 0])
def test_sincos_2d_refuses_a_width(width):
    with pytest.raises(InputError, match=f"needs a width of 8, 12, 16, ...: got {width}"):
        sincos_2d((2, 3), width)
