"""Position embeddings and patch kernels of other sizes, by the conventions of the weights' publishers.

Every convention is linear and separable: one matrix [new, old] per axis, in float64. They differ in the kernel, the
places of the samples and the edge.
"""

import numpy as np

from fcvit_jax.errors import InputError

RESAMPLINGS: dict[str, str] = {
    "timm": "bicubic, antialiased, as timm",  # resample_abs_pos_embed; also DINOv2 with registers
    "timm-npz": "bilinear, as timm does with .npz files",  # timm's _load_weights
    "bilinear": "bilinear, antialiased, as Hugging Face's TIPS v2",  # its interpolate_pos_encoding
    "torch-bicubic": "bicubic, as DeiT and Hugging Face",  # DeiT's --finetune, interpolate_pos_encoding
    "dino": "bicubic with an offset of 0.1, as DINO and DINOv2",  # interpolate_pos_encoding of both
    "align-corners": "bicubic with aligned corners, as torchvision",  # interpolate_embeddings
    "zoom": "bilinear with aligned corners, as vision_transformer and big_vision",  # scipy.ndimage.zoom(order=1)
}


def resample(grid: np.ndarray, size: tuple[int, int], convention: str) -> np.ndarray:
    """Resample a grid of position embeddings, [rows, columns, d] of any float dtype, to float32 [*size, d].

    convention: a key of `RESAMPLINGS`; InputError for others. At some sizes (24 to 22, 32 to 16) rounding takes scipy's
    last sample just outside the grid, so that its last row and column are 0; `zoom` does not follow it there.
    """
    if convention not in RESAMPLINGS:
        raise InputError(f"unknown resampling {convention!r}: expected one of {', '.join(RESAMPLINGS)}")
    # Compared as a grid, not by axis: with DINO's offset an axis that keeps its length is resampled too.
    if grid.shape[:2] == tuple(size):
        return grid.astype(np.float32)
    rows, columns = (_matrix(old, new, convention) for old, new in zip(grid.shape[:2], size, strict=True))
    return np.einsum("ai,bj,ijd->abd", rows, columns, grid.astype(np.float64), optimize=True).astype(np.float32)


def resample_patch(kernel: np.ndarray, patch_size: int) -> np.ndarray:
    """Resample a patch kernel, [p, p, 3, d], to float32 [patch_size, patch_size, 3, d]: FlexiViT's PI-resize.

    arXiv 2212.08013, section 3.4. With B the matrix that resizes a patch x, the new kernel is w' = pinv(B^T) w: if
    patches grow, <B x, w'> = <x, w> for every x, and if they shrink, w' is nearest to that on average. B is bicubic and
    antialiased, as in timm's `resample_patch_embed`; it and its pseudo-inverse are separable.
    """
    old = kernel.shape[0]
    if old == patch_size:
        return kernel.astype(np.float32)
    inverse = np.linalg.pinv(_matrix(old, patch_size, "timm"))
    return np.einsum("ia,jb,ijcd->abcd", inverse, inverse, kernel.astype(np.float64), optimize=True).astype(np.float32)


def sincos_2d(size: tuple[int, int], width: int) -> np.ndarray:
    """Compute the fixed embedding of big_vision's ViTs with posemb="sincos2d", after MoCo v3, arXiv 2104.02057.

    With omega_k = 10000^(-k / (width/4 - 1)), the patch in row y and column x has the quarters sin(x omega),
    cos(x omega), sin(y omega), cos(y omega). Returns float32 [1, rows * columns, width], patches row by row.
    """
    if width % 4 or width < 8:
        raise InputError(f"a sincos2d position embedding needs a width of 8, 12, 16, ...: got {width}")
    omega = 10000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
    y, x = (positions.reshape(-1, 1) * omega for positions in np.mgrid[: size[0], : size[1]])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1, dtype=np.float32)[None]


def _matrix(old: int, new: int, convention: str) -> np.ndarray:
    """Build the matrix [new, old], float64, that resizes one axis; its rows sum to 1."""
    index = np.arange(new)[:, None]
    if convention in ("align-corners", "zoom"):
        centre = index * (old - 1) / max(new - 1, 1)  # a single sample is the first entry, in torch and in scipy
    else:
        # DINO passes torch a factor of (new + 0.1) / old, so that rounding loses no row; it moves every sample too.
        centre = (index + 0.5) * old / (new + 0.1 * (convention == "dino")) - 0.5
    if convention in ("timm", "bilinear"):  # antialiased: wider when shrinking, without entries outside the grid
        distance = (centre - np.arange(old)) / max(old / new, 1)
        weights = _cubic(distance, -0.5) if convention == "timm" else _linear(distance)
        return weights / weights.sum(axis=1, keepdims=True)
    entries = np.arange(-2, old + 2)  # as far as a kernel reaches; entries outside count for the edge
    distance = centre - entries
    weights = _linear(distance) if convention in ("timm-npz", "zoom") else _cubic(distance, -0.75)
    return weights @ (entries.clip(0, old - 1)[:, None] == np.arange(old))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - abs(distance), 0)


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Evaluate Keys' interpolation kernel (1981); `a` is its slope at distance 1, -0.5 in PIL, -0.75 in OpenCV."""
    x = abs(distance)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))
