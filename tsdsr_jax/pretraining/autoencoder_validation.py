"""Validates an autoencoder on a few fixed photographs: metrics, and pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from tsdsr_jax.data.record import Record
from tsdsr_jax.images.sheet import comparison_sheet
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import Posterior
from tsdsr_jax.pretraining.autoencoder import AutoencoderLoss, divergence, latent_deviation
from tsdsr_jax.training.batch import to_unit
from tsdsr_jax.training.sharding import replicated
from tsdsr_jax.training.validation import image_of, place_samples, psnr

TITLES = ("photograph", "rebuilt", "four times the difference")


class AutoencoderValidation:
    """Reconstructs fixed photographs from the posterior's mean.

    Args:
      loss: provides the networks.
      mesh: the devices; each takes a share of the samples.
      records: samples with `hr`; all of them are measured.
      shown: how many of the first samples the sheet shows.
      fixed: parameters that are not trained.
    """

    def __init__(
        self,
        loss: AutoencoderLoss,
        mesh: Mesh,
        records: Sequence[Record],
        shown: int,
        fixed: Tree = {},  # noqa: B006 (nobody changes it)
    ):
        self.records, self.shown = records, shown
        self._batches = place_samples(records, mesh)

        def look(params: Tree, record: Record) -> tuple[jax.Array, Posterior]:
            posterior = loss.posterior(params, to_unit(record.hr))
            rebuilt = jnp.clip(loss.decode(params, posterior.mean), -1, 1)
            return jnp.round((rebuilt + 1) * 127.5).astype(jnp.uint8), posterior

        self._fixed, self._look = fixed, jax.jit(look, out_shardings=replicated(mesh))

    def _posteriors(self, params: Tree) -> tuple[np.ndarray, Posterior]:
        count = len(self.records)
        whole = {**self._fixed, **params}
        looks = [self._look(whole, batch) for batch in self._batches]
        rebuilt = np.concatenate([np.asarray(images) for images, _ in looks])[:count]
        mean, logvar = (
            np.concatenate(parts)[:count]
            for parts in zip(*(posterior for _, posterior in looks), strict=True)
        )
        return rebuilt, Posterior(mean, logvar)  # type: ignore[arg-type]  # of the host: NumPy's sums are exported

    def __call__(self, params: Tree) -> tuple[dict[str, float], Image.Image]:
        """Returns the mean PSNR (RGB, dB), the latents' divergence and standard deviation, and the comparison sheet."""
        rebuilt, posterior = self._posteriors(params)
        photographs = [image_of(record.hr) for record in self.records]
        ratios = [psnr(image, photograph) for image, photograph in zip(rebuilt, photographs, strict=True)]
        rows = []
        for image, photograph in zip(rebuilt[: self.shown], photographs, strict=False):
            apart = np.abs(image.astype(int) - photograph) * 4
            pictures = photograph, image, np.minimum(apart, 255).astype(np.uint8)
            rows.append([Image.fromarray(picture) for picture in pictures])
        values = {
            "validation_psnr": float(np.mean(ratios)),
            "validation_kl": float(divergence(posterior)),
            "latent_deviation": float(latent_deviation(posterior)),
        }
        return values, comparison_sheet(rows, TITLES)

    def scaling_factor(self, params: Tree) -> float:
        """Returns the factor that gives these photographs' latents a standard deviation of 1."""
        return 1 / float(latent_deviation(self._posteriors(params)[1]))
