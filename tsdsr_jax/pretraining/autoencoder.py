"""The loss of an autoencoder on photographs: L1, gradients at several scales, a KL term, optionally LPIPS.

The encoder can be frozen, and noise can be added to the latents. `adversarial` adds a discriminator.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from tsdsr_jax.data.record import Record
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.models.params import Tree, init_params
from tsdsr_jax.models.vae import AutoencoderKL, Posterior, VAEConfig
from tsdsr_jax.training.batch import Metrics, to_unit
from tsdsr_jax.training.pixels import absolute_distance, gradient_distance

# Log-variance of a new autoencoder's posteriors: a standard deviation of 0.05.
FIRST_LOGVAR = -6.0
# Makes the key of the latents' noise from that of the posteriors' samples.
_NOISE = 2**31
# The last kernel of every residual branch.
LAST_OF_BRANCH = ("conv2/kernel", "to_out_0/kernel")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the losses. Each loss is a mean over pixels or latents of images in [−1, 1].

    Attributes:
      gradient: weight of the absolute differences of gradients, which sharpens what L1 alone leaves blurred.
      kl: weight of the posterior's divergence from the standard normal; a small one keeps latents compact and smooth.
      lpips: weight of the perceptual distance.
      latent_noise: the largest deviation of the noise that is added to latents before they are decoded, relative to the
        latents' own deviation. It makes the decoder smooth: near latents become near images.
    """

    gradient: float = 1.0
    kl: float = 1e-6
    lpips: float = 0.0
    latent_noise: float = 0.0


def new_autoencoder_params(config: VAEConfig, key: jax.Array) -> Tree:
    """Initializes an autoencoder's parameters. Two things differ from its layers' own initialization.

    Every residual branch starts at zero, so that deep networks train well (Goyal et al. 2017, §5.1). Posteriors start
    narrow, because a standard deviation of 1 would drown the little information that the decoder can use at first.
    """
    leaves = flatten_dict(init_params(config, key), sep="/")
    for name, leaf in leaves.items():
        if name.endswith(LAST_OF_BRANCH):
            leaves[name] = jnp.zeros_like(leaf)
    bias = leaves["encoder/conv_out/bias"]
    leaves["encoder/conv_out/bias"] = bias.at[config.latent_channels :].set(FIRST_LOGVAR)
    return unflatten_dict(leaves, sep="/")


class Frozen(NamedTuple):
    """What is not trained: the parameters of LPIPS and the autoencoder's frozen part; {} without."""

    lpips: Tree = {}  # noqa: RUF012 (a NamedTuple's default, which nobody changes)
    fixed: Tree = {}  # noqa: RUF012


class Rebuilt(NamedTuple):
    """An autoencoder's result: images (B, H, W, 3) float32, and what they were decoded from."""

    images: jax.Array
    posterior: Posterior


@dataclasses.dataclass(frozen=True)
class AutoencoderLoss:
    """The loss as a function of the autoencoder's parameters. Holds the modules but no parameters."""

    vae: AutoencoderKL
    config: AutoencoderConfig
    lpips: LPIPS | None = None

    def posterior(self, params: Tree, images: jax.Array) -> Posterior:
        """Encodes images (B, H, W, 3) in [−1, 1] to a float32 posterior."""
        posterior: Any = self.vae.apply({"params": params}, images, method="encode")
        return posterior

    def decode(self, params: Tree, latents: jax.Array) -> jax.Array:
        """Decodes unscaled latents (B, h, w, C) to images (B, H, W, 3) float32, not clamped."""
        images: Any = self.vae.apply({"params": params}, latents, method="decode")
        return images.astype(jnp.float32)

    def of_batch(
        self, params: Tree, frozen: Frozen, record: Record, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the loss of a batch of photographs, with one sample from each posterior, and the values to log."""
        return self(params, frozen, to_unit(record.hr), key)

    def __call__(
        self, params: Tree, frozen: Frozen, images: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the weighted sum of the losses of images (B, H, W, 3) in [−1, 1], and each of its parts."""
        rebuilt = self.rebuild(params, frozen, images, key)
        distance, metrics = self.distance(frozen, rebuilt.images, images)
        kl = divergence(rebuilt.posterior)
        total = distance + self.config.kl * kl
        return total, metrics | {"kl": kl, "autoencoder": total}

    def rebuild(self, params: Tree, frozen: Frozen, images: jax.Array, key: jax.Array) -> Rebuilt:
        """Encodes images, and decodes a sample of each posterior, with noise if the settings say so."""
        params = {**frozen.fixed, **params}
        posterior = self.posterior(params, images)
        latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
        if self.config.latent_noise:
            latents += self._noise(latents, jax.random.fold_in(key, _NOISE))
        return Rebuilt(self.decode(params, latents), posterior)

    def _noise(self, latents: jax.Array, key: jax.Array) -> jax.Array:
        """Draws noise of a deviation of its own for each sample, uniform up to the largest."""
        level, noise = jax.random.split(key)
        share = jax.random.uniform(level, (latents.shape[0], 1, 1, 1), maxval=self.config.latent_noise)
        # Constant, or larger latents would come with a gradient that makes them larger still.
        deviation = jax.lax.stop_gradient(latents.std())
        return share * deviation * jax.random.normal(noise, latents.shape)

    def distance(self, frozen: Frozen, rebuilt: jax.Array, images: jax.Array) -> tuple[jax.Array, Metrics]:
        """Computes the weighted sum of the distances between two batches of images, and each of them."""
        parts = {"l1": absolute_distance(rebuilt, images), "gradient": gradient_distance(rebuilt, images)}
        weights = {"l1": 1.0, "gradient": self.config.gradient}
        if self.lpips and self.config.lpips:
            distances: Any = self.lpips.apply({"params": frozen.lpips}, rebuilt, images)
            parts["lpips"] = distances.mean()
            weights["lpips"] = self.config.lpips
        return sum((weights[name] * part for name, part in parts.items()), jnp.zeros(())), parts


def divergence(posterior: Posterior) -> jax.Array:
    """Computes the KL divergence from the standard normal, averaged over latents."""
    mean, logvar = posterior
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()


def latent_deviation(posterior: Posterior) -> jax.Array:
    """Computes the standard deviation of the posterior's samples.

    The scaling factor is its inverse (Rombach et al. 2022, §G).
    """
    return jnp.sqrt(posterior.mean.var() + jnp.exp(posterior.logvar).mean())
