"""Image → image on the devices: encode, one transformer step, decode, for a batch in one padded shape.

    z = encode(bicubic(photo)) · scaling_factor        (a posterior sample, or its mean)
    ẑ = z − v(z, t = 1000, prompt)
    picture = decode(ẑ / scaling_factor)

`LoadedNetworks` holds the parameters, `Engine` the jitted functions; neither changes. The settings of a call are arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from tsdsr_jax.devices import compiler_options, matmul_precision, memory_of
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.models.folded import FoldedMMDiT, fold
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, STUDENT_TIMESTEP, Tree
from tsdsr_jax.models.vae import AutoencoderKL, Posterior, VAEConfig, valid_mask, whole_image_bytes
from tsdsr_jax.upscaling import tiling
from tsdsr_jax.upscaling.planning import Settings, SizePlan
from tsdsr_jax.weights.prompt_files import PromptEmbeds

Progress = Callable[[str, int, int], object]
"""Called with each stage of a batch ("encode", "tiles", "decode"), the steps done, and their number."""


@dataclasses.dataclass(frozen=True)
class Bands:
    """How much of an image the autoencoder's convolutions compute at a time.

    Attributes:
      encoder: a band of rows has about this number of pixels, squared; None: the whole image.
      decoder: the same for decoding, in latent pixels.
      whole_pixels: up to this many pixels in total, a device's images are computed whole. None: as many as fit into
        the device's memory.
    """

    encoder: int | None = None
    decoder: int | None = None
    whole_pixels: int | None = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """A photograph ready for the device.

    Attributes:
      plan: its sizes.
      image: (H, W, 3) float32 in [−1, 1], of size `plan.padded`, upright.
      noise: (H/8, W/8, latent channels) float32 for the posterior sample; zeros give the mean.
    """

    plan: SizePlan
    image: np.ndarray
    noise: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Launched:
    """A batch that the device is computing."""

    plans: list[SizePlan]
    bucket: Size
    masked: bool
    images: jax.Array
    finite: jax.Array

    @property
    def batch(self) -> int:
        """Number of pictures computed, repeated ones included."""
        return self.images.shape[0]

    def results(self) -> list[np.ndarray | None]:
        """Waits for upright (H, W, 3) uint8 pictures of size `plan.padded`; None where a value was not finite."""
        images, finite = np.asarray(self.images), np.asarray(self.finite)
        return [
            _laid(image, plan)[: plan.padded[0], : plan.padded[1]] if fine else None
            for image, fine, plan in zip(images, finite, self.plans, strict=False)
        ]


class LoadedNetworks:
    """Both networks' configs and parameters, on their devices.

    Args:
      transformer, vae: configs and parameters; adapters merged, in any dtype. The devices keep only the part of the
      transformer that is needed at t = 1000 and for this prompt (`models.folded`). If the parameters are on the host, the
      devices never hold more than that part and two layers.
      prompt: text embeddings of the widths in the transformer's config.
      dtype: dtype in which the transformer is kept.
      devices: photographs and tiles are spread over all of them.
      weights: keep the transformer's blocks in eight bits; None: in `dtype`.
    """

    def __init__(
        self,
        transformer: tuple[MMDiTConfig, Tree],
        vae: tuple[VAEConfig, Tree],
        prompt: PromptEmbeds,
        dtype: DTypeLike,
        devices: Sequence[jax.Device],
        weights: EightBits | None = None,
    ):
        mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
        self.devices = list(devices)
        self.shared = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec("data"))
        self.transformer_config, self.vae_config = transformer[0], vae[0]
        self.transformer = fold(
            *transformer, prompt.prompt, prompt.pooled, STUDENT_TIMESTEP, dtype, weights, self.shared
        )
        self.vae: Tree = jax.device_put(vae[1], self.shared)

    @cached_property
    def lying_vae(self) -> Tree:
        """The autoencoder's parameters for transposed images."""
        transposed: Tree = jax.jit(_transpose_kernels, out_shardings=self.shared)(self.vae)
        return transposed

    @property
    def nbytes(self) -> int:
        """Memory of the parameters on each device, in bytes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.transformer, self.vae)))


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """The compiled programs of both networks, in one computation dtype and with fixed bands.

    Attributes:
      networks: the parameters, which engines may share.
      bands: how much of an image the autoencoder computes at a time.
      dtype: computation dtype.
    """

    networks: LoadedNetworks
    bands: Bands
    dtype: DTypeLike

    @property
    def devices(self) -> list[jax.Device]:
        return self.networks.devices

    @property
    def latent_channels(self) -> int:
        return self.networks.vae_config.latent_channels

    @property
    def largest_tile(self) -> int:
        """The longest side of a tile, in latent pixels, that the transformer has positions for."""
        config = self.networks.transformer_config
        return config.pos_embed_max_size * config.patch_size

    @cached_property
    def in_float32(self) -> Engine:
        """The same networks computing in float32, for results that overflow in half precision."""
        return dataclasses.replace(self, dtype=jnp.float32)

    @cached_property
    def whole_pixels(self) -> int:
        """The most pixels, in total, of a device's images that are computed whole instead of in bands."""
        if self.bands.whole_pixels is not None:
            return self.bands.whole_pixels
        device = self.devices[0]
        per_pixel = whole_image_bytes(self.networks.vae_config, self.dtype, device.platform)
        return max(0, int((memory_of(device) - self.networks.nbytes) / per_pixel))

    def largest_batch(self, bucket: Size, settings: Settings) -> int:
        """The number of photographs that the settings allow in a batch, on all devices together.

        If bands are allowed, a device gets no more than it computes whole, because bands compute their edges more than once.
        """
        most = settings.photos_at_a_time(bucket)
        if most > 1 and (self.bands.encoder or self.bands.decoder):
            most = min(most, max(1, self.whole_pixels // (bucket[0] * bucket[1])))
        return len(self.devices) * most

    def launch(
        self,
        photos: Sequence[Prepared],
        bucket: Size,
        settings: Settings,
        *,
        masked: bool = False,
        batch: int | None = None,
        progress: Progress | None = None,
    ) -> Launched:
        """Starts a batch and returns at once.

        Args:
          photos: either all portraits or none; at most `batch`.
          bucket: (height, width) with height ≤ width, no smaller than any `plan.lying`.
          settings: those that the photographs were planned with.
          masked: compute with masks even if the batch fills its bucket. Masks make another program, so batches that share a
            bucket should all use them or not.
          batch: number of photographs to compute, a multiple of the number of devices; photographs are repeated up to it.
            Each number is another program. Default: one photograph per device.
          progress: called at every stage; `launch` then waits for each instead of returning at once.
        """
        plans = [photo.plan for photo in photos]
        batch = batch or len(self.devices)
        if len(photos) > batch:
            raise ValueError(f"{len(photos)} photographs of {bucket}, expected at most {batch}")
        filled = [*photos, *[photos[0]] * (batch - len(photos))]
        latent_bucket = bucket[0] // LATENT_FACTOR, bucket[1] // LATENT_FACTOR
        params = self.networks.lying_vae if plans[0].portrait else self.networks.vae
        images = self._put(np.stack([_corner(_laid(photo.image, photo.plan), bucket) for photo in filled]))
        noise = self._put(
            np.stack([_corner(_laid(photo.noise, photo.plan), latent_bucket) for photo in filled])
        )
        masked = masked or any(plan.lying != bucket for plan in plans)
        sizes = np.asarray([photo.plan.lying for photo in filled], np.int32)
        valid = self._put(sizes) if masked else None
        with matmul_precision(self.dtype):
            _tell(progress, "encode", 0, 1)
            latents = self.encode(params, images, noise, valid)
            sums = self.denoise(latents, plans, settings, progress)
            _tell(progress, "decode", 0, 1)
            pictures, finite = self.decode(params, latents, sums, valid)
            _tell(progress, "decode", 1, 1, pictures)
        return Launched(plans, bucket, masked, pictures, finite)

    def denoise(
        self,
        latents: jax.Array,
        plans: Sequence[SizePlan],
        settings: Settings,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Runs all tiles of a batch of latents (B, h, w, C); returns the sums that `blend` accumulates."""
        config, devices = self.networks.transformer_config, len(self.devices)
        batch, height, width, channels = latents.shape
        tiles = tiling.cut_batch(plans, settings)
        sums = jnp.zeros((batch, height, width, channels + 1), jnp.float32, device=self.networks.shared)
        done = 0
        _tell(progress, "tiles", done, len(tiles), latents)
        for packed in tiling.pack_batches(tiles, settings, devices, (height, width), config):
            patches = self.gather(latents, self._put(packed.pixels))
            lengths = self._put(packed.lengths) if packed.needs_lengths else None
            velocity = self.velocity(self.networks.transformer, patches, self._put(packed.positions), lengths)
            sums = self.blend(sums, velocity, packed.pixels, packed.weights)
            done += packed.tiles
            _tell(progress, "tiles", done, len(tiles), sums)
        return sums

    def _put(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.networks.split)

    # ---- the programs ------------------------------------------------------------------------

    def _jit(self, function: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
        return jax.jit(function, out_shardings=sharding, compiler_options=compiler_options(self.devices[0]))

    @cached_property
    def encode(self) -> Callable[..., jax.Array]:
        return self._jit(self._encode, self.networks.shared)

    @cached_property
    def gather(self) -> Callable[..., jax.Array]:
        return jax.jit(_gather, out_shardings=self.networks.split)

    @cached_property
    def velocity(self) -> Callable[..., jax.Array]:
        return self._jit(self._velocity, self.networks.split)

    @cached_property
    def blend(self) -> Callable[..., jax.Array]:
        return jax.jit(_blend, donate_argnums=0, out_shardings=self.networks.shared)

    @cached_property
    def decode(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        return self._jit(self._decode, self.networks.split)

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        return AutoencoderKL(self.networks.vae_config, self.dtype)

    @cached_property
    def _transformer(self) -> FoldedMMDiT:
        # "auto" looks at the default devices; these may be others.
        default = self.devices[0].platform == jax.default_backend()
        return FoldedMMDiT(
            self.networks.transformer_config, self.dtype, implementation="auto" if default else "xla"
        )

    def _encode(
        self, params: Tree, images: jax.Array, noise: jax.Array, valid: jax.Array | None
    ) -> jax.Array:
        """(B, H, W, 3) in [−1, 1] -> (B, h, w, C) float32 latents times the scaling factor."""
        batch, height, width, _ = images.shape
        band = self._band_pixels(self.bands.encoder, batch, height * width)
        posterior = self._autoencoder.apply({"params": params}, images, valid, band, method="encode")
        assert isinstance(posterior, Posterior)
        return posterior.sample(noise) * self.networks.vae_config.scaling_factor

    def _velocity(
        self, params: Tree, patches: jax.Array, positions: jax.Array, lengths: jax.Array | None
    ) -> jax.Array:
        """(n, T, p·p·C) -> (n, T, p·p·C) float32 velocities at t = 1000."""
        velocity = self._transformer.apply({"params": params}, patches, positions, lengths)
        assert isinstance(velocity, jax.Array)
        return velocity.astype(jnp.float32)

    def _decode(
        self, params: Tree, latents: jax.Array, sums: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (B, H, W, 3) uint8 pictures and (B,) whether all their valid values were finite."""
        latent_valid = None if valid is None else valid // LATENT_FACTOR
        velocity = sums[..., :-1] / jnp.where(sums[..., -1:] > 0, sums[..., -1:], 1)
        batch, height, width, _ = latents.shape
        band = self._band_pixels(self.bands.decoder, batch, height * width * LATENT_FACTOR**2)
        decoded = self._autoencoder.apply(
            {"params": params},
            (latents - velocity) / self.networks.vae_config.scaling_factor,
            latent_valid,
            band,
            method="decode",
        )
        assert isinstance(decoded, jax.Array)
        decoded = decoded.astype(jnp.float32)
        finite = jnp.isfinite(decoded)
        if valid is not None:
            finite |= ~valid_mask(valid, (height * LATENT_FACTOR, width * LATENT_FACTOR))
        # Truncated, not rounded, as in the original.
        pictures = (jnp.clip(decoded, -1, 1) * 0.5 + 0.5) * 255
        return pictures.astype(jnp.uint8), finite.all((1, 2, 3))

    def _band_pixels(self, band: int | None, batch: int, pixels: int) -> int | None:
        """Pixels of a band, for a batch of images with `pixels` each; None if a device's images are computed whole."""
        if band is None or batch // len(self.devices) * pixels <= self.whole_pixels:
            return None
        return band**2


def _gather(latents: jax.Array, pixels: jax.Array) -> jax.Array:
    """(B, h, w, C) and (n, T, p·p) flat pixel indices -> (n, T, p·p·C) patches."""
    flat = latents.reshape(-1, latents.shape[-1])
    return flat[pixels].reshape(*pixels.shape[:2], -1)


def _blend(sums: jax.Array, velocity: jax.Array, pixels: jax.Array, weights: jax.Array) -> jax.Array:
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


def _transpose_kernels(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)


def _tell(
    progress: Progress | None, stage: str, done: int, total: int, result: jax.Array | None = None
) -> None:
    """Reports progress, once `result` has been computed."""
    if progress is not None:
        jax.block_until_ready(result)
        progress(stage, done, total)


def _laid(array: np.ndarray, plan: SizePlan) -> np.ndarray:
    """Lays a portrait on its side, or turns it upright again."""
    return array.swapaxes(0, 1) if plan.portrait else array


def _corner(array: np.ndarray, size: Size) -> np.ndarray:
    """Pads the array to this size with zeros at the bottom and on the right."""
    result = np.zeros((*size, *array.shape[2:]), array.dtype)
    result[: array.shape[0], : array.shape[1]] = array
    return result
