"""LPIPS (v0.1), the learned perceptual distance of Zhang et al. 2018, over AlexNet or VGG16.

Axes: B batch, H W height and width, C channels.

Five feature maps of each image are normalized to unit length at every pixel. The distance is their squared difference,
weighted per channel by the learned `lin` layers, averaged over the pixels and summed over the five maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tsdsr_jax.models.banding import materialized
from tsdsr_jax.models.layers import Conv

Network = Literal["alex", "vgg"]

# ImageNet's channel statistics, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10


class Convolution(NamedTuple):
    """A convolution and the ReLU after it; `position` is its index in torchvision's `features`."""

    position: int
    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1


class Slice(NamedTuple):
    """The layers up to the next feature map: max pooling by 2 in windows of side `pool` (0: none), then convolutions."""

    pool: int
    convolutions: tuple[Convolution, ...]


SLICES: dict[Network, tuple[Slice, ...]] = {
    "alex": (
        Slice(0, (Convolution(0, 64, kernel_size=11, stride=4, padding=2),)),
        Slice(3, (Convolution(3, 192, kernel_size=5, padding=2),)),
        Slice(3, (Convolution(6, 384),)),
        Slice(0, (Convolution(8, 256),)),
        Slice(0, (Convolution(10, 256),)),
    ),
    "vgg": (
        Slice(0, (Convolution(0, 64), Convolution(2, 64))),
        Slice(2, (Convolution(5, 128), Convolution(7, 128))),
        Slice(2, (Convolution(10, 256), Convolution(12, 256), Convolution(14, 256))),
        Slice(2, (Convolution(17, 512), Convolution(19, 512), Convolution(21, 512))),
        Slice(2, (Convolution(24, 512), Convolution(26, 512), Convolution(28, 512))),
    ),
}


def minimum_side(network: Network) -> int:
    """The smallest height and width at which no feature map is empty."""
    side = 1
    for slice_ in reversed(SLICES[network]):
        for conv in reversed(slice_.convolutions):
            side = (side - 1) * conv.stride + conv.kernel_size - 2 * conv.padding
        if slice_.pool:
            side = (side - 1) * 2 + slice_.pool
    return side


def unit_length(x: jax.Array) -> jax.Array:
    """x / (‖x‖ + 1e-10) over the last axis, in float32.

    The square root's derivative is infinite at 0, and 0 · ∞ would make the gradient NaN where all channels are 0. There
    the norm is the constant 0 instead, which has the same value and a finite gradient.
    """
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    is_zero = squares == 0
    norm = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
    return x / (norm + EPSILON)


class LPIPS(nn.Module):
    """Perceptual distance of two batches of images.

    The parameters are `slice1_0` and so on for the convolutions, and `lin0` to `lin4`.
    `tsdsr_jax.weights.lpips_files.load_lpips` reads them; `init` makes random ones.

    Attributes:
      network: whose features are compared.
      dtype: of the convolutions; normalization, distances and means are always float32.
    """

    network: Network = "alex"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Compares image by image; the distance is symmetric, and 0 for equal images.

        Args:
          first, second: (B, H, W, 3) in [-1, 1] (lpips's `normalize=False`), at least 31 pixels high and wide for
            AlexNet and 16 for VGG16.

        Returns:
          (B,) float32 distances.

        Raises:
          ValueError: the shapes differ, are not (B, H, W, 3), or are too small for the network.
        """
        self._check(first.shape, second.shape)
        slices = SLICES[self.network]
        convs = [
            [self._conv(f"slice{number}_{conv.position}", conv) for conv in slice_.convolutions]
            for number, slice_ in enumerate(slices, start=1)
        ]

        def features(image: jax.Array) -> list[jax.Array]:
            """The five maps, each (B, h, w, C) of unit length."""
            x = (image.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
            maps = []
            for slice_, layers in zip(slices, convs, strict=True):
                if slice_.pool:
                    x = nn.max_pool(x, (slice_.pool, slice_.pool), strides=(2, 2))
                for layer in layers:
                    x = nn.relu(materialized(layer(x)))
                # This ReLU changes nothing (x ≥ 0), but keeps the compiler from fusing the scaling and the difference of
                # two maps into a multiply-add, which would put equal images 1e-15 apart.
                maps.append(nn.relu(unit_length(x)))
            return maps

        # Two passes instead of one over 2B images: a gradient with respect to one of them costs only one backward pass.
        pairs = zip(features(first), features(second), strict=True)
        distance = jnp.zeros(first.shape[:1], jnp.float32)
        for number, (a, b) in enumerate(pairs):
            lin = self.param(f"lin{number}", nn.initializers.ones, a.shape[-1:]).astype(jnp.float32)
            distance += (jnp.square(a - b) * lin).sum(-1).mean((1, 2))
        return distance

    def _conv(self, name: str, conv: Convolution) -> Conv:
        padding = (conv.padding, conv.padding)
        return Conv(conv.features, conv.kernel_size, conv.stride, padding, dtype=self.dtype, name=name)

    def _check(self, first: Sequence[int], second: Sequence[int]) -> None:
        if self.network not in SLICES:
            raise ValueError(f"network is {self.network!r}; expected one of {', '.join(SLICES)}")
        if tuple(first) != tuple(second) or len(first) != 4 or first[-1] != 3:
            raise ValueError(f"images are {tuple(first)} and {tuple(second)}; expected (B, H, W, 3) twice")
        smallest = minimum_side(self.network)
        if min(first[1:3]) < smallest:
            raise ValueError(
                f"images are {first[1]}×{first[2]}; LPIPS over {self.network} needs at least {smallest}×{smallest} pixels"
            )
