"""A training step's losses and all adapter gradients against stored answers of PyTorch + PEFT
(make_golden_losses.py writes them); needs no torch."""

import jax
import jax.numpy as jnp
import numpy as np

import make_golden_losses as golden
from parity import random_params
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.objective import Base, Batch, Draws, Losses, Student
from tsdsr_jax.torch_weights import write_lora
from tsdsr_jax.tsd import Text


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def test_losses_and_gradients():
    with np.load(golden.FILE) as file:
        answers = dict(file)
    data = golden.problem()
    losses = Losses(
        MMDiT(golden.TRANSFORMER, remat=True), AutoencoderKL(golden.VAE, remat=True), golden.CONFIG
    )
    null = Text(data["null_states"], data["null_pooled"])
    base = Base(random_params(golden.TRANSFORMER), random_params(golden.VAE), golden.adapter("teacher"), null)
    batch = Batch(
        nhwc(data["lr"]), nhwc(data["hr"]), nhwc(data["latent_hr"]), Text(data["states"], data["pooled"]),
        Text(data["student_states"], data["student_pooled"]),
    )  # fmt: skip
    draws = Draws(**{
        name: nhwc(data[name]) if data[name].ndim == 4 else jnp.asarray(data[name]) for name in Draws._fields
    })  # fmt: skip

    @jax.jit
    def step(student, auxiliary):
        (_, (fake, metrics)), gradients = jax.value_and_grad(losses.student, has_aux=True)(
            student, base, auxiliary, batch, draws
        )
        value, slope = jax.value_and_grad(losses.auxiliary)(auxiliary, base, fake, batch, draws)
        return fake, metrics | {"auxiliary": value}, gradients, slope

    student = Student(golden.adapter("student"), golden.adapter("vae"))
    fake, metrics, gradients, slope = step(student, golden.adapter("auxiliary"))
    assert np.abs(fake - answers.pop("fake")).max() <= 1e-5 * np.abs(fake).max()
    found = {f"loss {name}": float(metrics[name]) for name in ("tsd", "mse", "auxiliary")}
    for name, value in found.items():
        assert abs(value - answers.pop(name)) <= 1e-4 * value, name
    tensors = {
        "student": write_lora(gradients.transformer, golden.TRANSFORMER, prefix=""),
        "vae": write_lora(gradients.vae, golden.VAE, prefix=""),
        "auxiliary": write_lora(slope, golden.TRANSFORMER, prefix=""),
    }
    named = {
        f"{network} {name}": tensor for network, part in tensors.items() for name, tensor in part.items()
    }
    assert named.keys() == answers.keys()
    for name, tensor in named.items():
        expected = answers[name]
        assert np.abs(golden.samples(tensor) - expected).max() <= 1e-4 * expected[0], name
    assert sum(answers[name][0] > 0 for name in answers) > 0.95 * len(answers)
