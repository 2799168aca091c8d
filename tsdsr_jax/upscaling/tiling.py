"""Latent tiles: where they lie, how they overlap, how they are packed into tokens, and how results are blended.

The transformer was trained on one latent size. It processes larger latents as overlapping tiles, which are blended with
Gaussian weights. Offsets and weights are the original's; docs/differences.md lists the deviations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tsdsr_jax.images.buckets import Size
from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions
from tsdsr_jax.models.params import LATENT_FACTOR
from tsdsr_jax.upscaling.planning import Settings, SizePlan, batch_size


class Tile(NamedTuple):
    """A rectangle of one image's latent.

    Attributes:
      image: its index in the batch.
      top, left, height, width: in latent pixels of the upright image.
      portrait: whether the batch holds this latent transposed.
    """

    image: int
    top: int
    left: int
    height: int
    width: int
    portrait: bool = False


def offsets(length: int, tile: int, overlap: int) -> list[int]:
    """Tile starts along one axis: every `tile − overlap`; the last tile ends with the axis."""
    if length <= tile:
        return [0]
    count = -(-(length - tile) // (tile - overlap)) + 1
    return [index * (tile - overlap) for index in range(count - 1)] + [length - tile]


def cut(image: int, height: int, width: int, tile: int, overlap: int, portrait: bool = False) -> list[Tile]:
    """The tiles of an (h, w) latent. A side no longer than `tile` is covered by one tile of the same length."""
    size = min(tile, height), min(tile, width)
    return [
        Tile(image, top, left, *size, portrait)
        for top in offsets(height, tile, overlap)
        for left in offsets(width, tile, overlap)
    ]


def cut_batch(plans: Sequence[SizePlan], settings: Settings) -> list[Tile]:
    """The tiles of a batch of photographs."""
    return [
        tile
        for index, plan in enumerate(plans)
        for tile in cut(
            index, *plan.latent, settings.latent_tile, settings.latent_overlap, portrait=plan.portrait
        )
    ]


def tile_weights(height: int, width: int) -> np.ndarray:
    """Blending weights of a tile, (h, w) float32: a Gaussian with variance 0.01 in units of the side.

    It is centered at (w − 1)/2 across columns and at h/2 across rows. This half-pixel asymmetry is the original's, kept
    because it is part of its result. Corners are as small as 3e-10, so sums need float32.
    """

    def bell(length: int, center: float) -> np.ndarray:
        distance = (np.arange(length) - center) / length
        return np.exp(-np.square(distance) / 0.02) / np.sqrt(2 * np.pi * 0.01)

    return np.outer(bell(height, height / 2), bell(width, (width - 1) / 2)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """n tiles as packed tokens, all arrays on the host. T: tokens per row, p: patch size.

    Attributes:
      tiles: number of tiles; further rows are padding.
      pixels: (n, T, p·p) int32, each token's latent pixels as rows of the flattened (B·h·w) batch of latents.
      weights: (n, T, p·p) float32, 0 for padding.
      positions: (n, T) int32, rows of the position table.
      lengths: (n,) int32 valid tokens.
      needs_lengths: whether the transformer needs the lengths.
    """

    tiles: int
    pixels: np.ndarray
    weights: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    needs_lengths: bool


def pack_batches(
    tiles: Sequence[Tile], settings: Settings, devices: int, latent_size: Size, config: MMDiTConfig
) -> Iterator[TokenBatch]:
    """Packs tiles into calls of the transformer. The calls have few shapes, because each is a compiled program.

    There are at most two token counts, and two numbers of rows: `devices`, and `settings.tile_batch` times as many.

    Args:
      latent_size: (h, w) of the batch of latents.
    """
    most_tokens = (settings.latent_tile // config.patch_size) ** 2
    for tokens, members in _by_token_level(tiles, settings, config.patch_size):
        while members:
            rows = batch_size(len(members), devices, devices * settings.tile_batch)
            packed = pack(members[:rows], rows, tokens, latent_size, config)
            if tokens == most_tokens and (packed.lengths == tokens).all():
                # A program without lengths is cheaper, but worth its compilation only at the largest size.
                packed = dataclasses.replace(packed, needs_lengths=False)
            yield packed
            members = members[rows:]


def _by_token_level(tiles: Sequence[Tile], settings: Settings, patch: int) -> list[tuple[int, list[Tile]]]:
    """Groups tiles by the padded token count they are computed at."""
    shortest = max(patch, min(settings.latent_tile, settings.process_size // LATENT_FACTOR))
    levels = token_levels((shortest // patch) ** 2, (settings.latent_tile // patch) ** 2)
    groups: dict[int, list[Tile]] = {}
    for tile in tiles:
        tokens = tile.height * tile.width // patch**2
        groups.setdefault(next(level for level in levels if level >= tokens), []).append(tile)
    return sorted(groups.items())


def token_levels(smallest: int, largest: int, most: int = 2) -> list[int]:
    """Token counts that packed tiles are padded to: at most `most`, in geometric steps up to `largest`."""
    if smallest >= largest:
        return [largest]
    steps = np.geomspace(smallest, largest, most + 1)[1:]
    return sorted({min(largest, int(np.ceil(step / 16) * 16)) for step in steps})


def pack(tiles: Sequence[Tile], rows: int, tokens: int, latent_size: Size, config: MMDiTConfig) -> TokenBatch:
    """Packs up to `rows` tiles of at most `tokens` tokens each.

    Rows without a tile repeat the first tile with weight 0: finite numbers in, nothing out. Padding tokens repeat their
    own tile's first pixel, because another photograph's might not be finite, and 0 times that is not 0.

    Args:
      tiles: tiles whose sides are multiples of the patch size.
      rows: rows to make.
      tokens: tokens per row.
      latent_size: (h, w) of the batch of latents that the pixel indices refer to.
      config: for the patch size and the position table.
    """
    patch, area = config.patch_size, config.patch_size**2
    pixels = np.zeros((rows, tokens, area), np.int32)
    weights = np.zeros((rows, tokens, area), np.float32)
    positions, lengths = np.zeros((rows, tokens), np.int32), np.zeros((rows,), np.int32)
    for row in range(rows):
        tile = tiles[row] if row < len(tiles) else tiles[0]
        count = tile.height * tile.width // area
        pixels[row, :count] = _pixels(tile, latent_size, patch)
        pixels[row, count:] = pixels[row, 0, 0]
        positions[row, :count] = grid_positions(config, tile.height, tile.width)
        lengths[row] = count
        if row < len(tiles):
            weights[row, :count] = _patches(tile_weights(tile.height, tile.width), patch)
    return TokenBatch(len(tiles), pixels, weights, positions, lengths, needs_lengths=True)


def _pixels(tile: Tile, latent_size: Size, patch: int) -> np.ndarray:
    rows, columns = tile.top + np.arange(tile.height), tile.left + np.arange(tile.width)
    row_stride, column_stride = (1, latent_size[1]) if tile.portrait else (latent_size[1], 1)
    first = tile.image * latent_size[0] * latent_size[1]
    return _patches(first + rows[:, None] * row_stride + columns[None] * column_stride, patch)


def _patches(values: np.ndarray, patch: int) -> np.ndarray:
    """(h, w) -> (h/p · w/p, p·p), in the transformer's order of tokens and of pixels within one."""
    height, width = values.shape
    grid = values.reshape(height // patch, patch, width // patch, patch)
    return grid.transpose(0, 2, 1, 3).reshape(-1, patch * patch)


# ---- on the devices ---------------------------------------------------------------------------


def empty_sums(latents: jax.Array) -> jax.Array:
    """(B, h, w, C) -> (B, h, w, C + 1) float32 zeros, which `blend_tiles` adds to."""
    return jnp.zeros((*latents.shape[:3], latents.shape[3] + 1), jnp.float32)


def gather_patches(latents: jax.Array, pixels: jax.Array) -> jax.Array:
    """(B, h, w, C) and (n, T, p·p) flat pixel indices -> (n, T, p·p·C) patches."""
    flat = latents.reshape(-1, latents.shape[-1])
    return flat[pixels].reshape(*pixels.shape[:2], -1)


def blend_tiles(sums: jax.Array, velocity: jax.Array, pixels: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds weighted velocities, and the weights in the last channel, at each tile's pixels.

    It adds tile after tile, because a single scatter would add overlapping tiles in an undefined order on GPUs.

    Args:
      sums: (B, h, w, C + 1) float32.
      velocity: (n, T, p·p·C) float32.
      pixels, weights: (n, T, p·p).
    """
    tiles, channels = velocity.shape[0], sums.shape[-1] - 1
    values = velocity.reshape(tiles, -1, channels)
    pixels, weights = pixels.reshape(tiles, -1), weights.reshape(tiles, -1, 1)
    # Padding tokens have weight 0; what the network returned for them must not count even if infinite.
    values = jnp.where(weights > 0, values * weights, 0)

    def add(tile: jax.Array, flat: jax.Array) -> jax.Array:
        return flat.at[pixels[tile]].add(jnp.concatenate([values[tile], weights[tile]], axis=-1))

    flat = sums.reshape(-1, channels + 1)
    return jax.lax.fori_loop(0, tiles, add, flat).reshape(sums.shape)
