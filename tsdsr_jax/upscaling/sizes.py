"""From a photograph's size to the shapes that are computed: target size, padding, shared buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from tsdsr_jax.images.buckets import Size
from tsdsr_jax.models.params import LATENT_FACTOR, PATCH_SIZE

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """The sizes one photograph goes through, each (height, width) in pixels.

    Attributes:
      source: the photograph's.
      resized: after bicubic interpolation; what the network is meant to see.
      padded: `resized` extended by reflection at the bottom and right to what the latents need; cropped off again.
      output: the file's: source × upscale. Differs from `resized` where the photograph was too small to process as it
        was; the result is then resized to it.
    """

    source: Size
    resized: Size
    padded: Size
    output: Size

    @property
    def latent(self) -> Size:
        return self.padded[0] // LATENT_FACTOR, self.padded[1] // LATENT_FACTOR

    @property
    def portrait(self) -> bool:
        """Processed lying on its side, so that portraits and landscapes share programs."""
        return self.padded[0] > self.padded[1]

    @property
    def lying(self) -> Size:
        """`padded` with the short side first."""
        return min(self.padded), max(self.padded)


def plan_size(source: Size, upscale: float, process_size: int, latent_tile: int) -> SizePlan:
    """Plans one photograph.

    A photograph whose short side would come out below `process_size` is enlarged until it does not, to the size that
    the original gives it: multiplied in floating point, and truncated. Sides are then padded to multiples of 8 (the
    autoencoder), and where the latent is not longer than a tile, to multiples of 16, because the tile must hold whole
    patches; longer sides are covered by overlapping tiles and need none.
    """
    minimum = max(1, int(process_size // upscale))
    height, width = source
    if min(source) < minimum:
        scale = minimum / min(source)
        # Truncation leaves short sides of 49, 98, 103 and 107 a pixel below 128, where the original crashes.
        height, width = (max(minimum, int(scale * side)) for side in source)
    resized = round(height * upscale), round(width * upscale)

    def pad(side: int) -> int:
        latent = -(-side // LATENT_FACTOR)
        if latent <= latent_tile:
            latent = -(-latent // PATCH_SIZE) * PATCH_SIZE
        return latent * LATENT_FACTOR

    padded = pad(resized[0]), pad(resized[1])
    return SizePlan(source, resized, padded, (round(source[0] * upscale), round(source[1] * upscale)))


def batch_size(items: int, small: int, large: int) -> int:
    """The larger of two batch sizes, each a compiled program, where so many items half fill it at least."""
    return large if items > large // 2 else small


def in_two_sizes(items: Sequence[Item], small: int, large: int) -> list[tuple[Sequence[Item], int]]:
    """Cuts items into batches of two sizes, each a compiled program; what would not half fill a large one is cut small.

    Returns:
      (items, size) with no more items than `size`, in order.
    """
    batches = []
    while items:
        size = batch_size(len(items), small, large)
        batches.append((items[:size], size))
        items = items[size:]
    return batches


def slices(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut into as many as `size` at a time, the last perhaps fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def token_levels(smallest: int, largest: int, most: int = 2) -> list[int]:
    """Token counts that packed tiles are padded to: at most `most`, in geometric steps up to `largest`."""
    if smallest >= largest:
        return [largest]
    steps = np.geomspace(smallest, largest, most + 1)[1:]
    return sorted({min(largest, int(np.ceil(step / 16) * 16)) for step in steps})
