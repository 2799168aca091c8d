"""Reading and writing photographs.

The network knows 8-bit RGB and nothing else. This module brings every kind of image file that people have to
that form, keeps what belongs to the photograph (transparency, colour profile, EXIF), and puts it back around
the result. All sizes are (height, width) in pixels as the viewer sees them, after the EXIF orientation.
"""

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError
from PIL.ExifTags import IFD, Base

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of the files that count as images in a folder; compare with `path.suffix.lower()`."""

FORMATS = ("png", "jpg", "webp", "tiff", "bmp")
"""What `write_photo` can write."""

# Only these decoders are tried, whatever a file is called: one of Pillow's others starts Ghostscript.
_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")

# Encoder settings; everything but jpg is lossless. Measured on eight 512 x 512 photographs of DRealSR, on one
# core and per megapixel:
#   PNG level  1   0.07 s and 1.36 MB                          WebP method 0   0.04 s and 1.00 MB
#              3   0.10 s and 1.29 MB                                      4   0.38 s and 0.91 MB
#              6   0.37 s and 1.22 MB (Pillow's default)       TIFF raw        0.00 s and 3.00 MB
#              9   1.15 s and 1.19 MB                               LZW        0.03 s and 1.40 MB
# PNG level 3 is within 6 % of the default's size in 28 % of its time. TIFF stays uncompressed because Pillow
# (13.0) cannot write EXIF into a compressed one. WebP's `exact` keeps the colours where alpha is 0.
_ENCODERS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0, "exact": True},
    "tiff": {"format": "TIFF"},
    "bmp": {"format": "BMP"},
}
WITH_ALPHA = ("png", "webp", "tiff")
_WITH_METADATA = ("png", "jpg", "webp", "tiff")
_MAX_SIDE = {"webp": 16383, "jpg": 65500}
# TIFF and BMP count bytes in 32 bits. Four bytes per pixel before compression, and room for the metadata.
_MAX_PIXELS = {"tiff": 2**30 - 2**20, "bmp": 2**30 - 2**20}
# One JPEG segment.
_MAX_JPEG_EXIF = 65533

# EXIF orientation: mirror along the main diagonal first, then reverse the rows, then reverse the columns.
_ORIENTATIONS = {
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
# In a TIFF the EXIF fields share their directory with those that lay out the pixels. Only these are taken.
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


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph as the network wants it, and what has to be put back around the result.

    Attributes:
        rgb: (H, W, 3) uint8, upright.
        alpha: (H, W) uint8, 255 opaque; None when the file has no transparency. Kept even where it is 255
            throughout.
        grey: the file holds grey values; `rgb` then has three equal channels.
        icc: the colour profile that describes the pixels, or None (then they are taken for sRGB).
        exif: EXIF block starting with b"Exif", without orientation and pixel sizes, or None.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    grey: bool
    icc: bytes | None
    exif: bytes | None


def read_photo(path: str | Path, max_pixels: int) -> Photo:
    """Reads the first (or only) picture of an image file.

    Sixteen bits per channel become eight: grey is rounded, colour loses its low byte (all that Pillow hands
    out). Floating point is taken on [0, 1]. CMYK and Lab become sRGB, through the embedded profile where it
    fits.

    Args:
        path: a PNG, JPEG, WebP, BMP or TIFF file, whatever its suffix.
        max_pixels: refuse larger pictures, before decoding them.

    Returns:
        The photograph, upright.

    Raises:
        UserError: missing, unreadable, damaged, cut short, too large, or of a kind that has no safe reading.
    """
    with _opened(Path(path), max_pixels) as image:
        return photo_of(image, str(path))


def photo_of(image: Image.Image, name: str) -> Photo:
    """A Pillow image as `read_photo` gives its file; `name` is what messages call it.

    Raises:
        UserError: as `read_photo`.
    """
    raw_mode = _raw_mode(image)
    _load(image, name)
    rgb, alpha, grey = _pixels(image, raw_mode, name)
    # After decoding: a PNG may carry its EXIF behind the pixels, and Pillow turns TIFFs upright itself.
    exif = _exif(image)
    turn = _ORIENTATIONS[_orientation(exif)]
    return Photo(
        rgb=_turned(rgb, turn),
        alpha=None if alpha is None else _turned(alpha, turn),
        grey=grey,
        icc=_carried_profile(image, grey),
        exif=_carried_exif(exif, is_tiff=image.format == "TIFF"),
    )


def read_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """Height and width of the upright picture, from the header.

    Pixels are decoded only for a PNG that has metadata behind them, where the orientation may hide.

    Raises:
        UserError: as `read_photo`, apart from damage to the pixels.
    """
    path = Path(path)
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned this size already.
            return height, width
        if image.format == "PNG" and _png_has_trailing_metadata(path):
            _load(image, path)
        turned, _, _ = _ORIENTATIONS[_orientation(_exif(image))]
        return (width, height) if turned else (height, width)


def write_photo(
    path: str | Path, rgb: np.ndarray, like: Photo, alpha: np.ndarray | None = None, format: str = "png"
) -> None:
    """Writes a result with the metadata of the photograph that it was made from.

    The file appears under its name complete or not at all, also when an older one is replaced. Grey
    photographs are written grey, by the ITU-R 601 luma of the result (WebP has no grey: three equal channels
    there, and no profile for grey). jpg and bmp have no transparency: the colours are written as if opaque.
    bmp holds no metadata either.

    Args:
        path: where to; missing folders are made. The suffix is the caller's business.
        rgb: (H, W, 3) uint8, the result.
        like: the photograph whose `grey`, `icc` and `exif` apply; its pixels are not looked at.
        alpha: (H, W) uint8, the transparency in the size of the result, or None.
        format: one of `FORMATS`. Lossless, apart from jpg (quality 95, full colour resolution).

    Raises:
        UserError: the format is unknown or cannot hold that many pixels, or the file cannot be written.
        ValueError: arrays of the wrong type or shape.
    """
    path = Path(path)
    _check_arrays(rgb, alpha)
    check_format(path, format, *rgb.shape[:2])
    image = as_image(rgb, like, alpha if format in WITH_ALPHA else None)
    # Encoded in memory, so that the errors left for the disk are the disk's own and say what they are.
    encoded = io.BytesIO()
    image.save(encoded, **_ENCODERS[format], **_metadata(like, format))
    with replacing(path) as temporary:
        # No getbuffer(): the traceback of a failed write keeps the view, on which Python 3.12.1's collector crashes.
        temporary.write_bytes(encoded.getvalue())


def as_image(rgb: np.ndarray, like: Photo, alpha: np.ndarray | None = None) -> Image.Image:
    """A result as a Pillow image: grey where the photograph is, with transparency (H, W)."""
    image = Image.fromarray(rgb)
    if like.grey:
        image = image.convert("L")
    if alpha is not None:
        image.putalpha(Image.fromarray(alpha))
    return image


# ---- opening -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size accepted."""
    # A file of our own stays open while Pillow decodes; the EXIF of a TIFF is read from it afterwards.
    with _opened_file(path) as file, _pillow_limits_lifted():
        try:
            image = Image.open(file, formats=_DECODERS)
        except UnidentifiedImageError as error:
            raise UserError(
                f"{path}: not a readable PNG, JPEG, WebP, BMP or TIFF image: it is damaged, or of "
                "another or an unusual kind; export it again as 8-bit PNG or JPEG"
            ) from error
        # Pillow's decoders raise whatever they stumble over in a damaged file: no narrower class covers it.
        except Exception as error:
            raise UserError(
                f"{path}: cannot be opened as an image ({_reason(error)}); check the file or export it again"
            ) from error
        with image:
            _check_size(path, image, max_pixels)
            yield image


