"""How timestep and pooled text act on the transformer: a conditioning vector, from which each block makes its modulations.

Axes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.models.layers import Dense, layer_norm


class ConditioningMLP(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Dense(self.width, self.dtype, name="linear_1")(x))
        return Dense(self.width, self.dtype, name="linear_2")(x)


class TimeTextEmbedding(nn.Module):
    """The conditioning vector (B, D): timestep (B,) in 0...1000 plus pooled text (B, pooled)."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        time = ConditioningMLP(self.width, self.dtype, name="timestep_embedder")(timestep_embedding(timestep))
        return time + ConditioningMLP(self.width, self.dtype, name="text_embedder")(pooled)


class Modulation(NamedTuple):
    """An AdaLN-Zero modulation, each (B, 1, D); `gate` multiplies what is added to the stream."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x) * (1 + self.scale) + self.shift


class AdaLayerNorm(nn.Module):
    """AdaLN-Zero: `count` modulations of width D from the conditioning vector."""

    count: int
    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, conditioning: jax.Array) -> list[Modulation]:
        """(B, D), after SiLU, -> modulations of (B, 1, D)."""
        vectors = Dense(3 * self.count * self.width, self.dtype, name="linear")(conditioning)[:, None]
        parts = jnp.split(vectors, 3 * self.count, axis=-1)
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


class AdaLayerNormContinuous(nn.Module):
    """AdaLN without a gate; the checkpoint stores scale before shift."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, conditioning: jax.Array) -> jax.Array:
        """Modulates (B, T, D) by (B, D), after SiLU."""
        vectors = Dense(2 * self.width, self.dtype, name="linear")(conditioning)[:, None]
        scale, shift = jnp.split(vectors, 2, axis=-1)
        return layer_norm(x) * (1 + scale) + shift


def timestep_embedding(timestep: jax.Array, dim: int = 256, max_period: float = 10000.0) -> jax.Array:
    """(B,) -> (B, dim) float32: cosines, then sines, of the timestep at geometric frequencies."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
