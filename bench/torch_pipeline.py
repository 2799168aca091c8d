"""SD3's two networks in PyTorch as upscaling uses them. It imports nothing of ours, which would slow PyTorch's start."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The compression level with which infer/upscale.py writes PNG files; Pillow's default takes twice as long.
PNG_LEVEL = 3


class Text(NamedTuple):
    """(1, S, D) and (1, P)."""

    states: Tensor
    pooled: Tensor


@dataclasses.dataclass
class TorchPipeline:
    """Attributes:
    transformer, vae: in eval mode, channels last.
    text: the prompt's embeddings.
    """

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text: Text

    def encode(self, images: Tensor, noise: Tensor) -> Tensor:
        """(B, 3, H, W) in [−1, 1] -> latents (B, C, h, w), times the scaling factor."""
        posterior = self.vae.encode(images).latent_dist
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def velocity(self, latents: Tensor) -> Tensor:
        """At t = 1000."""
        batch = len(latents)
        return self.transformer(
            hidden_states=latents,
            timestep=torch.full((batch,), 1000.0, device=latents.device),
            encoder_hidden_states=self.text.states.expand(batch, -1, -1),
            pooled_projections=self.text.pooled.expand(batch, -1),
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> (B, 3, H, W) uint8."""
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return ((decoded.clamp(-1, 1) * 0.5 + 0.5) * 255).to(torch.uint8)

    def compile(self) -> None:
        """Compiles all three methods, each as a separate program, for one shape, in the default mode."""
        torch._dynamo.reset()
        for name in ("encode", "velocity", "decode"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
