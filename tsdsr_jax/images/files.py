"""Reads photographs from image files.

The network takes only 8-bit RGB. Reading converts every kind of image file to that form, and keeps what belongs to the
photograph (transparency, the meaning of its colors, EXIF and the like), so that `writing` can put it around the result. All
sizes are (height, width) in pixels as the viewer sees them, after the EXIF orientation.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.git_lfs import is_pointer, pointer_error
from tsdsr_jax.images.jpeg_end import lacks_pixels, with_end_marker
from tsdsr_jax.images.metadata import (
    ORIENTATIONS,
    Metadata,
    carried_metadata,
    orientation_of,
    stored_metadata,
)
from tsdsr_jax.images.pillow_state import reading_with_pillow
from tsdsr_jax.images.pixels import decoded_pixels, raw_mode_of, turned
from tsdsr_jax.images.png_chunks import PngParts, is_png, read_png
from tsdsr_jax.images.transparency import fill_hidden
from tsdsr_jax.images.unread_kinds import unread_kind

IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
)  # fmt: skip
"""Suffixes of the files that count as images in a folder; compare with `path.suffix.lower()`."""

# Only these decoders are tried, whatever a file is called: one of Pillow's others starts Ghostscript.
_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF")
# Formats whose files may hold several pictures of equal rank, and what those are called. (PNG: see `png_chunks`. The further
# pictures of a JPEG are previews, depths or gain maps.)
_PAGES = {"TIFF": "pages", "GIF": "frames", "WEBP": "frames"}
_DNG_VERSION = 50706
_KIND_BYTES = 512


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph as the network takes it, and the metadata for its result.

    Attributes:
        rgb: (H, W, 3) uint8, upright. Where alpha hides them, the colors are those of the nearest visible pixels.
        alpha: (H, W) uint8, 255 opaque; None if the file has no transparency. Kept even if it is 255 throughout.
        gray: whether the file holds gray values; `rgb` then has three equal channels.
        metadata: what the result keeps, where its format can hold it.
        notes: a line for everything about the file that the user should know. Each names the file.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    gray: bool
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()


def read_photo(path: str | Path, max_pixels: int) -> Photo:
    """Reads the first (or only) picture of an image file.

    Sixteen bits per channel become eight: gray is rounded, color loses its low byte (all that Pillow gives). Floating
    point is expected in [0, 1]. CMYK and Lab become sRGB, through the embedded profile where it fits.

    Args:
        path: a PNG, JPEG, WebP, BMP, TIFF or GIF file, whatever its suffix.
        max_pixels: refuse larger pictures, before decoding them.

    Returns:
        The photograph, upright.

    Raises:
        UserError: missing, unreadable, damaged, cut short, too large, or of a kind that cannot be read safely.
    """
    return decode_photo(read_content(Path(path)), str(path), max_pixels)


def read_content(path: Path) -> bytes:
    """A file's bytes, for `decode_photo`; raises UserError like `read_photo`."""
    with _opened_file(path) as file:
        return file.read()


def decode_photo(content: bytes, name: str, max_pixels: int) -> Photo:
    """Decodes an image file's bytes as `read_photo` does; `name` is what messages call it."""
    png = read_png(io.BytesIO(content), pixels=True) if is_png(content) else None
    remarks = list(png.remarks) if png else []
    with reading_with_pillow() as warned:
        try:
            photo = _decoded(content, png, name, max_pixels)
        except _DamagedPixels:
            completed = with_end_marker(content)
            if completed is None:
                raise
            photo = _decoded(completed, None, name, max_pixels)
            remarks.append("its end marker is missing; its pixels are all there")
    remarks += [f"Pillow remarks: {first_line(remark)}" for remark in warned]
    return _with_remarks(photo, name, remarks)


def _with_remarks(photo: Photo, name: str, remarks: Iterable[str]) -> Photo:
    return replace(photo, notes=(*photo.notes, *(f"{name}: {remark}" for remark in remarks)))


def photo_of(image: Image.Image, name: str, max_pixels: int) -> Photo:
    """Converts a Pillow image as `read_photo` does its file; `name` is what messages call it.

    EXIF is kept only if the image holds it as a block, as those from a JPEG, PNG or WebP file do.
    """
    with reading_with_pillow() as warned:
        photo = _photo_of(image, stored_metadata(image), name, max_pixels)
    return _with_remarks(photo, name, [f"Pillow remarks: {first_line(remark)}" for remark in warned])


