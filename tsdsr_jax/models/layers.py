"""The two layers that carry weights, Dense and Conv, and the norms.

Both layers look for a pair (`a`, `b`) in the `lora` collection and add the low-rank branch if they find one. So an adapter
is an argument of `apply`, never a change to the module: `model.apply({"params": base, "lora": adapter}, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Sharding
from jax.typing import DTypeLike

from tsdsr_jax.models.banding import (
    FeatureMap,
    RowsOnDemand,
    fetch_rows,
    in_bands,
    materialized,
    rows_of_band,
    upsampled_rows,
)
from tsdsr_jax.models.convolution import convolution, upsampling_convolution

# The name of what a backward pass should rather keep than recompute, for `jax.checkpoint_policies`.
KEPT = "kept"

# An elementwise function: (rows (B, h, W, C), index of the first row) -> rows of the same shape.
Prepare = Callable[[jax.Array, jax.Array | int], jax.Array]


class Placement(NamedTuple):
    """Where arrays are while a network with sharded parameters computes.

    Without constraints, XLA moves activations to the shards of each weight. With these, it gathers each block's weights when
    the block runs, and moves nothing else.

    Attributes:
      activations: sharding of a block's inputs; the batch axis is split over all devices.
      weights: sharding of a block's parameters while it runs; whole on every device.
    """

    activations: Sharding
    weights: Sharding


def gathered(module: type[nn.Module], placement: Placement | None) -> type[nn.Module]:
    """The same module with its parameters gathered when it runs; without a placement, the module itself."""
    if placement is None:
        return module

    def gather(variables: Any) -> Any:
        return jax.lax.with_sharding_constraint(variables, placement.weights)

    return nn.map_variables(module, "params", trans_in_fn=gather)


class Dense(nn.Module):
    """y = x W + b, plus x A B where the `lora` collection has `a` (in, r) and `b` (r, out).

    It may also have both in the computation dtype, `a_rounded` and `b_rounded`, so that they need not be rounded here.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., in) -> (..., features)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x.astype(self.dtype)
        y = x @ kernel.astype(self.dtype)
        if self.has_variable("lora", "a"):
            inner = trained_product(x, *self._adapter("a"))
            y = y + trained_product(checkpoint_name(inner, KEPT), *self._adapter("b"))
        return checkpoint_name(y + bias.astype(self.dtype), KEPT)

    def _adapter(self, name: str) -> tuple[jax.Array, jax.Array | None]:
        """A matrix of the adapter, and the same in the computation dtype if that is at hand."""
        rounded: Any = self.get_variable("lora", f"{name}_rounded", None)
        return self.get_variable("lora", name), rounded


