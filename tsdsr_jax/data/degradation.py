"""The second-order degradation that makes training pairs: two rounds of blur, resize, noise and JPEG (Real-ESRGAN, Wang et
al. 2021).

Order and constants are those of SeeSR's `make_paired_data.py`, which TSD-SR names as its source. Here every sample has its
own draws; the script shares some of them within a batch, from the same distributions.

Images are (H, W, 3) float32 RGB in [0, 1]; random numbers come from a NumPy generator. No jax: Grain's workers run this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
from scipy.sparse import csr_array

from tsdsr_jax.data.blur_kernels import Shape, blur_kernel, pulse, sinc_kernel
from tsdsr_jax.data.jpeg_model import jpeg, jpeg_codec
from tsdsr_jax.images.resize import bicubic

Range = tuple[float, float]
Mode = Literal["area", "bilinear", "bicubic"]
_NEGLIGIBLE = 1e-9
MODES: tuple[Mode, ...] = ("area", "bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class Order:
    """One round of blur, resize, noise and JPEG. The manifests of prepared sets store the fields by name.

    Attributes:
      blur: probability of blurring; the first round always blurs.
      sigma: range of the kernels' σ.
      resize: probabilities of enlarging, shrinking and keeping the size.
      enlarge, shrink: ranges of the resize factor.
      gaussian: probability of Gaussian noise; otherwise it is Poisson noise.
      noise: range of the Gaussian noise's deviation, in gray levels of 255.
      poisson: range of the factor on the Poisson noise.
      grey: probability of noise that is the same in all channels.
      quality: range of the JPEG quality.
    """

    blur: float
    sigma: Range
    resize: tuple[float, float, float]
    enlarge: Range
    shrink: Range
    gaussian: float
    noise: Range
    poisson: Range
    grey: float
    quality: Range


@dataclasses.dataclass(frozen=True)
class DegradationConfig:
    """The whole degradation; the defaults are the published values.

    Attributes:
      scale: side of the photograph divided by the side of its low-resolution version.
      sharpen: apply an unsharp mask to the photograph first, as the script does by default.
      codec: compress with a real JPEG codec instead of the script's model of one.
      first, second: the two rounds. The second round's JPEG comes before or after the final resize.
      kernel_sizes: sides of the kernels, all equally likely.
      kernel_padding: side to which all kernels are padded.
      sinc: probability of a sinc kernel instead of one from the mixture.
      mixture: (shape, isotropic, probability) of each kind of kernel.
      generalized_beta, plateau_beta: two equally likely ranges of the exponent.
      final_sinc: probability of the sinc filter at the end.
    """

    scale: int = 4
    sharpen: bool = True
    codec: bool = False
    first: Order = Order(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (1.0, 1.5), (0.15, 1.0), 0.5, (1.0, 30.0), (0.05, 3.0), 0.4,
                         (30.0, 95.0))  # fmt: skip
    second: Order = Order(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (1.0, 1.2), (0.3, 1.0), 0.5, (1.0, 25.0), (0.05, 2.5), 0.4,
                          (30.0, 95.0))  # fmt: skip
    kernel_sizes: tuple[int, ...] = tuple(range(7, 22, 2))
    kernel_padding: int = 21
    sinc: float = 0.1
    mixture: tuple[tuple[Shape, bool, float], ...] = (
        ("gaussian", True, 0.45),
        ("gaussian", False, 0.25),
        ("generalized", True, 0.12),
        ("generalized", False, 0.03),
        ("plateau", True, 0.12),
        ("plateau", False, 0.03),
    )
    generalized_beta: tuple[Range, Range] = ((0.5, 1.0), (1.0, 4.0))
    plateau_beta: tuple[Range, Range] = ((1.0, 1.0), (1.0, 2.0))
    final_sinc: float = 0.8


def light(config: DegradationConfig) -> DegradationConfig:
    """The same steps with weaker values, chosen by this project.

    The published values leave little detail in a small crop (128×128 pixels, degraded to 32×32).
    """
    return dataclasses.replace(
        config,
        first=Order(1.0, (0.2, 2.0), (0.1, 0.3, 0.6), (1.0, 1.2), (0.5, 1.0), 0.5, (0.0, 4.0), (0.01, 0.2), 0.4,
                    (80.0, 98.0)),
        second=Order(0.3, (0.2, 1.0), (0.2, 0.3, 0.5), (1.0, 1.1), (0.7, 1.0), 0.5, (0.0, 3.0), (0.01, 0.1), 0.4,
                     (75.0, 98.0)),
        final_sinc=0.3,
    )  # fmt: skip


def camera(config: DegradationConfig) -> DegradationConfig:
    """A good camera's photograph: blurred by lens and demosaicing, with hardly any noise or compression.

    Chosen by this project. With `light`, three quarters of the first blurs lie below 0.4 pixels of the small photograph, so
    a model trained on them leaves a real camera's blur as it is; and it takes weak texture for noise.
    """

    def clean(order: Order) -> Order:
        return dataclasses.replace(order, noise=(0.0, 1.5), poisson=(0.005, 0.03), quality=(92.0, 100.0))

    mild = light(config)
    blurred = dataclasses.replace(mild.first, sigma=(0.5, 4.0))
    return dataclasses.replace(mild, first=clean(blurred), second=clean(mild.second))


# What each --degradation_strength makes of the published values.
STRENGTHS: dict[str, Callable[[DegradationConfig], DegradationConfig]] = {
    "published": lambda config: config,
    "light": light,
    "camera": camera,
}


class DegradedPair(NamedTuple):
    """A training pair, both (H, W, 3) uint8; `lr` is enlarged to the size of `hr`."""

    lr: np.ndarray
    hr: np.ndarray


def degrade(
    photo: np.ndarray, generator: np.random.Generator, config: DegradationConfig | None = None
) -> DegradedPair:
    """Makes a training pair from a photograph.

    Args:
      photo: (H, W, 3) float32 in [0, 1], sides multiples of the scale.
      generator: source of all randomness.
      config: the degradation; None: the published one.

    Returns:
      The pair, rounded half to even, as in the script's files.

    Raises:
      ValueError: a side is not a multiple of the scale.
    """
    config = config or DegradationConfig()
    height, width = photo.shape[:2]
    if height % config.scale or width % config.scale:
        raise ValueError(f"sides must be multiples of {config.scale}, not {height}×{width}")
    hr = sharpened(photo, config)
    small = low_resolution(hr, generator, config)
    return DegradedPair(to_bytes(bicubic(small, height, width)), to_bytes(hr))


def target(photo: np.ndarray, config: DegradationConfig) -> np.ndarray:
    """Makes only the target of a pair, (H, W, 3) uint8."""
    return to_bytes(sharpened(photo, config))


def sharpened(photo: np.ndarray, config: DegradationConfig) -> np.ndarray:
    return sharpen(photo) if config.sharpen else photo


def low_resolution(hr: np.ndarray, generator: np.random.Generator, config: DegradationConfig) -> np.ndarray:
    """Degrades an image: (H, W, 3) -> (H / scale, W / scale, 3) float32 in [0, 1], not rounded."""
    height, width = (side // config.scale for side in hr.shape[:2])
    first, second = config.first, config.second
    compress = jpeg_codec if config.codec else jpeg

    image = convolve(hr, draw_kernel(generator, first.sigma, config))
    factor = draw_factor(generator, first)
    image = resize_by(image, factor, draw_mode(generator))
    image = compress(add_random_noise(image, generator, first), generator.uniform(*first.quality))

    if generator.random() < second.blur:
        image = convolve(image, draw_kernel(generator, second.sigma, config))
    factor = draw_factor(generator, second)
    image = resize_to(image, max(1, int(height * factor)), max(1, int(width * factor)), draw_mode(generator))
    image = add_random_noise(image, generator, second)

    def resize_and_filter(image: np.ndarray) -> np.ndarray:
        small = resize_to(image, height, width, draw_mode(generator))
        return convolve(small, draw_final_kernel(generator, config))

    quality = generator.uniform(*second.quality)
    if generator.random() < 0.5:
        image = compress(np.clip(resize_and_filter(image), 0, 1), quality)
    else:
        image = resize_and_filter(compress(np.clip(image, 0, 1), quality))
    return np.clip(image, 0, 1)


def to_bytes(image: np.ndarray) -> np.ndarray:
    """Converts [0, 1] to uint8, rounding half to even and clipping."""
    return np.clip(np.round(255 * image), 0, 255).astype(np.uint8)


# --- blur -----------------------------------------------------------------------------------------


def draw_kernel(generator: np.random.Generator, sigma: Range, config: DegradationConfig) -> np.ndarray:
    """Draws a random kernel, (padding, padding) float32."""
    size = int(generator.choice(config.kernel_sizes))
    if generator.random() < config.sinc:
        lowest = np.pi / 3 if size < 13 else np.pi / 5
        return padded(sinc_kernel(size, generator.uniform(lowest, np.pi)), config.kernel_padding)
    chances = np.array([chance for _, _, chance in config.mixture])
    shape, isotropic, _ = config.mixture[generator.choice(len(chances), p=chances / chances.sum())]
    sigma_x = generator.uniform(*sigma)
    sigma_y, angle = (
        (None, 0.0) if isotropic else (generator.uniform(*sigma), generator.uniform(-np.pi, np.pi))
    )
    beta = 1.0
    if shape != "gaussian":
        ranges = config.generalized_beta if shape == "generalized" else config.plateau_beta
        beta = generator.uniform(*ranges[int(generator.random() >= 0.5)])
    return padded(blur_kernel(shape, size, sigma_x, sigma_y, angle, beta), config.kernel_padding)


def draw_final_kernel(generator: np.random.Generator, config: DegradationConfig) -> np.ndarray:
    """Draws the last filter: a sinc, or the identity."""
    if generator.random() >= config.final_sinc:
        return padded(pulse(1), config.kernel_padding)
    size = int(generator.choice(config.kernel_sizes))
    return padded(sinc_kernel(size, generator.uniform(np.pi / 3, np.pi)), config.kernel_padding)


def padded(kernel: np.ndarray, side: int) -> np.ndarray:
    """The kernel surrounded by zeros, (side, side) float32."""
    return np.pad(kernel, (side - kernel.shape[0]) // 2).astype(np.float32)


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Cross-correlates an image with a kernel; borders are mirrored without repeating the edge.

    OpenCV uses Fourier transforms for kernels of 12 pixels a side or more, so the kernel's margin of zeros is cut off first,
    and a kernel that is a column times a row is applied as two. Both change the result by float32 rounding only.
    """
    small = np.abs(kernel) < _NEGLIGIBLE
    margin = next(
        index for index in range(len(kernel) // 2 + 1)
        if not (small[[index, -1 - index]].all() and small[:, [index, -1 - index]].all())
    )  # fmt: skip
    kernel = kernel[margin : len(kernel) - margin, margin : len(kernel) - margin]
    column, row = kernel.sum(1), kernel.sum(0)
    if np.abs(np.outer(column, row) - kernel).max() < _NEGLIGIBLE * 10:
        return cv2.sepFilter2D(image, -1, row, column, borderType=cv2.BORDER_REFLECT_101)
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def sharpen(image: np.ndarray, side: int = 51, weight: float = 0.5, threshold: float = 10.0) -> np.ndarray:
    """Applies an unsharp mask where the detail exceeds the threshold (in gray levels), with soft transitions."""

    def blur(x: np.ndarray) -> np.ndarray:
        # With a deviation of 0 OpenCV chooses: 8 for 51 pixels.
        return cv2.GaussianBlur(x, (side, side), 0, borderType=cv2.BORDER_REFLECT_101)

    detail = image - blur(image)
    soft = blur((np.abs(detail) > threshold / 255).astype(np.float32))
    return image + soft * (np.clip(image + weight * detail, 0, 1) - image)


# --- resize ---------------------------------------------------------------------------------------


def draw_factor(generator: np.random.Generator, order: Order) -> float:
    kind = generator.choice(3, p=np.array(order.resize) / sum(order.resize))
    return 1.0 if kind == 2 else generator.uniform(*(order.enlarge, order.shrink)[kind])


def draw_mode(generator: np.random.Generator) -> Mode:
    return MODES[generator.integers(len(MODES))]


def resize_by(image: np.ndarray, factor: float, mode: Mode) -> np.ndarray:
    """torch's `interpolate(scale_factor=factor)`: floor(side · factor) pixels, sampled every 1 / factor pixels."""
    height, width = (max(1, int(side * factor)) for side in image.shape[:2])
    return _resample(image, height, width, mode, factor)


def resize_to(image: np.ndarray, height: int, width: int, mode: Mode) -> np.ndarray:
    """torch's `interpolate(size=(height, width))`: sampled every in / out pixels. Never antialiased."""
    return _resample(image, height, width, mode, None)


def _resample(image: np.ndarray, height: int, width: int, mode: Mode, factor: float | None) -> np.ndarray:
    rows, columns, channels = image.shape
    if (rows, columns) == (height, width) and factor in (None, 1):
        return image
    down = axis_weights(rows, height, mode, rows / height if factor is None else 1 / factor)
    across = axis_weights(columns, width, mode, columns / width if factor is None else 1 / factor)
    image = (down @ image.reshape(rows, -1)).reshape(height, columns, channels)
    turned = cv2.transpose(image).reshape(columns, -1)
    return cv2.transpose((across @ turned).reshape(width, height, channels))


@lru_cache(maxsize=64)
def axis_weights(inputs: int, outputs: int, mode: Mode, step: float) -> csr_array:
    """The matrix that resamples one axis, a sparse (outputs, inputs) float32.

    Args:
      step: input pixels between two outputs, for the interpolating modes; pixel centers lie at half integers.
    """
    index = np.arange(outputs)
    if mode == "area":
        # Integer arithmetic: output i averages the inputs that the interval [i, i + 1)·inputs/outputs touches.
        first, last = index * inputs // outputs, -(-(index + 1) * inputs // outputs)
        counts = last - first
        taps = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
        weights = np.repeat(1 / counts, counts)
        return _sparse(weights, taps, np.repeat(index, counts), (outputs, inputs))
    position = (index + 0.5) * step - 0.5
    if mode == "bilinear":
        position = np.maximum(position, 0)
        offsets, weight = np.arange(2), lambda distance: np.maximum(0, 1 - distance)
    else:
        offsets, weight = np.arange(-1, 3), _cubic
    base = np.floor(position).astype(int)
    taps = base[:, None] + offsets
    weights = weight(np.abs(position[:, None] - taps))
    taps = np.clip(taps, 0, inputs - 1)
    return _sparse(weights.ravel(), taps.ravel(), np.repeat(index, len(offsets)), (outputs, inputs))


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel with torch's constant."""
    near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _sparse(weights: np.ndarray, columns: np.ndarray, rows: np.ndarray, shape: tuple[int, int]) -> csr_array:
    return csr_array((weights.astype(np.float32), (rows, columns)), shape=shape)


# --- noise ----------------------------------------------------------------------------------------


def add_random_noise(image: np.ndarray, generator: np.random.Generator, order: Order) -> np.ndarray:
    """Adds Gaussian or Poisson noise, in color or gray; clips to [0, 1]."""
    if generator.random() < order.gaussian:
        noise = gaussian_noise(
            image.shape, generator, generator.uniform(*order.noise), generator.random() < order.grey
        )
    else:
        scale = generator.uniform(*order.poisson)
        noise = scale * poisson_noise(image, generator, generator.random() < order.grey)
    return np.clip(image + noise, 0, 1, dtype=np.float32)


def gaussian_noise(
    shape: tuple[int, ...], generator: np.random.Generator, sigma: float, gray: bool
) -> np.ndarray:
    """Gaussian noise of deviation sigma / 255, (H, W, 3), or (H, W, 1) if all channels share it."""
    return generator.standard_normal((*shape[:2], 1 if gray else shape[2]), np.float32) * np.float32(
        sigma / 255
    )


def poisson_noise(image: np.ndarray, generator: np.random.Generator, gray: bool) -> np.ndarray:
    """The noise of photon counting in an image rounded to 8 bits; (H, W, 3), or (H, W, 1) if all channels share it.

    White counts as many photons as the image has distinct values, rounded up to a power of two.
    """
    clean = image @ np.array([[0.2989], [0.587], [0.114]], np.float32) if gray else image
    clean = np.clip(np.round(255 * clean), 0, 255) / 255
    photons = 2 ** np.ceil(np.log2(len(np.unique(clean))))
    return (generator.poisson(clean * photons) / photons - clean).astype(np.float32)
