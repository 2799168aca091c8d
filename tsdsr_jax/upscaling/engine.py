"""Image → image on the devices: encode, one transformer step, decode, for a batch in one padded shape.

    z = encode(bicubic(photo)) · scaling_factor        (a posterior sample, or its mean)
    ẑ = z − v(z, t = 1000, prompt)
    picture = decode(ẑ / scaling_factor)

`LoadedNetworks` holds the parameters, `Engine` the jitted functions; neither changes. The settings of a call are arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from tsdsr_jax.devices import compiler_options, matmul_precision, memory_of
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.models.folded import FoldedMMDiT, ParamTree
from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import LATENT_FACTOR, Tree
from tsdsr_jax.models.vae import AutoencoderKL, Posterior, VAEConfig, valid_mask, whole_image_bytes
from tsdsr_jax.upscaling import tiling
from tsdsr_jax.upscaling.enlarging import Enlargement, enlarge, plan_enlargement, source_shape
from tsdsr_jax.upscaling.planning import Settings, SizePlan

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
      image: (h, w, 3) uint8, the photograph itself, upright.
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


class _SentPhotos(NamedTuple):
    """A batch of photographs on the devices."""

    pixels: jax.Array
    noise: jax.Array
    enlargement: Enlargement


class _SentTiles(NamedTuple):
    """A `tiling.TokenBatch` on the devices; without lengths where the transformer does not need them."""

    tiles: int
    pixels: jax.Array
    weights: jax.Array
    positions: jax.Array
    lengths: jax.Array | None


def shared_sharding(devices: Sequence[jax.Device]) -> NamedSharding:
    """Each device has the whole array."""
    return NamedSharding(jax.sharding.Mesh(np.asarray(devices), ("data",)), PartitionSpec())


class LoadedNetworks:
    """Both networks' configs and parameters, on their devices.

    Args:
      transformer: config, and parameters as `models.folded` makes them for t = 1000 and a prompt.
      vae: config and parameters, with adapters merged.
      devices: photographs and tiles are spread over all of them.
    """

    def __init__(
        self,
        transformer: tuple[MMDiTConfig, ParamTree],
        vae: tuple[VAEConfig, Tree],
        devices: Sequence[jax.Device],
    ):
        self.devices = list(devices)
        self.shared = shared_sharding(devices)
        self.split = NamedSharding(self.shared.mesh, PartitionSpec("data"))
        self.transformer_config, self.vae_config = transformer[0], vae[0]
        self.receive(transformer[1], vae[1])

    def receive(self, transformer: ParamTree, vae: Tree) -> None:
        """Takes other parameters, or their shapes: with these, programs can be compiled but not run."""
        self.transformer: ParamTree = _placed(transformer, self.shared)
        self.vae: Tree = _placed(vae, self.shared)
        self.__dict__.pop("lying_vae", None)

    @cached_property
    def lying_vae(self) -> Tree:
        """The autoencoder's parameters for transposed images."""
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self.vae)):
            return _placed(jax.eval_shape(_transpose_kernels, self.vae), self.shared)
        transposed: Tree = jax.jit(_transpose_kernels, out_shardings=self.shared)(self.vae)
        return transposed

    @property
    def nbytes(self) -> int:
        """Memory of the parameters on each device, in bytes."""
        leaves = jax.tree.leaves((self.transformer, self.vae))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    """Puts arrays on their devices, and tells shapes where their arrays will be."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


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
    def in_bands(self) -> Engine | None:
        """The same networks, with every picture computed in bands; None if this engine cannot or already does so."""
        if self.whole_pixels == 0 or not (self.bands.encoder or self.bands.decoder):
            return None
        return dataclasses.replace(self, bands=dataclasses.replace(self.bands, whole_pixels=0))

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
        sent = self._send_photos(filled, bucket, settings)
        params = self.networks.lying_vae if plans[0].portrait else self.networks.vae
        masked = masked or any(plan.lying != bucket for plan in plans)
        valid = sent.enlargement.padded if masked else None
        with matmul_precision(self.dtype):
            _tell(progress, "encode", 0, 1)
            latents = self.encode(params, self.enlarge(sent.pixels, sent.enlargement), sent.noise, valid)
            sums = self.denoise(latents, plans, settings, progress)
            _tell(progress, "decode", 0, 1)
            pictures, finite = self.decode(params, latents, sums, valid)
            _tell(progress, "decode", 1, 1, pictures)
        # The copies start as soon as the results are there, while the device computes the next batch.
        pictures.copy_to_host_async()
        finite.copy_to_host_async()
        return Launched(plans, bucket, masked, pictures, finite)

    def denoise(
        self,
        latents: jax.Array,
        plans: Sequence[SizePlan],
        settings: Settings,
        progress: Progress | None = None,
    ) -> jax.Array:
        """Runs all tiles of a batch of latents (B, h, w, C); returns the sums that `blend` accumulates."""
        height, width = latents.shape[1:3]
        calls = self._tiles(tuple(plans), settings, (height, width))
        done, total = 0, sum(call.tiles for call in calls)
        sums = self.empty_sums(latents)
        _tell(progress, "tiles", done, total, latents)
        for call in calls:
            patches = self.gather(latents, call.pixels)
            velocity = self.velocity(self.networks.transformer, patches, call.positions, call.lengths)
            sums = self.blend(sums, velocity, call.pixels, call.weights)
            done += call.tiles
            _tell(progress, "tiles", done, total, sums)
        return sums

    @cached_property
    def _tiles(self) -> Callable[[tuple[SizePlan, ...], Settings, Size], list[_SentTiles]]:
        """The tiles of a batch, on the devices. They stay there for the next batches, which often have the same."""
        return lru_cache(maxsize=4)(self._send_tiles)

    def _send_tiles(
        self, plans: tuple[SizePlan, ...], settings: Settings, latent_size: Size
    ) -> list[_SentTiles]:
        tiles = tiling.cut_batch(plans, settings)
        config = self.networks.transformer_config
        calls = tiling.pack_batches(tiles, settings, len(self.devices), latent_size, config)
        return [
            _SentTiles(
                call.tiles,
                self._put(call.pixels),
                self._put(call.weights),
                self._put(call.positions),
                self._put(call.lengths) if call.needs_lengths else None,
            )
            for call in calls
        ]

    def _send_photos(self, photos: Sequence[Prepared], bucket: Size, settings: Settings) -> _SentPhotos:
        plans = [photo.plan for photo in photos]
        latent_bucket = bucket[0] // LATENT_FACTOR, bucket[1] // LATENT_FACTOR
        pixels = _stack([photo.image for photo in photos], plans, source_shape(bucket, settings.upscale))
        noise = _stack([photo.noise for photo in photos], plans, latent_bucket)
        enlargement = jax.tree.map(self._put, plan_enlargement(plans, bucket))
        return _SentPhotos(self._put(pixels), self._put(noise), enlargement)

    def _put(self, array: np.ndarray) -> jax.Array:
        """Sends an array to the devices, split over them."""
        return jax.device_put(array, self.networks.split)

    # ---- the programs ------------------------------------------------------------------------

    def _jit(self, function: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
        return jax.jit(function, out_shardings=sharding, compiler_options=compiler_options(self.devices[0]))

    @cached_property
    def enlarge(self) -> Callable[[jax.Array, Enlargement], jax.Array]:
        return jax.jit(enlarge, out_shardings=self.networks.split)

    @cached_property
    def encode(self) -> Callable[..., jax.Array]:
        return self._jit(self._encode, self.networks.shared)

    @cached_property
    def empty_sums(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(tiling.empty_sums, out_shardings=self.networks.shared)

    @cached_property
    def gather(self) -> Callable[..., jax.Array]:
        return jax.jit(tiling.gather_patches, out_shardings=self.networks.split)

    @cached_property
    def velocity(self) -> Callable[..., jax.Array]:
        return self._jit(self._velocity, self.networks.split)

    @cached_property
    def blend(self) -> Callable[..., jax.Array]:
        return jax.jit(tiling.blend_tiles, donate_argnums=0, out_shardings=self.networks.shared)

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


def _stack(arrays: Sequence[np.ndarray], plans: Sequence[SizePlan], size: Size) -> np.ndarray:
    """Lays portraits on their side, pads all to this size with zeros at the bottom and on the right, and stacks them."""
    result = np.zeros((len(arrays), *size, arrays[0].shape[2]), arrays[0].dtype)
    for padded, array, plan in zip(result, arrays, plans, strict=True):
        laid = _laid(array, plan)
        padded[: laid.shape[0], : laid.shape[1]] = laid
    return result
