"""Trains an autoencoder against a discriminator, as VQGAN and the autoencoder of Stable Diffusion were trained."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsdsr_jax.data.record import Record
from tsdsr_jax.models.discriminator import (
    DISCRIMINATOR,
    PatchDiscriminator,
    balance,
    generator_loss,
    hinge_loss,
)
from tsdsr_jax.models.params import Tree
from tsdsr_jax.pretraining.autoencoder import AutoencoderLoss, Frozen, divergence
from tsdsr_jax.training.batch import Metrics, to_unit
from tsdsr_jax.training.step import NETWORK, Moment, Parts


class _Judged(NamedTuple):
    """The adversarial gradient at the images, the discriminator's gradient, and the values to log."""

    image: jax.Array
    discriminator: Tree
    metrics: Metrics


@dataclasses.dataclass(frozen=True)
class AdversarialAutoencoder:
    """The objective of an autoencoder and its discriminator, which are updated in the same step.

    The autoencoder minimizes its own loss and w·balance·(−D(x̂)), the discriminator the hinge loss. Before `start`, both
    gradients of the adversarial part are zero.

    Attributes:
      loss: the autoencoder's own loss.
      discriminator: D.
      weight: w.
      start: first step of the adversarial part.

    Source: Esser et al. 2021, §3.1; Rombach et al. 2022, §G. The factor of balance is taken at the images; see `balance`.
    """

    loss: AutoencoderLoss
    discriminator: PatchDiscriminator
    weight: float
    start: int

    def __call__(
        self, parts: Parts, frozen: Frozen, record: Record, key: jax.Array, moment: Moment
    ) -> tuple[Parts, Metrics]:
        """Computes the gradients of the scaled losses, and the losses: the objective of a `Trainer`."""
        images = to_unit(record.hr)
        config = self.loss.config

        def rebuild(params: Tree) -> tuple[tuple[jax.Array, jax.Array], None]:
            rebuilt = self.loss.rebuild(params, frozen, images, key)
            return (rebuilt.images, divergence(rebuilt.posterior)), None

        (rebuilt, kl), backward, _ = jax.vjp(rebuild, parts[NETWORK], has_aux=True)
        (distance, metrics), of_distance = jax.value_and_grad(
            lambda rebuilt: self.loss.distance(frozen, rebuilt, images), has_aux=True
        )(rebuilt)
        started = moment.step >= self.start
        judged = jax.lax.cond(started, self._judge, self._nothing, parts[DISCRIMINATOR], rebuilt, images)
        weight = jnp.where(started, self.weight * balance(of_distance, judged.image), 0)
        at_image = of_distance + weight * judged.image
        (network,) = backward((at_image * moment.scale, jnp.float32(config.kl) * moment.scale))
        discriminator = jax.tree.map(lambda leaf: leaf * moment.scale, judged.discriminator)
        total = distance + config.kl * kl
        metrics |= {"kl": kl, "autoencoder": total, "adversarial_weight": weight} | judged.metrics
        return {NETWORK: network, DISCRIMINATOR: discriminator}, metrics

    def _judge(self, params: Tree, rebuilt: jax.Array, images: jax.Array) -> _Judged:
        def fooled(rebuilt: jax.Array) -> jax.Array:
            return generator_loss(self._logits(params, rebuilt))

        def judges(params: Tree) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            real, fake = self._logits(params, images), self._logits(params, rebuilt)
            return hinge_loss(real, fake), (real.mean(), fake.mean())

        adversarial, image = jax.value_and_grad(fooled)(rebuilt)
        (value, (real, fake)), gradient = jax.value_and_grad(judges, has_aux=True)(params)
        metrics = {
            "adversarial": adversarial,
            DISCRIMINATOR: value,
            "logits_real": real,
            "logits_rebuilt": fake,
        }
        return _Judged(image, gradient, metrics)

    def _nothing(self, params: Tree, rebuilt: jax.Array, images: jax.Array) -> _Judged:
        shapes = jax.eval_shape(self._judge, params, rebuilt, images)
        nothing: _Judged = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return nothing

    def _logits(self, params: Tree, images: jax.Array) -> jax.Array:
        logits: Any = self.discriminator.apply({"params": params}, images)
        return logits
