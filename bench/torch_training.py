"""PyTorch's side of `training.py` and `lease/`: a step of student and auxiliary network with PEFT, as in TSD-SR's script."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]
from torch_pipeline import ADAPTED, DTYPES, ENCODER, STUDENT, TorchPipeline

import oracle_models
import oracle_training as oracle
from tsdsr_jax.distillation.losses import LossConfig
from tsdsr_jax.models import flow

RATE, RATE_AUXILIARY = 5e-6, 1e-6


class Adapter(NamedTuple):
    """Attributes:
    network: the network that it changes.
    torch_name: PEFT's name of it.
    targets: the modules that it changes, as PEFT matches them.
    file: its name in a folder of adapters.
    """

    network: Literal["transformer", "vae"]
    torch_name: str
    targets: tuple[str, ...] | str
    file: str


ADAPTERS = {
    "student": Adapter("transformer", "student", STUDENT, "transformer.safetensors"),
    "encoder": Adapter("vae", "default", ENCODER, "vae.safetensors"),
    "teacher": Adapter("transformer", "teacher", STUDENT, "teacher.safetensors"),
    "auxiliary": Adapter("transformer", "auxiliary", ADAPTED, "transformer_reg.safetensors"),
}


def adapted(networks: TorchPipeline, name: str) -> tuple[Any, str]:
    """The network that has an adapter, and PEFT's name of the adapter."""
    adapter = ADAPTERS[name]
    return getattr(networks, adapter.network), adapter.torch_name


def add_random_adapters(networks: TorchPipeline, rank: int) -> None:
    """Adds all four, whose changes are small."""
    for name, adapter in ADAPTERS.items():
        model, torch_name = adapted(networks, name)
        oracle_models.inject_lora(model, adapter.targets, rank, torch_name)
    torch.manual_seed(1)
    for model in (networks.transformer, networks.vae):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02 / rank)


def save_adapters(networks: TorchPipeline, folder: Path) -> None:
    for name, adapter in ADAPTERS.items():
        oracle_models.save_lora(adapted(networks, name)[0], folder / adapter.file, adapter.torch_name)


def load_adapters(networks: TorchPipeline, folder: Path) -> None:
    """Adds all four from files."""
    for name, adapter in ADAPTERS.items():
        model, torch_name = adapted(networks, name)
        oracle_models.load_lora_into(model, folder / adapter.file, adapter.targets, torch_name)


