"""What belongs to a photograph besides its pixels: what the colors mean, EXIF, XMP, IPTC and the pixel density."""

from __future__ import annotations

import dataclasses
import re
import struct
from typing import Any

from PIL import Image
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from tsdsr_jax.images.exif import ExifError, current_exif, exif_of_tiff
from tsdsr_jax.images.profiles import is_srgb, profile_of_chunks, profile_space

# Whether to transpose a picture, then to reverse its rows, then to reverse its columns.
Turn = tuple[bool, bool, bool]
# EXIF orientation -> what turns the picture upright
ORIENTATIONS: dict[int, Turn] = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

XMP_TAG, IPTC_TAG = 700, 33723  # of TIFF
_IPTC_RESOURCE = 0x0404  # of Photoshop, in JPEG
_MOST_DOTS = 65535  # in an inch, as a JPEG counts them
# Properties of XMP that would be untrue of the result: its pixels are upright, there are more of them, and it has none of
# the gain maps, depths and films that a phone's file may hold.
_STALE_XMP = (
    rb"(?:tiff:Orientation|tiff:ImageWidth|tiff:ImageLength|exif:PixelXDimension|exif:PixelYDimension"
    rb"|G?Container:Directory|(?:hdrgm|GCamera|GDepth|GImage|GAudio):\w+)"
)
# As attributes and as empty elements.
_STALE_XMP_FORMS = (
    re.compile(rb"\s" + _STALE_XMP + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')"),
    re.compile(rb"<" + _STALE_XMP + rb"\b[^<>]*/>\s*"),
)
_STALE_XMP_ELEMENT = re.compile(rb"<(" + _STALE_XMP + rb")\b[^<>]*>")
_MOST_UNCLOSED = 64
_ORIENTATION_IN_XMP = re.compile(rb"(tiff:Orientation\s*(?:=\s*[\"']|>)\s*)[0-9]")


@dataclasses.dataclass
class Metadata:
    """The metadata of a photograph that results keep, where their format can hold it.

    Attributes:
      icc: the color profile that describes the pixels; None means sRGB.
      exif: an EXIF block, starting with b"Exif".
      xmp: an XMP packet.
      iptc: an IPTC-IIM block.
      density: dots per inch, across and down.
      png_color: kind -> content of a PNG's chunks about color; see `png_chunks.COLOR_CHUNKS`.
    """

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    density: tuple[float, float] | None = None
    png_color: dict[bytes, bytes] = dataclasses.field(default_factory=dict)


def stored_metadata(image: Image.Image) -> Metadata:
    """The metadata of an image as Pillow finds it. EXIF only as a block: a TIFF has none."""
    info = image.info
    density, iptc = info.get("dpi"), None
    if isinstance(image, JpegImageFile):
        iptc = info.get("photoshop", {}).get(_IPTC_RESOURCE)
        # Otherwise Pillow has taken it from the EXIF, or made it up.
        density = density if info.get("jfif_unit") in (1, 2) else None
    elif isinstance(image, TiffImageFile):
        density = density if Base.XResolution in image.tag_v2 else None
        iptc = image.tag_v2.get(IPTC_TAG)
        if isinstance(iptc, tuple) and all(isinstance(value, int) for value in iptc):
            iptc = struct.pack(("<" if image.tag_v2.prefix == b"II" else ">") + f"{len(iptc)}I", *iptc)
    return Metadata(
        icc=info.get("icc_profile"),
        exif=_as_block(info.get("exif")),
        xmp=xmp if isinstance(xmp := info.get("xmp"), bytes) else None,
        iptc=iptc if isinstance(iptc, bytes) and iptc[:1] == b"\x1c" else None,
        density=_pair(density),
    )


def _pair(density: Any) -> tuple[float, float] | None:
    try:
        across, down = density
        return float(across), float(down)
    except (TypeError, ValueError, ArithmeticError):  # a damaged file may have texts there, or anything
        return None


def _as_block(exif: bytes | None) -> bytes | None:
    """EXIF with the prefix that some formats leave out."""
    return exif if not exif or exif.startswith(b"Exif\0\0") else b"Exif\0\0" + exif


def carried_metadata(
    image: Image.Image, stored: Metadata, gray: bool, turn: Turn, tiff: bytes | None
) -> tuple[Metadata, list[str]]:
    """The part of an image's metadata that also applies to the result.

    Args:
      image: the decoded image.
      stored: its metadata as it is stored.
      gray: whether its pixels are gray.
      turn: what has turned it upright.
      tiff: its file, if that is a TIFF.

    Returns:
      The metadata, and remarks about what is wrong with it, without the file's name.
    """
    remarks: list[str] = []
    icc = _carried_profile(image, stored, gray, remarks)
    exif = None
    try:
        exif = exif_of_tiff(tiff) if tiff else current_exif(stored.exif) if stored.exif else None
    except ExifError:
        big = tiff and tiff[:4] in (b"II+\0", b"MM\0+")
        remarks.append(
            "is a BigTIFF, whose EXIF is left out" if big else "its EXIF is damaged; that is left out"
        )
    xmp = _current_xmp(stored.xmp) if stored.xmp else None
    density = stored.density[::-1] if stored.density and turn[0] else stored.density
    if density and not all(1 <= dots <= _MOST_DOTS for dots in density):
        density = None  # nonsense that not every format can hold
    return Metadata(icc, exif, xmp, stored.iptc, density, stored.png_color), remarks


def _current_xmp(xmp: bytes) -> bytes:
    for form in _STALE_XMP_FORMS:
        xmp = form.sub(b"", xmp)
    xmp = _without_stale_elements(xmp)
    # In damaged XML, where a reader may still find it.
    return _ORIENTATION_IN_XMP.sub(rb"\g<1>1", xmp)


def _without_stale_elements(xmp: bytes) -> bytes:
    """Not by one regular expression: that takes hours for a long packet of elements that do not end."""
    kept, at, unclosed = list[bytes](), 0, set[bytes]()
    for found in _STALE_XMP_ELEMENT.finditer(xmp):
        if found.start() < at or found[1] in unclosed:
            continue
        closing = b"</" + found[1] + b">"
        end = xmp.find(closing, found.end())
        if end < 0:
            unclosed.add(found[1])
            if len(unclosed) > _MOST_UNCLOSED:
                break
        else:
            kept.append(xmp[at : found.start()])
            at = end + len(closing)
    return b"".join([*kept, xmp[at:]])


def _carried_profile(image: Image.Image, stored: Metadata, gray: bool, remarks: list[str]) -> bytes | None:
    """The profile, if it describes the pixels that `decoded_pixels` returns."""
    if image.mode in ("CMYK", "LAB"):  # these have become sRGB
        return None
    if not stored.icc and isinstance(image, JpegImageFile) and _has_pieces_of_a_profile(image):
        remarks.append("a piece of its color profile is missing; the colors count as sRGB")
    space, wanted = profile_space(stored.icc), "GRAY" if gray else "RGB"
    if stored.icc and space != wanted and not (space == "RGB" and is_srgb(stored.icc, gray=False)):
        described = f"is for {space}, not for {wanted}" if space else "is damaged"
        remarks.append(f"its color profile {described}; the colors count as sRGB")
    if b"cICP" not in stored.png_color and space == wanted:
        return stored.icc
    return profile_of_chunks(stored.png_color, gray) or (stored.icc if space == wanted else None)


def _has_pieces_of_a_profile(image: JpegImageFile) -> bool:
    """Whether there are segments of a profile, of which Pillow hands out none if one is missing."""
    return any(kind == "APP2" and content.startswith(b"ICC_PROFILE\0") for kind, content in image.applist)


# ---- orientation ---------------------------------------------------------------------------------


def orientation_of(image: Image.Image) -> int:
    """A key of `ORIENTATIONS`, from EXIF or XMP; 1 (upright) if they have none or are broken."""
    try:
        # Not PngImageFile's own method: that decodes the picture in search of a block behind it.
        value = Image.Image.getexif(image).get(Base.Orientation, 1)
    # The parser fails on broken offsets, counts and types in as many ways as it has lines.
    except Exception:
        return 1
    return value if isinstance(value, int) and value in ORIENTATIONS else 1
