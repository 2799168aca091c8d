"""Bicubic enlargement on the device, so that photographs travel there at their own size, in 8 bits.

It gives the same values as `images.resize.bicubic` followed by `reflect_pad`, up to rounding. Sizes are data, so that all
photographs of a bucket share a program.

Axes: B photographs; (h, w) a shape that holds each of them; (H, W) the bucket. Portraits lie on their side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsdsr_jax.images.buckets import Size
from tsdsr_jax.upscaling.planning import SizePlan

# The cubic's slope at distance 1, as in PyTorch and OpenCV. Pillow and JAX have -0.5.
_SLOPE = -0.75

_Array = np.ndarray | jax.Array


class SamplePoints(NamedTuple):
    """Where the pixels of an enlarged axis lie on the photograph.

    Attributes:
      before: (B, length) int32, the last of the photograph's pixels that is not beyond the point; -1 at the edge.
      fraction: (B, length) float32 in [0, 1), the point's distance from that pixel.
    """

    before: _Array
    fraction: _Array


class Enlargement(NamedTuple):
    """How a batch of photographs is enlarged.

    Attributes:
      sizes: (B, 2) int32, (height, width) of each photograph.
      rows, columns: sample points of the H rows and the W columns.
      padded: (B, 2) int32, (height, width) after enlarging and padding.
    """

    sizes: _Array
    rows: SamplePoints
    columns: SamplePoints
    padded: _Array


def source_shape(bucket: Size, upscale: float) -> Size:
    """A shape that holds every photograph of the bucket before it is enlarged."""
    return math.ceil(bucket[0] / upscale), math.ceil(bucket[1] / upscale)


def plan_enlargement(plans: Sequence[SizePlan], bucket: Size) -> Enlargement:
    """Plans the enlargement of photographs with these sizes; all arrays are on the host."""
    sizes = [plan.source[::-1] if plan.portrait else plan.source for plan in plans]
    rows, columns = (_sample_points(plans, axis, length) for axis, length in enumerate(bucket))
    return Enlargement(
        np.asarray(sizes, np.int32), rows, columns, np.asarray([plan.lying for plan in plans], np.int32)
    )


def _sample_points(plans: Sequence[SizePlan], axis: int, length: int) -> SamplePoints:
    before = np.zeros((len(plans), length), np.int32)
    fraction = np.zeros((len(plans), length), np.float32)
    for row, plan in enumerate(plans):
        upright = 1 - axis if plan.portrait else axis
        source, resized, padded = plan.source[upright], plan.resized[upright], plan.padded[upright]
        reflected = np.pad(np.arange(resized), (0, padded - resized), mode="reflect")
        # In float64: float32 knows a position of some thousands only to 1e-4.
        points = (reflected + 0.5) * (source / resized) - 0.5
        before[row, :padded] = np.floor(points)
        fraction[row, :padded] = points - np.floor(points)
    return SamplePoints(before, fraction)


def enlarge(photos: jax.Array, enlargement: Enlargement) -> jax.Array:
    """Enlarges and pads photographs.

    Args:
      photos: (B, h, w, 3) uint8, each in the top left corner.

    Returns:
      (B, H, W, 3) float32 in [−1, 1]; 0 outside a photograph's padded size.
    """
    return jax.vmap(_enlarge_one)(photos, enlargement)


def _enlarge_one(photo: jax.Array, enlargement: Enlargement) -> jax.Array:
    (height, width), rows, columns, padded = enlargement
    wide = _interpolate(photo.astype(jnp.float32) / 255, width, columns, axis=1)
    # Without the barrier, XLA computes `wide` anew for each of the four rows that are weighted.
    image = _interpolate(jax.lax.optimization_barrier(wide), height, rows, axis=0)
    valid = (jnp.arange(image.shape[0])[:, None] < padded[0]) & (jnp.arange(image.shape[1]) < padded[1])
    return jnp.where(valid[..., None], jnp.clip(image * 2 - 1, -1, 1), 0)


def _interpolate(image: jax.Array, length: jax.Array, points: SamplePoints, axis: int) -> jax.Array:
    """Resamples one axis of an (h, w, 3) image, of which the first `length` pixels are valid; edges are repeated."""
    fraction = jnp.expand_dims(points.fraction, (1 - axis, 2))
    weights = _far(1 + fraction), _near(fraction), _near(1 - fraction), _far(2 - fraction)
    result = jnp.zeros((), jnp.float32)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        pixels = jnp.clip(points.before + offset, 0, length - 1)
        result += weight * jnp.take(image, pixels, axis, mode="clip")
    return result


def _near(distance: jax.Array) -> jax.Array:
    """The cubic at a distance of at most one pixel."""
    return ((_SLOPE + 2) * distance - (_SLOPE + 3)) * distance**2 + 1


def _far(distance: jax.Array) -> jax.Array:
    """The cubic at a distance of one to two pixels."""
    return _SLOPE * (((distance - 5) * distance + 8) * distance - 4)
