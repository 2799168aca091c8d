"""TSD-SR's one-step inference in PyTorch: the numbers that the JAX port is held to.

Float32 throughout, the posterior's mean in place of a sample, no tiling in the VAE; everything else as the
released command line does it, wherever that works. Sizes at which it crashes or hangs raise an
AssertionError that names the defect; where it merely does something odd (tiling decided by area, sides
rounded down to multiples of 8), the oracle does the same.

Axes: H W picture rows and columns, h w latent rows and columns, S prompt tokens, E P widths of the prompt
and of the pooled prompt, T tile side. Sizes of images are (width, height), as in Pillow; those of latents
(height, width).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image
from torch import Tensor

ALIGN_METHODS = ("wavelet", "adain", "nofix")
LATENT_FACTOR = 8
TIMESTEP = 1000.0
TILE_VARIANCE = 0.01  # of the tile weights, in units of the tile side squared
WAVELET_LEVELS = 5
ADAIN_EPSILON = 1e-5


class Plan(NamedTuple):
    """The sizes on one picture's way through the pipeline, each (width, height)."""

    processed: tuple[int, int]  # what the networks see
    final: tuple[int, int]  # what the user gets; where the two differ, the decoded picture is resized


@dataclass(frozen=True)
class OraclePipeline:
    """The networks, with their LoRA, the prompt (1, S, E) and (1, P), and the command line's size flags."""

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    prompt_embeds: Tensor
    pooled_embeds: Tensor
    upscale: int = 4
    process_size: int = 512
    latent_tile: int = 64
    latent_overlap: int = 8

    @torch.no_grad()
    def upscale_image(
        self, image: Image.Image, align_method: str = "wavelet", capture: bool = False
    ) -> Image.Image | tuple[Image.Image, dict[str, Tensor]]:
        """The picture `upscale` times as large; with `capture` also every stage's tensor, in order.

        Stages: lr_input (1, 3, H, W) in [-1, 1]; latent, velocity and predicted = latent - velocity (1, 16,
        h, w), scaled; decoded (1, 3, H, W), clamped to [-1, 1]; before_colour, at the final size, 8-bit
        levels / 255; colour, in [0, 1], not yet truncated to 8 bit.
        """
        assert align_method in ALIGN_METHODS, f"align_method {align_method!r} is none of {ALIGN_METHODS}"
        image = image.convert("RGB")
        plan = self.plan(*image.size)
        lr_input = resize_input(to_tensor(image), plan.processed)
        latent = self.encode(lr_input)
        velocity = self.velocity(latent)
        predicted = latent - velocity
        decoded = self.decode(predicted)
        restored = to_image(decoded / 2 + 0.5)
        if plan.processed != plan.final:
            restored = restored.resize(plan.final, Image.Resampling.BICUBIC)
        colour = align_colour(to_tensor(restored), image, align_method)
        result = restored if align_method == "nofix" else to_image(colour)
        stages = {"lr_input": lr_input, "latent": latent, "velocity": velocity, "predicted": predicted}
        stages |= {"decoded": decoded, "before_colour": to_tensor(restored), "colour": colour}
        return (result, stages) if capture else result

    def plan(self, width: int, height: int) -> Plan:
        """Sizes for a (width, height) input: small ones grow, then sides go down to multiples of 8."""
        shortest = self.process_size // self.upscale
        final = (width * self.upscale, height * self.upscale)
        scale = max(1.0, shortest / min(width, height))
        columns, rows = (int(scale * side) * self.upscale // LATENT_FACTOR for side in (width, height))
        self.assert_sound(rows, columns)
        return Plan((columns * LATENT_FACTOR, rows * LATENT_FACTOR), final)

    def tile_side(self, height: int, width: int) -> int | None:
        """T for a latent of that size, or None where it is small enough, by area, to go through whole."""
        tiled = height * width > self.latent_tile**2
        return min(self.latent_tile, height, width) if tiled else None

    def assert_sound(self, height: int, width: int) -> None:
        """Refuses the latent sizes at which the released code fails, and those no position table covers."""
        size = f"latent {height}x{width} (rows x columns)"
        patch, table = self.transformer.config.patch_size, self.transformer.config.pos_embed_max_size
        assert min(height, width) > 0, f"{size}: the processed picture is empty"
        side = self.tile_side(height, width)
        if side is None:
            assert height % patch == 0 and width % patch == 0, f"{size}: odd latent side while untiled"
            assert max(height, width) <= table * patch, f"{size}: untiled, larger than the position table"
        else:
            assert side > self.latent_overlap, f"{size}: tile side {side} <= overlap, the loop never ends"
            assert side % patch == 0, f"{size}: odd tile side {side}"
            assert side <= table * patch, f"{size}: tile {side} larger than the position table"

    def encode(self, picture: Tensor) -> Tensor:
        """(1, 3, H, W) in [-1, 1] → (1, 16, h, w): the posterior's mean, scaled but not shifted."""
        return self.vae.encode(picture).latent_dist.mean * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """(1, 16, h, w), scaled → (1, 3, H, W), clamped to [-1, 1]."""
        return self.vae.decode(latent / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def velocity(self, latent: Tensor) -> Tensor:
        """The transformer's prediction (1, 16, h, w) at t = 1000; of a large latent, blended from tiles."""
        height, width = latent.shape[-2:]
        side = self.tile_side(height, width)
        if side is None:
            return self.predict(latent)
        weights = tile_weights(side).float()
        total, norm = torch.zeros_like(latent), torch.zeros_like(latent)
        for top in latent_tiles(height, side, self.latent_overlap):
            for left in latent_tiles(width, side, self.latent_overlap):
                window = (..., slice(top, top + side), slice(left, left + side))
                total[window] += weights * self.predict(latent[window])
                norm[window] += weights
        return total / norm

    def predict(self, latent: Tensor) -> Tensor:
        """One call of the transformer: (1, 16, h, w) → (1, 16, h, w)."""
        return self.transformer(
            hidden_states=latent,
            timestep=torch.tensor([TIMESTEP]),
            encoder_hidden_states=self.prompt_embeds,
            pooled_projections=self.pooled_embeds,
            return_dict=False,
        )[0]


# --- latent tiles -----------------------------------------------------------------------


def latent_tiles(length: int, tile: int, overlap: int) -> list[int]:
    """Where the tiles start along one axis: every `tile - overlap`, the last one flush with the end."""
    assert tile > overlap, f"tile {tile} <= overlap {overlap}: the tile loop never ends"
    if length <= tile:
        return [0]
    stride = tile - overlap
    count = math.ceil((length - tile) / stride) + 1
    return [*(i * stride for i in range(count - 1)), length - tile]


def tile_weights(tile: int) -> Tensor:
    """The blending weights (T, T), float64: Gaussian along each axis, in rows half a cell off centre."""
    rows, columns = tile_profile(tile, tile / 2), tile_profile(tile, (tile - 1) / 2)
    return torch.outer(rows, columns)


def tile_profile(tile: int, centre: float) -> Tensor:
    """A normal density (T,) around `centre`, float64, with the tile side as the unit of length."""
    distance = (torch.arange(tile, dtype=torch.float64) - centre) / tile
    return torch.exp(-(distance**2) / (2 * TILE_VARIANCE)) / math.sqrt(2 * math.pi * TILE_VARIANCE)


# --- pictures ---------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as (1, 3, H, W) float32 in [0, 1]."""
    levels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return levels.permute(2, 0, 1)[None].float() / 255


def to_image(picture: Tensor) -> Image.Image:
    """(1, 3, H, W) in [0, 1] to 8 bit; levels are cut off, not rounded."""
    levels = (picture[0] * 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def resize_input(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 3, H, W) in [0, 1] → `size` = (width, height), in [-1, 1]: bicubic, a = -0.75, no antialiasing."""
    resized = F.interpolate(picture, size=size[::-1], mode="bicubic", align_corners=False)
    return (2 * resized - 1).clamp(-1, 1)


# --- colour -----------------------------------------------------------------------------


def align_colour(restored: Tensor, source: Image.Image, method: str) -> Tensor:
    """`restored` (1, 3, H, W) with the colours of the low-resolution `source`, clamped to [0, 1].

    AdaIN takes its statistics from the source as it is, the wavelet correction from the source resized by Pillow.
    """
    if method == "nofix":
        return restored
    if method == "adain":
        return adain(restored, to_tensor(source)).clamp(0, 1)
    size = (restored.shape[-1], restored.shape[-2])
    return wavelet(restored, to_tensor(source.resize(size, Image.Resampling.BICUBIC))).clamp(0, 1)


def adain(picture: Tensor, source: Tensor) -> Tensor:
    """Gives each channel of `picture` (1, 3, H, W) its mean and deviation in `source`, of any size."""
    mean, deviation = channel_statistics(picture)
    source_mean, source_deviation = channel_statistics(source)
    return (picture - mean) / deviation * source_deviation + source_mean


def channel_statistics(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (unbiased, variance + 1e-5) of each channel, (1, 3, 1, 1) each."""
    variance, mean = torch.var_mean(picture, dim=(-2, -1), correction=1, keepdim=True)
    return mean, (variance + ADAIN_EPSILON).sqrt()


def wavelet(picture: Tensor, source: Tensor) -> Tensor:
    """`picture`'s detail on `source`'s low frequencies, both (1, 3, H, W)."""
    assert picture.shape == source.shape, f"sizes differ: {tuple(picture.shape)}, {tuple(source.shape)}"
    return picture - low_frequencies(picture) + low_frequencies(source)


def low_frequencies(picture: Tensor) -> Tensor:
    """(1, 3, H, W) after five [1, 2, 1] / 4 blurs on both axes, taps 1, 2, 4, 8, 16 apart, edges repeated."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(taps, taps).expand(picture.shape[1], 1, 3, 3)
    for spacing in (2**level for level in range(WAVELET_LEVELS)):
        padded = F.pad(picture, (spacing,) * 4, mode="replicate")
        picture = F.conv2d(padded, kernel, dilation=spacing, groups=picture.shape[1])
    return picture
