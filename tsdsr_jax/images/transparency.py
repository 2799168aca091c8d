"""Colors of transparent pictures: where they cannot be seen, and over white."""

from __future__ import annotations

import cv2
import numpy as np

# Below this alpha (3 %) a color hardly counts, and rounding has often spoiled it.
_LEAST_ALPHA = 8


def fill_hidden(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Gives hidden pixels the color of the nearest visible one.

    Files store any color where nothing is seen, often black. Everything that looks at a pixel's surroundings, such as the
    network, would draw it into the visible edge.

    Args:
      rgb: (H, W, 3) uint8.
      alpha: (H, W) uint8, 255 opaque.

    Returns:
      (H, W, 3) uint8; `rgb` itself if no pixel, or every pixel, is hidden.
    """
    if alpha.min() >= _LEAST_ALPHA:
        return rgb
    visible = alpha >= _LEAST_ALPHA
    if not visible.any():
        visible = alpha > 0
    if visible.all() or not visible.any():
        return rgb
    _, nearest = cv2.distanceTransformWithLabels(
        (~visible).view(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    # A color as one number: indexing rows of three takes several times as long.
    packed = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view(np.uint32)[..., 0]
    colors = np.zeros(int(nearest.max()) + 1, np.uint32)
    colors[nearest[visible]] = packed[visible]
    return np.ascontiguousarray(colors[nearest][..., None].view(np.uint8)[..., :3])


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composes (H, W, 3) uint8 colors over white, as browsers and viewers show them."""
    if alpha.min() == 255:
        return rgb
    light = cv2.cvtColor(255 - alpha, cv2.COLOR_GRAY2RGB)
    return cv2.add(cv2.multiply(rgb, 255 - light, scale=1 / 255), light)
