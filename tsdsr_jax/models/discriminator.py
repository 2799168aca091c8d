"""A discriminator that judges patches of images, for adversarial training (Isola et al. 2017, §3.2.2)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.models.banding import materialized
from tsdsr_jax.models.layers import Conv, GroupNorm
from tsdsr_jax.models.params import Tree

# Name of the discriminator's part of a training state.
DISCRIMINATOR = "discriminator"
# Group norm instead of the paper's batch norm, so that devices and accumulation steps do not depend on each other.
GROUPS = 8
# Spacing in pixels of the blurs between which the detail lies, and what brings each band to about the size of the pictures.
SPACINGS, GAINS = (1, 2, 4), (8.0, 4.0, 2.0)


class PatchDiscriminator(nn.Module):
    """Convolutions with stride 2, each twice as wide as the one before, then one logit for each patch.

    It sees the pictures' finest bands alone (see `detail`), where good reconstructions differ from photographs. Shown whole
    pictures, it has to find these small differences first: of reconstructions with 32 dB it told none from photographs after
    300 steps, with the bands nearly all after 60. Nor can colors give pictures away.

    With three layers, a logit sees 38×38 pixels of the bands.

    Attributes:
      width: channels of the first convolution, a multiple of 8.
      layers: number of convolutions with stride 2.
      dtype: computation dtype.
    """

    width: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, H, W, 3) in [−1, 1] -> logits (B, H / 2^layers, W / 2^layers, 1) float32, high where a patch looks real."""
        x = detail(images)
        for layer in range(self.layers):
            x = materialized(Conv(self.width * 2**layer, 4, 2, dtype=self.dtype, name=f"conv_{layer}")(x))
            if layer:
                scale, shift = GroupNorm(GROUPS, name=f"norm_{layer}")(x)
                x = x.astype(jnp.float32) * scale + shift
            x = nn.leaky_relu(x, 0.2)
        logits = materialized(Conv(1, dtype=self.dtype, name="conv_out")(x))
        return logits.astype(jnp.float32)


def detail(images: jax.Array) -> jax.Array:
    """(B, H, W, C) -> their three finest bands, (B, H, W, 3·C): differences between blurs of growing width, amplified."""
    bands = []
    for spacing, gain in zip(SPACINGS, GAINS, strict=True):
        blurred = _blurred(images, spacing)
        bands.append(gain * (images - blurred))
        images = blurred
    return jnp.concatenate(bands, axis=-1)


def _blurred(images: jax.Array, spacing: int) -> jax.Array:
    """Blurs with [1, 2, 1] / 4 along rows and columns; taps are `spacing` pixels apart, and edges are repeated."""
    for axis in (1, 2):
        side = images.shape[axis]
        reach = min(spacing, side)
        rows = partial(jax.lax.slice_in_dim, images, axis=axis)
        # Not `jnp.pad`: its gradient would make XLA send pictures between devices.
        first, last = (jnp.repeat(edge, reach, axis) for edge in (rows(0, 1), rows(side - 1, side)))
        before = jnp.concatenate([first, rows(0, side - reach)], axis)
        after = jnp.concatenate([rows(reach, side), last], axis)
        images = before / 4 + images / 2 + after / 4
    return images


def new_discriminator_params(discriminator: PatchDiscriminator, key: jax.Array) -> Tree:
    """Initializes a discriminator's parameters for images of three channels."""
    images = jnp.zeros((1, *(2 * [2**discriminator.layers]), 3))
    params: Tree = discriminator.init(key, images)["params"]
    return params


def hinge_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """Computes the discriminator's loss from logits of real and of generated images (Lim and Ye 2017)."""
    return 0.5 * (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean())


def generator_loss(fake: jax.Array) -> jax.Array:
    """Computes the generator's loss from the discriminator's logits of its images."""
    return -fake.mean()


def balance(of_rest: jax.Array, of_adversarial: jax.Array) -> jax.Array:
    """Computes the weight that makes the adversarial gradient as large as that of the other losses.

    Args:
      of_rest, of_adversarial: gradients of both losses for the same images.

    Source: Esser et al. 2021, eq. 7, with the gradients at the image instead of the last layer's weights. Those are a linear
    function of these, and would cost a second backward pass.
    """
    rest, adversarial = (jnp.linalg.norm(gradient.ravel()) for gradient in (of_rest, of_adversarial))
    return jnp.minimum(rest / (adversarial + 1e-12), 1e4)
