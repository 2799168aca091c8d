"""The two layers that carry weights, Dense and Conv, and the norms.

Both layers look into the `lora` collection: where it holds a pair (`a`, `b`) for them they add the low-rank branch, and
where it holds nothing they are the plain layer. An adapter is therefore an argument of `apply`, never a change to the
module: `model.apply({"params": base, "lora": adapter}, ...)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jax.typing import DTypeLike

from tsdsr_jax.models.convolution import convolution, upsampling_convolution

# (rows (B, h, W, C), index of the first row) -> rows of the same shape, elementwise.
Prepare = Callable[[jax.Array, jax.Array | int], jax.Array]


@dataclasses.dataclass(frozen=True)
class RowsOnDemand:
    """A feature map (B, H, W, C) that is never whole: its rows are computed when they are needed, each time anew.

    Attributes:
      shape, dtype: as of an array.
      fetch: (first row, number of rows) -> (B, n, W, C).
      source: an array it is computed from.
    """

    shape: tuple[int, ...]
    dtype: DTypeLike
    fetch: Callable[[jax.Array | int, int], jax.Array]
    source: jax.Array

    def whole(self) -> jax.Array:
        return self.fetch(0, self.shape[1])


FeatureMap = jax.Array | RowsOnDemand


def fetch_rows(x: FeatureMap, first: jax.Array | int, count: int) -> jax.Array:
    """Rows first ... first + count − 1."""
    return (
        x.fetch(first, count)
        if isinstance(x, RowsOnDemand)
        else jax.lax.dynamic_slice_in_dim(x, first, count, 1)
    )


class Placement(NamedTuple):
    """Where a network's arrays live while it computes, when its parameters are stored in parts.

    Left alone, XLA moves activations to wherever the parts of a weight are. Pinned like this it gathers each block's
    weights when the block runs, and moves nothing else.

    Attributes:
      activations: of what blocks pass on; the batch axis is split over all devices.
      weights: of a block's parameters while it runs; whole on every device.
    """

    activations: Sharding
    weights: Sharding


def gathered(module: type[nn.Module], placement: Placement | None) -> type[nn.Module]:
    """The same module, whose parameters are gathered when it runs; without a placement the module itself."""
    if placement is None:
        return module

    def gather(variables: Any) -> Any:
        return jax.lax.with_sharding_constraint(variables, placement.weights)

    return nn.map_variables(module, "params", trans_in_fn=gather)


class Dense(nn.Module):
    """y = x W + b, plus x A B where the `lora` collection has `a` (in, r) and `b` (r, out).

    Where the parameters have a `scale` (out,) beside it the kernel is stored in eight bits, and W = kernel·scale.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., features)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.has_variable("params", "scale"):
            kernel = kernel.astype(jnp.float32) * self.get_variable("params", "scale")
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b"))
            y = y + (x @ a) @ b
        return y + bias.astype(self.dtype)