def farthest_apart(losses: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """The largest relative difference of a loss."""
    return max(abs(losses[name] / value - 1) for name, value in wanted.items())


class TorchStep:
    """Trains adapters in float32; everything else is in `precision`, computed under autocast.

    Args:
      networks: with all adapters.
      precision: fp32, fp16 or bf16.
      config: the losses.
      gradient_checkpointing: for both networks.
    """

    def __init__(
        self, networks: TorchPipeline, precision: str, config: LossConfig, gradient_checkpointing: bool
    ):
        self.config, self.networks, self.dtype = config, networks, DTYPES[precision]
        self.device = networks.text.pooled.device.type
        transformer, vae = networks.transformer, networks.vae
        for model in (transformer, vae):
            for name, parameter in model.named_parameters():
                if "lora_" in name and ".teacher." not in name:  # the teacher's is frozen, as the base is
                    parameter.data = parameter.data.float()
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
            vae.enable_gradient_checkpointing()
            transformer.train(), vae.train()
        self.student = [*self.parameters(transformer, "student"), *self.parameters(vae, "default")]
        self.auxiliary = list(self.parameters(transformer, "auxiliary"))
        self.optimizers = [
            torch.optim.AdamW(self.student, RATE, weight_decay=1e-4),
            torch.optim.AdamW(self.auxiliary, RATE_AUXILIARY, weight_decay=1e-4),
        ]

    @staticmethod
    def parameters(model: Any, adapter: str) -> Iterator[Tensor]:
        for name, parameter in model.named_parameters():
            if "lora_" in name and f".{adapter}." in name:
                yield parameter

    def autocast(self) -> Any:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    def on_device(self, data: dict[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(np.asarray(value)).to(self.device) for name, value in data.items()}

    def guided(self, adapter: str, x: Tensor, timestep: Tensor, text: oracle.TorchText) -> Tensor:
        """Evaluates empty and real prompt in one call."""
        null = oracle.TorchText(*(torch.zeros_like(part) for part in text))
        both = oracle.TorchText(*(torch.cat(pair) for pair in zip(null, text, strict=True)))
        transformer = self.networks.transformer
        without, given = (
            oracle.velocity(transformer, adapter, x.repeat(2, 1, 1, 1), timestep.repeat(2), both)
            .float()
            .chunk(2)
        )
        return without + self.config.guidance_scale * (given - without)

    @torch.no_grad()
    def tsd_gradient(self, fake: Tensor, data: dict[str, Tensor], text: oracle.TorchText) -> Tensor:
        tsd, levels = self.config.tsd, torch.from_numpy(flow.sigmas(self.config.shift)).to(self.device)
        points = len(tsd.point_weights)
        last = (data["index"] + tsd.stride * points + data["bias"]).clamp(max=len(levels) - 1)
        grid = [data["index"] + (last - data["index"]) * step // points for step in range(points + 1)]
        sigma = oracle.wide(levels[grid[0]])
        x, y = (sigma * data["noise"] + (1 - sigma) * clean for clean in (fake, data["latent_hr"]))
        total = torch.zeros_like(x)
        for n, weight in enumerate(tsd.point_weights):
            sigma, following = oracle.wide(levels[grid[n]]), oracle.wide(levels[grid[n + 1]])
            timestep = 1000 * levels[grid[n]]
            teacher_x, teacher_y = (self.guided("teacher", latent, timestep, text) for latent in (x, y))
            auxiliary_x = self.guided("auxiliary", x, timestep, text)
            mixed = tsd.balance * (teacher_x - auxiliary_x) + (1 - tsd.balance) * (teacher_x - teacher_y)
            total += torch.nan_to_num(sigma**2 * weight * mixed)
            x, y = x - (sigma - following) * auxiliary_x, y - (sigma - following) * teacher_y
        return total

    def student_losses(self, data: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        text = oracle.TorchText(data["states"], data["pooled"])
        fake = oracle.student_latent(
            self.networks.transformer, self.networks.vae, data["lr"].to(self.dtype), data["posterior"], text
        ).float()
        gradient = self.tsd_gradient(fake.detach(), data, text)
        self.activate("student")
        return fake, {
            "tsd": oracle.tsd_loss(fake, gradient),
            "mse": torch.mean((fake - data["latent_hr"]) ** 2),
        }

    def auxiliary_loss(self, fake: Tensor, data: dict[str, Tensor]) -> Tensor:
        levels = oracle.LEVELS.to(self.device)
        sigma = levels[data["auxiliary_index"]].float()
        weight = oracle.sample_weights(self.config.weighting, sigma, data["normal"], data["uniform"])
        noisy = oracle.wide(sigma) * data["auxiliary_noise"] + (1 - oracle.wide(sigma)) * fake.detach()
        text = oracle.TorchText(data["states"], data["pooled"])
        velocity = oracle.velocity(self.networks.transformer, "auxiliary", noisy, 1000 * sigma, text).float()
        clean = noisy - oracle.wide(sigma) * velocity
        return (0.5 * weight * ((clean - fake.detach()) ** 2).mean((1, 2, 3))).mean()

    def activate(self, adapter: str) -> None:
        """Switching adapters resets requires_grad, but the backward pass needs the setting of the forward pass."""
        self.networks.transformer.set_adapter(adapter)

    @torch.no_grad()
    def losses(self, data: dict[str, np.ndarray]) -> dict[str, float]:
        tensors = self.on_device(data)
        with self.autocast():
            fake, values = self.student_losses(tensors)
            values["auxiliary"] = self.auxiliary_loss(fake, tensors)
        return {name: float(value) for name, value in values.items()}

    def step(self, tensors: dict[str, Tensor]) -> None:
        with self.autocast():
            fake, values = self.student_losses(tensors)
        (values["tsd"] + values["mse"]).backward()
        torch.nn.utils.clip_grad_norm_(self.student, 1.0)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad(set_to_none=True)
        with self.autocast():
            value = self.auxiliary_loss(fake, tensors)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.auxiliary, 1.0)
        self.optimizers[1].step()
        self.optimizers[1].zero_grad(set_to_none=True)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def memory(self) -> float:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0.0
