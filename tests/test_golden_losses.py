"""A training step's losses and all adapter gradients against stored answers of PyTorch + PEFT
(make_golden_losses.py writes them); needs no torch."""

import numpy as np

import make_golden_losses as golden
from parity import losses_and_gradients, random_params
from tsdsr_jax.distillation.losses import Base, Losses, Student
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL


def test_losses_and_gradients():
    check_golden()


def check_golden(implementation="auto"):
    """Compares everything with the stored answers.

    Args:
      implementation: of the transformer's attention.
    """
    with np.load(golden.FILE) as file:
        answers = dict(file)
    data = golden.problem()
    losses = Losses(
        MMDiT(golden.TRANSFORMER, remat=True, implementation=implementation),
        AutoencoderKL(golden.VAE, remat=True),
        golden.CONFIG,
    )
    null = Text(data["null_states"], data["null_pooled"])
    base = Base(random_params(golden.TRANSFORMER), random_params(golden.VAE), golden.adapter("teacher"), null)
    student = Student(golden.adapter("student"), golden.adapter("vae"))
    fake, metrics, tensors = losses_and_gradients(losses, base, student, golden.adapter("auxiliary"), data)
    assert np.abs(fake - answers.pop("fake")).max() <= 1e-5 * np.abs(fake).max()
    found = {f"loss {name}": metrics[name] for name in ("tsd", "mse", "auxiliary")}
    for name, value in found.items():
        assert abs(value - answers.pop(name)) <= 1e-4 * value, name
    named = {
        f"{network} {name}": tensor for network, part in tensors.items() for name, tensor in part.items()
    }
    assert named.keys() == answers.keys()
    for name, tensor in named.items():
        expected = answers[name]
        assert np.abs(golden.samples(tensor) - expected).max() <= 1e-4 * expected[0], name
    assert sum(answers[name][0] > 0 for name in answers) > 0.95 * len(answers)
