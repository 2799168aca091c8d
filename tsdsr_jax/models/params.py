"""Shared by both networks: trees of parameters, their shapes, and SD3's sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.shapes import autoencoder_shapes, transformer_shapes
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig

LATENT_FACTOR, PATCH_SIZE = 8, 2  # SD3's pixels per latent pixel, and latent pixels per token, on each axis
STUDENT_TIMESTEP = 1000.0  # of the single step; it tells the network that its input is pure noise

Tree = dict[str, Any]
Config = MMDiTConfig | VAEConfig


def network(config: Config, **options: Any) -> MMDiT | AutoencoderKL:
    """The module that a config describes; `options` go to its constructor."""
    return MMDiT(config, **options) if isinstance(config, MMDiTConfig) else AutoencoderKL(config, **options)


def init_params(config: Config, key: jax.Array) -> Tree:
    """Initializes a network's parameters."""
    inputs: tuple[jax.Array, ...]
    if isinstance(config, MMDiTConfig):
        side = 2 * config.patch_size
        inputs = (
            jnp.zeros((1, side, side, config.in_channels)),
            jnp.zeros((1,)),
            jnp.zeros((1, 1, config.joint_attention_dim)),
            jnp.zeros((1, config.pooled_projection_dim)),
        )
    else:
        inputs = (jnp.zeros((1, config.factor, config.factor, config.in_channels)),)
    return network(config).init(key, *inputs)["params"]


def abstract_params(config: Config) -> Tree:
    """Shapes and dtypes (float32) of a network's parameters, without computing or tracing anything."""
    shapes = transformer_shapes(config) if isinstance(config, MMDiTConfig) else autoencoder_shapes(config)
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda part: isinstance(part, tuple),
    )
