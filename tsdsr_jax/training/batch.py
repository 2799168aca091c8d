"""What every loss makes of a batch of records on the devices: images in [−1, 1], their latents, their texts.

A batch is a `Record` whose parts have leading axes and are arrays on the devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tsdsr_jax.data.record import Record
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL

Metrics = dict[str, jax.Array]


def to_unit(images: jax.Array) -> jax.Array:
    """uint8 to [−1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def encode(vae: AutoencoderKL, params: Tree, images: jax.Array, key: jax.Array | None) -> jax.Array:
    """Images (B, H, W, 3) in [−1, 1] to latents (B, h, w, C) float32, times the scaling factor: a sample of each posterior,
    or without a key its mean.
    """
    posterior = vae.apply({"params": params}, images, method="encode")
    latent = posterior.mean if key is None else posterior.sample(jax.random.normal(key, posterior.mean.shape))
    return latent.astype(jnp.float32) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, params: Tree, latents: jax.Array) -> jax.Array:
    """Latents (B, h, w, C), times the scaling factor, to images (B, H, W, 3) float32 within [−1, 1]."""
    decoded = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
    return jnp.clip(decoded.astype(jnp.float32), -1, 1)


def texts_of(batch: Record) -> Text | None:
    """The images' own prompts, (B, S, D) and (B, P); None where they have none."""
    return None if batch.prompt is None else Text(batch.prompt, batch.pooled)


def repeated(text: Text, count: int) -> Text:
    """One text, (1, S, D) and (1, P), for every sample: (B, S, D) and (B, P)."""
    return Text(*(jnp.broadcast_to(part, (count, *part.shape[1:])) for part in text))
