"""Image → image: encode, one transformer step, decode, for a batch of photographs in one padded shape.

    z = encode(bicubic(photo)) · scaling_factor        (a posterior sample, or its mean)
    ẑ = z − v(z, t = 1000, prompt)
    result = colour fix(decode(ẑ / scaling_factor))

The arithmetic on the device is four small jitted functions; what depends on each photograph's size (resampling,
padding, tiles as index arrays, colour) happens on the host around them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from tsdsr_jax.devices import matmul_precision, memory_of
from tsdsr_jax.images import color
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.resize import bicubic, pillow_bicubic, reflect_pad
from tsdsr_jax.models.folded import EightBits, FoldedMMDiT, fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, STUDENT_TIMESTEP, Tree
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig, valid_mask, whole_image_bytes
from tsdsr_jax.upscaling import tiling
from tsdsr_jax.upscaling.sizes import SizePlan, in_two_sizes, plan_size, token_levels
from tsdsr_jax.weights.prompt_files import PromptEmbeds

_PHOTO_PIXELS = 512**2
_BANDS = ("encoder_band", "decoder_band", "whole_pixels")

Progress = Callable[[str, int, int], object]
"""Told of each stage of a batch ("encode", "tiles", "decode") with the steps done and their number."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How photographs are cut up and processed; the original's flags and defaults.

    Attributes:
      upscale: output size over input size, ≥ 1.
      process_size: smallest side, in output pixels, that is processed as it is.
      latent_tile, latent_overlap: transformer tiles, in latent pixels.
      tile_batch: tiles per device and transformer call.
      photo_batch: photographs of 512×512 output pixels per device and call; of larger ones fewer.
      encoder_band, decoder_band: sides (pixels, latent pixels) of the area that the autoencoder's convolutions
        compute at a time; None: the whole image.
      whole_pixels: a device's images of up to so many pixels together are computed whole all the same; None: those that the
        devices have memory for.
      sample: draw the latent from the encoder's posterior; otherwise take its mean.
    """

    upscale: float = 4.0
    process_size: int = 512
    latent_tile: int = 64
    latent_overlap: int = 8
    tile_batch: int = 1
    photo_batch: int = 1
    encoder_band: int | None = None
    decoder_band: int | None = None
    whole_pixels: int | None = 0
    sample: bool = True

    def plan(self, source: Size) -> SizePlan:
        """The sizes of a photograph of (height, width) `source`."""
        return plan_size(source, self.upscale, self.process_size, self.latent_tile)

    def photos_at_a_time(self, size: Size) -> int:
        """Photographs of (height, width) `size` that a device takes at most; smaller ones no more than of 512×512."""
        return max(1, min(self.photo_batch, self.photo_batch * _PHOTO_PIXELS // (size[0] * size[1])))


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A photograph ready for the device.

    Attributes:
      plan: its sizes.
      image: (H, W, 3) float32 in [−1, 1], `plan.padded` large, upright.
      noise: (H/8, W/8, latent channels) float32 for the posterior sample; zeros give its mean.
    """

    plan: SizePlan
    image: np.ndarray
    noise: np.ndarray


