"""Convolutions over bands of rows: the same numbers as on the whole image, without temporaries of its size.

Axes: B batch, H W rows and columns, C channels; h rows of a band.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# (input rows (B, h, W, C), index of the first) -> output rows (B, h', W', C').
ConvolveRows = Callable[[jax.Array, jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class RowsOnDemand:
    """A feature map (B, H, W, C) that is never materialized; rows are recomputed on demand.

    Attributes:
      shape, dtype: as of an array.
      fetch: (first row, number of rows) -> (B, h, W, C).
      source: an array that the rows are computed from.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    fetch: Callable[[jax.Array | int, int], jax.Array]
    source: jax.Array


FeatureMap = jax.Array | RowsOnDemand


def materialized(x: FeatureMap) -> jax.Array:
    """The feature map as an array."""
    return x.fetch(0, x.shape[1]) if isinstance(x, RowsOnDemand) else x


def fetch_rows(x: FeatureMap, first: jax.Array | int, count: int) -> jax.Array:
    """Rows first ... first + count − 1."""
    if isinstance(x, RowsOnDemand):
        return x.fetch(first, count)
    return jax.lax.dynamic_slice_in_dim(x, first, count, 1)


def rows_of_band(height: int, width: int, band_pixels: int | None) -> int:
    """How many rows of a map of this size are computed at a time."""
    return height if band_pixels is None else max(8, band_pixels // width)


def upsampled_rows(convolve: ConvolveRows, x: FeatureMap, upsample: int) -> RowsOnDemand:
    """The result of an up-sampling 3×3 convolution as `RowsOnDemand`.

    The largest map of the decoder is read three times, by a group norm and two convolutions. Recomputing it each time
    costs a quarter more arithmetic and saves a third of the decoder's memory.
    """
    out = _output(convolve, x)

    def fetch(first: jax.Array | int, count: int) -> jax.Array:
        # One more source row on either side than the requested rows need: the outputs at the cut are wrong and dropped.
        rows_in = min(count // upsample + 3, x.shape[1])
        start = jnp.clip(first // upsample - 1, 0, x.shape[1] - rows_in)
        rows = convolve(fetch_rows(x, start, rows_in), start)
        return jax.lax.dynamic_slice_in_dim(rows, first - start * upsample, count, 1)

    return RowsOnDemand(out.shape, out.dtype, fetch, _source(x))


def in_bands(
    convolve: ConvolveRows, x: FeatureMap, band: int, upsample: int, stride: int, add: jax.Array | None = None
) -> jax.Array:
    """Computes a convolution of at most 3×3 one band of output rows at a time.

    Each band reads its input rows and a margin of one row (of `stride` rows when down-sampling), clamped to the image.
    Inside the image the margin takes the place of the zero padding; at the border the padding is the true one. Outputs
    computed from the margin are dropped.

    Args:
      convolve: maps h input rows to h·upsample/stride output rows.
      x: (B, H, W, C), H a multiple of `stride`.
      band: the most output rows of a band; all bands are equally high.
      upsample, stride: of the convolution.
      add: residual of the result's shape and dtype; None: zeros.
    """
    height, margin = x.shape[1], stride
    out = _output(convolve, x)
    count = -(-out.shape[1] // band)
    rows_in = -(-height // (count * stride)) * stride
    slice_rows, rows_out = rows_in + 2 * margin, rows_in * upsample // stride

    def add_band(index: jax.Array, result: jax.Array) -> jax.Array:
        # The last band starts early enough to be a full one.
        first_in = jnp.minimum(index * rows_in, height - rows_in)
        start = jnp.clip(first_in - margin, 0, height - slice_rows)
        rows = convolve(fetch_rows(x, start, slice_rows), start)
        rows = jax.lax.dynamic_slice_in_dim(rows, (first_in - start) * upsample // stride, rows_out, 1)
        first = first_in * upsample // stride
        # Rows that an earlier band has computed must not be added twice.
        fresh = first + jnp.arange(rows_out) >= index * rows_out
        rows = jnp.where(fresh[None, :, None, None], rows, 0)
        rows += jax.lax.dynamic_slice_in_dim(result, first, rows_out, 1)
        return jax.lax.dynamic_update_slice_in_dim(result, rows, first, 1)

    start = zeros_after(_source(x), out.shape, out.dtype) if add is None else add
    return jax.lax.fori_loop(0, count, add_band, start)


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Zeros that depend on x, so that XLA cannot allocate them earlier.

    XLA would allocate plain zeros of all convolutions before the first one runs. An optimization barrier would not help:
    XLA removes it and then merges equal zeros.
    """
    zero = jnp.nan_to_num(x[(slice(1),) * x.ndim].reshape(1)[0]) * 0
    return jnp.broadcast_to(zero.astype(dtype), shape)


def _output(convolve: ConvolveRows, x: FeatureMap) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the convolution of the whole map."""
    return jax.eval_shape(convolve, jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.int32(0))


def _source(x: FeatureMap) -> jax.Array:
    return x.source if isinstance(x, RowsOnDemand) else x
