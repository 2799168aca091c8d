"""SD3's two networks in PyTorch as upscaling uses them. It imports nothing of ours, which would slow PyTorch's start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# The compression level with which infer/upscale.py writes PNG files; Pillow's default takes twice as long.
PNG_LEVEL = 3
# The modules that TSD-SR's adapters change: the auxiliary network's, the student's and teacher's, the encoder's.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj")
STUDENT = (*ADAPTED, "proj", "linear", "proj_out")
ENCODER = r"encoder\.(conv_in|conv_out|.+\.(conv1|conv2|conv_shortcut|downsamplers\.\d+\.conv|to_q|to_k|to_v|to_out\.0))"


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

    @classmethod
    def load(cls, model: Path, prompt: Path, device: str, dtype: torch.dtype) -> TorchPipeline:
        """Loads a diffusers folder, and a folder with prompt.safetensors."""
        transformer = SD3Transformer2DModel.from_pretrained(model / "transformer", torch_dtype=dtype)
        vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=dtype)
        text = load_file(prompt / "prompt.safetensors")
        return cls(
            transformer.to(device).eval().requires_grad_(False),
            vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False),
            Text(*(text[name][None].to(device, dtype) for name in ("prompt_embeds", "pooled_embeds"))),
        )

    def add_lora(self, rank: int = 64) -> None:
        """Adds adapters as in TSD-SR's released inference: beside the weights, not merged. They change nothing yet."""
        from peft import LoraConfig  # only some processes need it, and it takes time

        for model, targets in ((self.transformer, list(STUDENT)), (self.vae, ENCODER)):
            model.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
            )

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
