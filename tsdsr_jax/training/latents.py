"""Encodes photographs to latents for a prepared set, on all devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.batch import to_unit
from tsdsr_jax.training.networks import Networks
from tsdsr_jax.training.sharding import batch_sharding

_NOISE_STREAM = 0x6C617465  # separates the posteriors' noise from other random draws


class LatentEncoder:
    """Encodes photographs to latents, on all devices of a mesh.

    Args:
      networks: provides the autoencoder and the mesh.
      vae: the autoencoder's parameters.
      batch: images per device.
      seed: seed of the posteriors' noise.
    """

    def __init__(self, networks: Networks, vae: Tree, batch: int, seed: int):
        self.networks, self.vae, self.seed = networks, vae, seed
        self.batch = batch * networks.mesh.size
        self._rows = batch_sharding(networks.mesh)
        network, scale = networks.autoencoder(), networks.vae_config.scaling_factor

        @jax.jit
        def encode(vae: Tree, images: jax.Array, noise: jax.Array) -> jax.Array:
            posterior: Any = network.apply({"params": vae}, to_unit(images), method="encode")
            return posterior.sample(noise) * scale

        self._encode = encode

    def noise(self, position: int, height: int, width: int) -> np.ndarray:
        """Draws the noise (h, w, C) of the sample at a position of the plan; it does not depend on the other samples of the
        batch."""
        factor, channels = self.networks.vae_config.factor, self.networks.vae_config.latent_channels
        generator = np.random.default_rng([_NOISE_STREAM, self.seed, position])
        return generator.standard_normal((height // factor, width // factor, channels), np.float32)

    def launch(self, positions: Sequence[int], images: Sequence[np.ndarray]) -> jax.Array:
        """Starts to encode up to `batch` images (H, W, 3) uint8 of one size; returns a full batch of latents, padded."""
        images = [*images, *[images[-1]] * (self.batch - len(images))]
        positions = [*positions, *[positions[-1]] * (self.batch - len(positions))]
        noise = [self.noise(position, *images[0].shape[:2]) for position in positions]
        put = partial(jax.device_put, device=self._rows)
        return self._encode(self.vae, put(np.stack(images)), put(np.stack(noise)))