def read_size(path: str | Path, max_pixels: int) -> tuple[int, int]:
    """Reads the height and width of the upright picture, without decoding pixels.

    Raises:
        UserError: like `read_photo`, except for damaged pixels.
    """
    path = Path(path)
    with _opened_file(path) as file, reading_with_pillow():
        png = is_png(file.read(8))
        file.seek(0)
        source = io.BytesIO(read_png(file, pixels=False).picture) if png else file
        with _opened_image(source, str(path), max_pixels) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile) and Base.Orientation in image.tag_v2:
                return height, width  # Pillow has turned it already
            transposed, _, _ = ORIENTATIONS[orientation_of(image)]
            return (width, height) if transposed else (height, width)


class _DamagedPixels(UserError):
    """The header could be read, the pixels could not."""


def _decoded(content: bytes, png: PngParts | None, name: str, max_pixels: int) -> Photo:
    with _opened_image(io.BytesIO(png.picture if png else content), name, max_pixels) as image:
        stored = png.metadata if png else stored_metadata(image)
        tiff = content if isinstance(image, TiffImageFile) else None
        photo = _photo_of(image, stored, name, max_pixels, tiff)
        if isinstance(image, JpegImageFile) and lacks_pixels(image, content):
            raise UserError(f"{name}: its last pixels are missing; copy or export the file again")
        pages = png.frames if png else _page_count(image)
    if pages == 1:
        return photo
    called = _PAGES.get(image.format or "", "frames")
    return _with_remarks(photo, name, [f"has {pages} {called}; only the first is read"])


def _photo_of(
    image: Image.Image, stored: Metadata, name: str, max_pixels: int, tiff: bytes | None = None
) -> Photo:
    _check_size(name, image, max_pixels)
    raw_mode = raw_mode_of(image)
    _load(image, name)
    rgb, alpha, gray = decoded_pixels(image, raw_mode, name)
    # After decoding: Pillow turns TIFFs upright itself.
    turn = ORIENTATIONS[orientation_of(image)]
    rgb, alpha = turned(rgb, turn), None if alpha is None else turned(alpha, turn)
    metadata, remarks = carried_metadata(image, stored, gray, turn, tiff)
    return Photo(
        rgb=rgb if alpha is None else fill_hidden(rgb, alpha),
        alpha=alpha,
        gray=gray,
        metadata=metadata,
        notes=tuple(f"{name}: {remark}" for remark in remarks),
    )


def _page_count(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1) if image.format in _PAGES else 1
    # As in `_opened_image`: what follows the first page may be damaged in any way.
    except Exception:
        return 1


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
    if not file.peek(1):
        file.close()
        raise UserError(f"{path}: is empty (0 bytes); copy the image again")
    return file


@contextlib.contextmanager
def _opened_image(file: BinaryIO, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image with its header read and its size accepted; the file must stay open meanwhile."""
    start = file.read(_KIND_BYTES)
    file.seek(0)
    if is_pointer(start):
        raise pointer_error(name)
    if kind := unread_kind(start):
        raise UserError(f"{name}: is {kind}")
    try:
        image = Image.open(file, formats=_DECODERS)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name}: not a readable PNG, JPEG, WebP, BMP, TIFF or GIF image: it is damaged, or of "
            "another or an unusual kind; export it again as 8-bit PNG or JPEG"
        ) from error
    # Pillow's decoders raise whatever they stumble over in a damaged file: no narrower class covers it.
    except Exception as error:
        raise UserError(
            f"{name}: cannot be opened as an image ({_reason(error)}); check the file or export it again"
        ) from error
    with image:
        if isinstance(image, TiffImageFile) and _DNG_VERSION in image.tag_v2:
            raise UserError(
                f"{name}: is a camera's raw file (DNG), which is not read; export it as JPEG or PNG first"
            )
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


def _load(image: Image.Image, name: str) -> None:
    try:
        image.load()
    # As in `_opened_image`: the decoders have no common error.
    except Exception as error:
        raise _DamagedPixels(
            f"{name}: the image is damaged or cut short ({_reason(error)}); copy or export the file again"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, for use in our messages."""
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
