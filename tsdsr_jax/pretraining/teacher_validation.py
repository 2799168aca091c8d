"""Validates a flow-matching network on a few fixed samples: its loss at fixed noise levels, and pictures to look at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from tsdsr_jax.data.record import Record
from tsdsr_jax.images.sheet import comparison_sheet
from tsdsr_jax.models import flow
from tsdsr_jax.models.guidance import Text, guided
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.pretraining.teacher import FlowBase, FlowLoss
from tsdsr_jax.training.batch import decode, latents_of, text_of
from tsdsr_jax.training.sharding import replicated
from tsdsr_jax.training.validation import image_of, place_samples

# Schedule indices at which the loss is measured, with σ = 0.96, 0.86, 0.67 and 0.33, and the position of the one that is
# shown.
INDICES = (100, 330, 600, 860)
SHOWN = 2
TITLES = ("photograph", "with noise", "one step", "from noise")


def sample(
    loss: FlowLoss, trained: Tree, base: FlowBase, noise: jax.Array, text: Text, steps: int, guidance: float
) -> jax.Array:
    """Generates latents (B, h, w, C) from noise, by guided Euler steps along the schedule.

    Args:
      noise: (B, h, w, C) standard normal.
      text: (B, S, D) and (B, P).
      steps: number of Euler steps.
      guidance: scale of classifier-free guidance.
    """
    sigma = jnp.append(
        jnp.asarray(flow.sigmas(loss.config.shift))[np.arange(steps) * flow.STEPS // steps], 0.0
    )
    batch = noise.shape[0]
    predict = guided(partial(loss.velocity, trained, base), text, base.null, guidance)

    def step(index: jax.Array, latents: jax.Array) -> jax.Array:
        here, following = (jnp.broadcast_to(sigma[at], (batch,)) for at in (index, index + 1))
        return flow.euler_step(latents, predict(latents, flow.timesteps(here)), here, following)

    return jax.lax.fori_loop(0, steps, step, noise)


class TeacherValidation:
    """Measures the loss and draws pictures, with the same noise every time.

    Args:
      loss: provides the networks.
      mesh: the devices; each takes a share of the samples.
      base: frozen arrays, already on the devices.
      records: samples with `hr`.
      steps, guidance: settings for the pictures that are generated from noise.
    """

    def __init__(
        self,
        loss: FlowLoss,
        mesh: Mesh,
        base: FlowBase,
        records: Sequence[Record],
        steps: int,
        guidance: float,
    ):
        self.base, self.records = base, records
        self._batches = place_samples(records, mesh)

        def look(
            trained: Tree, base: FlowBase, record: Record, key: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            clean = latents_of(loss.vae, base.vae, record, None)
            text = text_of(record, base.default)
            noise = jax.random.normal(key, clean.shape)

            def at(sigma: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                sigma = jnp.broadcast_to(sigma, clean.shape[:1])
                noisy = flow.add_noise(clean, noise, sigma)
                velocity = loss.velocity(trained, base, noisy, flow.timesteps(sigma), text)
                errors = jnp.square(velocity - (noise - clean)).mean((1, 2, 3))
                return errors, noisy, flow.to_clean(noisy, velocity, sigma)

            # One level after the other, so that networks are compiled once and only one level's activations are in memory.
            levels = jnp.asarray(flow.sigmas(loss.config.shift))[np.array(INDICES)]
            errors, noisy, estimate = jax.lax.map(at, levels)
            made = sample(loss, trained, base, noise, text, steps, guidance)
            latents = jnp.stack([noisy[SHOWN], estimate[SHOWN], made])
            return errors.mean(0), jax.lax.map(partial(_picture, loss.vae, base.vae), latents)

        self._look = jax.jit(look, out_shardings=replicated(mesh))

    def __call__(self, trained: Tree) -> tuple[dict[str, float], Image.Image]:
        """Returns the mean loss over samples and noise levels, and the comparison sheet."""
        count = len(self.records)
        # The key depends on the batch's number only, so runs with different seeds see the same noise.
        looks = [
            self._look(trained, self.base, batch, jax.random.key(number))
            for number, batch in enumerate(self._batches)
        ]
        losses = np.concatenate([np.asarray(errors) for errors, _ in looks])[:count]
        pictures = [
            np.concatenate([np.asarray(made[column]) for _, made in looks])[:count] for column in range(3)
        ]
        rows = [
            [
                Image.fromarray(image)
                for image in (image_of(record.hr), *(column[index] for column in pictures))
            ]
            for index, record in enumerate(self.records)
        ]
        return {"validation_flow": float(losses.mean())}, comparison_sheet(rows, TITLES)


def _picture(vae: AutoencoderKL, params: Tree, latents: jax.Array) -> jax.Array:
    """Decodes latents to images (B, H, W, 3) uint8."""
    return jnp.round((decode(vae, params, latents) + 1) * 127.5).astype(jnp.uint8)
