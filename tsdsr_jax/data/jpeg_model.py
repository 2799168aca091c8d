"""JPEG compression as the original's data script simulates it: a JPEG codec that does not round to 8 bits.

It differs from a real codec in details that a port must keep: quality is a real number, the tables scaled by it are neither
rounded nor kept at 1 or more, pixels are not rounded before or after, chroma is averaged 2×2 and repeated, images are padded
with black, and the luma table is the transpose of the standard's.
Source: DiffJPEG's non-differentiable mode as Real-ESRGAN and SeeSR use it.
"""

from __future__ import annotations

import cv2
import numpy as np

# ITU-T T.81, Annex K.1 and K.2. The luma table is used transposed; the chroma table is symmetric.
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
# The orthonormal DCT-II of 8 values as a matrix.
_k = np.arange(8)
_dct = np.cos((2 * _k[None] + 1) * _k[:, None] * np.pi / 16) * np.where(_k == 0, np.sqrt(1 / 8), 0.5)[:, None]
_DCT = _dct.astype(np.float32)


def jpeg(image: np.ndarray, quality: float) -> np.ndarray:
    """Compresses and restores (H, W, 3) float32 RGB in [0, 1]; keeps shape and range.

    Args:
      quality: above 0 and at most 100, on libjpeg's scale.
    """
    height, width = image.shape[:2]
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    padded = cv2.copyMakeBorder(image, 0, -height % 16, 0, -width % 16, cv2.BORDER_CONSTANT, value=0)
    ycc = cv2.transform(padded, 255 * _TO_YCC)
    # Chroma is centered at 0 already: JFIF adds 128, the transform subtracts it again.
    small = cv2.resize(ycc[..., 1:], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    small = np.stack([_quantized(small[..., channel], CHROMA * factor) for channel in range(2)], -1)
    ycc[..., 0] = _quantized(ycc[..., 0] - 128, LUMA * factor) + 128
    ycc[..., 1:] = cv2.resize(small, ycc.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return np.clip(cv2.transform(ycc, _TO_RGB / 255)[:height, :width], 0, 1)


def _quantized(plane: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Quantizes the DCT of each 8×8 block of one plane, (H, W) with sides multiples of 8.

    It uses many small products, one per row of blocks or pixels. They need no transposed copy, and they are too small for
    BLAS to split among threads, so that the number of threads does not change the result.
    """
    shape, table = plane.shape, table.astype(np.float32)[None, :, None, :]

    def both_axes(rows: np.ndarray, columns: np.ndarray, plane: np.ndarray) -> np.ndarray:
        along = (rows @ plane.reshape(-1, 8, shape[1])).reshape(shape[0], -1, 8)
        return (along @ columns).reshape(-1, 8, shape[1] // 8, 8)

    coefficients = both_axes(_DCT, _DCT.T, plane)
    coefficients /= table
    np.rint(coefficients, out=coefficients)
    coefficients *= table
    return both_axes(_DCT.T, _DCT, coefficients.reshape(shape)).reshape(shape)


def jpeg_codec(image: np.ndarray, quality: float) -> np.ndarray:
    """Like `jpeg`, but with libjpeg: 8 bits in and out, rounded quality, 4:2:0, the untransposed table, smoothed chroma."""
    pixels = cv2.cvtColor(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), cv2.COLOR_RGB2BGR)
    _, file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, max(1, min(100, round(quality)))])
    decoded = cv2.imdecode(file, cv2.IMREAD_COLOR)
    assert decoded is not None, "OpenCV has just encoded it"
    return cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB).astype(np.float32) / 255