def _opened_file(path: Path) -> BinaryIO:
    """The file, with the plain mistakes told apart: Pillow has only error numbers for them."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, expected an image file; name a file in it")
        file = open(path, "rb")  # noqa: SIM115 (the caller closes it)
    except FileNotFoundError as error:
        raise UserError(f"{path}: does not exist, expected an image file; check the path") from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be opened ({_reason(error)}); check the path and permissions"
        ) from error
    if not file.peek(1):
        file.close()
        raise UserError(f"{path}: is empty (0 bytes); copy the image again")
    return file


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{path}: has {width} x {height} pixels, expected at least 1 x 1; export it again")
    if width * height > max_pixels:
        raise UserError(
            f"{path}: has {width} x {height} = {width * height} pixels, more than the limit of {max_pixels}; "
            "make it smaller or raise the limit"
        )


_limits_lock = threading.Lock()
_limits_users = 0
_limits_before: tuple[int | None, bool] = (None, False)


@contextlib.contextmanager
def _pillow_limits_lifted() -> Iterator[None]:
    """Puts aside two settings that Pillow keeps for the whole process, until the last thread here is done.

    Its own pixel limit would warn or refuse below a larger `max_pixels`, and its leniency about truncated
    files, if some other library has asked for it, would turn them into half-grey photographs.
    """
    global _limits_users, _limits_before
    with _limits_lock:
        if _limits_users == 0:
            _limits_before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        _limits_users += 1
    try:
        yield
    finally:
        with _limits_lock:
            _limits_users -= 1
            if _limits_users == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = _limits_before


def _load(image: Image.Image, path: str | Path) -> None:
    try:
        image.load()
    # As in `_opened`: the decoders have no common error.
    except Exception as error:
        raise UserError(
            f"{path}: the image is damaged or cut short ({_reason(error)}); copy or export the file again"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, for use inside ours."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).strip().splitlines()[0]


# ---- pixels --------------------------------------------------------------------------------------


# Colours (H, W, 3) uint8; alpha (H, W) uint8 or None; whether the file is grey.
_Pixels = tuple[np.ndarray, np.ndarray | None, bool]


def _pixels(image: Image.Image, raw_mode: str, path: str | Path) -> _Pixels:
    """Decoded pixels, not yet upright.

    `raw_mode` is the layout in the file, which Pillow forgets when it decodes.
    """
    if _is_garbled(image, raw_mode):
        raise UserError(
            f"{path}: 16-bit TIFF with separate colour planes; export it interleaved, or with 8 bits"
        )
    if image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
        return _three(_grey_bytes(image, values, raw_mode, path)), _key_alpha(image, values, raw_mode), True
    if image.mode in ("LA", "La"):
        grey, alpha = _split_alpha(image.convert("LA"))
        return _three(grey[..., 0]), alpha, True
    if image.mode in ("PA", "RGBA", "RGBa") or (image.mode == "P" and image.has_transparency_data):
        rgb, alpha = _split_alpha(image.convert("RGBA"))
        return rgb, alpha, raw_mode.startswith("LA")  # 16-bit grey with alpha is handed out as RGBA.
    if image.mode in ("CMYK", "LAB"):
        return np.asarray(_through_profile(image)), None, False
    rgb = np.asarray(image.convert("RGB"))
    return rgb, _key_alpha(image, rgb, raw_mode), False


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name for the sample layout in the file, such as "L;2" or "RGB;16B"; empty if unnamed."""
    if not getattr(image, "tile", None):
        return ""
    arguments = image.tile[0].args
    name = arguments if isinstance(arguments, str) else (arguments or ("",))[0]
    return name if isinstance(name, str) else ""


