"""JPEG compression as the training data's script simulates it: an 8-bit codec without the 8 bits.

It differs from a real codec in details that the data has, and a port must keep: quality is a real number, the tables scaled
by it are neither rounded nor kept at 1 or more, pixels are not rounded before or after, chroma is averaged 2×2 and repeated,
images are padded with black, and the luma table is the standard's transposed.
Source: DiffJPEG's non-differentiable mode as Real-ESRGAN and SeeSR use it.
"""

from __future__ import annotations

import cv2
import numpy as np
from scipy.fft import dctn, idctn

# ITU-T T.81, Annex K.1 and K.2. The luma table is used transposed, the chroma table is symmetric.
LUMA = np.array([
    [16, 11, 10, 16, 24, 40, 51, 61], [12, 12, 14, 19, 26, 58, 60, 55], [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62], [18, 22, 37, 56, 68, 109, 103, 77], [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101], [72, 92, 95, 98, 112, 100, 103, 99],
], np.float32).T  # fmt: skip
CHROMA = np.full((8, 8), 99, np.float32)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

_TO_YCC = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]], np.float32)


def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """Compresses and restores (H, W, 3) float32 RGB in [0, 1]; of the same shape and range.

    Args:
      quality: above 0 to 100, as libjpeg counts it.
    """
    height, width = image.shape[:2]
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    padded = np.pad(image.astype(np.float32), ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycc = (255 * padded) @ _TO_YCC.T
    luma = _quantised(ycc[..., 0] - 128, LUMA * factor) + 128
    # Chroma is centred at 0 already: the 128 that JFIF adds is the 128 that the transform takes away.
    chroma = ycc[..., 1:].reshape(ycc.shape[0] // 2, 2, ycc.shape[1] // 2, 2, 2).mean((1, 3))
    restored = [_quantised(chroma[..., channel], CHROMA * factor) for channel in range(2)]
    chroma = np.stack(restored, -1).repeat(2, 0).repeat(2, 1)
    rgb = np.concatenate([luma[..., None], chroma], -1) @ _TO_RGB.T
    return np.clip(rgb[:height, :width] / 255, 0, 1)


def _quantised(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """One plane, (H, W) with sides multiples of 8, through the quantised transform of its 8×8 blocks."""
    rows, columns = plane.shape[0] // 8, plane.shape[1] // 8
    blocks = plane.reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3)
    coefficients = dctn(blocks, axes=(2, 3), norm="ortho")
    restored = idctn(np.round(coefficients / table) * table, axes=(2, 3), norm="ortho")
    return restored.transpose(0, 2, 1, 3).reshape(plane.shape).astype(np.float32)


def jpeg_codec(image: np.ndarray, quality: float) -> np.ndarray:
    """The same by libjpeg: 8 bits in and out, the quality rounded, 4:2:0, the untransposed table, chroma smoothed."""
    pixels = cv2.cvtColor(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), cv2.COLOR_RGB2BGR)
    _, file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, max(1, min(100, round(quality)))])
    restored = cv2.cvtColor(cv2.imdecode(file, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return restored.astype(np.float32) / 255