def trained_product(x: jax.Array, weight: jax.Array, rounded: jax.Array | None = None) -> jax.Array:
    """x W in the dtype of x, with a gradient of W in the dtype of W.

    Devices add up these gradients. In 16 bits each sum would be rounded to 16 bits, and float16's could overflow; PyTorch's
    DDP, too, adds up the gradients of float32 parameters.

    Args:
      x: (..., in).
      weight: (in, out), usually float32.
      rounded: the weight in the dtype of x, if it is at hand.
    """
    if x.dtype == weight.dtype:
        return x @ weight
    return _mixed_product(weight.dtype, x, weight.astype(x.dtype) if rounded is None else rounded, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed_product(dtype: DTypeLike, x: jax.Array, rounded: jax.Array, weight: jax.Array) -> jax.Array:
    return x @ rounded


def _mixed_forward(
    dtype: DTypeLike, x: jax.Array, rounded: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ rounded, (x, rounded)


def _mixed_backward(
    dtype: DTypeLike, saved: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, rounded = saved
    rows = tuple(range(x.ndim - 1))
    of_weight = jax.lax.dot_general(x, slope, ((rows, rows), ((), ())), preferred_element_type=dtype)
    return slope @ rounded.T, jnp.zeros_like(rounded), of_weight


_mixed_product.defvjp(_mixed_forward, _mixed_backward)


class Conv(nn.Module):
    """2-D convolution, NHWC, with the low-rank branch of PEFT's Conv2d: A has the kernel's size, stride and padding but r
    outputs, B is 1×1.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      stride: 1, or 2 for the encoder's down-sampling.
      padding: (before, after) on both axes.
      upsample: 2 repeats every pixel twice on both axes before the convolution, which must be 3×3 with padding 1.
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
          prepare: elementwise function applied to the input. It is an argument so that a banded convolution never holds
            the prepared copy of the whole image.
          band_pixels: compute about this many output pixels at a time; None: the whole image. Exact either way.
          add: residual (B, H', W', features) to add to the result; bands are added to it in place.
          lazy: return `RowsOnDemand` if the result would take several bands; only when up-sampling.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        lora: list[jax.Array] = []
        if self.has_variable("lora", "a"):
            lora = [self.get_variable("lora", name).astype(self.dtype) for name in ("a", "b")]

        def convolve(rows: jax.Array, first_row: jax.Array | int) -> jax.Array:
            rows = rows.astype(self.dtype) if prepare is None else prepare(rows, first_row).astype(self.dtype)
            y = self._convolve(rows, kernel)
            if lora:
                a, b = lora
                y = y + convolution(self._convolve(rows, a), b[None, None], 1, (0, 0))
            return y + bias

        height, width = (side * self.upsample // self.stride for side in x.shape[1:3])
        band = rows_of_band(height, width, band_pixels)
        # A band and its margins must lie inside the image; small images are cheap as a whole.
        if band + 2 * self.upsample >= height:
            whole = convolve(materialized(x), 0)
            return whole if add is None else add + whole
        if lazy:
            return upsampled_rows(convolve, x, self.upsample)
        return in_bands(convolve, x, band, self.upsample, self.stride, add)

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        if self.upsample > 1:
            return upsampling_convolution(x, kernel)
        return convolution(x, kernel, self.stride, self.padding)


class GroupNorm(nn.Module):
    """Group normalization as an affine map per sample and channel, with statistics of the valid pixels only."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: FeatureMap, mask: jax.Array | None = None, band_pixels: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Measures x and returns (scale, shift), each (B, 1, 1, C) float32: the normalized x is x·scale + shift.

        Args:
          x: (B, H, W, C).
          mask: (B, H, W, 1) bool, False where a pixel is padding; None: all are valid.
          band_pixels: how many pixels of `RowsOnDemand` are held at a time.
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

        The variance is E[d²] − E[d]² with d the difference from a value near the mean. With d = x, a large mean would cost
        half of the digits. The mean of every 16th pixel of every 16th row is near enough. The moments of channels are then
        merged into those of their group (Chan et al. 1979).
        """
        some = x[:, ::16, ::16].astype(jnp.float32)
        if mask is None:
            valid, pixels = jnp.float32(1), jnp.float32(x.shape[1] * x.shape[2])
            near = some.mean((1, 2), keepdims=True)
        else:
            valid = mask.astype(jnp.float32)
            pixels = valid.sum((1, 2, 3))[:, None]
            some_valid = valid[:, ::16, ::16]
            near = (some * some_valid).sum((1, 2), keepdims=True)
            near /= jnp.maximum(some_valid.sum((1, 2), keepdims=True), 1)
        near = jax.lax.stop_gradient(near)  # the result does not depend on it
        # GPUs read x once if both sums share x − near, and XLA would not share it without the barrier. On CPUs they must not
        # share it, because XLA would write it to memory.
        behind = jax.lax.optimization_barrier(near)
        squared = jnp.square(x - (near if jax.default_backend() == "cpu" else behind))
        offset = ((x - behind) * valid).sum((1, 2)) / pixels
        squares = (squared * valid).sum((1, 2)) / pixels
        channel_mean = near[:, 0, 0] + offset
        mean = self._over_groups(channel_mean)
        within = squares - jnp.square(offset)
        variance = self._over_groups(within + jnp.square(channel_mean - mean))
        return mean, jnp.maximum(variance, 0)

    def _moments_in_bands(
        self, x: RowsOnDemand, mask: jax.Array | None, band_pixels: int | None
    ) -> tuple[jax.Array, jax.Array]:
        """Like `_moments`, band by band; merging the bands' moments (Chan et al. 1979) is as exact as two passes."""
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
    """Layer normalization over the last axis without affine parameters; computed in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)).astype(x.dtype)
