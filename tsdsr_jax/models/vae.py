"""SD3's autoencoder (AutoencoderKL) as Flax modules, exact on padded inputs and in bands.

Axes: B batch, H W image or feature height and width, h w latent height and width (= H/8, W/8), C channels.

It has two properties that the plain network does not have:
- `valid` sizes: images of several sizes share one padded shape and so one compiled program. Group norms measure valid
  pixels only; padding is zeroed before every convolution and masked out of the mid block's attention. The valid region
  equals the unpadded result up to rounding.
- `band_pixels`: convolutions run over bands of rows, so that no normalized, padded or up-sampled copy of a large feature
  map is ever held. Group norms and attention still see the whole image, so this is exact, too: no tiles, no seams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.models.attention import single_head_attention
from tsdsr_jax.models.banding import FeatureMap, materialized, zeros_after
from tsdsr_jax.models.layers import Conv, Dense, GroupNorm, Placement, Prepare, gathered


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The checkpoint's `vae/config.json`; defaults are SD3's.

    Attributes:
      mid_block_add_attention: SD3's autoencoder attends to the whole image in its mid blocks. One that is trained on small
        crops does better without: its attention would meet more pixels in photographs than it was trained on.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 1.5305
    shift_factor: float | None = 0.0609
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VAEConfig:
        """Reads a diffusers config.

        Raises:
          ValueError: the autoencoder has parts that SD3's lacks.
        """
        # A missing key means diffusers' default, which is not SD3's choice for the quant convolutions.
        expected = {"use_quant_conv": (True, False), "use_post_quant_conv": (True, False),
                    "act_fn": ("silu", "silu")}  # fmt: skip
        for key, (default, wanted) in expected.items():
            if values.get(key, default) != wanted:
                raise ValueError(f"{key} is {values.get(key, default)!r}; SD3's autoencoder has {wanted!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known}
        chosen["block_out_channels"] = tuple(chosen.get("block_out_channels", cls.block_out_channels))
        return cls(**chosen)

    @classmethod
    def sd3(cls) -> VAEConfig:
        return cls()

    @classmethod
    def tiny(cls, **overrides: Any) -> VAEConfig:
        """A few ten thousand parameters, for tests and rehearsals."""
        small: dict[str, Any] = dict(block_out_channels=(16, 16, 32, 32), norm_num_groups=8)
        return cls(**(small | overrides))

    @property
    def factor(self) -> int:
        """Pixels that a latent pixel spans on each axis."""
        return 2 ** (len(self.block_out_channels) - 1)


def whole_image_bytes(config: VAEConfig, dtype: DTypeLike, platform: str) -> float:
    """An estimate of the peak memory per image pixel when encoding or decoding without bands.

    The decoder needs the most. For SD3's, XLA plans ten times the second width in float32, 2560 bytes, and half of it in
    float16 on GPUs, for any size and batch. GPUs get a fifth more: 30 bytes for images that come and go, and the rest for
    the workspaces of libraries and gaps between arrays. Others get a half more. On CPUs jax 0.10 plans 3600 bytes, and half
    precision takes more, because it is computed in float32.
    """
    widest = max(2 * config.block_out_channels[0], *config.block_out_channels[1:2])
    item = 5 if platform == "cpu" else jnp.dtype(dtype).itemsize
    return (1.2 if platform == "gpu" else 1.5) * 2.5 * widest * item


def banded_image_bytes(config: VAEConfig, dtype: DTypeLike, platform: str) -> float:
    """An estimate of the peak memory per image pixel in bands of the default size, for images of some megapixels.

    Bands take 0.51 (4096×4096) to 0.55 (2048×2048) of what XLA plans for the whole image.
    """
    margin = 1.2 if platform == "gpu" else 1.5
    return 0.56 * whole_image_bytes(config, dtype, platform) / margin


class Posterior(NamedTuple):
    """The encoder's Gaussian, both (B, h, w, latent_channels) float32; not multiplied by the scaling factor."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, noise: jax.Array) -> jax.Array:
        """mean + std · noise, noise of the mean's shape and standard normal."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


def valid_mask(valid: jax.Array, shape: Sequence[int], first_row: jax.Array | int = 0) -> jax.Array:
    """(B, 2) valid (rows, columns) -> (B, *shape, 1) bool, beginning at row `first_row`."""
    rows = first_row + jnp.arange(shape[0])
    inside = (rows[None, :, None] < valid[:, 0, None, None]) & (
        jnp.arange(shape[1])[None, None] < valid[:, 1, None, None]
    )
    return inside[..., None]


def normalize(affine: tuple[jax.Array, jax.Array] | None, valid: jax.Array | None) -> Prepare:
    """Prepares the input of a convolution: group norm and SiLU if a norm is given, then zeros in the padding."""

    def prepare(rows: jax.Array, first_row: jax.Array | int) -> jax.Array:
        if affine is not None:
            rows = nn.silu(rows.astype(jnp.float32) * affine[0] + affine[1])
        if valid is not None:
            rows = jnp.where(valid_mask(valid, rows.shape[1:3], first_row), rows, 0)
        return rows

    return prepare


class NormSiluConv(NamedTuple):
    """Group norm, SiLU and a 3×3 convolution, from which most of the network is built."""

    norm: GroupNorm
    conv: Conv

    def __call__(
        self, x: FeatureMap, valid: jax.Array | None, band_pixels: int | None, add: jax.Array | None = None
    ) -> jax.Array:
        mask = None if valid is None else valid_mask(valid, x.shape[1:3])
        affine = self.norm(x, mask, band_pixels)
        return materialized(self.conv(x, normalize(affine, valid), band_pixels, add))


class ResnetBlock(nn.Module):
    """x + two (norm, SiLU, conv); a 1×1 convolution on the shortcut where the width changes."""

    features: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: FeatureMap, valid: jax.Array | None, band_pixels: int | None) -> jax.Array:
        def layer(index: int) -> NormSiluConv:
            norm = GroupNorm(self.groups, name=f"norm{index}")
            return NormSiluConv(norm, Conv(self.features, dtype=self.dtype, name=f"conv{index}"))

        h = layer(1)(x, valid, band_pixels)
        if x.shape[-1] != self.features:
            shortcut = Conv(self.features, 1, padding=(0, 0), dtype=self.dtype, name="conv_shortcut")
            # With bands the shortcut waits for h; otherwise both convolutions' results would be allocated at once.
            start = None if band_pixels is None else zeros_after(h, h.shape, h.dtype)
            x = shortcut(x, band_pixels=band_pixels, add=start)
        return layer(2)(h, valid, band_pixels, add=materialized(x))


def _resnet_block(remat: bool) -> type[ResnetBlock]:
    """The block; with `remat` it keeps only its input for the backward pass and recomputes the rest."""
    return nn.remat(ResnetBlock, static_argnums=(3,)) if remat else ResnetBlock


class SpatialAttention(nn.Module):
    """Single-head attention over all valid pixels, with a residual."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None) -> jax.Array:
        batch, height, width, channels = x.shape
        mask = None if valid is None else valid_mask(valid, (height, width))
        scale, shift = GroupNorm(self.groups, name="group_norm")(x, mask)
        tokens = (x.astype(jnp.float32) * scale + shift).reshape(batch, height * width, channels)
        q, k, v = (Dense(channels, self.dtype, name=name)(tokens) for name in ("to_q", "to_k", "to_v"))
        out = single_head_attention(q, k, v, key_mask=None if mask is None else mask.reshape(batch, -1))
        return x + Dense(channels, self.dtype, name="to_out_0")(out).reshape(x.shape)


