"""Training samples on the devices: images in [−1, 1], their latents, their texts."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tsdsr_jax.data.record import Record
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL

Metrics = dict[str, jax.Array]


class Samples(NamedTuple):
    """B training samples as they come from the host.

    Attributes:
      lr, hr: (..., B, H, W, 3) uint8; lr is interpolated to hr's size.
      latent_hr: (..., B, h, w, C), times the scaling factor; None: to be encoded from hr.
      text: the images' prompts, (..., B, S, D) and (..., B, P); None: the default prompt.
    """

    lr: jax.Array
    hr: jax.Array
    latent_hr: jax.Array | None
    text: Text | None


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


def repeated(text: Text, lead: tuple[int, ...]) -> Text:
    """One text, (1, S, D) and (1, P), for every sample: (*lead, S, D) and (*lead, P)."""
    return Text(*(jnp.broadcast_to(part[0], (*lead, *part.shape[1:])) for part in text))


def to_samples(record: Record) -> Samples:
    """A batched record, its parts arrays on the devices."""
    text = None if record.prompt is None else Text(record.prompt, record.pooled)
    return Samples(record.lr, record.hr, record.latent_hr, text)