class Conv(nn.Module):
    """2-D convolution, NHWC, with the low-rank branch of PEFT's Conv2d: A has the kernel's own shape, stride and padding
    with r outputs, B is 1×1.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      stride: 1, or 2 for the encoder's down-sampling.
      padding: (before, after) on both axes.
      upsample: 2 repeats every pixel twice on both axes before the convolution, which must be a 3×3 one with padding 1.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    upsample: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: FeatureMap,
        prepare: Prepare | None = None,
        band_pixels: int | None = None,
        add: jax.Array | None = None,
        lazy: bool = False,
    ) -> FeatureMap:
        """(B, H, W, C) -> (B, H', W', features).

        Args:
          x: input.
          prepare: elementwise function applied to the input first. Given here rather than before the call so that a
            banded convolution never holds the prepared copy of the whole image.
          band_pixels: compute at most about this many output pixels at a time; None: the whole image. Exact either way.
          add: (B, H', W', features) to add to the result, a residual; bands are added to it in place.
          lazy: where the result would take several bands, return it as `RowsOnDemand`; only when up-sampling.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        lora = None
        if self.has_variable("lora", "a"):
            lora = [self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b")]

        def convolve(rows: jax.Array, first_row: jax.Array | int) -> jax.Array:
            rows = rows.astype(self.dtype) if prepare is None else prepare(rows, first_row).astype(self.dtype)
            y = self._convolve(rows, kernel)
            if lora is not None:
                y = y + convolution(self._convolve(rows, lora[0]), lora[1][None, None], 1, (0, 0))
            return y + bias

        height, width = (side * self.upsample // self.stride for side in x.shape[1:3])
        band = rows_of_band(height, width, band_pixels)
        # A band needs its own rows, plus a margin, inside the image; small images are cheap whole.
        if band + 2 * self.upsample >= height:
            whole = convolve(x.whole() if isinstance(x, RowsOnDemand) else x, 0)
            return whole if add is None else add + whole
        if lazy:
            return upsampled_rows(convolve, x, self.upsample)
        return in_bands(convolve, x, band, self.upsample, self.stride, add)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.upsample > 1:
            return upsampling_convolution(x, kernel)
        return convolution(x, kernel, self.stride, self.padding)


def rows_of_band(height: int, width: int, band_pixels: int | None) -> int:
    """Rows of a map of this size that are computed at a time."""
    return height if band_pixels is None else max(8, band_pixels // width)


def upsampled_rows(
    convolve: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, upsample: int
) -> RowsOnDemand:
    """The result of an up-sampling 3×3 convolution as `RowsOnDemand`.

    The largest map of the decoder is read three times, by a group norm and two convolutions. Computing it each time
    costs a quarter more arithmetic and saves a third of the decoder's memory.
    """
    out = jax.eval_shape(convolve, x, jnp.int32(0))

    def fetch(first: jax.Array | int, count: int) -> jax.Array:
        # One source row more on either side than the rows asked for touch: its outputs, wrong at the cut, are dropped.
        rows_in = min(count // upsample + 3, x.shape[1])
        start = jnp.clip(first // upsample - 1, 0, x.shape[1] - rows_in)
        rows = convolve(jax.lax.dynamic_slice_in_dim(x, start, rows_in, 1), start)
        return jax.lax.dynamic_slice_in_dim(rows, first - start * upsample, count, 1)

    return RowsOnDemand(out.shape, out.dtype, fetch, x)


def in_bands(
    convolve: Callable[[jax.Array, jax.Array], jax.Array],
    x: FeatureMap,
    band: int,
    upsample: int,
    stride: int,
    add: jax.Array | None = None,
) -> jax.Array:
    """Computes a convolution of at most 3×3 band by band of output rows: the same numbers, without whole-image temporaries.

    Each band reads its input rows and a margin of one row (of `stride` rows when down-sampling), clamped to the image:
    away from the border the margin replaces the zero padding, at the border the padding is the true one. The
    outputs made from the margin are dropped.

    Args:
      convolve: (input rows (B, n, W, C), index of the first) -> output rows (B, n·upsample/stride, W', C').
      x: (B, H, W, C), H a multiple of `stride`.
      band: output rows a band, at most; bands are then made equally high.
      add: residual of the result's shape and dtype; None: zeros.
    """
    height, margin = x.shape[1], stride
    out = jax.eval_shape(convolve, jax.ShapeDtypeStruct(x.shape, x.dtype), jnp.int32(0))
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
        # Rows that the band before has done already must not be added twice.
        fresh = first + jnp.arange(rows_out) >= index * rows_out
        rows = jnp.where(fresh[None, :, None, None], rows, 0)
        rows += jax.lax.dynamic_slice_in_dim(result, first, rows_out, 1)
        return jax.lax.dynamic_update_slice_in_dim(result, rows, first, 1)

    source = x.source if isinstance(x, RowsOnDemand) else x
    start = zeros_after(source, out.shape, out.dtype) if add is None else add
    return jax.lax.fori_loop(0, count, add_band, start)


def zeros_after(x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Zeros that exist no earlier than x.

    Plain zeros depend on nothing, and XLA would set up those of all convolutions before the first. A barrier instead of
    arithmetic does not last: XLA removes it before it merges equal zeros.
    """
    zero = jnp.nan_to_num(x[(slice(1),) * x.ndim].reshape(1)[0]) * 0
    return jnp.broadcast_to(zero.astype(dtype), shape)


class GroupNorm(nn.Module):
    """Group normalisation as a per-sample, per-channel affine map, statistics over the valid pixels only."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: FeatureMap, mask: jax.Array | None = None, band_pixels: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Measures x and returns (scale, shift), each (B, 1, 1, C) float32: the normalised x is x·scale + shift.

        Args:
          x: (B, H, W, C).
          mask: (B, H, W, 1) bool, False where a pixel is padding; None: all are valid.
          band_pixels: how much of `RowsOnDemand` is held at a time.
        """
        channels = x.shape[-1]
        weight = self.param("scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,)).astype(jnp.float32)
        if isinstance(x, RowsOnDemand):
            mean, variance = self._moments_in_bands(x, mask, band_pixels)
        else:
            mean, variance = self._moments(x, mask)
        scale = weight * jax.lax.rsqrt(variance + self.epsilon)
        return scale[:, None, None, :], (bias - mean * scale)[:, None, None, :]

    def _moments(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Each group's mean and variance, (B, C), from one pass over x.

        E[d²] − E[d]² of differences d to a value near the mean: to 0 it would lose half the digits where the mean is large.
        The mean of every 16th pixel of every 16th row is near enough; channels' moments are then merged to their group's
        (Chan et al. 1979).
        """
        x = x.astype(jnp.float32)
        if mask is None:
            valid, pixels = jnp.float32(1), jnp.float32(x.shape[1] * x.shape[2])
            near = x[:, ::16, ::16].mean((1, 2), keepdims=True)
        else:
            valid = mask.astype(jnp.float32)
            pixels = valid.sum((1, 2, 3))[:, None]
            some = valid[:, ::16, ::16]
            near = (x[:, ::16, ::16] * some).sum((1, 2), keepdims=True)
            near /= jnp.maximum(some.sum((1, 2), keepdims=True), 1)
        near = jax.lax.stop_gradient(near)  # the result does not depend on it
        # Behind a barrier near is another array: XLA on CPUs would write out differences that two sums share.
        offset = ((x - jax.lax.optimization_barrier(near)) * valid).sum((1, 2)) / pixels
        squares = (jnp.square(x - near) * valid).sum((1, 2)) / pixels
        channel_mean = near[:, 0, 0] + offset
        mean = self._over_groups(channel_mean)
        within = squares - jnp.square(offset)
        variance = self._over_groups(within + jnp.square(channel_mean - mean))
        return mean, jnp.maximum(variance, 0)

    def _moments_in_bands(
        self, x: RowsOnDemand, mask: jax.Array | None, band_pixels: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """The same in one pass over bands, whose moments are merged (Chan et al. 1979): as exact as two passes."""
        batch, height, width, channels = x.shape
        count = -(-height // rows_of_band(height, width, band_pixels))
        rows = -(-height // count)

        def merge(index: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            pixels, mean, squares = sums
            first = jnp.minimum(index * rows, height - rows)
            band = fetch_rows(x, first, rows).astype(jnp.float32)
            fresh = (first + jnp.arange(rows) >= index * rows)[None, :, None, None]
            valid = jnp.broadcast_to(fresh, (batch, rows, width, 1))
            if mask is not None:
                valid &= jax.lax.dynamic_slice_in_dim(mask, first, rows, 1)
            valid = valid.astype(jnp.float32)
            new_pixels = valid.sum((1, 2, 3))[:, None]
            divisor = jnp.maximum(new_pixels, 1)
            new_mean = self._over_groups((band * valid).sum((1, 2)) / divisor)
            new_squares = (jnp.square(band - new_mean[:, None, None, :]) * valid).sum((1, 2))
            total = jnp.maximum(pixels + new_pixels, 1)
            apart = new_mean - mean
            return (
                pixels + new_pixels,
                mean + apart * new_pixels / total,
                squares + self._over_groups(new_squares) + jnp.square(apart) * pixels * new_pixels / total,
            )

        zeros = jnp.zeros((batch, channels), jnp.float32)
        pixels, mean, squares = jax.lax.fori_loop(0, count, merge, (zeros[:, :1], zeros, zeros))
        return mean, squares / pixels

    def _over_groups(self, per_channel: jax.Array) -> jax.Array:
        """(B, C) -> (B, C): each channel's value replaced by its group's mean."""
        batch, channels = per_channel.shape
        means = per_channel.reshape(batch, self.groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.groups, axis=1)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · scale over the last axis, in float32."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(x.dtype)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Layer normalisation without affine parameters over the last axis, computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)
