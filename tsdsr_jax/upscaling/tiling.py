"""Latent tiles: where they lie, how they overlap, and how they travel as packed tokens.

The transformer was trained on one latent size; larger latents go through it as overlapping tiles, blended with Gaussian
weights. Offsets and weights are the original's; docs/differences.md names the deviations.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions


class Tile(NamedTuple):
    """A rectangle of one image's latent.

    Attributes:
      image: its index in the batch.
      top, left, height, width: in latent pixels, of the upright image.
      portrait: whether the batch holds this latent transposed.
    """

    image: int
    top: int
    left: int
    height: int
    width: int
    portrait: bool = False


def offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Tile starts along one axis: every `tile − overlap`, the last one moved back to end with the axis."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // (tile - overlap)) + 1
    return [index * (tile - overlap) for index in range(count - 1)] + [length - tile]


def cut(image: int, height: int, width: int, tile: int, overlap: int, portrait: bool = False) -> list[Tile]:
    """The tiles of an (h, w) latent; along a side no longer than `tile` there is just one, as long as the side."""
    size = min(tile, height), min(tile, width)
    return [
        Tile(image, top, left, *size, portrait)
        for top in offsets(height, tile, overlap)
        for left in offsets(width, tile, overlap)
    ]


def weights(height: int, width: int) -> np.ndarray:
    """Blending weights of a tile, (h, w) float32: a Gaussian of variance 0.01 in units of the side.

    Across columns it is centred at (w − 1)/2, across rows at h/2: the original's half-pixel asymmetry, kept because it
    is part of its result. Corners are as small as 3e-10, so sums need float32.
    """

    def bell(length: int, centre: float) -> np.ndarray:
        distance = (np.arange(length) - centre) / length
        return np.exp(-np.square(distance) / 0.02) / np.sqrt(2 * np.pi * 0.01)

    return np.outer(bell(height, height / 2), bell(width, (width - 1) / 2)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """n tiles as packed tokens, all arrays on the host. T: tokens of the longest tile allowed, p: patch size.

    Attributes:
      pixels: (n, T, p·p) int32, each token's latent pixels as rows of the flattened (B·h·w) batch of latents.
      weights: (n, T, p·p) float32, 0 for padding.
      positions: (n, T) int32, rows of the position table.
      lengths: (n,) int32 valid tokens.
      full: whether every tile fills all T tokens.
    """

    pixels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray

    @property
    def full(self) -> bool:
        return bool((self.lengths == self.positions.shape[1]).all())


def pack(
    tiles: list[Tile], batch: int, tokens: int, latent_size: tuple[int, int], config: MMDiTConfig
) -> TokenBatch:
    """Packs up to `batch` tiles of at most `tokens` tokens each.

    Rows that no tile fills repeat the first tile with weight 0: real numbers in, nothing out. Padding tokens repeat their
    own tile's first pixel: another photograph's might not be finite, and 0 times that is not 0.

    Args:
      tiles: tiles whose sides are multiples of the patch size.
      batch: rows to make.
      tokens: tokens a row.
      latent_size: (h, w) of the batch of latents the pixel indices refer to.
      config: for the patch size and the position table.
    """
    area = config.patch_size**2
    result = TokenBatch(
        np.zeros((batch, tokens, area), np.int32),
        np.zeros((batch, tokens, area), np.float32),
        np.zeros((batch, tokens), np.int32),
        np.zeros((batch,), np.int32),
    )
    for row in range(batch):
        tile = tiles[row] if row < len(tiles) else tiles[0]
        count = tile.height * tile.width // area
        result.pixels[row, :count] = _pixels(tile, latent_size, config.patch_size)
        result.pixels[row, count:] = result.pixels[row, 0, 0]
        result.positions[row, :count] = grid_positions(config, tile.height, tile.width)
        result.lengths[row] = count
        if row < len(tiles):
            result.weights[row, :count] = _patches(weights(tile.height, tile.width), config.patch_size)
    return result


def _pixels(tile: Tile, latent_size: tuple[int, int], patch: int) -> np.ndarray:
    rows, columns = tile.top + np.arange(tile.height), tile.left + np.arange(tile.width)
    row_stride, column_stride = (1, latent_size[1]) if tile.portrait else (latent_size[1], 1)
    first = tile.image * latent_size[0] * latent_size[1]
    return _patches(first + rows[:, None] * row_stride + columns[None] * column_stride, patch)


def _patches(values: np.ndarray, patch: int) -> np.ndarray:
    """(h, w) -> (h/p · w/p, p·p), in the transformer's order of tokens and of pixels within one."""
    height, width = values.shape
    grid = values.reshape(height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 1, 3).reshape(-1, patch * patch)
