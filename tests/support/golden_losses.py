"""golden/losses.npz: what PyTorch + PEFT answer for one training step's losses.

`check` compares ours with it, without torch; `python tests/support/golden_losses.py` writes it. Everything that goes in
follows from names (parity.uniform). Of each adapter tensor's gradient its largest value and up to sixteen samples are
stored.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from parity import losses_and_gradients, random_lora, random_params, random_tensors, uniform
from tsdsr_jax.distillation.losses import Base, LossConfig, Losses, Student
from tsdsr_jax.models import lora
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.weights.torch_names import write_lora

FILE = Path(__file__).parent / "golden" / "losses.npz"
TRANSFORMER = MMDiTConfig.tiny(num_layers=2)
VAE = VAEConfig.tiny(block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
CONFIG = LossConfig(weight_lpips=0)
# Adapter: (network, targets, rank, seed).
ADAPTERS = {
    "student": (TRANSFORMER, lora.STUDENT_TARGETS, 4, 1),
    "teacher": (TRANSFORMER, lora.STUDENT_TARGETS, 3, 2),
    "auxiliary": (TRANSFORMER, lora.AUXILIARY_TARGETS, 2, 3),
    "vae": (VAE, lora.VAE_ENCODER_TARGETS, 4, 4),
}
LATENT = (2, 16, 4, 6)
SHAPES = {
    "lr": (2, 3, 32, 48), "hr": (2, 3, 32, 48), "latent_hr": LATENT, "posterior": LATENT, "noise": LATENT,
    "auxiliary_noise": LATENT, "states": (2, 7, 48), "pooled": (2, 40), "student_states": (2, 7, 48),
    "student_pooled": (2, 40), "null_states": (1, 7, 48), "null_pooled": (1, 40), "normal": (2,),
}  # fmt: skip
INTEGERS = {"index": (613, 87), "auxiliary_index": (50, 949), "bias": (-25, 24)}


def problem() -> dict[str, np.ndarray]:
    """The batch and the draws, NCHW: images in [−1, 1], the rest of variance 1."""
    data = {name: uniform(name, shape) for name, shape in SHAPES.items()}
    data |= {name: data[name] / np.float32(3**0.5) for name in ("lr", "hr")}
    data |= {name: np.asarray(values) for name, values in INTEGERS.items()}
    return data | {"uniform": np.array([0.25, 0.75], np.float32)}


def adapter(name: str) -> Tree:
    config, targets, rank, seed = ADAPTERS[name]
    return random_lora(config, targets, rank, seed)


def samples(gradient: np.ndarray) -> np.ndarray:
    """The largest absolute value, then up to sixteen values evenly spread."""
    flat = gradient.reshape(-1)
    return np.concatenate([[np.abs(flat).max()], flat[:: max(1, flat.size // 16)][:16]]).astype(np.float32)


def check(implementation: str = "auto") -> None:
    """Compares everything with the stored answers.

    Args:
      implementation: of the transformer's attention.
    """
    with np.load(FILE) as file:
        answers = dict(file)
    data = problem()
    losses = Losses(
        MMDiT(TRANSFORMER, remat=True, implementation=implementation),
        AutoencoderKL(VAE, remat=True),
        CONFIG,
    )
    null = Text(data["null_states"], data["null_pooled"])
    base = Base(random_params(TRANSFORMER), random_params(VAE), adapter("teacher"), null)
    student = Student(adapter("student"), adapter("vae"))
    fake, metrics, tensors = losses_and_gradients(losses, base, student, adapter("auxiliary"), data)
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
        assert np.abs(samples(tensor) - expected).max() <= 1e-4 * expected[0], name
    assert sum(answers[name][0] > 0 for name in answers) > 0.95 * len(answers)


def main() -> None:
    """Computes every answer with torch and writes the file."""
    import torch

    import oracle_models as oracle
    import oracle_training

    def load(model, tensors):
        model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
        return model

    def adapt(model, name: str, peft_name: str, targets) -> None:
        config, _, rank, _ = ADAPTERS[name]
        oracle.inject_lora(model, targets, rank, peft_name)
        tensors = write_lora(adapter(name), config)
        state = {
            key.removeprefix(oracle.LORA_PREFIX): torch.from_numpy(array) for key, array in tensors.items()
        }
        assert state.keys() == oracle.lora_state(model, peft_name).keys()
        oracle.set_peft_model_state_dict(model, state, adapter_name=peft_name)

    transformer = load(oracle.tiny_transformer(0, num_layers=2), random_tensors(TRANSFORMER))
    vae = load(oracle.tiny_vae(0), random_tensors(VAE))
    for name, targets in (
        ("student", oracle.STUDENT_TARGETS),
        ("teacher", oracle.STUDENT_TARGETS),
        ("auxiliary", oracle.AUX_TARGETS),
    ):
        adapt(transformer, name, name, targets)
    adapt(vae, "vae", "default", oracle.VAE_TARGETS)
    fake, values, gradients = oracle_training.losses_and_gradients(
        transformer, vae, problem(), CONFIG, teacher=True
    )
    answers = {"fake": fake} | {f"loss {name}": np.float64(value) for name, value in values.items()}
    for network, tensors in gradients.items():
        answers |= {f"{network} {name}": samples(tensor) for name, tensor in tensors.items()}
    np.savez_compressed(FILE, **answers)
    print(f"{FILE}: {len(answers)} arrays, {FILE.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    sys.exit(main())
