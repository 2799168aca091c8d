"""Writes golden/networks.npz, what diffusers and PEFT answer for tiny random networks:

    python tests/support/golden_networks.py

test_golden.py compares ours with it where torch is not installed. Parameters, adapters and inputs follow from their
names (parity.uniform), so that only the answers are stored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from parity import random_lora, random_tensors, uniform
from tsdsr_jax.models import lora
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.vae import VAEConfig
from tsdsr_jax.weights import torch_names

FILE = Path(__file__).parent / "golden" / "networks.npz"

TRANSFORMERS = {
    "sd3": MMDiTConfig.tiny(),
    "sd3.5": MMDiTConfig.tiny(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}
VAE = VAEConfig.tiny(block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
ADAPTERS = {
    "plain": None,
    "student": (lora.STUDENT_TARGETS, 4),
    "auxiliary": (lora.AUXILIARY_TARGETS, 2),
}
TIMESTEP = np.array([1000.0, 321.5], np.float32)
INPUTS = {
    "latents": (2, 8, 12, 16),
    "context": (2, 9, 48),
    "pooled": (2, 40),
    "image": (1, 32, 48, 3),
    "code": (1, 3, 4, 16),
}


def draw(name: str) -> np.ndarray:
    return uniform(name, INPUTS[name])


def transformer_adapter(style: str, name: str) -> Tree:
    targets, rank = ADAPTERS[name]
    return random_lora(TRANSFORMERS[style], targets, rank)


def vae_adapter() -> Tree:
    return random_lora(VAE, lora.VAE_ENCODER_TARGETS, 4)


def main() -> None:
    """Computes every answer with torch and writes the file."""
    import torch

    import oracle_models as oracle

    def load(model: Any, tensors: dict[str, np.ndarray]) -> Any:
        model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
        return model

    def adapt(model: Any, targets: Any, adapter: Tree, config: Any) -> None:
        tensors = torch_names.write_lora(adapter, config)
        rank = next(iter(lora.modules(adapter).values()))
        oracle.inject_lora(model, targets, rank, "default")
        state = {name.removeprefix(oracle.LORA_PREFIX): torch.from_numpy(a) for name, a in tensors.items()}
        assert state.keys() == oracle.lora_state(model).keys()
        oracle.set_peft_model_state_dict(model, state)

    def first(name: str) -> torch.Tensor:
        return torch.from_numpy(draw(name)).permute(0, 3, 1, 2)

    def last(tensor: torch.Tensor) -> np.ndarray:
        return tensor.permute(0, 2, 3, 1).contiguous().numpy()

    torch_targets = {"student": oracle.STUDENT_TARGETS, "auxiliary": oracle.AUX_TARGETS}
    answers: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for style, config in TRANSFORMERS.items():
            overrides = {
                key: getattr(config, key) for key in ("num_layers", "qk_norm", "dual_attention_layers")
            }
            for name in ADAPTERS:
                model = load(oracle.tiny_transformer(0, **overrides), random_tensors(config))
                if name != "plain":
                    adapt(model, torch_targets[name], transformer_adapter(style, name), config)
                velocity = model(
                    hidden_states=first("latents"),
                    timestep=torch.from_numpy(TIMESTEP),
                    encoder_hidden_states=torch.from_numpy(draw("context")),
                    pooled_projections=torch.from_numpy(draw("pooled")),
                ).sample
                # Every fourth channel is enough, and a quarter of the size.
                answers[f"{style}/{name}"] = last(velocity)[..., ::4]
        vae = load(oracle.tiny_vae(0), random_tensors(VAE))
        answers["vae/decoder"] = last(vae.decode(first("code")).sample)
        answers["vae/encoder"] = last(vae.encode(first("image")).latent_dist.parameters)
        adapt(vae, oracle.VAE_TARGETS, vae_adapter(), VAE)
        answers["vae/adapted encoder"] = last(vae.encode(first("image")).latent_dist.parameters)
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **answers)
    print(f"{FILE}: {len(answers)} arrays, {FILE.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    sys.exit(main())
