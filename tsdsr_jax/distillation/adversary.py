"""The adversarial loss of the student: its photographs, decoded and corrected in color, against real ones.

TSD-SR has none. Later one-step methods added one to a diffusion model's knowledge: TAD-SR (He et al. 2024), AdcSR (Chen et
al. 2025), HYPIR (Lin et al. 2025). Theirs judge latents, or features of a large network; this one judges patches of pixels
through the frozen decoder (Isola et al. 2017, §3.2.2), so it needs no further weights, and the decoder's artefacts cost
too. Hinge losses, as in Lim and Ye 2017.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tsdsr_jax.images.color import BLUR_DILATIONS
from tsdsr_jax.models.discriminator import PatchDiscriminator, generator_loss, hinge_loss
from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.batch import Metrics


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator of photographs. All images are (B, H, W, 3) in [−1, 1].

    It sees photographs with the low frequencies of their low-quality versions, the student's and the real ones alike.
    Upscaling ends with the same correction, so the student is judged for what will be seen, and only detail can tell the
    two apart.

    Attributes:
      discriminator: the network, high where a patch looks real.
      weight: of the adversarial loss in the student's.
      start: number of steps in which the discriminator learns while the student is not yet moved by it.
    """

    discriminator: PatchDiscriminator
    weight: float
    start: int = 0

    def student(
        self, params: Tree, image: jax.Array, lr: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Computes the student's weighted adversarial loss at a step, and the loss to log."""
        loss = generator_loss(self._logits(params, with_colors_of(lr, image)))
        weight = jnp.where(step >= self.start, self.weight, 0)
        return weight * loss, {"adversarial": loss}

    def gradient(
        self, params: Tree, real: jax.Array, image: jax.Array, lr: jax.Array, scale: jax.Array
    ) -> tuple[Tree, Metrics]:
        """Computes the gradient of the discriminator's loss, times the loss scale, and the values to log."""
        real, image = with_colors_of(lr, real), with_colors_of(lr, jax.lax.stop_gradient(image))

        def judges(params: Tree) -> tuple[jax.Array, Metrics]:
            logits = self._logits(params, real), self._logits(params, image)
            value = hinge_loss(*logits)
            metrics = {
                "discriminator": value,
                "logits_real": logits[0].mean(),
                "logits_student": logits[1].mean(),
            }
            return value * scale, metrics

        return jax.grad(judges, has_aux=True)(params)

    def _logits(self, params: Tree, images: jax.Array) -> jax.Array:
        logits: Any = self.discriminator.apply({"params": params}, images)
        return logits


def with_colors_of(lr: jax.Array, images: jax.Array) -> jax.Array:
    """Replaces the low frequencies of images by those of their low-quality versions, both (B, H, W, 3).

    This is `images.color.wavelet` on the devices, with gradients.
    """
    return images - _low_frequencies(images - lr)


def _low_frequencies(images: jax.Array) -> jax.Array:
    """Blurs with [1, 2, 1] / 4 along both axes, at each spacing, with repeated edges."""
    for spacing in BLUR_DILATIONS:
        for axis in (1, 2):
            images = _blur(images, spacing, axis)
    return images


def _blur(images: jax.Array, spacing: int, axis: int) -> jax.Array:
    side = images.shape[axis]
    padding = [(spacing, spacing) if index == axis else (0, 0) for index in range(images.ndim)]
    padded = jnp.pad(images, padding, mode="edge")
    before, here, after = (
        jax.lax.slice_in_dim(padded, start, start + side, axis=axis) for start in (0, spacing, 2 * spacing)
    )
    return before / 4 + here / 2 + after / 4
