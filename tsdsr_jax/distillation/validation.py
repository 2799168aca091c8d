"""Validates the student on a few fixed samples: pictures to look at, latent error and PSNR."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Base, Losses, Student
from tsdsr_jax.images.sheet import comparison_sheet
from tsdsr_jax.training.sharding import replicated
from tsdsr_jax.training.validation import image_of, place_samples, psnr

TITLES = ("low quality", "student", "high quality")


class Validation:
    """Runs the student on fixed samples. It uses the posterior's mean, so that pictures of different steps are comparable.

    Args:
      losses: provides the networks.
      mesh: the devices; each takes a share of the samples.
      base: frozen arrays, already on the devices.
      records: the samples.
    """

    def __init__(self, losses: Losses, mesh: Mesh, base: Base, records: Sequence[Record]):
        self.base, self.records = base, records
        self._batches = place_samples(records, mesh)
        self._restore = jit_restore(losses, mesh)

    def __call__(self, student: Student) -> tuple[dict[str, float], Image.Image]:
        """Returns the mean latent error and PSNR (RGB, dB) over the samples, and the comparison sheet."""
        count = len(self.records)
        restored = [self._restore(student, self.base, batch) for batch in self._batches]
        pictures, errors = (
            np.concatenate([np.asarray(part) for part in parts])[:count]
            for parts in zip(*restored, strict=True)
        )
        ratios, rows = [], []
        for picture, record in zip(pictures, self.records, strict=True):
            lr, hr = image_of(record.lr), image_of(record.hr)
            ratios.append(psnr(picture, hr))
            rows.append([Image.fromarray(image) for image in (lr, picture, hr)])
        values = {"validation_mse": float(errors.mean()), "validation_psnr": float(np.mean(ratios))}
        return values, comparison_sheet(rows, TITLES)


def jit_restore(losses: Losses, mesh: Mesh) -> Callable[[Student, Base, Record], tuple[jax.Array, jax.Array]]:
    """Jits `(student, base, batch) -> (pictures, errors)`: (B, H, W, 3) uint8, and the latents' mean squared errors (B,)."""

    def restore(student: Student, base: Base, record: Record) -> tuple[jax.Array, jax.Array]:
        batch = losses.batch(base, record, None)
        fake = losses.student_latent(base, student, batch, jnp.zeros_like(batch.latent_hr))
        errors = jnp.square(fake - batch.latent_hr).mean((1, 2, 3))
        decoded = losses.decode(base, fake)
        return jnp.round((decoded + 1) * 127.5).astype(jnp.uint8), errors

    return jax.jit(restore, out_shardings=replicated(mesh))
