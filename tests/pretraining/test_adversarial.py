"""The adversarial part of the autoencoder's training, and noise in its latents."""

from __future__ import annotations

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_checkpoint as tiny
from tsdsr_jax.data.record import Record
from tsdsr_jax.models.discriminator import (
    DISCRIMINATOR,
    PatchDiscriminator,
    balance,
    detail,
    generator_loss,
    hinge_loss,
)
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.pretraining.adversarial import AdversarialAutoencoder
from tsdsr_jax.pretraining.autoencoder import AutoencoderConfig, AutoencoderLoss, Frozen
from tsdsr_jax.training.batch import to_unit
from tsdsr_jax.training.step import NETWORK, Moment, objective_of

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = tiny.tiny_vae_config()
KEY = jax.random.key(5)
JUDGE = PatchDiscriminator(8, layers=2)


def moment(step: int, scale: float = 1.0) -> Moment:
    return Moment(jnp.float32(scale), jnp.int32(step))


@pytest.fixture(scope="module")
def record() -> Record:
    images = np.random.default_rng(2).integers(0, 256, (2, 32, 48, 3), np.uint8)
    return Record(images, images, None, None, None)


@pytest.fixture(scope="module")
def parts() -> dict:
    judge = JUDGE.init(jax.random.key(1), jnp.zeros((1, 8, 8, 3)))["params"]
    return {NETWORK: tiny.random_params(CONFIG, 3), DISCRIMINATOR: judge}


def loss_with(**weights: float) -> AutoencoderLoss:
    return AutoencoderLoss(AutoencoderKL(CONFIG), AutoencoderConfig(**weights))


def test_patches_are_judged_each_from_its_own_place(parts):
    """Sides are those of the image over 4; a pixel changes only the logits near it, but for the norms' statistics."""
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 96, 3)).astype(np.float32)
    other = images.copy()
    other[:, :8, :8] *= -1
    first, second = (JUDGE.apply({"params": parts[DISCRIMINATOR]}, image) for image in (images, other))
    apart = np.abs(first - second)[0, :, :, 0]
    assert first.shape == (1, 16, 24, 1) and first.dtype == jnp.float32
    assert apart[:3, :3].max() > 10 * apart[8:, 8:].max()


@pytest.mark.parametrize("size", [(40, 56), (8, 8)])
def test_a_discriminator_sees_the_three_finest_bands(size):
    """Those of the wavelet color correction on the host; with what the blurs leave over, they are the picture."""
    image = np.random.default_rng(0).uniform(-1, 1, (*size, 3)).astype(np.float32)
    found = np.asarray(detail(image[None]))[0]
    assert found.shape == (*size, 9)
    left = image
    for index, (spacing, gain) in enumerate(zip((1, 2, 4), (8, 4, 2), strict=True)):
        taps = np.zeros(2 * spacing + 1, np.float32)
        taps[[0, spacing, -1]] = 0.25, 0.5, 0.25
        blurred = cv2.sepFilter2D(left, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_REPLICATE)
        np.testing.assert_allclose(found[..., 3 * index : 3 * index + 3], gain * (left - blurred), atol=1e-5)
        left = blurred
    np.testing.assert_allclose(detail(image[None] + 0.5), found[None], atol=1e-5)


def test_hinge_losses():
    real, fake = jnp.asarray([2.0, 0.5]), jnp.asarray([-3.0, 0.25])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * ((0 + 0.5) / 2 + (0 + 1.25) / 2))
    assert float(generator_loss(fake)) == pytest.approx(1.375)


def test_the_balance_makes_both_gradients_equally_large():
    rest, adversarial = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[0.0, 0.1]])
    assert float(balance(rest, adversarial)) == pytest.approx(50)
    assert float(balance(rest, 0 * adversarial)) == 1e4


def test_before_its_start_it_changes_nothing(parts, record):
    loss = loss_with(kl=0.01)
    both = AdversarialAutoencoder(loss, JUDGE, weight=0.7, start=10)
    found, metrics = jax.jit(both)(parts, Frozen(), record, KEY, moment(9))
    alone, expected = jax.jit(objective_of(loss.of_batch))(parts, Frozen(), record, KEY, moment(9))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7),
        found[NETWORK], alone[NETWORK],
    )  # fmt: skip
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found[DISCRIMINATOR]))
    assert float(metrics["autoencoder"]) == pytest.approx(float(expected["autoencoder"]), rel=1e-6)
    assert float(metrics["adversarial_weight"]) == 0


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_those_of_both_losses(parts, record, scale):
    """Against one differentiation of the whole loss, with the balance as a constant."""
    loss = loss_with(kl=0.01, latent_noise=0.2)
    both = AdversarialAutoencoder(loss, JUDGE, weight=0.7, start=10)
    found, metrics = jax.jit(both)(parts, Frozen(), record, KEY, moment(10, scale))
    images = to_unit(record.hr)

    def total(network, judge):
        own, _ = loss(network, Frozen(), images, KEY)
        rebuilt = loss.rebuild(network, Frozen(), images, KEY).images
        return own + metrics["adversarial_weight"] * generator_loss(JUDGE.apply({"params": judge}, rebuilt))

    def judged(judge):
        rebuilt = loss.rebuild(parts[NETWORK], Frozen(), images, KEY).images
        return hinge_loss(*(JUDGE.apply({"params": judge}, batch) for batch in (images, rebuilt)))

    expected = {
        NETWORK: jax.jit(jax.grad(total))(parts[NETWORK], parts[DISCRIMINATOR]),
        DISCRIMINATOR: jax.jit(jax.grad(judged))(parts[DISCRIMINATOR]),
    }
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours / scale, theirs, rtol=1e-3, atol=1e-5 * largest),
        found, expected,
    )  # fmt: skip
    rebuilt = loss.rebuild(parts[NETWORK], Frozen(), images, KEY).images
    of_rest = jax.grad(lambda rebuilt: loss.distance(Frozen(), rebuilt, images)[0])(rebuilt)
    of_judge = jax.grad(
        lambda rebuilt: generator_loss(JUDGE.apply({"params": parts[DISCRIMINATOR]}, rebuilt))
    )(rebuilt)
    ratio = np.linalg.norm(of_rest.ravel()) / np.linalg.norm(of_judge.ravel())
    assert float(metrics["adversarial_weight"]) == pytest.approx(0.7 * ratio, rel=1e-3)


def test_noise_is_a_share_of_the_latents_deviation(monkeypatch, record):
    """Each sample has its own level, uniform up to the largest; without noise, nothing changes."""
    seen = []
    loss = loss_with(latent_noise=0.2)
    monkeypatch.setattr(
        AutoencoderLoss, "decode", lambda self, params, latents: seen.append(latents) or latents
    )
    images = np.random.default_rng(1).uniform(-1, 1, (64, 8, 8, 3)).astype(np.float32)
    params = tiny.random_params(CONFIG, 3)
    for case in (loss_with(), loss):
        case.rebuild(params, Frozen(), images, KEY)
    plain, noisy = map(np.asarray, seen)
    levels = np.sqrt(np.square(noisy - plain).mean((1, 2, 3))) / plain.std()
    assert levels.max() < 0.2 * 1.5 and 0.08 < levels.mean() < 0.12 and levels.std() > 0.03
