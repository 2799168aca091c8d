"""TSD-SR's losses for the student and the auxiliary network, as functions of their adapters.

All networks share one frozen base. The student (transformer and VAE-encoder LoRAs) turns a low-resolution photograph into ẑ
in one step. The teacher (the base, or the base with its own LoRA) and the auxiliary network (another LoRA, trained to follow
the student's distribution) show where ẑ should move.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.adversary import Adversary
from tsdsr_jax.distillation.tsd import (
    TSDConfig,
    Weighting,
    auxiliary_loss,
    sample_weights,
    tsd_gradient,
    tsd_loss,
)
from tsdsr_jax.models import flow
from tsdsr_jax.models.discriminator import DISCRIMINATOR
from tsdsr_jax.models.guidance import Predict, Text, guided
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.params import STUDENT_TIMESTEP, Tree
from tsdsr_jax.models.stacks import variables
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.training.batch import (
    Metrics,
    decode,
    decode_unclipped,
    latents_of,
    repeated,
    text_of,
    to_unit,
)
from tsdsr_jax.training.pixels import absolute_distance, gradient_distance
from tsdsr_jax.training.step import Moment, Parts

# The trained parts: the student's two adapters, and the auxiliary network's. An adversary's discriminator is a third.
STUDENT, AUXILIARY = "student", "auxiliary"
_HR_LATENTS = 2**31

# (parameters, result, target), both images (B, H, W, 3) in [−1, 1] -> (B,) distances.
Perceptual = Callable[[Tree, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Settings of the losses.

    Attributes:
      tsd: constants of Target Score Distillation.
      weight_tsd, weight_mse, weight_lpips: weights of the student's three losses in TSD-SR; 0 leaves a loss out.
      weight_pixel: weight of the decoded photograph's L1 distance and distance of gradients; TSD-SR has none.
      train_auxiliary: compute the auxiliary network's loss, which TSD needs. If False, its gradients are 0.
      guidance_scale: guidance of the teacher and the auxiliary network inside TSD.
      split_guidance: evaluate the empty and the real prompt one after the other, which halves the memory for guidance.
      bias_range: half-open range of the trajectory's random bias; None for no bias.
      weighting: sample weights of the auxiliary loss.
      logit_mean, logit_std, mode_scale: parameters of the weightings "logit_normal" and "mode".
      shift: shift of the noise schedule.
    """

    tsd: TSDConfig = dataclasses.field(default_factory=TSDConfig)
    weight_tsd: float = 1.0
    weight_mse: float = 1.0
    weight_lpips: float = 1.0
    weight_pixel: float = 0.0
    train_auxiliary: bool = True
    guidance_scale: float = 7.5
    split_guidance: bool = False
    bias_range: tuple[int, int] | None = (-25, 25)
    weighting: Weighting = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    shift: float = 3.0

    def __post_init__(self) -> None:
        if self.weight_tsd and not self.train_auxiliary:
            raise ValueError("TSD needs an auxiliary network that follows the student")


class Base(NamedTuple):
    """Everything that stays constant during training. It is an argument of the step, not a constant in its program.

    Attributes:
      transformer, vae: parameters of SD3's two networks.
      teacher: the teacher's adapter; {} if SD3 itself is the teacher, or with `merged`.
      null: text of the empty prompt, (1, S, D) and (1, P).
      default: text for the student; None: each image's own text.
      perceptual: parameters of the perceptual distance; {} without one.
      merged: the transformer with the teacher's adapter merged in; {} if it stays beside the weights.
    """

    transformer: Tree
    vae: Tree
    teacher: Tree
    null: Text
    default: Text | None = None
    perceptual: Tree = {}  # noqa: RUF012 (a NamedTuple's default, which nobody changes)
    merged: Tree = {}  # noqa: RUF012


class Student(NamedTuple):
    """The student's trainable adapters, float32."""

    transformer: Tree
    vae: Tree


class Batch(NamedTuple):
    """B training samples in the form that the losses take.

    Attributes:
      lr, hr: (B, H, W, 3) in [−1, 1]; lr is interpolated to hr's size.
      latent_hr: (B, h, w, C), times the scaling factor.
      text: the images' prompts.
      student_text: the student's prompts: the same, or the default prompt.
    """

    lr: jax.Array
    hr: jax.Array
    latent_hr: jax.Array
    text: Text
    student_text: Text


class Made(NamedTuple):
    """What the student makes of a batch.

    Attributes:
      latent: ẑ, (B, h, w, C) float32, times the scaling factor.
      image: ẑ decoded, (B, H, W, 3), not clipped to [−1, 1]; None if no loss needs it.
    """

    latent: jax.Array
    image: jax.Array | None


