"""Distances between images, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# Gradients are compared at these scales, in pixels, so that edges and texture of each width count.
GRADIENT_SCALES = (1, 2, 4)


def absolute_distance(first: jax.Array, second: jax.Array) -> jax.Array:
    """Computes L1: the mean absolute difference of two batches of images, (B, H, W, C)."""
    return jnp.abs(first - second).mean()


def gradient_distance(
    first: jax.Array, second: jax.Array, scales: Sequence[int] = GRADIENT_SCALES
) -> jax.Array:
    """Computes the mean absolute difference of horizontal and vertical gradients, averaged over the scales.

    At scale s, gradients are taken between means of s×s pixels.

    Args:
      first, second: (B, H, W, C), with sides larger than the largest scale.
    """
    difference = first - second  # gradients and means are linear
    total = jnp.zeros(())
    for scale in scales:
        coarse = nn.avg_pool(difference, (scale, scale), strides=(scale, scale))
        total += jnp.abs(jnp.diff(coarse, axis=1)).mean() + jnp.abs(jnp.diff(coarse, axis=2)).mean()
    return total / len(scales)
