"""Decoded Pillow images of every kind as 8-bit RGB and transparency."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin
from PIL.ExifTags import Base

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.metadata import Turn
from tsdsr_jax.images.profiles import through_profile

# Colors (H, W, 3) uint8; alpha (H, W) uint8 or None; whether the file is gray.
Pixels = tuple[np.ndarray, np.ndarray | None, bool]


def decoded_pixels(image: Image.Image, raw_mode: str, name: str) -> Pixels:
    """The pixels of a decoded image, not yet upright.

    Args:
      raw_mode: `raw_mode_of` the image before it was decoded.
      name: what messages call it.
    """
    if _is_garbled(image, raw_mode):
        raise UserError(
            f"{name}: 16-bit TIFF with separate color planes; export it interleaved, or with 8 bits"
        )
    if image.mode == "P" and image.palette is None:
        raise UserError(
            f"{name}: the image is damaged (its palette is missing); copy or export the file again"
        )
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        return _three(_gray_bytes(image, values, raw_mode, name)), _key_alpha(image, values, raw_mode), True
    if image.mode in ("LA", "La"):
        gray, alpha = _split_alpha(image.convert("LA"))
        return _three(gray[..., 0]), alpha, True
    if image.mode in ("PA", "RGBA", "RGBa") or (image.mode == "P" and image.has_transparency_data):
        rgb, alpha = _split_alpha(image.convert("RGBA"))
        if not alpha.any() and _may_lack_alpha(image):  # many programs leave the fourth byte at zero
            return rgb, None, False
        return rgb, alpha, raw_mode.startswith("LA")  # 16-bit gray with alpha is handed out as RGBA.
    if image.mode in ("CMYK", "LAB"):
        return np.asarray(through_profile(image)), None, False
    rgb = np.asarray(image.convert("RGB"))
    return rgb, _key_alpha(image, rgb, raw_mode), False


def _may_lack_alpha(image: Image.Image) -> bool:
    """Whether the file does not say that its fourth sample is alpha."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return Base.ExtraSamples not in image.tag_v2
    return image.format in ("BMP", "DIB")


def raw_mode_of(image: Image.Image) -> str:
    """Pillow's name for the sample layout in the file, such as "L;2" or "RGB;16B"; empty if unnamed or decoded."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    arguments = image.tile[0].args
    name = arguments if isinstance(arguments, str) else (arguments or ("",))[0]
    return name if isinstance(name, str) else ""


def _is_garbled(image: Image.Image, raw_mode: str) -> bool:
    """Whether this is an uncompressed planar 16-bit TIFF, whose samples Pillow 13.0 misreads as bytes."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return raw_mode in ("R", "G", "B", "A") and 16 in image.tag_v2.get(Base.BitsPerSample, ())


def _gray_bytes(image: Image.Image, values: np.ndarray, raw_mode: str, name: str) -> np.ndarray:
    """(H, W) gray values of any type as uint8."""
    if values.dtype == np.uint8:
        return values
    if image.mode == "F":
        # Also false for NaN.
        if not (values.min() >= 0 and values.max() <= 1):
            raise UserError(
                f"{name}: floating-point values outside [0, 1]; rescale them, or export 8 or 16 bits"
            )
        return np.rint(values * 255).astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{name}: integer image with values outside 0..65535; export it as 8- or 16-bit gray")
    full = 4095 if raw_mode.startswith("I;12") else 65535
    scaled = (values.astype(np.uint32) * 255 + full // 2) // full
    # For 8 bits Pillow inverts by itself the TIFFs in which 0 is white.
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        inverted = image.tag_v2.get(Base.PhotometricInterpretation) == 0
        scaled = 255 - scaled if inverted else scaled
    return scaled.astype(np.uint8)


def _key_alpha(image: Image.Image, values: np.ndarray, raw_mode: str) -> np.ndarray | None:
    """Transparency of a PNG that declares one value or color transparent, as (H, W) uint8 or None.

    Pillow's own conversion misses the key in gray of 2, 4 and 16 bits and in color of 16 bits.
    """
    key = image.info.get("transparency")
    if key is None:
        return None
    if values.ndim == 2:
        hidden = values == key * {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    else:
        shift = 8 if raw_mode.startswith("RGB;16") else 0
        hidden = (values == np.asarray(key) >> shift).all(-1)
    return np.where(hidden, 0, 255).astype(np.uint8)


def _split_alpha(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """An image with alpha as (H, W, C) colors and (H, W) alpha."""
    values = np.asarray(image)
    return values[..., :-1], values[..., -1]


def _three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=-1)


def turned(pixels: np.ndarray, turn: Turn) -> np.ndarray:
    """Turns (H, W, ...) pixels upright; a copy, since Pillow's own memory is read-only."""
    transposed, rows, columns = turn
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    return np.array(pixels[:: -1 if rows else 1, :: -1 if columns else 1], order="C")
