"""Converts a batch to what every loss needs: images in [−1, 1], latents and texts.

A batch is a `Record` whose parts are arrays on the devices, with a leading axis B.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from tsdsr_jax.data.record import Record
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL

Metrics = dict[str, jax.Array]


def to_unit(images: ArrayLike | None) -> jax.Array:
    """Converts uint8 images to float32 in [−1, 1].

    Raises:
      ValueError: there are no images.
    """
    if images is None:
        raise ValueError("these samples have no images")
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def encode(vae: AutoencoderKL, params: Tree, images: jax.Array, key: jax.Array | None) -> jax.Array:
    """Encodes images (B, H, W, 3) in [−1, 1] to latents (B, h, w, C) float32, times the scaling factor.

    With a key, each latent is sampled from its posterior; without one, it is the posterior's mean.
    """
    posterior: Any = vae.apply({"params": params}, images, method="encode")
    latent = posterior.mean if key is None else posterior.sample(jax.random.normal(key, posterior.mean.shape))
    return latent.astype(jnp.float32) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, params: Tree, latents: jax.Array) -> jax.Array:
    """Decodes latents (B, h, w, C), times the scaling factor, to images (B, H, W, 3) float32 within [−1, 1]."""
    return jnp.clip(decode_unclipped(vae, params, latents), -1, 1)


def decode_unclipped(vae: AutoencoderKL, params: Tree, latents: jax.Array) -> jax.Array:
    """Decodes latents to images that may exceed [−1, 1]; see `decode`."""
    decoded: Any = vae.apply({"params": params}, latents / vae.config.scaling_factor, method="decode")
    return decoded.astype(jnp.float32)


def latents_of(vae: AutoencoderKL, params: Tree, batch: Record, key: jax.Array | None) -> jax.Array:
    """Returns the batch's latents (B, h, w, C) float32, encoding the photographs if the batch has no latents; see
    `encode`."""
    if batch.latent_hr is not None:
        return jnp.asarray(batch.latent_hr, jnp.float32)
    return encode(vae, params, to_unit(batch.hr), key)


def text_of(batch: Record, default: Text | None) -> Text:
    """Returns the images' own prompts, (B, S, D) and (B, P), or the default prompt for each image.

    Raises:
      ValueError: there are neither own prompts nor a default.
    """
    if batch.prompt is not None and batch.pooled is not None:
        return Text(jnp.asarray(batch.prompt), jnp.asarray(batch.pooled))
    images = batch.hr if batch.latent_hr is None else batch.latent_hr
    if default is None or images is None:
        raise ValueError("samples without prompts of their own need the default prompt")
    return repeated(default, images.shape[0])


def repeated(text: Text, count: int) -> Text:
    """Repeats one text, (1, S, D) and (1, P), for every sample: (B, S, D) and (B, P)."""
    states, pooled = (jnp.broadcast_to(part, (count, *part.shape[1:])) for part in text)
    return Text(states, pooled)