class Draws(NamedTuple):
    """Every random number of a step.

    Attributes:
      posterior, noise, auxiliary_noise: (B, h, w, C) standard normal: the encoder's sample, ε of TSD, and ε of the
        auxiliary loss.
      index, auxiliary_index: (B,) schedule indices.
      bias: (B,) schedule steps added to the trajectory.
      normal, uniform: (B,) draws for the auxiliary loss's weights.
    """

    posterior: jax.Array
    noise: jax.Array
    auxiliary_noise: jax.Array
    index: jax.Array  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    auxiliary_index: jax.Array
    bias: jax.Array
    normal: jax.Array
    uniform: jax.Array

    @classmethod
    def from_key(cls, key: jax.Array, latent_shape: tuple[int, ...], config: LossConfig) -> Draws:
        """Draws all random numbers for latents (B, h, w, C), separately for each sample."""
        keys = jax.random.split(key, len(cls._fields))
        batch = latent_shape[:1]
        indices = partial(
            jax.random.randint, shape=batch, minval=config.tsd.first_index, maxval=config.tsd.last_index + 1
        )
        return cls(
            posterior=jax.random.normal(keys[0], latent_shape),
            noise=jax.random.normal(keys[1], latent_shape),
            auxiliary_noise=jax.random.normal(keys[2], latent_shape),
            index=indices(keys[3]),
            auxiliary_index=indices(keys[4]),
            bias=jax.random.randint(keys[5], batch, *(config.bias_range or (0, 1))),
            normal=jax.random.normal(keys[6], batch),
            uniform=jax.random.uniform(keys[7], batch),
        )


