"""Makes SD3 with random weights as its users have it, and whatever else both frameworks must agree on.

In WORK: model/ (diffusers), prompt/, adapters/ (PEFT: student, encoder, teacher and auxiliary network), photos/ (128×128).
"""

import os

# Only file formats of ours are used here.
os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import torch
from inputs import TOKENS
from PIL import Image
from torch_networks import TorchNetworks, numpy_of
from torch_pipeline import Text, TorchPipeline
from torch_training import add_random_adapters, save_adapters
from worker import ADAPTERS, FULL, MADE, MODEL, PROMPT, RANK, WORK, Worker

import oracle_models
from tsdsr_jax.weights.prompt_files import PromptEmbeds, save_prompt_embeds

PHOTOS = Path(__file__).resolve().parents[2] / "examples" / "photos"
CROPS = 24 if FULL else 3


def main() -> None:
    worker = Worker()
    if MADE.exists():
        worker.report(model="there already")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    networks = TorchNetworks.random("full", device, dtype) if FULL else smallest(device, dtype)
    networks.transformer.save_pretrained(MODEL / "transformer")
    networks.vae.save_pretrained(MODEL / "vae")
    save_prompt_embeds(PROMPT, PromptEmbeds(*(numpy_of(part[0].float()) for part in networks.text)))
    add_random_adapters(networks, RANK)
    save_adapters(networks, ADAPTERS)
    save_photos(WORK / "photos")
    MADE.write_text("full" if FULL else "tiny")
    worker.report(model=f"made on {device}")


def smallest(device: str, dtype: torch.dtype) -> TorchPipeline:
    """Networks that a CPU compiles and runs in seconds."""
    transformer = oracle_models.tiny_transformer(0).to(device, dtype)
    vae = oracle_models.tiny_vae(1).to(device, dtype)
    wide = transformer.config
    text = torch.randn(1, TOKENS, wide.joint_attention_dim), torch.randn(1, wide.pooled_projection_dim)
    return TorchPipeline(transformer, vae, Text(*(part.to(device, dtype) for part in text)))


def save_photos(folder: Path) -> None:
    """Crops of the photographs in examples/, each another one."""
    folder.mkdir(exist_ok=True)
    image = Image.open(PHOTOS / "cat.png").convert("RGB")
    for index in range(CROPS):
        left = index * (image.width - 128) // CROPS
        image.crop((left, 0, left + 128, 128)).save(folder / f"{index:02}.png")


if __name__ == "__main__":
    main()
