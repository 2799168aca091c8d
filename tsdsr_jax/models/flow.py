"""SD3's rectified flow: x_σ = (1 − σ)·x₀ + σ·ε, dx/dσ = v, over a discrete, shifted schedule.

Sources: the FlowMatchEulerDiscreteScheduler of SD3's checkpoints (1000 steps, shift 3); Esser et al. 2024, §3 and eq. 23.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

STEPS = 1000


def sigmas(shift: float = 3.0) -> np.ndarray:
    """The noise levels, (1000,) float32, falling from 1 to 0.003; index i has timestep 1000·σ_i."""
    uniform = (STEPS - np.arange(STEPS, dtype=np.float64)) / STEPS
    return (shift * uniform / (1 + (shift - 1) * uniform)).astype(np.float32)


def per_sample(values: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) -> (B, 1, ...), ready to multiply an array with as many axes as `like`."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def add_noise(clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """x_σ of clean (B, ...) at noise levels (B,)."""
    sigma = per_sample(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def to_clean(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The x₀ that follows from a velocity at x_σ."""
    return noisy - per_sample(sigma, noisy) * velocity


def euler_step(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array, following: jax.Array) -> jax.Array:
    """Moves along the velocity from noise level `sigma` (B,) to `following` (B,)."""
    return noisy - per_sample(sigma - following, noisy) * velocity


def matching_loss(velocity: jax.Array, clean: jax.Array, noise: jax.Array) -> jax.Array:
    """Flow matching: the mean squared distance of velocities to ε − x₀, the value of dx/dσ on the straight path."""
    return jnp.mean(jnp.square(velocity - (noise - clean)))


def timesteps(sigma: jax.Array) -> jax.Array:
    """The transformer's timestep input for a noise level."""
    return jnp.asarray(sigma) * STEPS