@dataclasses.dataclass(frozen=True)
class Losses:
    """The losses as functions of adapters. Holds the modules but no parameters.

    Attributes:
      mmdit, vae: SD3's networks, in the computation dtype.
      config: see `LossConfig`.
      perceptual: LPIPS; None if its weight is 0.
      adversary: the adversarial loss; None without.
    """

    mmdit: MMDiT
    vae: AutoencoderKL
    config: LossConfig
    perceptual: Perceptual | None = None
    adversary: Adversary | None = None

    def __call__(
        self, parts: Parts, base: Base, record: Record, key: jax.Array, moment: Moment
    ) -> tuple[Parts, Metrics]:
        """Computes the gradients of all parts' scaled losses, and the losses: the objective of a `Trainer`.

        All losses use the parts from before the step, as in the original, so they can be computed together.

        Args:
          parts: "student": a `Student`; "auxiliary": its adapter; "discriminator": the adversary's parameters, if any.
          base: frozen arrays.
          record: a batch; photographs without latents are encoded here.
          key: key of every random number in the step.
          moment: provides the loss scale, for float16.
        """
        # `Draws` splits the same key; folding in a large number gives a key that is none of its parts.
        batch = self.batch(base, record, jax.random.fold_in(key, _HR_LATENTS))
        draws = Draws.from_key(key, batch.latent_hr.shape, self.config)

        def scaled_student(student: Student) -> tuple[jax.Array, tuple[Made, Metrics]]:
            loss, (made, metrics) = self.student(student, base, parts[AUXILIARY], batch, draws)
            if self.adversary and made.image is not None:
                adversarial, terms = self.adversary.student(parts[DISCRIMINATOR], made.image, moment.step)
                loss, metrics = loss + adversarial, metrics | terms
            return loss * moment.scale, (made, metrics)

        def scaled_auxiliary(auxiliary: Tree, fake: jax.Array) -> jax.Array:
            return self.auxiliary(auxiliary, base, fake, batch, draws) * moment.scale

        (total, (made, metrics)), student = jax.value_and_grad(scaled_student, has_aux=True)(parts[STUDENT])
        metrics = metrics | {"student": total / moment.scale}
        gradients = {STUDENT: student, AUXILIARY: jax.tree.map(jnp.zeros_like, parts[AUXILIARY])}
        if self.config.train_auxiliary:
            value, gradients[AUXILIARY] = jax.value_and_grad(scaled_auxiliary)(parts[AUXILIARY], made.latent)
            metrics["auxiliary"] = value / moment.scale
        if self.adversary and made.image is not None:
            gradients[DISCRIMINATOR], judged = self.adversary.gradient(
                parts[DISCRIMINATOR],
                decode_unclipped(self.vae, base.vae, batch.latent_hr),
                made.image,
                moment.scale,
            )
            metrics |= judged
        return gradients, metrics

    def schedule(self) -> jax.Array:
        return jnp.asarray(flow.sigmas(self.config.shift))

    def velocity(
        self, base: Base, adapter: Tree, latents: jax.Array, timestep: jax.Array, text: Text
    ) -> jax.Array:
        """Evaluates the transformer with an adapter; returns float32."""
        velocity: Any = self.mmdit.apply(
            variables(self.mmdit, base.transformer, adapter), latents, timestep, *text
        )
        return velocity.astype(jnp.float32)

    def batch(self, base: Base, record: Record, key: jax.Array | None) -> Batch:
        """Converts a batch to the form that the losses take.

        Photographs without latents are encoded: with a key, to a sample from each posterior, as in prepared sets; without
        one, to its mean.
        """
        text = text_of(record, base.default)
        student_text = text if base.default is None else repeated(base.default, text.states.shape[0])
        images = to_unit(record.lr), to_unit(record.hr)
        # The barrier keeps XLA from fusing this with what follows, so that a batch is rounded alike with and without
        # gradient accumulation.
        (lr, hr), text, student_text = jax.lax.optimization_barrier((images, text, student_text))
        latent_hr = latents_of(self.vae, base.vae, record, key)
        return Batch(lr, hr, latent_hr, text, student_text)

    def student_latent(self, base: Base, student: Student, batch: Batch, posterior: jax.Array) -> jax.Array:
        """Computes ẑ = z − v(z, t = 1000): (B, h, w, C) float32, times the scaling factor."""
        moments: Any = self.vae.apply({"params": base.vae, "lora": student.vae}, batch.lr, method="encode")
        latent = moments.sample(posterior) * self.vae.config.scaling_factor
        timestep = jnp.full(latent.shape[:1], STUDENT_TIMESTEP)
        return latent - self.velocity(base, student.transformer, latent, timestep, batch.student_text)

    def student(
        self, student: Student, base: Base, auxiliary: Tree, batch: Batch, draws: Draws
    ) -> tuple[jax.Array, tuple[Made, Metrics]]:
        """Computes the student's loss without the adversarial part, what it makes, and the terms of the loss."""
        config = self.config
        fake = self.student_latent(base, student, batch, draws.posterior)
        metrics: Metrics = {}
        if config.weight_tsd:
            gradient, replaced = self.tsd_gradient(fake, base, auxiliary, batch, draws)
            metrics["tsd"] = tsd_loss(fake, gradient)
            metrics["tsd_gradient_norm"] = jnp.sqrt(jnp.mean(jnp.square(gradient)))
            metrics["tsd_not_finite"] = replaced.astype(jnp.float32)
        metrics["mse"] = jnp.mean(jnp.square(fake - batch.latent_hr))
        needed = config.weight_lpips or config.weight_pixel or self.adversary
        image = decode_unclipped(self.vae, base.vae, fake) if needed else None
        if config.weight_lpips and image is not None:
            metrics["lpips"] = self.lpips(base, image, batch)
        if config.weight_pixel and image is not None:
            # Not clipped, for the reason that `Adversary` gives.
            metrics["pixel"] = absolute_distance(image, batch.hr) + gradient_distance(image, batch.hr)
        loss = config.weight_mse * metrics["mse"]
        loss += config.weight_tsd * metrics["tsd"] if config.weight_tsd else 0.0
        loss += config.weight_lpips * metrics["lpips"] if config.weight_lpips else 0.0
        loss += config.weight_pixel * metrics["pixel"] if config.weight_pixel else 0.0
        return loss, (Made(fake, image), metrics)

    def tsd_gradient(
        self, fake: jax.Array, base: Base, auxiliary: Tree, batch: Batch, draws: Draws
    ) -> tuple[jax.Array, jax.Array]:
        """Computes the gradient g of the TSD loss, and how many of its terms were replaced."""

        teaching = base._replace(transformer=base.merged) if base.merged else base

        def predict(base: Base, adapter: Tree) -> Predict:
            network = partial(self.velocity, base, adapter)
            return guided(
                network, batch.text, base.null, self.config.guidance_scale, self.config.split_guidance
            )

        return tsd_gradient(
            fake,
            batch.latent_hr,
            draws.noise,
            draws.index,
            draws.bias,
            predict(teaching, base.teacher),
            predict(base, auxiliary),
            self.schedule(),
            self.config.tsd,
        )

    def lpips(self, base: Base, image: jax.Array, batch: Batch) -> jax.Array:
        """Computes LPIPS between the decoded, clamped ẑ and the photograph, averaged over the batch."""
        assert self.perceptual is not None, "weight_lpips needs the network"
        return self.perceptual(base.perceptual, jnp.clip(image, -1, 1), batch.hr).mean()

    def decode(self, base: Base, latents: jax.Array) -> jax.Array:
        return decode(self.vae, base.vae, latents)

    def auxiliary(
        self, auxiliary: Tree, base: Base, fake: jax.Array, batch: Batch, draws: Draws
    ) -> jax.Array:
        """Computes the auxiliary network's denoising loss on ẑ, with the images' prompts and without guidance."""
        config = self.config
        sigma = self.schedule()[draws.auxiliary_index]
        weight = sample_weights(
            config.weighting,
            sigma,
            draws.normal,
            draws.uniform,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
        )

        def predict(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            return self.velocity(base, auxiliary, latents, timestep, batch.text)

        return auxiliary_loss(fake, draws.auxiliary_noise, sigma, weight, predict)