def _is_garbled(image: Image.Image, raw_mode: str) -> bool:
    """Whether this is an uncompressed planar 16-bit TIFF, whose samples Pillow 13.0 misreads as bytes."""
    if image.format != "TIFF":
        return False
    return raw_mode in ("R", "G", "B", "A") and 16 in image.tag_v2.get(Base.BitsPerSample, ())


def _grey_bytes(image: Image.Image, values: np.ndarray, raw_mode: str, path: str | Path) -> np.ndarray:
    """(H, W) grey values of whatever type as uint8."""
    if values.dtype == np.uint8:
        return values
    if image.mode == "F":
        # Also false for NaN.
        if not (values.min() >= 0 and values.max() <= 1):
            raise UserError(
                f"{path}: floating-point values outside [0, 1]; rescale them, or export 8 or 16 bits"
            )
        return np.rint(values * 255).astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path}: integer image with values outside 0..65535; export it as 8- or 16-bit grey")
    full = 4095 if raw_mode.startswith("I;12") else 65535
    scaled = (values.astype(np.uint32) * 255 + full // 2) // full
    # For 8 bits Pillow inverts by itself the TIFFs in which 0 is white.
    inverted = image.format == "TIFF" and image.tag_v2.get(Base.PhotometricInterpretation) == 0
    return (255 - scaled if inverted else scaled).astype(np.uint8)


def _key_alpha(image: Image.Image, values: np.ndarray, raw_mode: str) -> np.ndarray | None:
    """Transparency of a PNG that names one value or colour as see-through, as (H, W) uint8 or None.

    Pillow's own conversion misses the key in grey of 2, 4 and 16 bits and in colour of 16 bits.
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
    """An image with alpha as (H, W, C) colours and (H, W) alpha."""
    values = np.asarray(image)
    return values[..., :-1], values[..., -1]


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _turned(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """(H, W, ...) pixels set upright; a copy, since Pillow's own memory is read-only."""
    transposed, rows, columns = turn
    if transposed:
        pixels = pixels.swapaxes(0, 1)
    return np.array(pixels[:: -1 if rows else 1, :: -1 if columns else 1], order="C")


# ---- colour profiles -----------------------------------------------------------------------------


def _profile(icc: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """The parsed profile, None when there is none or it makes no sense."""
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc)) if icc else None
    except (OSError, ImageCms.PyCMSError):
        return None


