"""Writes results as image files, with the metadata of the photographs that they were made from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import Photo
from tsdsr_jax.images.metadata import keep_descriptive, profile_space

FORMATS = ("png", "jpg", "webp", "tiff", "bmp")
"""The formats that `write_photo` knows."""
FORMAT_OF_SUFFIX = {f".{name}": name for name in FORMATS} | {".jpeg": "jpg", ".tif": "tiff"}
"""Suffix of a result, in lower case -> its format."""

# The key of the text in a PNG that says how it was made.
_MADE_WITH = "tsdsr_jax"

# Encoder settings; everything but jpg is lossless. Measured on eight 512 x 512 photographs of DRealSR, on one
# core and per megapixel:
#   PNG level  1   0.07 s and 1.36 MB                          WebP method 0   0.04 s and 1.00 MB
#              3   0.10 s and 1.29 MB                                      4   0.38 s and 0.91 MB
#              6   0.37 s and 1.22 MB (Pillow's default)       TIFF raw        0.00 s and 3.00 MB
#              9   1.15 s and 1.19 MB                               LZW        0.03 s and 1.40 MB
# PNG level 3 is within 6 % of the default's size in 28 % of its time. TIFF stays uncompressed because Pillow
# (13.0) cannot write EXIF into a compressed one. WebP's `exact` keeps the colors where alpha is 0.
_ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0, "exact": True},
    "tiff": {"format": "TIFF"},
    "bmp": {"format": "BMP"},
}
_WITH_ALPHA = ("png", "webp", "tiff")
_WITH_METADATA = ("png", "jpg", "webp", "tiff")
_MAX_SIDE = {"webp": 16383, "jpg": 65500}
# TIFF and BMP count bytes in 32 bits. Four bytes per pixel before compression, and room for the metadata.
_MAX_PIXELS = {"tiff": 2**30 - 2**20, "bmp": 2**30 - 2**20}
# One JPEG segment.
_MAX_JPEG_EXIF = 65533


def write_photo(
    path: str | Path,
    rgb: np.ndarray,
    like: Photo,
    alpha: np.ndarray | None = None,
    format: str = "png",
    made_with: str = "",
) -> None:
    """Writes a result with the metadata of the photograph that it was made from.

    The file is complete or absent, even if it replaces an older one. Gray photographs are written as gray, the ITU-R 601
    luma of the result. WebP has no gray: it gets three equal channels, without a gray profile. jpg and bmp have no
    transparency: the colors are written as if opaque. bmp holds no metadata either.

    Args:
        path: the file; missing folders are made. Its suffix is ignored.
        rgb: (H, W, 3) uint8, the result.
        like: the photograph whose `gray`, `icc` and `exif` apply; its pixels are ignored.
        alpha: (H, W) uint8, the transparency in the result's size, or None.
        format: one of `FORMATS`. Lossless, apart from jpg (quality 95, full color resolution).
        made_with: ASCII text to store beside the pixels, for `read_made_with`; only png and jpg hold it.

    Raises:
        UserError: the format is unknown or cannot hold that many pixels, or the file cannot be written.
        ValueError: arrays of the wrong type or shape.
    """
    path = Path(path)
    encoded = encode_photo(rgb, like, alpha, format, str(path), made_with)
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def encode_photo(
    rgb: np.ndarray, like: Photo, alpha: np.ndarray | None, format: str, name: str, made_with: str = ""
) -> bytes:
    """The bytes that `write_photo` writes; `name` is what messages call the file."""
    _check_arrays(rgb, alpha)
    check_format(name, format, *rgb.shape[:2])
    image = as_image(rgb, like, alpha if format in _WITH_ALPHA else None)
    encoded = io.BytesIO()
    image.save(encoded, **_ENCODERS[format], **_metadata(like, format), **_text(made_with, format))
    # No getbuffer(): the traceback of a failed write keeps the view, on which Python 3.12.1's collector crashes.
    return encoded.getvalue()


def read_made_with(path: Path) -> str | None:
    """The text that `write_photo` stored in a file; None if there is none or if the file cannot be read."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            text = image.info.get(_MADE_WITH if image.format == "PNG" else "comment")
    except Exception:  # whatever Pillow's decoders stumble over in a damaged file
        return None
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def as_image(rgb: np.ndarray, like: Photo, alpha: np.ndarray | None = None) -> Image.Image:
    """A result as a Pillow image: gray where the photograph is, with transparency (H, W)."""
    image = Image.fromarray(rgb)
    if like.gray:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


def _check_arrays(rgb: np.ndarray, alpha: np.ndarray | None) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    if alpha is not None and (alpha.dtype != np.uint8 or alpha.shape != rgb.shape[:2]):
        raise ValueError(f"expected an alpha of {rgb.shape[:2]} uint8, got {alpha.shape} {alpha.dtype}")


def check_format(path: str | Path, format: str, height: int, width: int) -> None:
    """Raises UserError if a format is unknown or cannot hold a picture this large; `path` is for the message."""
    if format not in FORMATS:
        raise UserError(f"{path}: cannot write the format {format!r}; choose one of {', '.join(FORMATS)}")
    too_long = format in _MAX_SIDE and max(height, width) > _MAX_SIDE[format]
    too_many = format in _MAX_PIXELS and height * width > _MAX_PIXELS[format]
    if too_long or too_many:
        raise UserError(f"{path}: {format} cannot hold {width} x {height} pixels; write png instead")


def lost_transparency(name: str, alpha: np.ndarray | None, format: str) -> str | None:
    """A remark if a format cannot hold a picture's transparency; the remark calls the file `name`."""
    if alpha is None or format in _WITH_ALPHA:
        return None
    return f"{name}: {format} holds no transparency; it is left out"


def _metadata(like: Photo, format: str) -> dict[str, Any]:
    """Encoder arguments for the metadata that the format can hold."""
    if format not in _WITH_METADATA:
        return {}
    kept: dict[str, Any] = {}
    if like.icc and not (format == "webp" and profile_space(like.icc) == "GRAY"):
        kept["icc_profile"] = like.icc
    if like.exif and format == "tiff":
        exif = Image.Exif()
        exif.load(like.exif)
        keep_descriptive(exif)
        kept["exif"] = exif
    elif like.exif and not (format == "jpg" and len(like.exif) > _MAX_JPEG_EXIF):
        kept["exif"] = like.exif
    return kept


def _text(made_with: str, format: str) -> dict[str, Any]:
    """Encoder arguments that store a text."""
    if made_with and format == "png":
        text = PngInfo()
        text.add_text(_MADE_WITH, made_with)
        return {"pnginfo": text}
    return {"comment": made_with} if made_with and format == "jpg" else {}
