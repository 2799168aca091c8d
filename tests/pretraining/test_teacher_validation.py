"""The teacher's validation: pictures generated from noise, and the loss at fixed noise levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_checkpoint as tiny
from tsdsr_jax.data.record import Record
from tsdsr_jax.models import flow
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.pretraining.teacher import FlowBase, FlowConfig, FlowLoss
from tsdsr_jax.pretraining.teacher_validation import INDICES, TeacherValidation, sample
from tsdsr_jax.training.sharding import make_mesh

SHIFT = 3.0


class Toward:
    """A fake network whose velocities point to one clean latent, and to another one for the empty prompt."""

    config = FlowConfig(SHIFT)

    def velocity(self, trained, base, latents, timestep, text):
        sigma = flow.per_sample(timestep / 1000, latents)
        goal = flow.per_sample(text.pooled[:, 0], latents)
        return (latents - goal) / sigma


def text(value: float, batch: int) -> Text:
    return Text(jnp.zeros((batch, 5, 12)), jnp.full((batch, 10), value))


@pytest.mark.parametrize("steps", [1, 3, 28])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_sampling_ends_where_the_guided_velocities_point(steps, guidance):
    """v = (x − goal)/σ leads straight to the goal, so Euler steps reach it exactly: null + guidance·(prompt − null)."""
    noise = jax.random.normal(jax.random.key(0), (2, 4, 6, 16))
    base = FlowBase({}, {}, text(-0.5, 1))
    made = sample(Toward(), {}, base, noise, text(1.0, 2), steps, guidance)
    np.testing.assert_allclose(made, np.full(noise.shape, -0.5 + guidance * 1.5), atol=1e-4)


@pytest.mark.parametrize("prepared", [True, False])
def test_the_loss_is_flow_matching_at_the_fixed_levels(prepared):
    configs = tiny.tiny_mmdit_config(), tiny.tiny_vae_config()
    params, vae = tiny.random_params(configs[0], 1), tiny.random_params(configs[1], 2)
    loss = FlowLoss(MMDiT(configs[0]), AutoencoderKL(configs[1]), FlowConfig(SHIFT))
    null, default = (tiny.random_prompt(configs[0], seed) for seed in (5, 6))
    texts = [Text(prompt.prompt[None], prompt.pooled[None]) for prompt in (null, default)]
    base = FlowBase(params, vae, *texts)
    image = tiny.synthetic_photo(32, 48, 0)
    encoded = loss.vae.apply({"params": vae}, image[None].astype(np.float32) / 127.5 - 1, method="encode")
    # A prepared set's latents are used as they are; otherwise the posterior's mean is used.
    clean = np.asarray(encoded.mean) * configs[1].scaling_factor + (0.1 if prepared else 0.0)
    record = Record(None, image, clean[0] if prepared else None, None, None)
    validation = TeacherValidation(loss, make_mesh(jax.devices()[:1]), base, [record], steps=2, guidance=2.0)
    values, picture = validation({})

    noise = jax.random.normal(jax.random.key(0), clean.shape)
    expected = []
    for index in INDICES:
        sigma = jnp.full(1, flow.sigmas(SHIFT)[index])
        noisy = (1 - sigma[0]) * clean + sigma[0] * noise
        velocity = loss.mmdit.apply({"params": params}, noisy, 1000 * sigma, *texts[1])
        expected.append(np.square(velocity - (noise - clean)).mean())
    assert values["validation_flow"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert picture.height > 26 and picture.width > 4 * 300
