"""The parts of upscaling in PyTorch, on the same random inputs as ours in `inference_parts.py`. Does not import jax."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inputs import photographs, upscaling_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_pipeline import TorchPipeline

# cuDNN's attention first. It does not take the autoencoder's head of 512, for which PyTorch goes on to the others.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def torch_part(part: str, batch: int, side: int, networks: TorchPipeline) -> Callable[[], torch.Tensor]:
    """A function that starts a part and returns its result (B, C, h, w), which a GPU may still be computing.

    `end` copies photographs from the host, enlarges them on the device, and copies pictures back.
    """
    device, dtype = networks.text.pooled.device, networks.text.pooled.dtype

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype).permute(0, 3, 1, 2)

    images, latents, noise = map(tensor, upscaling_inputs(batch, side, networks.vae.config.latent_channels))
    photos = photographs(batch, side)

    def whole() -> torch.Tensor:
        enlarged = F.interpolate(tensor(photos) / 255, (side, side), mode="bicubic")
        found = networks.encode((enlarged * 2 - 1).clamp(-1, 1), torch.zeros_like(noise))
        return networks.decode(found - networks.velocity(found)).cpu()

    return torch.no_grad()({
        "encode": lambda: networks.encode(images, noise),
        "transformer": lambda: networks.velocity(latents),
        "decode": lambda: networks.decode(latents),
        "end": whole,
    }[part])  # fmt: skip


def as_array(result: torch.Tensor) -> np.ndarray:
    """(B, C, h, w) -> (B, h, w, C) float32 on the host."""
    return result.float().cpu().numpy().transpose(0, 2, 3, 1)


def synchronized(device: str, function: Callable[[], Any]) -> Callable[[], Any]:
    """Wraps `function` to return only when its result is ready."""

    def run() -> Any:
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def cudnn_is_faster(
    batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype, backward: bool
) -> bool:
    """Whether cuDNN's attention beats PyTorch's own choice on this GPU, at the transformer's shapes."""
    shape = (batch, heads, tokens, size)
    parts = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=backward) for _ in range(3)]

    def seconds() -> float:
        times = []
        for _ in range(12):
            start = time.perf_counter()
            found = F.scaled_dot_product_attention(*parts)
            if backward:
                found.backward(found)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times[2:])[5]

    own = seconds()
    try:
        with attention(cudnn_first=True):
            return seconds() < 0.98 * own
    except RuntimeError:
        return False


@contextmanager
def attention(cudnn_first: bool) -> Iterator[None]:
    """PyTorch's own choice of attention, or cuDNN's wherever it can be used."""
    if not cudnn_first:
        yield
        return
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        yield
