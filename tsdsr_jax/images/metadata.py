"""What belongs to a photograph besides its pixels: color profile and EXIF, which holds the orientation."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base

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

# EXIF fields that would be untrue of the result: its pixels are upright and there are more of them.
_STALE_TAGS = (Base.Orientation, Base.ImageWidth, Base.ImageLength)
_STALE_EXIF_TAGS = (Base.ExifImageWidth, Base.ExifImageHeight)
# In a TIFF the EXIF fields share their directory with those that lay out the pixels. Only these are kept.
_DESCRIPTIVE_TIFF_TAGS = frozenset(
    (
        Base.ImageDescription,
        Base.Make,
        Base.Model,
        Base.XResolution,
        Base.YResolution,
        Base.ResolutionUnit,
        Base.Software,
        Base.DateTime,
        Base.Artist,
        Base.HostComputer,
        Base.Copyright,
        IFD.Exif,
        IFD.GPSInfo,
    )
)


# ---- color profiles ------------------------------------------------------------------------------


def _profile(icc: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """The parsed profile; None if there is none or it is damaged."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else None
    except (OSError, ImageCms.PyCMSError):
        return None


def profile_space(icc: bytes | None) -> str:
    """The color space that a profile describes, such as "RGB", "GRAY", "CMYK" or "Lab"; empty if none."""
    profile = _profile(icc)
    try:
        return profile.profile.xcolor_space.strip() if profile else ""
    except ValueError:  # damaged: not even text
        return ""


def carried_profile(image: Image.Image, gray: bool) -> bytes | None:
    """The embedded profile, if it describes the pixels that `decoded_pixels` returns."""
    icc: bytes | None = image.info.get("icc_profile")
    if image.mode in ("CMYK", "LAB"):
        return None
    return icc if profile_space(icc) == ("GRAY" if gray else "RGB") else None


def through_profile(image: Image.Image) -> Image.Image:
    """CMYK or Lab as sRGB: with the embedded profile if it fits, otherwise by the plain formula."""
    profile = _profile(image.info.get("icc_profile"))
    if profile is None:
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:  # A profile of another color space, or with broken or missing tables.
        return image.convert("RGB")
    assert converted is not None  # as always if it does not convert in place
    return converted


# ---- EXIF ----------------------------------------------------------------------------------------


def read_exif(image: Image.Image) -> Image.Exif:
    """The EXIF of the file; empty if it has none or a broken one, because the picture is still worth reading."""
    try:
        # Not PngImageFile's own method: that decodes the picture in search of a block behind it.
        return Image.Image.getexif(image)
    # The parser fails on broken offsets, counts and types in as many ways as it has lines.
    except Exception:
        return Image.Exif()


def orientation_of(exif: Image.Exif) -> int:
    """A key of `ORIENTATIONS`; 1 (upright) if the EXIF has none."""
    value = exif.get(Base.Orientation, 1)
    return value if isinstance(value, int) and value in ORIENTATIONS else 1


def carried_exif(exif: Image.Exif, is_tiff: bool) -> bytes | None:
    """The part of the EXIF that also applies to the result, as bytes; a thumbnail does not. May change `exif`."""
    try:
        if is_tiff:
            keep_descriptive(exif)
        for tag in _STALE_TAGS:
            if tag in exif:
                del exif[tag]
        if IFD.Exif in exif:
            for tag in _STALE_EXIF_TAGS:
                exif.get_ifd(IFD.Exif).pop(tag, None)
        return exif.tobytes() if len(exif) else None
    # As in `read_exif`: what cannot be written back is dropped.
    except Exception:
        return None


def keep_descriptive(exif: Image.Exif) -> None:
    """Removes every tag that describes the layout of pixels."""
    for tag in list(exif):
        if tag not in _DESCRIPTIVE_TIFF_TAGS:
            del exif[tag]


def png_has_trailing_metadata(path: Path) -> bool:
    """Whether chunks that can hold EXIF follow the pixels of a PNG. Reads the chunk headers only."""
    with open(path, "rb") as file:
        file.seek(8)
        seen_pixels = False
        while len(header := file.read(8)) == 8:
            kind = header[4:]
            if seen_pixels and kind in (b"eXIf", b"zTXt", b"tEXt", b"iTXt"):
                return True
            seen_pixels = seen_pixels or kind == b"IDAT"
            file.seek(int.from_bytes(header[:4], "big") + 4, os.SEEK_CUR)
    return False
