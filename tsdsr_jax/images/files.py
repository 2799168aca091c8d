"""Reads photographs from image files.

The network takes only 8-bit RGB. Reading converts every kind of image file to that form, and keeps what belongs to the
photograph (transparency, color profile, EXIF), so that `writing` can put it around the result. All sizes are (height, width)
in pixels as the viewer sees them, after the EXIF orientation.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from tsdsr_jax.errors import UserError
from tsdsr_jax.git_lfs import POINTER_BYTES, is_pointer, pointer_error
from tsdsr_jax.images.metadata import (
    ORIENTATIONS,
    carried_exif,
    carried_profile,
    orientation_of,
    png_has_trailing_metadata,
    read_exif,
)
from tsdsr_jax.images.pixels import decoded_pixels, raw_mode_of, turned

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Suffixes of the files that count as images in a folder; compare with `path.suffix.lower()`."""

# Only these decoders are tried, whatever a file is called: one of Pillow's others starts Ghostscript.
_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph as the network takes it, and the metadata for its result.

    Attributes:
        rgb: (H, W, 3) uint8, upright.
        alpha: (H, W) uint8, 255 opaque; None if the file has no transparency. Kept even if it is 255 throughout.
        gray: whether the file holds gray values; `rgb` then has three equal channels.
        icc: the color profile that describes the pixels; None means sRGB.
        exif: EXIF block starting with b"Exif", without orientation and pixel sizes, or None.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    gray: bool
    icc: bytes | None
    exif: bytes | None


def read_photo(path: str | Path, max_pixels: int) -> Photo:
    """Reads the first (or only) picture of an image file.

    Sixteen bits per channel become eight: gray is rounded, color loses its low byte (all that Pillow gives). Floating
    point is expected in [0, 1]. CMYK and Lab become sRGB, through the embedded profile where it fits.

    Args:
        path: a PNG, JPEG, WebP, BMP or TIFF file, whatever its suffix.
        max_pixels: refuse larger pictures, before decoding them.

    Returns:
        The photograph, upright.

    Raises:
        UserError: missing, unreadable, damaged, cut short, too large, or of a kind that cannot be read safely.
    """
    with _opened_file(Path(path)) as file:
        return _decode(file, str(path), max_pixels)


def read_content(path: Path) -> bytes:
    """A file's bytes, for `decode_photo`; raises UserError like `read_photo`."""
    with _opened_file(path) as file:
        return file.read()


def decode_photo(content: bytes, name: str, max_pixels: int) -> Photo:
    """Decodes an image file's bytes as `read_photo` does; `name` is what messages call it."""
    return _decode(io.BytesIO(content), name, max_pixels)


def photo_of(image: Image.Image, name: str, max_pixels: int) -> Photo:
    """Converts a Pillow image as `read_photo` does its file; `name` is what messages call it."""
    _check_size(name, image, max_pixels)
    raw_mode = raw_mode_of(image)
    _load(image, name)
    rgb, alpha, gray = decoded_pixels(image, raw_mode, name)
    # After decoding: a PNG may have its EXIF behind the pixels, and Pillow turns TIFFs upright itself.
    exif = read_exif(image)
    turn = ORIENTATIONS[orientation_of(exif)]
    return Photo(
        rgb=turned(rgb, turn),
        alpha=None if alpha is None else turned(alpha, turn),
        gray=gray,
        icc=carried_profile(image, gray),
        exif=carried_exif(exif, is_tiff=image.format == "TIFF"),
    )


def read_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """Reads the height and width of the upright picture from the header.

    Pixels are decoded only for a PNG that has metadata behind them, where the orientation may be.

    Raises:
        UserError: like `read_photo`, except for damaged pixels.
    """
    path = Path(path)
    with _opened_file(path) as file, _opened_image(file, str(path), max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow has turned this size already.
            return height, width
        if image.format == "PNG" and png_has_trailing_metadata(path):
            _load(image, str(path))
        transposed, _, _ = ORIENTATIONS[orientation_of(read_exif(image))]
        return (width, height) if transposed else (height, width)


def _decode(file: BinaryIO, name: str, max_pixels: int) -> Photo:
    with _opened_image(file, name, max_pixels) as image:
        return photo_of(image, name, max_pixels)


def _opened_file(path: Path) -> BinaryIO:
    """Opens the file; names common mistakes, for which Pillow gives only error numbers."""
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
    start = file.peek(POINTER_BYTES)
    if not start or is_pointer(start):
        file.close()
        raise (
            UserError(f"{path}: is empty (0 bytes); copy the image again")
            if not start
            else pointer_error(path)
        )
    return file


@contextlib.contextmanager
def _opened_image(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size accepted; the file must stay open meanwhile."""
    with _pillow_limits_lifted():
        try:
            image = Image.open(file, formats=_DECODERS)
        except UnidentifiedImageError as error:
            raise UserError(
                f"{name}: not a readable PNG, JPEG, WebP, BMP or TIFF image: it is damaged, or of "
                "another or an unusual kind; export it again as 8-bit PNG or JPEG"
            ) from error
        # Pillow's decoders raise whatever they stumble over in a damaged file: no narrower class covers it.
        except Exception as error:
            raise UserError(
                f"{name}: cannot be opened as an image ({_reason(error)}); check the file or export it again"
            ) from error
        with image:
            _check_size(name, image, max_pixels)
            yield image


def _check_size(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UserError(f"{name}: has {width} x {height} pixels, expected at least 1 x 1; export it again")
    if width * height > max_pixels:
        raise UserError(
            f"{name}: has {width} x {height} = {width * height} pixels, more than the limit of {max_pixels}; "
            "make it smaller or raise the limit"
        )


_limits_lock = threading.Lock()
_limits_users = 0
_limits_before: tuple[int | None, bool] = (None, False)


@contextlib.contextmanager
def _pillow_limits_lifted() -> Iterator[None]:
    """Suspends two settings that Pillow keeps for the whole process, until the last thread here is done.

    Pillow's own pixel limit would warn or refuse below a larger `max_pixels`. Its leniency about truncated files, if another
    library has turned it on, would read them as half-gray photographs.
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


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    # As in `_opened_image`: the decoders have no common error.
    except Exception as error:
        raise UserError(
            f"{name}: the image is damaged or cut short ({_reason(error)}); copy or export the file again"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, for use in our messages."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text or type(error).__name__).strip().splitlines()[0]
