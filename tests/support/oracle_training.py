"""One training step's losses in PyTorch + PEFT, written from the method's description.

A single diffusers transformer carries three adapters, "student", "teacher" and "auxiliary", switched on one at a time; the
autoencoder carries the encoder's. Every random draw is an argument. Latents are NCHW here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor
from torch.nn import functional

from parity import nhwc
from tsdsr_jax.distillation.losses import LossConfig

LEVELS = torch.tensor(
    [3 * s / (1 + 2 * s) for s in ((1000 - i) / 1000 for i in range(1000))], dtype=torch.float64
)


class TorchText(NamedTuple):
    states: Tensor  # (B, S, D)
    pooled: Tensor  # (B, P)


def wide(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]


def velocity(
    transformer: SD3Transformer2DModel, adapter: str | None, x: Tensor, timestep: Tensor, text: TorchText
) -> Tensor:
    if adapter is None:
        transformer.disable_adapters()
    else:
        transformer.enable_adapters()
        transformer.set_adapter(adapter)
    return transformer(
        hidden_states=x,
        timestep=timestep.float(),
        encoder_hidden_states=text.states,
        pooled_projections=text.pooled,
    ).sample


def student_latent(transformer, vae: AutoencoderKL, lr: Tensor, noise: Tensor, text: TorchText) -> Tensor:
    posterior = vae.encode(lr).latent_dist
    z = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    return z - velocity(transformer, "student", z, torch.full((len(z),), 1000.0), text)


@torch.no_grad()
def tsd_gradient(
    transformer, teacher, fake, real, noise, index, bias, text, null, scale, points, stride, balance
):
    """g, each sample followed alone along its own trajectory."""

    def guidance(adapter, x, timestep, b):
        at = TorchText(*(part[b : b + 1] for part in text))
        without = velocity(transformer, adapter, x, timestep, null)
        return without + scale * (velocity(transformer, adapter, x, timestep, at) - without)

    results = []
    for b in range(len(fake)):
        last = min(int(index[b]) + stride * len(points) + int(bias[b]), 999)
        grid = np.linspace(int(index[b]), last, len(points) + 1).astype(int)
        sigma = LEVELS[grid[0]].float()
        x, y = (sigma * noise[b : b + 1] + (1 - sigma) * clean[b : b + 1] for clean in (fake, real))
        variational, matching = torch.zeros_like(x), torch.zeros_like(x)
        for n, gamma in enumerate(points):
            sigma, following = LEVELS[grid[n]].float(), LEVELS[grid[n + 1]].float()
            timestep = (1000 * sigma).reshape(1)
            teacher_x, teacher_y = (guidance(teacher, latent, timestep, b) for latent in (x, y))
            auxiliary_x = guidance("auxiliary", x, timestep, b)
            variational += torch.nan_to_num(sigma**2 * gamma * (teacher_x - auxiliary_x))
            matching += torch.nan_to_num(sigma**2 * gamma * (teacher_x - teacher_y))
            x, y = x - (sigma - following) * auxiliary_x, y - (sigma - following) * teacher_y
        results.append(balance * variational + (1 - balance) * matching)
    return torch.cat(results)


def tsd_loss(fake: Tensor, gradient: Tensor) -> Tensor:
    # In float64: the difference of two nearly equal latents would round the gradient away.
    target = (fake.double() - gradient.double()).detach()
    return 0.5 * torch.mean((fake.double() - target) ** 2)


def sample_weights(scheme: str, sigma: Tensor, normal: Tensor, uniform: Tensor) -> Tensor:
    if scheme == "logit_normal":
        return torch.sigmoid(normal)
    if scheme == "mode":
        return 1 - uniform - 1.29 * (torch.cos(torch.pi * uniform / 2) ** 2 - 1 + uniform)
    return sigma**-2


def auxiliary_loss(transformer, fake, noise, index, weight, text: TorchText) -> Tensor:
    sigma = LEVELS[index].float()
    fake = fake.detach()
    x = wide(sigma) * noise + (1 - wide(sigma)) * fake
    clean = x - wide(sigma) * velocity(transformer, "auxiliary", x, 1000 * sigma, text)
    return (0.5 * weight * ((clean - fake) ** 2).mean((1, 2, 3))).mean()


def pixel_distance(images: Tensor, others: Tensor) -> Tensor:
    """L1, and the mean absolute difference of gradients at three scales."""
    difference = images - others
    edges = torch.zeros(())
    for scale in (1, 2, 4):
        coarse = functional.avg_pool2d(difference, scale)
        edges = edges + coarse.diff(dim=2).abs().mean() + coarse.diff(dim=3).abs().mean()
    return difference.abs().mean() + edges / 3


def flow_loss(
    transformer,
    adapter: str | None,
    latents: Tensor,
    noise: Tensor,
    index,
    dropped,
    text: TorchText,
    null: TorchText,
) -> Tensor:
    """Flow matching, one sample after the other, each at its own noise level and with its own prompt or none."""
    total = torch.zeros(())
    for b in range(len(latents)):
        sigma = LEVELS[int(index[b])].float()
        words = null if dropped[b] else TorchText(*(part[b : b + 1] for part in text))
        noisy = sigma * noise[b : b + 1] + (1 - sigma) * latents[b : b + 1]
        predicted = velocity(transformer, adapter, noisy, (1000 * sigma).reshape(1), words)
        total = total + torch.mean((noise[b : b + 1] - latents[b : b + 1] - predicted) ** 2)
    return total / len(latents)


def losses_and_gradients(
    transformer: SD3Transformer2DModel,
    vae: AutoencoderKL,
    data: Mapping[str, np.ndarray],
    config: LossConfig,
    teacher: bool,
) -> tuple[np.ndarray, dict[str, float], dict[str, dict[str, np.ndarray]]]:
    """The student's latent (B, h, w, 16), every loss, and each adapter's gradients by PEFT's names."""
    data = {name: torch.from_numpy(np.asarray(value)) for name, value in data.items()}
    text = TorchText(data["states"], data["pooled"])
    null = TorchText(data["null_states"], data["null_pooled"])
    student_text = TorchText(data["student_states"], data["student_pooled"])
    transformer.zero_grad()
    vae.zero_grad()
    for module in (transformer, vae):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
    fake = student_latent(transformer, vae, data["lr"], data["posterior"], student_text)
    gradient = tsd_gradient(
        transformer, "teacher" if teacher else None, fake.detach(), data["latent_hr"], data["noise"], data["index"],
        data["bias"], text, null, config.guidance_scale, config.tsd.point_weights, config.tsd.stride, config.tsd.balance,
    )  # fmt: skip
    values = {"tsd": tsd_loss(fake, gradient), "mse": torch.mean((fake - data["latent_hr"]) ** 2)}
    if config.weight_pixel:
        values["pixel"] = pixel_distance(vae.decode(fake / vae.config.scaling_factor).sample, data["hr"])
    # Switching adapters sets requires_grad anew: the student's back pass needs its own active again.
    student_parameters = named_lora(transformer, "student") | {
        "vae." + k: v for k, v in named_lora(vae, "default").items()
    }
    for parameter in student_parameters.values():
        parameter.requires_grad_(True)
    total = config.weight_tsd * values["tsd"] + config.weight_mse * values["mse"]
    total = total + config.weight_pixel * values.get("pixel", 0)
    slopes = torch.autograd.grad(total, list(student_parameters.values()), allow_unused=True)
    student = {
        name: np.zeros(p.shape, np.float32) if g is None else g.numpy()
        for (name, p), g in zip(student_parameters.items(), slopes, strict=True)
    }
    weight = sample_weights(
        config.weighting, LEVELS[data["auxiliary_index"]].float(), data["normal"], data["uniform"]
    )
    values["auxiliary"] = auxiliary_loss(
        transformer, fake, data["auxiliary_noise"], data["auxiliary_index"], weight, text
    )
    parameters = named_lora(transformer, "auxiliary")
    slopes = torch.autograd.grad(values["auxiliary"], list(parameters.values()), allow_unused=True)
    auxiliary = {
        name: np.zeros(p.shape, np.float32) if g is None else g.numpy()
        for (name, p), g in zip(parameters.items(), slopes, strict=True)
    }
    return (
        nhwc(fake.detach().numpy()),
        {name: float(value.detach()) for name, value in values.items()},
        {
            "student": {k: v for k, v in student.items() if not k.startswith("vae.")},
            "vae": {k.removeprefix("vae."): v for k, v in student.items() if k.startswith("vae.")},
            "auxiliary": auxiliary,
        },
    )


def named_lora(module: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by the names that a file gives them."""
    found = {}
    for path, parameter in module.named_parameters():
        for half in ("lora_A", "lora_B"):
            if path.endswith(f".{half}.{name}.weight"):
                found[path.replace(f".{half}.{name}.", f".{half}.")] = parameter
    return found
