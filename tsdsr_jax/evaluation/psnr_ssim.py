"""PSNR and SSIM on luma, as papers on real-world super-resolution compute them.

Both match pyiqa's results with `test_y_channel=True, color_space="ycbcr"`: no border is cropped and nothing is resized.
Photographs of several sizes share a compiled program: each lies in the top left corner of an array of a batch, and `sizes`
gives its height and width.
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
# Middle of the luma range. Variances are computed around it, which keeps four decimals exact in float32.
_MIDDLE = 125.0


@jax.jit
def psnr_y(result: jax.Array, reference: jax.Array, sizes: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of the unrounded luma.

    Args:
      result, reference: (B, H, W, 3) uint8.
      sizes: (B, 2) int32, height and width of each picture.

    Returns:
      (B,) float32 decibels; 80 for equal images, because 1e-8 is added to the mean squared error.
    """
    difference = (_luma(result) - _luma(reference)) / 255
    return -10 * jnp.log10(_mean(jnp.square(difference), sizes) + 1e-8)


def ssim_y(result: jax.Array, reference: jax.Array, sizes: jax.Array) -> jax.Array:
    """Structural similarity of the luma rounded to integers (Wang et al. 2004).

    The window is Gaussian, 11×11, σ = 1.5, used only where it lies inside the image; K = 0.01, 0.03; the contrast-structure
    term is clipped at 0, as in pyiqa. There are three programs, because in a single one XLA recomputes each filter for every
    tap of the next, which is twenty times slower on a CPU.

    Args:
      result, reference: (B, H, W, 3) uint8, H and W at least 11.
      sizes: (B, 2) int32, height and width of each picture, at least 11.

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
    """How much of the fine detail agrees with the reference: correlation of the luma's two finest Haar levels.

    Invented detail improves NIQE, and so does noise; this metric rises only with correct detail. Both levels count
    equally; within a level, horizontal, vertical and diagonal coefficients are correlated together.

    Args:
      result, reference: (B, H, W, 3) uint8, H and W at least 4.
      sizes: (B, 2) int32, height and width of each picture, at least 4.

    Returns:
      (B,) float32 in [−1, 1]; NaN if one of the two has no detail.
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
    """Correlates along one axis, only where all taps lie inside; returns every `stride`-th value.

    It is a sum of slices, which XLA fuses into one loop; a convolution with a single channel would be slow on a CPU.
    """
    size = (image.shape[axis] - len(taps)) // stride * stride + 1
    parts = [
        float(tap) * lax.slice_in_dim(image, start, start + size, stride, axis)
        for start, tap in enumerate(taps)
    ]
    return sum(parts[1:], start=parts[0])


def _luma(rgb: jax.Array) -> jax.Array:
    """(..., 3) uint8 to float32 BT.601 luma, unrounded, in [16, 235]."""
    channels = (weight / 255 * rgb[..., index].astype(jnp.float32) for index, weight in enumerate(BT601))
    return sum(channels, start=jnp.float32(BT601_OFFSET))


def _mean(image: jax.Array, sizes: jax.Array) -> jax.Array:
    """(B, H, W) -> (B,) means of the top left corners; rows first, to keep float32's rounding small."""
    rows = jnp.arange(image.shape[1]) < sizes[:, :1]
    columns = jnp.arange(image.shape[2]) < sizes[:, 1:]
    by_row = jnp.where(columns[:, None], image, 0).sum(2) / sizes[:, 1:]
    return jnp.where(rows, by_row, 0).sum(1) / sizes[:, 0]
