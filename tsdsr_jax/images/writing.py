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
from tsdsr_jax.images.exif import ExifError, TiffField, with_fields
from tsdsr_jax.images.files import Photo
from tsdsr_jax.images.metadata import IPTC_TAG, XMP_TAG, Metadata
from tsdsr_jax.images.pillow_state import reading_with_pillow
from tsdsr_jax.images.png_chunks import PILLOWS_LIMIT, iptc_text, photoshop_resource, xmp_text
from tsdsr_jax.images.profiles import in_srgb, is_high_range, is_srgb, profile_space
from tsdsr_jax.images.transparency import over_white

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
# PNG level 3 is within 6 % of the default's size in 28 % of its time. WebP's `exact` keeps the colors where alpha is 0.
_ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0, "exact": True},
    "tiff": {"format": "TIFF"},
    "bmp": {"format": "BMP"},
}
_WITH_ALPHA = ("png", "webp", "tiff")
# What a format can hold of a photograph's metadata, by the names of `Metadata`.
_HOLDS: dict[str, tuple[str, ...]] = {
    "png": ("icc", "exif", "xmp", "iptc", "density", "png_color"),
    "jpg": ("icc", "exif", "xmp", "iptc", "density"),
    "webp": ("icc", "exif", "xmp"),
    "tiff": ("icc", "exif", "xmp", "iptc", "density"),
    "bmp": ("density",),
}
# The most bytes of each. A JPEG's segments have 65533, or for a profile 255 times as many, some of which are names. Pillow
# does not open PNG files with a larger profile, though others do.
_MOST_BYTES: dict[str, dict[str, int]] = {
    "jpg": {"exif": 65533, "xmp": 65533 - 29, "iptc": 65533 - 14 - 13, "icc": 255 * (65533 - 14)},
    "png": {"icc": PILLOWS_LIMIT},
}
_WORDS = {"exif": "EXIF", "xmp": "XMP", "iptc": "IPTC"}
_MAX_SIDE = {"webp": 16383, "jpg": 65500}
# TIFF and BMP count bytes in 32 bits. Four bytes per pixel before compression, and room for the metadata.
_MAX_PIXELS = {"tiff": 2**30 - 2**20, "bmp": 2**30 - 2**20}


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
    luma of the result. WebP has no gray: it gets three equal channels. jpg and bmp have no transparency: the picture
    lies over white. Colors are converted to sRGB if the format cannot hold their profile. `_HOLDS` says which metadata
    a format can hold; `left_behind` names what is lost.

    Args:
        path: the file; missing folders are made. Its suffix is ignored.
        rgb: (H, W, 3) uint8, the result.
        like: the photograph whose `gray` and `metadata` apply; its pixels are ignored.
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
    held = _held(like, format)
    if like.metadata.icc and not held.icc:
        stored = np.asarray(as_image(rgb, like).convert("RGB"))
        converted = in_srgb(stored, like.metadata.icc, like.gray)
        rgb = rgb if converted is None else converted
    if alpha is not None and format not in _WITH_ALPHA:
        rgb, alpha = over_white(rgb, alpha), None
    image = as_image(rgb, like, alpha)
    encoded = io.BytesIO()
    image.save(encoded, **_ENCODERS[format], **_encoder_arguments(held, format, made_with))
    if format == "tiff":
        return _tiff_with_metadata(encoded.getvalue(), held)
    # No getbuffer(): the traceback of a failed write keeps the view, on which Python 3.12.1's collector crashes.
    return encoded.getvalue()


def read_made_with(path: Path) -> str | None:
    """The text that `write_photo` stored in a file; None if there is none or if the file cannot be read."""
    try:
        with reading_with_pillow(), Image.open(path, formats=("PNG", "JPEG")) as image:
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


def left_behind(name: str, like: Photo, alpha: np.ndarray | None, format: str) -> str | None:
    """A remark on what of a photograph its result's format cannot hold; the remark calls the file `name`.

    The density of pixels is not worth a remark.
    """
    held, metadata = _held(like, format), like.metadata
    remarks = []
    if alpha is not None and format not in _WITH_ALPHA:
        remarks.append(f"{format} cannot hold its transparency; the picture lies over white")
    lost = [word for part, word in _WORDS.items() if getattr(metadata, part) and not getattr(held, part)]
    if is_high_range(metadata.png_color) and not held.png_color:
        lost.append("HDR colors")
    if lost:
        are = "it is" if len(lost) == 1 else "they are"
        remarks.append(f"{format} cannot hold its {' and '.join(lost)}; {are} left out")
    if metadata.icc and not held.icc and not is_srgb(metadata.icc, like.gray):
        remarks.append(f"{_why_without_profile(metadata.icc, format)}; the colors are converted to sRGB")
    return f"{name}: {'; '.join(remarks)}" if remarks else None


def _why_without_profile(icc: bytes, format: str) -> str:
    if format == "png":
        return f"many programs refuse a png with a color profile of {len(icc) / 1e6:.1f} MB"
    return f"{format} cannot hold its color profile"


def _held(like: Photo, format: str) -> Metadata:
    """The part of a photograph's metadata that a format can hold."""
    held = {}
    for part in _HOLDS[format]:
        value = getattr(like.metadata, part)
        most = _MOST_BYTES.get(format, {}).get(part)
        if value and not (most and len(value) > most):
            held[part] = value
    if format == "webp" and profile_space(held.get("icc")) == "GRAY":
        del held["icc"]  # WebP has no gray
    if like.metadata.icc and "icc" not in held:
        held.pop("png_color", None)  # the colors become sRGB
    return Metadata(**held)


def _encoder_arguments(held: Metadata, format: str, made_with: str) -> dict[str, Any]:
    """Pillow's arguments for the metadata, except a TIFF's, which Pillow would change, and for a text."""
    arguments: dict[str, Any] = {"icc_profile": held.icc, "dpi": held.density}
    if format in ("png", "jpg", "webp"):
        arguments["exif"] = held.exif
    if format in ("jpg", "webp"):
        arguments["xmp"] = held.xmp
    if format == "jpg" and held.iptc:
        segment = b"Photoshop 3.0\0" + photoshop_resource(held.iptc)
        arguments["extra"] = b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment
    if format == "jpg":
        arguments["comment"] = made_with
    if format == "png":
        arguments["pnginfo"] = info = PngInfo()
        for kind, content in held.png_color.items():
            info.add(kind, content)
        if held.xmp:
            info.add(b"iTXt", xmp_text(held.xmp))
        if held.iptc:
            info.add(b"tEXt", iptc_text(held.iptc))
        if made_with:
            info.add_text(_MADE_WITH, made_with)
    return {name: value for name, value in arguments.items() if value}


def _tiff_with_metadata(tiff: bytes, held: Metadata) -> bytes:
    fields = {
        tag: TiffField(kind, len(value), value)
        for tag, kind, value in ((XMP_TAG, 1, held.xmp), (IPTC_TAG, 7, held.iptc))
        if value
    }
    try:
        return with_fields(tiff, held.exif, fields)
    except ExifError:  # made by someone else than `read_photo`, which leaves out what is damaged
        return with_fields(tiff, None, fields)