class MidBlock(nn.Module):
    """Resnet, attention, resnet; or the two resnets alone."""

    features: int
    groups: int
    attention: bool
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, x: FeatureMap, valid: jax.Array | None, band_pixels: int | None) -> jax.Array:
        block = _resnet_block(self.remat)
        h = block(self.features, self.groups, self.dtype, name="resnets_0")(x, valid, band_pixels)
        if self.attention:
            attention = nn.remat(SpatialAttention) if self.remat else SpatialAttention
            h = attention(self.groups, self.dtype, name="attentions_0")(h, valid)
        return block(self.features, self.groups, self.dtype, name="resnets_1")(h, valid, band_pixels)


class Resampler(nn.Module):
    """Down-samples (pad right and bottom, stride 2) or up-samples (nearest) by two, with a 3×3 convolution.

    It is a module of its own because the checkpoint names it `downsamplers.0.conv` or `upsamplers.0.conv`.

    Attributes:
      lazy: with bands, return the result as `RowsOnDemand`.
    """

    features: int
    down: bool
    lazy: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: FeatureMap, valid: jax.Array | None, band_pixels: int | None) -> FeatureMap:
        kind: dict[str, Any] = dict(stride=2, padding=(0, 1)) if self.down else dict(upsample=2)
        conv = Conv(self.features, dtype=self.dtype, name="conv", **kind)
        return conv(x, normalize(None, valid), band_pixels, lazy=self.lazy)


class Level(nn.Module):
    """The resnets of one resolution and the step to the next resolution, if `resample` names one."""

    features: int
    layers: int
    groups: int
    resample: str | None
    dtype: DTypeLike
    remat: bool
    lazy: bool = False

    @nn.compact
    def __call__(
        self, x: FeatureMap, valid: jax.Array | None, band_pixels: int | None, band_pixels_out: int | None
    ) -> FeatureMap:
        for layer in range(self.layers):
            block = _resnet_block(self.remat)(self.features, self.groups, self.dtype, name=f"resnets_{layer}")
            x = block(x, valid, band_pixels)
        if self.resample is None:
            return x
        down = self.resample == "downsamplers"
        sampler = Resampler(self.features, down, self.lazy, self.dtype, name=f"{self.resample}_0")
        return sampler(x, valid, band_pixels_out)


