"""Convolutions as functions: up-sampling with 4/9 of the arithmetic, and gradients that are fast on CPUs.

Axes: B batch, H W rows and columns of the input, h w of the output, I O channels in and out. All NHWC; square kernels
(k, k, I, O).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Padding = tuple[int, int]
Taps = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# Output pixels whose patches are gathered at a time: few enough to stay in the cache.
_PIXELS = 2048


def convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """(B, H, W, I) -> (B, h, w, O).

    Args:
      x: input.
      kernel: (k, k, I, O).
      stride: 1 or 2.
      padding: zeros (before, after) on both axes.
    """
    if jax.default_backend() == "cpu":
        if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0):
            # A matrix product is up to ten times as fast on CPUs, gradients included. The barrier keeps XLA from computing
            # x a second time, into an array of the product's shape (jax 0.10 ignores it).
            rows = jax.lax.optimization_barrier(x).reshape(-1, x.shape[-1])
            return (rows @ kernel[0, 0]).reshape(*x.shape[:3], -1)
        return _for_cpus(x, kernel, stride, padding)
    return _convolution(x, kernel, stride, padding)


def upsampling_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Repeats every pixel twice on both axes, then convolves 3×3 with zero padding, in 4/9 of the arithmetic.

    Two of the three input rows of an output row are the same: even rows 2i see rows i−1, i, i, and odd rows 2i+1 see i, i,
    i+1; likewise for columns. So each of the four combinations is a 2×2 convolution whose kernel sums taps of the 3×3
    kernel. A single convolution with four times as many outputs computes all of them on a grid one larger, and each
    combination takes its part of that grid.

    Args:
      x: (B, H, W, I).
      kernel: (3, 3, I, O).

    Returns:
      (B, 2H, 2W, O).
    """
    height, width = x.shape[1:3]
    # In float32, so that sums of taps are rounded only once.
    wide = kernel.astype(jnp.float32)
    phases = _phases(wide, even=lambda a, b, c: (a, b + c), odd=lambda a, b, c: (a + b, c))
    y = convolution(x, phases.astype(kernel.dtype), 1, (1, 1))
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    parts = [[y[:, i : i + height, j : j + width, i, j] for j in (0, 1)] for i in (0, 1)]
    return _interleaved(parts)


def _phases(kernel: jax.Array, even: Taps, odd: Taps) -> jax.Array:
    """(3, 3, I, O) -> (2, 2, I, 2·2·O): the taps that even and odd rows and columns of a fine grid apply to a coarse one.

    Args:
      kernel: 3×3 taps.
      even, odd: map the three taps along an axis to two.
    """

    def split(taps: jax.Array) -> jax.Array:
        """(3, ...) -> (phase, tap, ...)."""
        return jnp.stack([jnp.stack(choose(*taps)) for choose in (even, odd)])

    rows = split(kernel)
    both = split(jnp.moveaxis(rows, 2, 0))  # (column phase, column tap, row phase, row tap, I, O)
    return both.transpose(3, 1, 4, 2, 0, 5).reshape(2, 2, kernel.shape[2], -1)


def _interleaved(parts: list[list[jax.Array]]) -> jax.Array:
    """Four (B, h, w, C) by (row phase, column phase) -> (B, 2h, 2w, C)."""
    batch, height, width, channels = parts[0][0].shape
    rows = [jnp.stack(pair, axis=3) for pair in parts]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=(padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


# --- gradients on CPUs ------------------------------------------------------------------------------
#
# XLA computes the gradient of a kernel as a convolution with a window as large as the image, at a tenth of the forward
# pass's speed, and that of a strided convolution's input at a sixth (two cores, float32). These functions compute the same
# sums in another order. They leave convolutions on CPUs without forward-mode differentiation.


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _for_cpus(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return _convolution(x, kernel, stride, padding)


def _forward(
    x: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolution(x, kernel, stride, padding), (x, kernel)


def _backward(
    stride: int, padding: Padding, kept: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    if stride == 2 and kernel.shape[0] == 3 and padding == (0, 1) and not (x.shape[1] % 2 or x.shape[2] % 2):
        to_input = _input_gradient(kernel, slope)
    else:
        (to_input,) = jax.vjp(lambda x: _convolution(x, kernel, stride, padding), x)[1](slope)
    return to_input.astype(x.dtype), _kernel_gradient(x, slope, kernel, stride, padding)


_for_cpus.defvjp(_forward, _backward)


def _input_gradient(kernel: jax.Array, slope: jax.Array) -> jax.Array:
    """The input's gradient for a 3×3 kernel, stride 2 and a zero after each axis: (B, h, w, O) -> (B, 2h, 2w, I).

    An even row 2i is in the windows of outputs i−1 (third tap) and i (first tap), an odd one in that of i (second tap).
    """
    phases = _phases(
        kernel.swapaxes(2, 3), even=lambda a, b, c: (c, a), odd=lambda a, b, c: (jnp.zeros_like(b), b)
    )
    y = _convolution(slope, phases, 1, (1, 0))
    y = y.reshape(*y.shape[:3], 2, 2, -1)
    return _interleaved([[y[..., i, j, :] for j in (0, 1)] for i in (0, 1)])


def _kernel_gradient(
    x: jax.Array, slope: jax.Array, kernel: jax.Array, stride: int, padding: Padding
) -> jax.Array:
    """(B, H, W, I) and (B, h, w, O) -> (k, k, I, O): matrix products of patches and slopes, a few rows at a time."""
    side, (batch, height, width, features) = kernel.shape[0], slope.shape
    rows = max(1, min(height, _PIXELS // (batch * width)))
    count = -(-height // rows)
    # The rows that pad the last part are zero in `slope` and do not count.
    slope = jnp.pad(slope.astype(jnp.float32), ((0, 0), (0, count * rows - height), (0, 0), (0, 0)))
    read = (rows - 1) * stride + side
    missing = max(0, (count - 1) * rows * stride + read - x.shape[1] - sum(padding))
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (padding[0], padding[1] + missing), padding, (0, 0)))
    last_row, last_column = (rows - 1) * stride + 1, (width - 1) * stride + 1

    def add(part: jax.Array, total: jax.Array) -> jax.Array:
        window = jax.lax.dynamic_slice_in_dim(x, part * rows * stride, read, 1)
        taps = [
            window[:, i : i + last_row : stride, j : j + last_column : stride]
            for i in range(side)
            for j in range(side)
        ]
        patches = jnp.concatenate(taps, axis=-1).reshape(batch * rows * width, -1)
        slopes = jax.lax.dynamic_slice_in_dim(slope, part * rows, rows, 1).reshape(-1, features)
        return total + slopes.T @ patches

    total = jax.lax.fori_loop(0, count, add, jnp.zeros((features, side * side * x.shape[-1])))
    return total.T.reshape(kernel.shape).astype(kernel.dtype)
