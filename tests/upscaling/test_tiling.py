"""Latent tiles: where they lie, how they are weighted, and that packing loses and invents nothing."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tsdsr_jax.models.mmdit import MMDiTConfig, grid_positions, patchify
from tsdsr_jax.upscaling.tiling import (
    Tile,
    TokenBatch,
    blend_tiles,
    cut,
    gather_patches,
    offsets,
    pack,
    tile_weights,
)

CONFIG = MMDiTConfig.tiny()


@pytest.mark.parametrize(
    ("length", "expected"),
    [(8, [0]), (63, [0]), (64, [0]), (65, [0, 1]), (120, [0, 56]), (121, [0, 56, 57]), (128, [0, 56, 64])],
)
def test_offsets_are_the_originals(length, expected):
    assert offsets(length, tile=64, overlap=8) == expected


@pytest.mark.parametrize(("tile", "overlap"), [(64, 8), (16, 4), (10, 8), (10, 0), (32, 31)])
def test_tiles_cover_everything_and_stay_inside(tile, overlap):
    for length in range(1, 5 * tile):
        starts = offsets(length, tile, overlap)
        assert starts[0] == 0 and starts == sorted(set(starts))
        assert starts[-1] == max(0, length - tile)
        assert all(0 < later - earlier <= tile - overlap for earlier, later in itertools.pairwise(starts))


def test_cut():
    assert cut(2, 64, 65, 64, 8) == [Tile(2, 0, 0, 64, 64), Tile(2, 0, 1, 64, 64)]
    assert cut(0, 40, 24, 64, 8) == [Tile(0, 0, 0, 40, 24)]
    # A side no longer than a tile stays whole: thin pictures are not cut into many small squares.
    assert cut(1, 32, 128, 64, 8, portrait=True) == [Tile(1, 0, left, 32, 64, True) for left in (0, 56, 64)]
    for height, width in [(64, 64), (130, 65), (17, 200), (1000, 40)]:
        covered = np.zeros((height, width), bool)
        for tile in cut(0, height, width, 64, 8):
            covered[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] = True
        assert covered.all()


def test_weights_follow_the_formula():
    bells = tile_weights(64, 48)
    assert bells.dtype == np.float32 and bells.shape == (64, 48)
    for row, column in [(0, 0), (32, 23), (31, 24), (63, 47), (10, 40)]:
        exponent = ((row - 32) / 64) ** 2 / 0.02 + ((column - 23.5) / 48) ** 2 / 0.02
        assert bells[row, column] == pytest.approx(math.exp(-exponent) / (2 * math.pi * 0.01), rel=1e-6)
    assert tile_weights(64, 64).max() == pytest.approx(15.9, abs=0.05)
    assert tile_weights(64, 64).min() == pytest.approx(3e-10, rel=0.15)


def test_weights_are_half_a_pixel_off_center_in_rows_only():
    bells = tile_weights(16, 16)
    np.testing.assert_array_equal(bells, bells[:, ::-1])
    np.testing.assert_allclose(
        bells[1:], bells[1:][::-1], rtol=1e-6
    )  # row 8 is the middle one, of rows 1 to 15
    assert not np.allclose(bells, bells[::-1])


def blended(velocities: list[np.ndarray], packs: list[TokenBatch], shape: tuple[int, int, int]) -> np.ndarray:
    """The weighted mean, (B, h, w, C + 1) with the sum of weights last, of tiles of velocities (n, T, p·p·C)."""
    sums = jnp.zeros((*shape, velocities[0].shape[2] // 4 + 1), jnp.float32)
    for velocity, packed in zip(velocities, packs, strict=True):
        sums = blend_tiles(sums, *map(jnp.asarray, (velocity, packed.pixels, packed.weights)))
    sums = np.array(sums)
    sums[..., :-1] /= np.where(sums[..., -1:] > 0, sums[..., -1:], 1)
    return sums


@pytest.mark.parametrize("portrait", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 12])
def test_the_identity_network_gives_the_latents_back(portrait, rows):
    # Several pictures of a batch, each smaller than the shared shape; odd offsets (17 = 16 + 1); a short last call.
    sizes = [(12, 17), (10, 12), (12, 23)]
    shape = (12, 23)
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((len(sizes), *shape, 4), dtype=np.float32)
    tiles = [
        tile
        for index, (short, long) in enumerate(sizes)
        for tile in cut(index, *((long, short) if portrait else (short, long)), 10, 3, portrait)
    ]
    tokens = 25 + 4
    assert len(tiles) == 12
    packs = [pack(tiles[start : start + rows], rows, tokens, shape, CONFIG) for start in range(0, 12, rows)]
    velocities = [gather_patches(jnp.asarray(latents), jnp.asarray(packed.pixels)) for packed in packs]
    result = blended(velocities, packs, latents.shape[:3])[..., :-1]
    for index, (height, width) in enumerate(sizes):
        np.testing.assert_allclose(
            result[index, :height, :width], latents[index, :height, :width], rtol=2e-6, atol=2e-6
        )
        # Nothing is written where the picture does not reach.
        assert not result[index, height:].any() and not result[index, :, width:].any()


def test_tokens_come_in_the_transformers_order():
    latents = np.random.default_rng(1).standard_normal((2, 14, 20, 4), dtype=np.float32)
    tile = Tile(1, 3, 5, 8, 12)
    packed = pack([tile], 1, 24, (14, 20), CONFIG)
    window = jnp.asarray(latents[1:2, 3:11, 5:17])
    patches = gather_patches(jnp.asarray(latents), jnp.asarray(packed.pixels))
    np.testing.assert_array_equal(patches, patchify(window, 2))
    np.testing.assert_array_equal(packed.positions[0], grid_positions(CONFIG, 8, 12))
    assert (packed.lengths == 24).all()


def test_a_portrait_is_read_upright_from_its_transposed_latent():
    upright = np.random.default_rng(2).standard_normal((1, 20, 14, 4), dtype=np.float32)
    lying = upright.swapaxes(1, 2)
    tile = Tile(0, 5, 3, 12, 8, portrait=True)
    packed = pack([tile], 1, 24, lying.shape[1:3], CONFIG)
    patches = gather_patches(jnp.asarray(lying), jnp.asarray(packed.pixels))
    np.testing.assert_array_equal(patches, patchify(jnp.asarray(upright[:, 5:17, 3:11]), 2))
    np.testing.assert_array_equal(packed.positions[0], grid_positions(CONFIG, 12, 8))
    assert packed.weights[0].reshape(-1).argmax() == _flat_patches(tile_weights(12, 8)).argmax()


def _flat_patches(values: np.ndarray) -> np.ndarray:
    return np.asarray(patchify(jnp.asarray(values)[None, ..., None], 2)).reshape(-1)


def test_padding_weighs_nothing_even_if_infinite():
    tiles = [Tile(0, 0, 0, 4, 4), Tile(0, 0, 2, 4, 6)]
    packed = pack(tiles, 3, 8, (4, 8), CONFIG)
    assert packed.lengths.tolist() == [4, 6, 4] and packed.needs_lengths
    assert not packed.weights[0, 4:].any() and not packed.weights[1, 6:].any() and not packed.weights[2].any()
    assert packed.weights[0, :4].all() and packed.weights[1, :6].all()
    np.testing.assert_array_equal(packed.pixels[2], packed.pixels[0])  # real numbers for the spare row
    assert packed.pixels[1, 0, 0] == 2 and (packed.pixels[1, 6:] == 2).all()  # of no other photograph

    velocity = np.ones((3, 8, 16), np.float32)
    velocity[0, 4:], velocity[1, 6:], velocity[2] = np.inf, np.nan, np.inf
    result = blended([velocity], [packed], (1, 4, 8))
    np.testing.assert_allclose(result[..., :-1], 1, rtol=1e-6)
    # Every weight arrives once: the second tile's over the first's, nothing twice.
    expected = np.pad(tile_weights(4, 4), ((0, 0), (0, 4))) + np.pad(tile_weights(4, 6), ((0, 0), (2, 0)))
    np.testing.assert_allclose(result[0, :, :, -1], expected, rtol=1e-6)


def test_overlaps_are_weighted_means():
    tiles = cut(0, 4, 7, 4, 1)
    assert [tile.left for tile in tiles] == [0, 3]
    packed = pack(tiles, 2, 4, (4, 7), CONFIG)
    velocity = np.stack([np.zeros((4, 16), np.float32), np.ones((4, 16), np.float32)])
    result = blended([velocity], [packed], (1, 4, 7))[0, :, :, 0]
    left, right = tile_weights(4, 4)[:, 3], tile_weights(4, 4)[:, 0]
    np.testing.assert_allclose(result[:, 3], right / (left + right), rtol=1e-6)
    assert not result[:, :3].any() and (result[:, 4:] == 1).all()
