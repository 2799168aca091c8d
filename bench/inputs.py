"""Random inputs that both frameworks compute the same results from. Imports neither of them."""

from __future__ import annotations

import numpy as np

# of a prompt
TOKENS = 333


def upscaling_inputs(batch: int, side: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws images (B, H, W, 3) in [−1, 1], latents and noise (B, h, w, C)."""
    random = np.random.default_rng(batch)
    images = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    shape = (batch, side // 8, side // 8, channels)
    latents, noise = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
    return images, latents, noise


def photographs(batch: int, side: int) -> np.ndarray:
    """Draws photographs to enlarge fourfold to this side, (B, side/4, side/4, 3) uint8."""
    shape = (batch, side // 4, side // 4, 3)
    return np.random.default_rng(batch).integers(0, 256, shape, np.uint8)


def training_inputs(batch: int, side: int, channels: int, width: int, pooled: int) -> dict[str, np.ndarray]:
    """A batch and a step's random draws, by name; images and latents are NCHW.

    Args:
      batch, side: number of images, and their side in pixels.
      channels: of the latents.
      width, pooled: widths of the prompt's embedding and of its pooled one.
    """
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    images, latents = (batch, 3, side, side), (batch, channels, side // 8, side // 8)
    index = random.integers(50, 950, batch)
    return {
        "lr": np.tanh(normal(*images)), "hr": np.tanh(normal(*images)), "latent_hr": normal(*latents),
        "states": normal(batch, TOKENS, width), "pooled": normal(batch, pooled),
        "posterior": normal(*latents), "noise": normal(*latents), "auxiliary_noise": normal(*latents),
        "index": index, "auxiliary_index": random.integers(50, 950, batch),
        "bias": np.minimum(random.integers(-25, 25, batch), 950 - index),
        "normal": normal(batch), "uniform": random.uniform(size=batch).astype(np.float32),
    }  # fmt: skip
