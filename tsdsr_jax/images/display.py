"""Photographs as a screen shows them, to be measured and to be learned from."""

from __future__ import annotations

import numpy as np

from tsdsr_jax.images.files import Photo
from tsdsr_jax.images.profiles import in_srgb, is_high_range
from tsdsr_jax.images.transparency import over_white


def displayed(photo: Photo) -> np.ndarray:
    """The pixels in sRGB, over white where they are transparent, (H, W, 3) uint8.

    If `not_displayed` has a reason, the stored numbers count as sRGB.
    """
    rgb, icc = photo.rgb, photo.metadata.icc
    converted = in_srgb(rgb, icc, photo.gray) if icc else rgb
    rgb = rgb if converted is None else converted
    return rgb if photo.alpha is None else over_white(rgb, photo.alpha)


def not_displayed(photo: Photo) -> str | None:
    """Why a photograph's colors cannot be converted to sRGB; None if they can."""
    metadata = photo.metadata
    if is_high_range(metadata.png_color):
        return "its colors are HDR (PQ or HLG), which sRGB cannot show"
    if metadata.icc and in_srgb(photo.rgb[:1, :1], metadata.icc, photo.gray) is None:
        return "its color profile cannot be applied"
    return None
