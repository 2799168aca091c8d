"""Measures of structure: a grid's energy in flat areas, VIF and GMSD. Noise and sharpening hardly please them.

Pictures are luminance, (H, W) float32 in 0...255.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

# Side of the windows in which a grid is looked for, a multiple of its step.
WINDOW = 64
# Share of the original's windows that counts as flat.
FLAT = 0.2
# Variance of the visual noise in VIF.
VIF_NOISE = 2.0
# The constant of GMSD for values up to 255.
GMSD_CONSTANT = 170.0


def luminance(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) float32, as ITU-R BT.601 weighs the colors."""
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def grid_energy(result: np.ndarray, original: np.ndarray, step: int = 8) -> tuple[float, float]:
    """Measures patterns that repeat every `step` pixels on both axes, in the windows where the original is flattest.

    Returns:
      The mean energies of result and original at all multiples of the frequency 1/step, without the mean value.
    """
    windows = [
        (slice(top, top + WINDOW), slice(left, left + WINDOW))
        for top in range(0, original.shape[0] - WINDOW + 1, WINDOW)
        for left in range(0, original.shape[1] - WINDOW + 1, WINDOW)
    ]
    flattest = sorted(windows, key=lambda window: float(original[window].std()))
    flattest = flattest[: max(1, round(FLAT * len(flattest)))]

    def energy(picture: np.ndarray) -> float:
        return float(np.mean([_repeating(picture[window], step) for window in flattest]))

    return energy(result), energy(original)


def _repeating(window: np.ndarray, step: int) -> float:
    """The variance of what repeats every `step` pixels: the mean of all repetitions, less slow changes."""
    detail = window - ndimage.gaussian_filter(window, step, mode="reflect")
    tiles = detail.reshape(WINDOW // step, step, WINDOW // step, step)
    return float(tiles.mean((0, 2)).var())


def vif(result: np.ndarray, original: np.ndarray) -> float:
    """Visual information fidelity in the pixel domain, 1 for equal pictures (Sheikh and Bovik 2006, §V)."""
    kept, total = 0.0, 0.0
    for scale in range(1, 5):
        side = 2 ** (5 - scale) + 1  # 17, 9, 5, 3

        def blurred(picture: np.ndarray, side: int = side) -> np.ndarray:
            reach = side // 2
            smooth = ndimage.gaussian_filter(picture.astype(np.float64), side / 5, radius=reach)
            return smooth[reach:-reach, reach:-reach]

        if scale > 1:
            result, original = blurred(result)[::2, ::2], blurred(original)[::2, ::2]
        means = blurred(original), blurred(result)
        of_original = np.maximum(blurred(original**2) - means[0] ** 2, 0)
        of_result = np.maximum(blurred(result**2) - means[1] ** 2, 0)
        shared = blurred(original * result) - means[0] * means[1]
        gain = np.where(of_original > 1e-10, shared / np.maximum(of_original, 1e-10), 0)
        gain = np.where(of_result > 1e-10, gain, 0)
        noise = np.where(gain < 0, of_result, of_result - gain * shared)
        gain, noise = np.maximum(gain, 0), np.maximum(noise, 1e-10)
        kept += np.log2(1 + gain**2 * of_original / (noise + VIF_NOISE)).sum()
        total += np.log2(1 + of_original / VIF_NOISE).sum()
    return float(kept / total) if total else 1.0


def gmsd(result: np.ndarray, original: np.ndarray) -> float:
    """Gradient magnitude similarity deviation, 0 for equal pictures (Xue et al. 2014)."""

    def gradients(picture: np.ndarray) -> np.ndarray:
        half = ndimage.uniform_filter(picture.astype(np.float64), 2)[::2, ::2]
        return np.hypot(*(ndimage.prewitt(half, axis) / 3 for axis in (0, 1)))

    first, second = gradients(original), gradients(result)
    similarity = (2 * first * second + GMSD_CONSTANT) / (first**2 + second**2 + GMSD_CONSTANT)
    return float(similarity.std())
