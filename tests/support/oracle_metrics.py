"""PSNR, SSIM and NIQE once more, in float64 NumPy and SciPy, written from their definitions and sharing nothing with ours.

Convolutions are SciPy's with whole windows, features are computed block by block, the shape parameter is searched over
the whole table.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage, special


def luma_601(rgb: np.ndarray) -> np.ndarray:
    """Studio-range luma, 16 to 235, unrounded."""
    return 16 + (rgb.astype(np.float64) / 255) @ np.array([65.481, 128.553, 24.966])


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    difference = (luma_601(first) - luma_601(second)) / 255
    return float(10 * np.log10(1 / (np.mean(difference**2) + 1e-8)))


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    x, y = np.round(luma_601(first)), np.round(luma_601(second))
    axis = np.arange(11) - 5
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def local(image: np.ndarray) -> np.ndarray:
        return ndimage.correlate(image, window, mode="nearest")[5:-5, 5:-5]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = local(x), local(y)
    vx, vy, vxy = local(x * x) - mx**2, local(y * y) - my**2, local(x * y) - mx * my
    structure = np.maximum((2 * vxy + c2) / (vx + vy + c2), 0)
    return float(np.mean(structure * (2 * mx * my + c1) / (mx**2 + my**2 + c1)))


def detail(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of the Haar coefficients, level by level, from the wavelet's matrices."""
    levels = []
    x, y = luma_601(first), luma_601(second)
    for _ in range(2):
        coefficients = []
        for image in (x, y):
            rows, columns = (haar_matrix(side) for side in image.shape)
            coefficients.append(rows @ image @ columns.T)
        height, width = (side // 2 for side in x.shape)
        bands = []
        for whole in coefficients:
            kept = whole.copy()
            kept[:height, :width] = 0
            bands.append(kept.ravel())
        levels.append(bands[0] @ bands[1] / np.linalg.norm(bands[0]) / np.linalg.norm(bands[1]))
        x, y = (whole[:height, :width] for whole in coefficients)
    return float(np.mean(levels))


def haar_matrix(side: int) -> np.ndarray:
    """(side // 2 * 2, side): means of neighbours, then their differences; an odd last one is dropped."""
    half = side // 2
    matrix = np.zeros((2 * half, side))
    for index in range(half):
        matrix[index, 2 * index : 2 * index + 2] = 0.5
        matrix[half + index, 2 * index : 2 * index + 2] = 0.5, -0.5
    return matrix


def niqe(rgb: np.ndarray, mean: np.ndarray, covariance: np.ndarray, block: int = 96) -> float:
    # Integers divided once: halves are exact, and rounded to even.
    image = np.round(rgb.astype(np.int64) @ np.array([299, 587, 114]) / 1000)
    rows, columns = image.shape[0] // block, image.shape[1] // block
    image = image[: rows * block, : columns * block]
    axis = np.arange(7) - 3
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    scales = []
    for scale in (1, 2):
        mu = ndimage.correlate(image, window, mode="nearest")
        sigma = np.sqrt(np.abs(ndimage.correlate(image**2, window, mode="nearest") - mu**2))
        # Where the two are equal in exact arithmetic, float64 leaves 1e-14 of either sign, and signs are counted.
        difference = np.where(np.abs(image - mu) < 1e-9, 0, image - mu)
        normalised = difference / (sigma + 1)
        side = block // scale
        scales.append(
            [
                block_features(normalised[r * side : (r + 1) * side, c * side : (c + 1) * side])
                for c in range(columns)
                for r in range(rows)
            ]
        )
        image = halved(image)
    features = np.concatenate(scales, axis=1)
    spread = np.cov(features[~np.isnan(features).any(axis=1)], rowvar=False)
    offset = np.ravel(mean) - np.nanmean(features, axis=0)
    return float(np.sqrt(offset @ np.linalg.pinv((covariance + spread) / 2) @ offset))


GAMMAS = np.arange(200, 10001) / 1000
RATIOS = special.gamma(2 / GAMMAS) ** 2 / (special.gamma(1 / GAMMAS) * special.gamma(3 / GAMMAS))


@np.errstate(invalid="ignore", divide="ignore")
def block_features(block: np.ndarray) -> list[float]:
    alpha, left, right = fit(block)
    features = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        alpha, left, right = fit(block * np.roll(block, shift, axis=(0, 1)))
        mean = (right - left) * special.gamma(2 / alpha) / special.gamma(1 / alpha)
        features += [alpha, mean, left, right]
    return features


def fit(values: np.ndarray) -> tuple[float, float, float]:
    """Shape and both scales of an asymmetric generalised Gaussian, by moments."""
    left, right = (
        np.sqrt(np.square(side).sum() / len(side)) for side in (values[values < 0], values[values > 0])
    )
    gamma = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    ratio *= (gamma**3 + 1) * (gamma + 1) / (gamma**2 + 1) ** 2
    alpha = GAMMAS[np.argmin((RATIOS - ratio) ** 2)]
    scale = np.sqrt(special.gamma(1 / alpha) / special.gamma(3 / alpha))
    return alpha, left * scale, right * scale


def halved(image: np.ndarray) -> np.ndarray:
    """MATLAB's `imresize(image, 0.5)`: bicubic with antialiasing, the border mirrored with its edge repeated."""
    distance = np.abs(np.arange(8) - 3.5) / 2
    near, far = (
        1.5 * distance**3 - 2.5 * distance**2 + 1,
        -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2,
    )
    taps = np.where(distance <= 1, near, far)
    taps /= taps.sum()
    for axis in (0, 1):
        # Origin: the tap that falls on each pixel; even pixels are those of the smaller image, read at -3 ... +4.
        image = ndimage.correlate1d(image, taps, axis=axis, mode="reflect", origin=-1)
        image = np.take(image, np.arange(0, image.shape[axis], 2), axis=axis)
    return image
