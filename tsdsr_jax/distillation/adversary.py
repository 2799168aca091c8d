"""The adversarial loss of the student: its photographs, decoded, against real ones.

TSD-SR has none. Later one-step methods added one to a diffusion model's knowledge: TAD-SR (He et al. 2024), AdcSR (Chen et
al. 2025), HYPIR (Lin et al. 2025). Theirs judge latents, or features of a large network; this one judges patches of pixels
through the frozen decoder (Isola et al. 2017, §3.2.2), so it needs no further weights, and what the decoder makes of wrong
latents costs too. Real photographs are encoded and decoded first, so that the decoder's own marks, which the student cannot
avoid, tell nothing. Hinge losses, as in Lim and Ye 2017.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tsdsr_jax.models.discriminator import PatchDiscriminator, generator_loss, hinge_loss
from tsdsr_jax.models.params import Tree
from tsdsr_jax.training.batch import Metrics


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator of photographs. All images are (B, H, W, 3), photographs in [−1, 1].

    It judges detail alone, so the color correction with which upscaling ends, which changes nothing else, is left out. The
    student's images are not clipped: where they were, too much contrast would cost nothing and have no gradient.

    Attributes:
      discriminator: the network, high where a patch looks real.
      weight: of the adversarial loss in the student's.
      start: number of steps in which the discriminator learns while the student is not yet moved by it.
    """

    discriminator: PatchDiscriminator
    weight: float
    start: int = 0

    def student(self, params: Tree, image: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
        """Computes the student's weighted adversarial loss at a step, and the loss to log."""
        loss = generator_loss(self._logits(params, image))
        weight = jnp.where(step >= self.start, self.weight, 0)
        return weight * loss, {"adversarial": loss}

    def gradient(
        self, params: Tree, real: jax.Array, image: jax.Array, scale: jax.Array
    ) -> tuple[Tree, Metrics]:
        """Computes the gradient of the discriminator's loss, times the loss scale, and the values to log."""
        image = jax.lax.stop_gradient(image)

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