def latent_noise(content: bytes, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise that depends on the seed and the file's content, on nothing else."""
    digest = hashlib.sha256(seed.to_bytes(16, "little", signed=True) + content).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal(shape, dtype=np.float32)


def prepare(rgb: np.ndarray, plan: SizePlan, noise: np.ndarray) -> Prepared:
    """Bicubic interpolation (a = −0.75, in float32) of (H, W, 3) uint8 to the planned size, and padding."""
    image = bicubic(rgb.astype(np.float32) / 255, *plan.resized) * 2 - 1
    return Prepared(plan, reflect_pad(np.clip(image, -1, 1), *plan.padded), noise)


def finish(result: np.ndarray, rgb: np.ndarray, plan: SizePlan, align: color.AlignMethod) -> np.ndarray:
    """The network's picture, brought to the output size, with the photograph's colours.

    Args:
      result: (H, W, 3) uint8, `plan.padded` large.
      rgb: the photograph, (h, w, 3) uint8.

    Returns:
      `plan.output` large, uint8.
    """
    result = result[: plan.resized[0], : plan.resized[1]]
    if plan.output != plan.resized:
        result = pillow_bicubic(result, *plan.output)
    upscaled = pillow_bicubic(rgb, *plan.output) if align == "wavelet" else result
    return color.align(align, result, rgb, upscaled)


@dataclasses.dataclass(frozen=True, eq=False)
class Launched:
    """A batch under way on the device."""

    plans: list[SizePlan]
    bucket: Size
    masked: bool
    images: jax.Array
    finite: jax.Array

    @property
    def batch(self) -> int:
        """Pictures computed, repeated ones among them."""
        return self.images.shape[0]

    def results(self) -> list[np.ndarray | None]:
        """Waits; upright (H, W, 3) uint8 pictures, `plan.padded` large; None where values were not finite."""
        images, finite = np.asarray(self.images), np.asarray(self.finite)
        return [
            _laid(image, plan)[: plan.padded[0], : plan.padded[1]] if fine else None
            for image, fine, plan in zip(images, finite, self.plans, strict=False)
        ]


class Engine:
    """The two networks on their devices.

    Args:
      transformer, vae: configs and parameters; the adapters merged, kept in any dtype. Of the transformer only what is left
        at t = 1000 and for this prompt stays on the devices (`models.folded`), and where its parameters lie on the host no
        more than that and two layers ever come to them.
      prompt: text embeddings, of the widths that the transformer's config asks for.
      settings: see `Settings`.
      dtype: computation dtype.
      devices: photographs and tiles are spread over all of them.
      weights: keep the transformer's blocks in eight bits; None: in `dtype`.
    """

    def __init__(
        self,
        transformer: tuple[MMDiTConfig, Tree],
        vae: tuple[VAEConfig, Tree],
        prompt: PromptEmbeds,
        settings: Settings,
        dtype: DTypeLike,
        devices: Sequence[jax.Device],
        weights: EightBits | None = None,
    ):
        mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
        self.progress: Progress | None = None
        self._origin = self  # keeps what `with_settings` shares
        self.settings, self.devices = settings, list(devices)
        self._shared = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._configs = transformer[0], vae[0]
        self._transformer_params = fold(
            transformer[0],
            transformer[1],
            prompt.prompt,
            prompt.pooled,
            STUDENT_TIMESTEP,
            dtype,
            weights,
            self._shared,
        )
        self._vae_params = jax.device_put(vae[1], self._shared)
        self._compute_in(dtype)

    def _compute_in(self, dtype: DTypeLike) -> None:
        self.dtype = jnp.dtype(dtype)
        # "auto" looks at the default devices; these may be others.
        default = self.devices[0].platform == jax.default_backend()
        implementation = "auto" if default else "xla"
        self._transformer = FoldedMMDiT(self._configs[0], self.dtype, implementation=implementation)
        self._vae = AutoencoderKL(self._configs[1], self.dtype)
        jit = partial(jax.jit, out_shardings=self._shared)
        self.encode = jit(self._encode)
        self.gather = jax.jit(_gather, out_shardings=self._split)
        self.velocity = jax.jit(self._velocity, out_shardings=self._split)
        self.blend = jit(_blend, donate_argnums=0)
        self.decode = jax.jit(self._decode, out_shardings=self._split)

    @cached_property
    def whole_pixels(self) -> int:
        """Pixels of a device's images, together, up to which they are not computed in bands where bands are allowed."""
        if self.settings.whole_pixels is not None:
            return self.settings.whole_pixels
        per_pixel = whole_image_bytes(self._configs[1], self.dtype, self.devices[0].platform)
        return max(0, int((memory_of(self.devices[0]) - self.weight_bytes) / per_pixel))

    @property
    def weight_bytes(self) -> int:
        """What the parameters take on each device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self._transformer_params, self._vae_params)))

    def _band_pixels(self, band: int | None, batch: int, pixels: int) -> int | None:
        """Area computed at a time of each of a batch's images of `pixels`; None: the whole."""
        if band is None or batch // len(self.devices) * pixels <= self.whole_pixels:
            return None
        return band**2

    def largest_batch(self, bucket: Size) -> int:
        """As many photographs on each device as the settings allow.

        Where bands are allowed, no more than a device computes whole: in bands the edges are computed more than once.
        """
        settings = self.settings
        most = settings.photos_at_a_time(bucket)
        if most > 1 and (settings.encoder_band or settings.decoder_band):
            most = min(most, max(1, self.whole_pixels // (bucket[0] * bucket[1])))
        return len(self.devices) * most

    @property
    def latent_channels(self) -> int:
        return self._configs[1].latent_channels

    @property
    def largest_tile(self) -> int:
        """The longest side of a tile, in latent pixels, that the transformer has positions for."""
        return self._configs[0].pos_embed_max_size * self._configs[0].patch_size

    def with_settings(self, settings: Settings, progress: Progress | None = None) -> Engine:
        """The same networks under other settings; parameters and compiled programs are shared.

        Args:
          settings: the autoencoder's bands are part of its programs and must stay as they are.
          progress: called from `launch`, which then waits for every stage instead of returning at once.
        """
        if any(getattr(settings, name) != getattr(self.settings, name) for name in _BANDS):
            raise ValueError("the autoencoder's bands cannot change")
        other = copy.copy(self)
        other.settings, other.progress = settings, progress
        return other

    @property
    def in_float32(self) -> Engine:
        """The same networks computing in float32, for results that overflow in half precision."""
        return self._origin._in_float32.with_settings(self.settings, self.progress)

    @cached_property
    def _in_float32(self) -> Engine:
        other = copy.copy(self)
        other._origin = other
        other.__dict__.pop("whole_pixels", None)  # of half precision's memory
        other._compute_in(jnp.float32)
        return other

    @cached_property
    def _lying_vae_params(self) -> Tree:
        """The autoencoder that does to a transposed image what the other does to the image."""
        return jax.jit(_transpose_kernels, out_shardings=self._shared)(self._vae_params)

    def launch(
        self, photos: Sequence[Prepared], bucket: Size, *, masked: bool = False, batch: int | None = None
    ) -> Launched:
        """Starts a batch and returns at once.

        Args:
          photos: all portraits or none; at most `batch`.
          bucket: (height, width) with height ≤ width, no smaller than any `plan.lying`.
          masked: compute with masks in any case. A batch that fills its bucket needs none, but whether there are masks
            is part of which program is compiled: batches that share a bucket should agree.
          batch: a multiple of the number of devices, up to which photographs are repeated; part of the program, too.
            Default: one photograph per device.
        """
        plans = [photo.plan for photo in photos]
        batch = batch or len(self.devices)
        if len(photos) > batch:
            raise ValueError(f"{len(photos)} photographs of {bucket}, expected at most {batch}")
        filled = [*photos, *[photos[0]] * (batch - len(photos))]
        params = self._origin._lying_vae_params if plans[0].portrait else self._vae_params
        latent_bucket = bucket[0] // LATENT_FACTOR, bucket[1] // LATENT_FACTOR
        sizes = np.asarray([photo.plan.lying for photo in filled], np.int32)
        masked = masked or any(plan.lying != bucket for plan in plans)
        images = self._put(np.stack([_corner(_laid(photo.image, photo.plan), bucket) for photo in filled]))
        noise = self._put(
            np.stack([_corner(_laid(photo.noise, photo.plan), latent_bucket) for photo in filled])
        )
        valid = self._put(sizes) if masked else None
        with matmul_precision(self.dtype):
            self._tell("encode", 0, 1)
            latents = self.encode(params, images, noise, valid)
            sums = self._denoise(latents, plans)
            self._tell("decode", 0, 1)
            pictures, finite = self.decode(params, latents, sums, valid)
            self._tell("decode", 1, 1, pictures)
        return Launched(plans, bucket, masked, pictures, finite)

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self._split)

    def _tell(self, stage: str, done: int, total: int, result: jax.Array | None = None) -> None:
        """Reports progress, once `result` is there."""
        if self.progress is not None:
            jax.block_until_ready(result)
            self.progress(stage, done, total)

    def _denoise(self, latents: jax.Array, plans: Sequence[SizePlan]) -> jax.Array:
        """Runs all tiles of a batch; returns what `_blend` accumulates."""
        settings, config = self.settings, self._configs[0]
        tiles = [
            tile
            for index, plan in enumerate(plans)
            for tile in tiling.cut(
                index, *plan.latent, settings.latent_tile, settings.latent_overlap, plan.portrait
            )
        ]
        largest = (settings.latent_tile // config.patch_size) ** 2
        sums = jnp.zeros((*latents.shape[:3], latents.shape[3] + 1), jnp.float32, device=self._shared)
        few, done = len(self.devices), 0
        self._tell("tiles", done, len(tiles), latents)
        for tokens, members in self._by_tokens(tiles):
            for chunk, size in in_two_sizes(members, few, few * settings.tile_batch):
                packed = tiling.pack(chunk, size, tokens, latents.shape[1:3], config)
                pixels, positions, lengths = map(self._put, (packed.pixels, packed.positions, packed.lengths))
                patches = self.gather(latents, pixels)
                # Lengths or none are two programs; at all but the largest size the cheaper one is not worth it.
                lengths = None if packed.full and tokens == largest else lengths
                velocity = self.velocity(self._transformer_params, patches, positions, lengths)
                sums = self.blend(sums, velocity, packed.pixels, packed.weights)
                done += len(chunk)
                self._tell("tiles", done, len(tiles), sums)
        return sums

    def _by_tokens(self, tiles: Sequence[tiling.Tile]) -> list[tuple[int, list[tiling.Tile]]]:
        """Groups tiles by the padded token count they are computed at."""
        patch, settings = self._configs[0].patch_size, self.settings
        shortest = max(patch, min(settings.latent_tile, settings.process_size // LATENT_FACTOR))
        levels = token_levels((shortest // patch) ** 2, (settings.latent_tile // patch) ** 2)
        groups: dict[int, list[tiling.Tile]] = {}
        for tile in tiles:
            tokens = tile.height * tile.width // patch**2
            groups.setdefault(next(level for level in levels if level >= tokens), []).append(tile)
        return sorted(groups.items())

    def _encode(
        self, params: Tree, images: jax.Array, noise: jax.Array, valid: jax.Array | None
    ) -> jax.Array:
        """(B, H, W, 3) in [−1, 1] -> (B, h, w, C) float32 latents times the scaling factor."""
        batch, height, width, _ = images.shape
        band = self._band_pixels(self.settings.encoder_band, batch, height * width)
        posterior = self._vae.apply({"params": params}, images, valid, band, method="encode")
        return posterior.sample(noise) * self._configs[1].scaling_factor

    def _velocity(
        self,
        params: Tree,
        patches: jax.Array,
        positions: jax.Array,
        lengths: jax.Array | None,
    ) -> jax.Array:
        """(n, T, p·p·C) -> (n, T, p·p·C) float32 velocities at t = 1000."""
        return self._transformer.apply({"params": params}, patches, positions, lengths).astype(jnp.float32)

    def _decode(
        self, params: Tree, latents: jax.Array, sums: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (B, H, W, 3) uint8 pictures and (B,) whether all their valid values were finite."""
        latent_valid = None if valid is None else valid // LATENT_FACTOR
        velocity = sums[..., :-1] / jnp.where(sums[..., -1:] > 0, sums[..., -1:], 1)
        batch, height, width, _ = latents.shape
        band = self._band_pixels(self.settings.decoder_band, batch, height * width * LATENT_FACTOR**2)
        decoded = self._vae.apply(
            {"params": params},
            (latents - velocity) / self._configs[1].scaling_factor,
            latent_valid,
            band,
            method="decode",
        ).astype(jnp.float32)
        finite = jnp.isfinite(decoded)
        if valid is not None:
            finite |= ~valid_mask(valid, decoded.shape[1:3])
        # Truncated, not rounded: so does the original.
        pictures = (jnp.clip(decoded, -1, 1) * 0.5 + 0.5) * 255
        return pictures.astype(jnp.uint8), finite.all((1, 2, 3))


def _gather(latents: jax.Array, pixels: jax.Array) -> jax.Array:
    """(B, h, w, C) and (n, T, p·p) flat pixel indices -> (n, T, p·p·C) patches."""
    flat = latents.reshape(-1, latents.shape[-1])
    return flat[pixels].reshape(*pixels.shape[:2], -1)


def _blend(sums: jax.Array, velocity: jax.Array, pixels: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds weighted velocities, and the weights in the last channel, at each tile's pixels.

    Tile after tile: a single scatter would add overlapping tiles in an order that GPUs do not fix.

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


def _transpose_kernels(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)


def _laid(array: np.ndarray, plan: SizePlan) -> np.ndarray:
    """Lays a portrait on its side, or sets it up again."""
    return array.swapaxes(0, 1) if plan.portrait else array


def _corner(array: np.ndarray, size: Size) -> np.ndarray:
    """The array in the top left corner of zeros."""
    result = np.zeros((*size, *array.shape[2:]), array.dtype)
    result[: array.shape[0], : array.shape[1]] = array
    return result