def _profile_space(icc: bytes | None) -> str:
    """Colour space that a profile describes, such as "RGB", "GRAY", "CMYK" or "Lab"; empty if none."""
    profile = _profile(icc)
    try:
        return profile.profile.xcolor_space.strip() if profile else ""
    except ValueError:  # damaged: not even text
        return ""


def _carried_profile(image: Image.Image, grey: bool) -> bytes | None:
    """The embedded profile if it describes the pixels that `_pixels` hands out."""
    icc = image.info.get("icc_profile")
    if image.mode in ("CMYK", "LAB"):
        return None
    return icc if _profile_space(icc) == ("GRAY" if grey else "RGB") else None


def _through_profile(image: Image.Image) -> Image.Image:
    """CMYK or Lab as sRGB: with the embedded profile where it fits, otherwise by the plain formula."""
    profile = _profile(image.info.get("icc_profile"))
    if profile is None:
        return image.convert("RGB")
    try:
        return ImageCms.profileToProfile(
            image,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError:  # A profile of another colour space, or with broken or missing tables.
        return image.convert("RGB")


# ---- EXIF ----------------------------------------------------------------------------------------


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF of the file, empty when it has none or a broken one: the picture is still worth reading."""
    try:
        # Not PngImageFile's own method: that decodes the picture in search of a block behind it.
        return Image.Image.getexif(image)
    # The parser fails on broken offsets, counts and types in as many ways as it has lines.
    except Exception:
        return Image.Exif()


def _orientation(exif: Image.Exif) -> int:
    value = exif.get(Base.Orientation, 1)
    return value if isinstance(value, int) and value in _ORIENTATIONS else 1


def _carried_exif(exif: Image.Exif, is_tiff: bool) -> bytes | None:
    """What of the EXIF stays true of the result, as bytes; a thumbnail does not. May change `exif`."""
    try:
        if is_tiff:
            _keep_descriptive(exif)
        for tag in _STALE_TAGS:
            if tag in exif:
                del exif[tag]
        if IFD.Exif in exif:
            for tag in _STALE_EXIF_TAGS:
                exif.get_ifd(IFD.Exif).pop(tag, None)
        return exif.tobytes() if len(exif) else None
    # As in `_exif`: what cannot be written back is dropped.
    except Exception:
        return None


def _keep_descriptive(exif: Image.Exif) -> None:
    """Removes every tag that could lay out pixels."""
    for tag in list(exif):
        if tag not in _DESCRIPTIVE_TIFF_TAGS:
            del exif[tag]


def _png_has_trailing_metadata(path: Path) -> bool:
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


# ---- writing -------------------------------------------------------------------------------------


def _check_arrays(rgb: np.ndarray, alpha: np.ndarray | None) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {rgb.shape} {rgb.dtype}")
    if alpha is not None and (alpha.dtype != np.uint8 or alpha.shape != rgb.shape[:2]):
        raise ValueError(f"expected an alpha of {rgb.shape[:2]} uint8, got {alpha.shape} {alpha.dtype}")


def check_format(path: str | Path, format: str, height: int, width: int) -> None:
    """Raises UserError where a format is unknown or cannot hold a picture this large; `path` is for the message."""
    if format not in FORMATS:
        raise UserError(f"{path}: cannot write the format {format!r}; choose one of {', '.join(FORMATS)}")
    too_long = format in _MAX_SIDE and max(height, width) > _MAX_SIDE[format]
    too_many = format in _MAX_PIXELS and height * width > _MAX_PIXELS[format]
    if too_long or too_many:
        raise UserError(f"{path}: {format} cannot hold {width} x {height} pixels; write png instead")


def _metadata(like: Photo, format: str) -> dict[str, Any]:
    """Encoder arguments for the metadata that the format can hold."""
    if format not in _WITH_METADATA:
        return {}
    kept = {}
    if like.icc and not (format == "webp" and _profile_space(like.icc) == "GRAY"):
        kept["icc_profile"] = like.icc
    if like.exif and format == "tiff":
        kept["exif"] = Image.Exif()
        kept["exif"].load(like.exif)
        _keep_descriptive(kept["exif"])
    elif like.exif and not (format == "jpg" and len(like.exif) > _MAX_JPEG_EXIF):
        kept["exif"] = like.exif
    return kept