@dataclasses.dataclass(frozen=True)
class Scale:
    """Valid size and band size at one resolution."""

    valid: jax.Array | None
    band_pixels: int | None

    def down(self) -> Scale:
        return Scale(
            None if self.valid is None else self.valid // 2,
            None if self.band_pixels is None else self.band_pixels // 4,
        )

    def up(self) -> Scale:
        return Scale(
            None if self.valid is None else self.valid * 2,
            None if self.band_pixels is None else self.band_pixels * 4,
        )


class Encoder(nn.Module):
    """Image (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2·latent_channels)."""

    config: VAEConfig
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, image: jax.Array, valid: jax.Array | None, band_pixels: int | None) -> jax.Array:
        config, dtype, scale = self.config, self.dtype, Scale(valid, band_pixels)
        groups, widths = config.norm_num_groups, config.block_out_channels
        conv_in = Conv(widths[0], dtype=dtype, name="conv_in")
        x = conv_in(image, normalize(None, scale.valid), scale.band_pixels)
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            following = scale if last else scale.down()
            resample = None if last else "downsamplers"
            level = Level(
                *(width, config.layers_per_block, groups, resample, dtype, self.remat),
                name=f"down_blocks_{index}",
            )
            x = level(x, scale.valid, scale.band_pixels, following.band_pixels)
            scale = following
        attention = config.mid_block_add_attention
        mid_block = MidBlock(widths[-1], groups, attention, dtype, self.remat, name="mid_block")
        x = mid_block(x, scale.valid, scale.band_pixels)
        conv_out = Conv(2 * config.latent_channels, dtype=dtype, name="conv_out")
        norm_out = GroupNorm(groups, name="conv_norm_out")
        return NormSiluConv(norm_out, conv_out)(x, scale.valid, scale.band_pixels)


class Decoder(nn.Module):
    """Latents (B, h, w, latent_channels) -> image (B, H, W, 3), about [-1, 1], not clamped."""

    config: VAEConfig
    dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, latents: jax.Array, valid: jax.Array | None, band_pixels: int | None) -> jax.Array:
        config, dtype, scale = self.config, self.dtype, Scale(valid, band_pixels)
        groups, widths = config.norm_num_groups, config.block_out_channels[::-1]
        conv_in = Conv(widths[0], dtype=dtype, name="conv_in")
        x = conv_in(latents, normalize(None, scale.valid), scale.band_pixels)
        attention = config.mid_block_add_attention
        mid_block = MidBlock(widths[0], groups, attention, dtype, self.remat, name="mid_block")
        x = mid_block(x, scale.valid, scale.band_pixels)
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            following = scale if last else scale.up()
            resample = None if last else "upsamplers"
            # Memory is greatest where the largest map is read, so keeping the smaller ones costs none.
            lazy = index == len(widths) - 2
            level = Level(
                *(width, config.layers_per_block + 1, groups, resample, dtype, self.remat, lazy),
                name=f"up_blocks_{index}",
            )
            x = level(x, scale.valid, scale.band_pixels, following.band_pixels)
            scale = following
        conv_out = Conv(config.out_channels, dtype=dtype, name="conv_out")
        norm_out = GroupNorm(groups, name="conv_norm_out")
        return NormSiluConv(norm_out, conv_out)(x, scale.valid, scale.band_pixels)


class AutoencoderKL(nn.Module):
    """SD3's autoencoder. Callers multiply latents by `scaling_factor`; TSD-SR ignores `shift_factor`.

    Attributes:
      config: sizes, from the checkpoint.
      dtype: computation dtype; group norm statistics and the softmax are float32 in any case.
      remat: recompute each residual block in the backward pass instead of keeping its activations. Not with bands.
      placement: for sharded parameters; None: XLA decides.
    """

    config: VAEConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    placement: Placement | None = None

    def setup(self) -> None:
        self.encoder = gathered(Encoder, self.placement)(self.config, self.dtype, self.remat)
        self.decoder = gathered(Decoder, self.placement)(self.config, self.dtype, self.remat)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Encodes and decodes at the posterior mean; creates all parameters in `init`."""
        return self.decode(self.encode(image).mean)

    def encode(
        self, image: jax.Array, valid: jax.Array | None = None, band_pixels: int | None = None
    ) -> Posterior:
        """Encodes.

        Args:
          image: (B, H, W, 3) in [-1, 1], H and W multiples of 8.
          valid: (B, 2) int valid (height, width) in pixels, multiples of 8; pixels outside count as absent.
          band_pixels: compute convolutions on bands of about this many image pixels; None: whole.

        Returns:
          The posterior at (B, h, w); its values in the padding are meaningless.
        """
        moments = self.encoder(image, valid, band_pixels).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(
        self, latents: jax.Array, valid: jax.Array | None = None, band_pixels: int | None = None
    ) -> jax.Array:
        """Decodes.

        Args:
          latents: (B, h, w, latent_channels), already divided by the scaling factor.
          valid: (B, 2) int valid (height, width) in latent pixels.
          band_pixels: compute convolutions on bands of about this many latent pixels (times 64 at full size).

        Returns:
          (B, H, W, 3) in the computation dtype, not clamped.
        """
        return self.decoder(latents, valid, band_pixels)
