"""PSNR and SSIM on luma, in the conventions of the papers on real-world super-resolution.

Both follow what pyiqa computes with `test_y_channel=True, color_space="ycbcr"`: no border is cropped, nothing is resized.
Photographs of several sizes share a compiled program: each lies in the top left corner of a batch, and `sizes` says how
much of it counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# ITU-R BT.601, studio range: 16 to 235 for 8-bit RGB.
BT601_OFFSET, BT601 = 16.0, (65.481, 128.553, 24.966)


def gaussian_taps(width: int, sigma: float) -> np.ndarray:
    """(width,) float64, sum 1."""
    taps = np.exp(-((np.arange(width) - (width - 1) / 2) ** 2) / (2 * sigma**2))
    return taps / taps.sum()


SSIM_SIDE = 11
_WINDOW = gaussian_taps(SSIM_SIDE, 1.5)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Middle of the luma range. Variances are taken around it: float32 then loses nothing that shows in four decimals.
_MIDDLE = 125.0


@jax.jit
def psnr_y(result: jax.Array, reference: jax.Array, sizes: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of the unrounded luma.

    Args:
      result, reference: (B, H, W, 3) uint8.
      sizes: (B, 2) int32, height and width of what counts.

    Returns:
      (B,) float32 decibels; 80 for equal images, because 1e-8 is added to the mean square.
    """
    difference = (_luma(result) - _luma(reference)) / 255
    return -10 * jnp.log10(_mean(jnp.square(difference), sizes) + 1e-8)


def ssim_y(result: jax.Array, reference: jax.Array, sizes: jax.Array) -> jax.Array:
    """Structural similarity of the luma rounded to integers (Wang et al. 2004).

    11×11 Gaussian window, σ = 1.5, only where it lies inside; K = 0.01, 0.03; the contrast-structure term is clipped at
    0, as pyiqa does. Three programs: within one, XLA computes each filter again for every tap of the next, twenty times
    slower on a CPU.

    Args:
      result, reference: (B, H, W, 3) uint8, H and W at least 11.
      sizes: (B, 2) int32, height and width of what counts, at least 11.

    Returns:
      (B,) float32, at most 1.
    """
    moments = _vertical_moments(*_rounded_lumas(result, reference))
    return _similarity(moments, jnp.asarray(sizes))


@jax.jit
def _rounded_lumas(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.round(_luma(first)) - _MIDDLE, jnp.round(_luma(second)) - _MIDDLE


@jax.jit
def _vertical_moments(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(filter_valid(image, _WINDOW, 1) for image in (x, y, x * x, y * y, x * y))


@jax.jit
def _similarity(moments: tuple[jax.Array, ...], sizes: jax.Array) -> jax.Array:
    mean_x, mean_y, xx, yy, xy = (filter_valid(image, _WINDOW, 2) for image in moments)
    structure = 2 * (xy - mean_x * mean_y) + _C2
    structure /= (xx - mean_x**2) + (yy - mean_y**2) + _C2
    mean_x, mean_y = mean_x + _MIDDLE, mean_y + _MIDDLE
    brightness = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return _mean(jnp.maximum(structure, 0) * brightness, sizes - (SSIM_SIDE - 1))


@jax.jit
def detail_correlation(result: jax.Array, reference: jax.Array, sizes: jax.Array) -> jax.Array:
    """How much of the fine detail is the reference's: correlation of the luma's two finest Haar bands.

    Detail that was made up raises NIQE, and so does noise; this tells them from detail that is right. Both levels count the
    same; within a level horizontal, vertical and diagonal coefficients are taken together.

    Args:
      result, reference: (B, H, W, 3) uint8, H and W at least 4.
      sizes: (B, 2) int32, height and width of what counts, at least 4.

    Returns:
      (B,) float32 in [−1, 1]; NaN where one of the two has no detail.
    """
    x, y = _luma(result), _luma(reference)
    levels = []
    for level in (1, 2):
        (x, *bands_x), (y, *bands_y) = _haar(x), _haar(y)
        first, second = jnp.stack(bands_x, -1), jnp.stack(bands_y, -1)
        products = (first * second, first * first, second * second)
        xy, xx, yy = (_mean(product.sum(-1), sizes // 2**level) for product in products)
        levels.append(xy / jnp.sqrt(xx * yy))
    return (levels[0] + levels[1]) / 2


def _haar(image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(B, H, W) -> mean, horizontal, vertical and diagonal differences of 2×2 blocks, each (B, H // 2, W // 2)."""
    height, width = (side // 2 * 2 for side in image.shape[1:])
    image = image[:, :height, :width]
    a, b, c, d = (image[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return (a + b + c + d) / 4, (a - b + c - d) / 4, (a + b - c - d) / 4, (a - b - c + d) / 4


def filter_valid(image: jax.Array, taps: np.ndarray, axis: int, stride: int = 1) -> jax.Array:
    """Correlates along one axis, only where the taps lie inside; every `stride`-th value.

    A sum of slices: XLA makes one loop of it, where a convolution of a single channel would be slow on a CPU.
    """
    size = (image.shape[axis] - len(taps)) // stride * stride + 1
    parts = (
        float(tap) * lax.slice_in_dim(image, start, start + size, stride, axis)
        for start, tap in enumerate(taps)
    )
    return sum(parts)  # pyright: ignore


def _luma(rgb: jax.Array) -> jax.Array:
    """(..., 3) uint8 to float32 BT.601 luma, unrounded, in [16, 235]."""
    channels = (weight / 255 * rgb[..., index].astype(jnp.float32) for index, weight in enumerate(BT601))
    return sum(channels, start=jnp.float32(BT601_OFFSET))


def _mean(image: jax.Array, sizes: jax.Array) -> jax.Array:
    """(B, H, W) -> (B,) means of the top left corners; rows first, which keeps float32's rounding small."""
    rows = jnp.arange(image.shape[1]) < sizes[:, :1]
    columns = jnp.arange(image.shape[2]) < sizes[:, 1:]
    by_row = jnp.where(columns[:, None], image, 0).sum(2) / sizes[:, 1:]
    return jnp.where(rows, by_row, 0).sum(1) / sizes[:, 0]
