"""The two color corrections that follow the network, on the host.

Both give a super-resolved photograph the colors of its source, as the original's inference script does. AdaIN matches
the statistics of each channel over the whole image; the wavelet correction replaces the low frequencies of the result by
those of the source. Axes: H height, W width, three channels in RGB order.
"""

from typing import Literal

import cv2
import numpy as np

AlignMethod = Literal["wavelet", "adain", "nofix"]
METHODS: tuple[AlignMethod, ...] = ("wavelet", "adain", "nofix")

# Added to the variance, so that a flat channel is divided by about 0.003 and not by zero.
VARIANCE_FLOOR = 1e-5

# Spacing in pixels of the three taps of each blur in the cascade. Together: sigma 13 px, reach 31 px.
BLUR_DILATIONS = (1, 2, 4, 8, 16)


def adain(result: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Gives each channel of `result` the mean and the standard deviation of that channel in `reference`.

    Args:
        result: (H, W, 3) float32 in [0, 1], the photograph to correct.
        reference: (h, w, 3) float32 in [0, 1]; its size may differ.

    Returns:
        (H, W, 3) float32, not clamped: more contrast can exceed [0, 1].
    """
    mean, deviation = _statistics(result)
    wanted_mean, wanted_deviation = _statistics(reference)
    return (result - mean) / deviation * wanted_deviation + wanted_mean


def wavelet(result: np.ndarray, upscaled: np.ndarray) -> np.ndarray:
    """Combines the fine detail of `result` with the low frequencies of `upscaled`.

    With the blur cascade L this is `result - L(result) + L(upscaled)`. L is linear, so one cascade over the
    difference of the two is enough.

    Args:
        result: (H, W, 3) float32 in [0, 1], the photograph to correct.
        upscaled: (H, W, 3) float32 in [0, 1], the source enlarged to the same size.

    Returns:
        (H, W, 3) float32, not clamped.

    Raises:
        ValueError: the two sizes differ.
    """
    if result.shape != upscaled.shape:
        raise ValueError(
            f"the wavelet correction needs images of one size, got {result.shape} and {upscaled.shape}"
        )
    return result - _low_frequencies(result - upscaled)


def align(method: AlignMethod, result: np.ndarray, lr: np.ndarray, upscaled: np.ndarray) -> np.ndarray:
    """Corrects the colors of an 8-bit result.

    Args:
        method: "wavelet" takes the colors from `upscaled`, "adain" from `lr`; "nofix" returns `result` unchanged.
        result: (H, W, 3) uint8, the super-resolved photograph.
        lr: (h, w, 3) uint8, the source at its own size.
        upscaled: (H, W, 3) uint8, the source enlarged by Pillow's default filter.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: the method is unknown, or the sizes do not fit together.
    """
    if method == "nofix":
        return result
    if method == "wavelet":
        return _to_bytes(wavelet(_to_unit(result), _to_unit(upscaled)))
    if method == "adain":
        return _to_bytes(adain(_to_unit(result), _to_unit(lr)))
    raise ValueError(f"unknown color correction {method!r}, expected one of {', '.join(METHODS)}")


def _statistics(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and floored standard deviation of each channel, both (3,) float32, accumulated in float64."""
    mean, spread = cv2.meanStdDev(image)
    count = image.shape[0] * image.shape[1]
    # OpenCV divides by the count, the original by one less. A single pixel has no spread to estimate.
    variance = spread[:, 0] ** 2 * count / max(count - 1, 1)
    return mean[:, 0].astype(np.float32), np.sqrt(variance + VARIANCE_FLOOR).astype(np.float32)


def _low_frequencies(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 through the cascade of separable [1, 2, 1] / 4 blurs, each with repeated edges."""
    for dilation in BLUR_DILATIONS:
        taps = np.zeros(2 * dilation + 1, np.float32)
        taps[[0, dilation, -1]] = 0.25, 0.5, 0.25
        image = cv2.sepFilter2D(image, cv2.CV_32F, taps, taps, borderType=cv2.BORDER_REPLICATE)
    return image


def _to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 to float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def _to_bytes(image: np.ndarray) -> np.ndarray:
    """float32 to uint8, truncated as in the original: half a level darker on average."""
    return (np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)
