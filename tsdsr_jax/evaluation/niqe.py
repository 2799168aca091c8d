"""NIQE (Mittal, Soundararajan, Bovik 2013): how far an image's local statistics are from those of natural photographs.

The device computes moments of each block of 96×96 pixels, at two scales. The host fits distributions to them and compares
the features with a model of natural photographs, which comes as a file. Lower is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import special

from tsdsr_jax.evaluation.niqe_params import FEATURES, PristineModel
from tsdsr_jax.evaluation.psnr_ssim import filter_valid, gaussian_taps

BLOCK = 96
_TAPS = gaussian_taps(7, 7 / 6)
_REACH = len(_TAPS) // 2
# MATLAB's `imresize` by one half: its cubic (a = -0.5) stretched to eight taps, at distances 0.5, 1.5, 2.5 and 3.5.
_HALVING = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
# Around a pixel that equals the local mean exactly, the weighted differences add up to at most this fraction of σ.
_BALANCED = 3e-7
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))

# The table in which Mittal et al. look up the shape parameter, and the ratio of moments for each entry.
_SHAPES = np.arange(200, 10001) / 1000
_RATIOS = special.gamma(2 / _SHAPES) ** 2 / (special.gamma(1 / _SHAPES) * special.gamma(3 / _SHAPES))


def niqe(images: jax.Array, sizes: np.ndarray, model: PristineModel) -> list[float]:
    """NIQE of each image, computed from its whole blocks of 96×96, counted from the top left.

    Args:
      images: (B, H, W, 3) uint8.
      sizes: (B, 2) height and width of each picture, in the array's top left corner.
      model: see `load_pristine`.

    Returns:
      One value per image; NaN if fewer than two of its blocks have any texture.
    """
    return distances(block_moments(images, jnp.asarray(sizes, jnp.int32)), sizes, model)


def distances(moments: Sequence[jax.Array], sizes: np.ndarray, model: PristineModel) -> list[float]:
    """The second half of `niqe`, on the host; waits for the result of `block_moments`."""
    sides = BLOCK, BLOCK // 2
    features = np.concatenate(
        [
            block_features(np.asarray(scale, np.float64), side**2)
            for scale, side in zip(moments, sides, strict=True)
        ],
        axis=-1,
    )
    return [
        _distance(grid[: height // BLOCK, : width // BLOCK].reshape(-1, FEATURES), model)
        for grid, (height, width) in zip(features, np.asarray(sizes), strict=False)
    ]


def _distance(features: np.ndarray, model: PristineModel) -> float:
    """(blocks, 36) -> Mahalanobis distance of the means, under the average of the covariances."""
    # A block without texture has no shape. As in BasicSR, its other features still count for the mean.
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        return float("nan")
    offset = model.mean - np.nanmean(features, axis=0)
    spread = (model.covariance + np.cov(whole, rowvar=False)) / 2
    return float(np.sqrt(offset @ np.linalg.pinv(spread, hermitian=True) @ offset))


# ---- on the device -------------------------------------------------------------------------------


def block_moments(images: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments of the normalized luma and of its four products with shifted copies, per block, at both scales.

    This is a chain of small programs, because in a single one XLA would recompute each filter for every tap of the next.

    Args:
      images: (B, H, W, 3) uint8.
      sizes: (B, 2) int32.

    Returns:
      Two arrays (B, H // 96, W // 96, 5 maps, 5) float32: the counts of negative and positive values, the sums of their
      squares, the sum of all magnitudes. Blocks outside `sizes` are meaningless.
    """
    covered = sizes // BLOCK * BLOCK
    luma = _luma(images)
    half = _halve(_halve(luma, covered, 1), covered, 2)
    return _scale_moments(luma, covered, BLOCK), _scale_moments(half, covered // 2, BLOCK // 2)


def _scale_moments(luma: jax.Array, sizes: jax.Array, side: int) -> jax.Array:
    extended = _extend(luma, sizes)
    columns = _column_statistics(extended)
    return _moments(_maps(_normalize(extended, columns), side))


@jax.jit
def _luma(images: jax.Array) -> jax.Array:
    """(B, H, W, 3) uint8 to full-range luma - 128 of whole blocks; integer rounding, half to even on every device."""
    rows, columns = (side // BLOCK * BLOCK for side in images.shape[1:3])
    red, green, blue = jnp.moveaxis(images[:, :rows, :columns].astype(jnp.int32), -1, 0)
    whole, rest = jnp.divmod(299 * red + 587 * green + 114 * blue, 1000)
    rounded = whole + ((rest > 500) | ((rest == 500) & (whole % 2 == 1)))
    return (rounded - 128).astype(jnp.float32)


@jax.jit
def _column_statistics(extended: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _about_center(extended, None, 1)


@jax.jit
def _normalize(extended: jax.Array, columns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Subtracts the local mean and normalizes the contrast: (x - μ) / (σ + 1) with Gaussian weights.

    μ and σ² are summed from differences to the center pixel, σ² by columns first. Computed as differences of large numbers,
    they would contain float32's rounding, and the moments would count the signs of rounding errors.
    """
    centers = lax.slice_in_dim(extended, _REACH, extended.shape[1] - _REACH, axis=1)
    mean, variance = _about_center(centers, columns, 2)
    sigma = jnp.sqrt(variance)
    return jnp.where(jnp.abs(mean) <= _BALANCED * sigma, 0, -mean) / (sigma + 1)


def _about_center(
    values: jax.Array, spread: tuple[jax.Array, jax.Array] | None, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and variance along one axis; the mean is relative to the center value.

    With `spread`, each value is itself a distribution with mean `value + spread[0]` and variance `spread[1]`. Taps are added
    in symmetric pairs, so that the mean of a linear ramp is exactly its center.
    """
    size = values.shape[axis] - 2 * _REACH

    def at(array: jax.Array, shift: int) -> jax.Array:
        return lax.slice_in_dim(array, _REACH + shift, _REACH + shift + size, axis=axis)

    def tap(shift: int) -> tuple[jax.Array, jax.Array]:
        difference = at(values, shift) - at(values, 0)
        if spread is None:
            return difference, jnp.square(difference)
        difference += at(spread[0], shift)
        return difference, jnp.square(difference) + at(spread[1], shift)

    mean, square = (float(_TAPS[_REACH]) * part for part in tap(0))
    for shift in range(1, _REACH + 1):
        weight = float(_TAPS[_REACH + shift])
        (low, low_square), (high, high_square) = tap(-shift), tap(shift)
        mean += weight * (low + high)
        square += weight * (low_square + high_square)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


@partial(jax.jit, static_argnums=2)
def _halve(image: jax.Array, sizes: jax.Array, axis: int) -> jax.Array:
    """MATLAB's `imresize` by one half along an axis; exact for integers, because float32 can hold the sums."""
    index = jnp.arange(-3, image.shape[axis] + 3)
    extended = jax.vmap(lambda plane, size: jnp.take(plane, _mirror(index, size), axis - 1))(
        image, sizes[:, axis - 1]
    )
    return filter_valid(extended, _HALVING, axis, stride=2)


def _mirror(index: jax.Array, size: jax.Array) -> jax.Array:
    """Reflection that repeats the edge: ... 1 0 0 1 ..."""
    return jnp.clip(jnp.minimum(jnp.maximum(index, -1 - index), 2 * size - 1 - index), 0, None)


@jax.jit
def _extend(image: jax.Array, sizes: jax.Array) -> jax.Array:
    """(B, H, W) -> (B, 3 + H + 3, 3 + W + 3): repeats the edges beyond each image's own size."""

    def one(plane: jax.Array, size: jax.Array) -> jax.Array:
        for axis in (0, 1):
            index = jnp.arange(-_REACH, plane.shape[axis] + _REACH)
            plane = jnp.take(plane, jnp.clip(index, 0, size[axis] - 1), axis)
        return plane

    return jax.vmap(one)(image, sizes)


@partial(jax.jit, static_argnums=1)
def _maps(image: jax.Array, side: int) -> jax.Array:
    """(B, H, W) -> (5, B, rows, side, columns, side): the blocks, and their products with shifted copies."""
    batch, rows, columns = image.shape[0], image.shape[1] // side, image.shape[2] // side
    blocks = image.reshape(batch, rows, side, columns, side)
    # Shifts wrap around within the block, as in the authors' MATLAB code.
    return jnp.stack([blocks, *(blocks * jnp.roll(blocks, shift, (2, 4)) for shift in _SHIFTS)])


@jax.jit
def _moments(maps: jax.Array) -> jax.Array:
    """(5, B, rows, side, columns, side) -> (B, rows, columns, 5 maps, 5 moments)."""
    squares = jnp.square(maps)
    negative, positive = maps < 0, maps > 0
    parts = (
        negative.astype(jnp.float32),
        positive.astype(jnp.float32),
        jnp.where(negative, squares, 0),
        jnp.where(positive, squares, 0),
        jnp.abs(maps),
    )
    # All five in one pass over the pixels; rows first, to keep float32's rounding small.
    for axis in (5, 3):
        parts = lax.reduce(parts, (np.float32(0),) * len(parts), _add, (axis,))
    return jnp.moveaxis(jnp.stack(parts, axis=-1), 0, -2)


def _add(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    return tuple(a + b for a, b in zip(first, second, strict=True))


# ---- on the host ---------------------------------------------------------------------------------


def block_features(moments: np.ndarray, pixels: int) -> np.ndarray:
    """(..., 5 maps, 5) moments of blocks of `pixels` pixels -> (..., 18) features; NaN if a block has no texture."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shape, left, right = _fit(moments, pixels)
        mean = (right - left) * special.gamma(2 / shape) / special.gamma(1 / shape)
    first = np.stack([shape[..., 0], (left[..., 0] + right[..., 0]) / 2], axis=-1)
    products = np.stack([shape, mean, left, right], axis=-1)[..., 1:, :]
    return np.concatenate([first, products.reshape(*products.shape[:-2], -1)], axis=-1)


def _fit(moments: np.ndarray, pixels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shape and both scales of asymmetric generalized Gaussians, from moments (Lasmar, Stitou, Berthoumieu 2009)."""
    below, above, squares_below, squares_above, magnitudes = np.moveaxis(moments, -1, 0)
    left, right = np.sqrt(squares_below / below), np.sqrt(squares_above / above)
    gamma = left / right
    ratio = magnitudes**2 / (pixels * (squares_below + squares_above))
    ratio = ratio * (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    # Without texture the ratio is NaN; like other implementations, this one then uses the table's first entry.
    shape = np.where(np.isnan(ratio), _SHAPES[0], _nearest_shape(ratio))
    scale = np.sqrt(special.gamma(1 / shape) / special.gamma(3 / shape))
    return shape, left * scale, right * scale


def _nearest_shape(ratio: np.ndarray) -> np.ndarray:
    """The table's entry with the nearest ratio; ratios are sorted."""
    after = np.clip(np.searchsorted(_RATIOS, ratio), 1, len(_RATIOS) - 1)
    closer = ratio - _RATIOS[after - 1] <= _RATIOS[after] - ratio
    return _SHAPES[after - closer]
