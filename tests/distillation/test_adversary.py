"""The adversarial loss of the student, and the discriminator's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_checkpoint as tiny
from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.adversary import Adversary
from tsdsr_jax.distillation.losses import AUXILIARY, STUDENT, Base, LossConfig, Losses, Student
from tsdsr_jax.models import lora
from tsdsr_jax.models.discriminator import (
    DISCRIMINATOR,
    PatchDiscriminator,
    generator_loss,
    hinge_loss,
    new_discriminator_params,
)
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.training.batch import decode_unclipped, to_unit
from tsdsr_jax.training.step import Moment

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIGS = tiny.tiny_mmdit_config(), tiny.tiny_vae_config()
KEY = jax.random.key(5)
JUDGE = PatchDiscriminator(8)


def moment(step: int, scale: float = 1.0) -> Moment:
    return Moment(jnp.float32(scale), jnp.int32(step))


@pytest.fixture(scope="module")
def record() -> Record:
    generator = np.random.default_rng(2)
    lr, hr = generator.integers(0, 256, (2, 2, 32, 48, 3), np.uint8)
    return Record(lr, hr, generator.standard_normal((2, 4, 6, 16), np.float32), None, None)


@pytest.fixture(scope="module")
def base() -> Base:
    prompts = [tiny.random_prompt(CONFIGS[0], seed) for seed in (3, 4)]
    text = [Text(prompt.prompt[None], prompt.pooled[None]) for prompt in prompts]
    return Base(tiny.random_params(CONFIGS[0], 1), tiny.random_params(CONFIGS[1], 2), {}, *text)


@pytest.fixture(scope="module")
def parts(base: Base) -> dict:
    student = Student(
        tiny.random_lora(base.transformer, lora.STUDENT_TARGETS, 2, 8),
        tiny.random_lora(base.vae, lora.VAE_ENCODER_TARGETS, 2, 9),
    )
    auxiliary = tiny.random_lora(base.transformer, lora.AUXILIARY_TARGETS, 2, 10)
    judge = new_discriminator_params(JUDGE, jax.random.key(1))
    return {STUDENT: student, AUXILIARY: auxiliary, DISCRIMINATOR: judge}


WITHOUT_TSD = LossConfig(weight_tsd=0, weight_lpips=0)


def losses_with(adversary: Adversary | None) -> Losses:
    return Losses(MMDiT(CONFIGS[0]), AutoencoderKL(CONFIGS[1]), LossConfig(weight_lpips=0), None, adversary)


def close(ours, theirs, scale: float = 1.0) -> None:
    """Within 1e-4 of each tensor's largest value: the two programs add up in another order."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a / scale, b, rtol=1e-3, atol=1e-4 * max(float(np.abs(b).max()), 1e-6)
        ),
        ours, theirs,
    )  # fmt: skip


def test_gradients_are_those_of_the_whole_losses(parts, base, record):
    """Against one differentiation of each loss; the student is moved from the third step on, the discriminator always."""
    losses = losses_with(Adversary(JUDGE, weight=0.3, start=3))
    objective = jax.jit(losses)
    alone, without = jax.jit(losses_with(None))(parts, base, record, KEY, moment(0))
    batch = losses.batch(base, record, None)
    posterior = jax.random.normal(jax.random.split(KEY, 8)[0], record.latent_hr.shape)

    def logits(judge, images):
        return JUDGE.apply({"params": judge}, images)

    def fooled(student, judge):
        latent = losses.student_latent(base, student, batch, posterior)
        image = decode_unclipped(losses.vae, base.vae, latent)
        return generator_loss(logits(judge, image)), image

    def judged(judge, image):
        real = decode_unclipped(losses.vae, base.vae, record.latent_hr)
        return hinge_loss(logits(judge, real), logits(judge, image))

    (value, image), slope = jax.jit(jax.value_and_grad(fooled, has_aux=True))(
        parts[STUDENT], parts[DISCRIMINATOR]
    )
    loss, of_judge = jax.jit(jax.value_and_grad(judged))(parts[DISCRIMINATOR], image)
    for step, scale, weight in ((2, 1.0, 0.0), (3, 1024.0, 0.3)):
        found, metrics = objective(parts, base, record, KEY, moment(step, scale))
        expected = jax.tree.map(lambda own, other, weight=weight: own + weight * other, alone[STUDENT], slope)
        close(found[STUDENT], expected, scale)
        close(found[AUXILIARY], alone[AUXILIARY], scale)
        close(found[DISCRIMINATOR], of_judge, scale)
        total = float(without["student"]) + weight * float(value)
        for name, wanted in {
            "adversarial": value, "discriminator": loss, "student": total, "mse": without["mse"]
        }.items():  # fmt: skip
            assert float(metrics[name]) == pytest.approx(float(wanted), rel=1e-4), name


def test_only_detail_tells_photographs_apart(parts, base, record):
    """A cast over the whole picture reaches neither the discriminator nor the student."""
    image = to_unit(record.hr)
    adversary = Adversary(JUDGE, weight=1.0)
    plain, cast = (
        adversary.student(parts[DISCRIMINATOR], picture, jnp.int32(0))[0] for picture in (image, image + 0.3)
    )
    assert float(cast) == pytest.approx(float(plain), rel=1e-4)


def test_the_auxiliary_network_can_be_left_out(parts, base, record):
    """The other gradients are the same, and it gets none."""
    whole = dataclasses.replace(losses_with(Adversary(JUDGE, weight=0.3)), config=WITHOUT_TSD)
    less = dataclasses.replace(whole, config=dataclasses.replace(WITHOUT_TSD, train_auxiliary=False))
    (expected, wanted), (found, metrics) = (
        jax.jit(losses)(parts, base, record, KEY, moment(0)) for losses in (whole, less)
    )
    assert any(leaf.any() for leaf in jax.tree.leaves(expected.pop(AUXILIARY)))
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.pop(AUXILIARY)))
    close(found, expected)
    assert metrics.keys() == wanted.keys() - {"auxiliary"}
    with pytest.raises(ValueError, match="TSD needs"):
        dataclasses.replace(less.config, weight_tsd=1.0)
