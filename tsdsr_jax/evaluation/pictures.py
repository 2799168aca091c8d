"""The pictures of a report, as its HTML file stores them."""

from __future__ import annotations

import base64
import io
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
from PIL import Image

from tsdsr_jax.devices import cores
from tsdsr_jax.errors import UserError, first_line
from tsdsr_jax.evaluation.comparison import Comparison
from tsdsr_jax.images.files import Photo, read_photo


@dataclass(frozen=True)
class _Format:
    name: Literal["webp", "jpeg"]
    settings: Mapping[str, Any]


# Measured on 16 photographs of DRealSR, 512 x 512, per megapixel on one core:
#   lossless WebP, method 0   0.04 s   1.09 MB             WebP quality 98    0.09 s   0.24 MB   45.2 dB
#                  method 1   0.08 s   1.01 MB                  quality 95    0.08 s   0.18 MB   44.0 dB
#                  method 4   0.30 s   0.97 MB             JPEG quality 92    0.01 s   0.25 MB   44.8 dB
# Lossy WebP halves the resolution of colors: single values at colored edges are off by 80, against 24 in a JPEG of the same
# size without subsampling. So results of 512 x 512 are stored without loss, and larger ones as such a JPEG.
_LOSSLESS = _Format("webp", {"lossless": True, "method": 1, "quality": 20})
# Without `optimize`, for which Pillow reserves a byte per pixel: noise needs more.
_LOSSY = _Format("jpeg", {"quality": 92, "subsampling": 0})
_LOSSLESS_PIXELS = 2**19
_SHOWN_PIXELS = 2**22
_SHOWN_SIDE = 16383  # WebP's limit
_THUMBNAIL_SIDE = 320
_THUMBNAIL = _Format("webp", {"quality": 75, "method": 2})
# No limit of our own: the run that is reported has already made or read these files.
_MAX_PIXELS = 2**31

ENCODINGS = (
    f"Pictures of up to {_LOSSLESS_PIXELS / 1e6:.1f} megapixels, and those with transparency, are stored without loss at 8 "
    f"bits per channel; larger ones as JPEG of quality {_LOSSY.settings['quality']}. Pictures above "
    f"{_SHOWN_PIXELS / 1e6:.1f} megapixels are scaled down. The viewer says for each picture how it is stored. This file is "
    "self-contained and loads nothing from elsewhere."
)

PixelSize = tuple[int, int]


@dataclass(frozen=True)
class StoredPicture:
    """A layer as the page stores it.

    Attributes:
      size: (width, height) of the original picture, upright.
      encoding: how it was stored, in words.
      type: media type of `data`.
      data: the stored picture in base64.
    """

    size: PixelSize
    encoding: str
    type: str
    data: bytes


@dataclass(frozen=True)
class StoredEntry:
    """An entry as the page stores it.

    Attributes:
      layers: each layer's picture, or why it cannot be shown.
      thumbnail: data URI and size; None if no layer can be shown.
    """

    layers: list[StoredPicture | str]
    thumbnail: tuple[str, PixelSize] | None


def store_entries(entries: Sequence[Comparison]) -> Iterator[tuple[Comparison, StoredEntry]]:
    """Reads and encodes the pictures of all entries in threads, a few entries ahead."""
    threads = min(8, cores())
    waiting: deque[tuple[Comparison, Future[StoredEntry]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            waiting.append((entry, pool.submit(_store_entry, entry)))
            if len(waiting) > threads:
                ready, future = waiting.popleft()
                yield ready, future.result()
        for ready, future in waiting:
            yield ready, future.result()


def _store_entry(entry: Comparison) -> StoredEntry:
    """Encodes an entry. The thumbnail shows the first of the largest layers, so a result rather than its input."""
    layers: list[StoredPicture | str] = []
    thumbnail, largest = None, 0
    for layer in entry.layers:
        try:
            photo = read_photo(layer.path, _MAX_PIXELS)
            image = _image(photo)
            layers.append(_encode(image, photo))
        except Exception as error:  # one picture that fails must not hide the others
            layers.append(
                str(error) if isinstance(error, UserError) else f"{layer.path}: {first_line(error)}"
            )
            continue
        if image.width * image.height > largest:
            thumbnail, largest = _thumbnail(image, photo), image.width * image.height
    return StoredEntry(layers, thumbnail)


def _image(photo: Photo) -> Image.Image:
    if photo.alpha is None:
        return Image.fromarray(photo.rgb)
    return Image.fromarray(np.dstack([photo.rgb, photo.alpha]))


def _encode(image: Image.Image, photo: Photo) -> StoredPicture:
    size = image.size
    scale = min(1.0, math.sqrt(_SHOWN_PIXELS / (size[0] * size[1])), _SHOWN_SIDE / max(size))
    words = []
    if scale < 1:
        image = _resized(image, scale)
        words.append(f"shown at {image.width}×{image.height} ({scale:.0%})")
    if photo.alpha is not None or image.width * image.height <= _LOSSLESS_PIXELS:
        format = _LOSSLESS
        words.append("lossless")
    else:
        format = _LOSSY
        words.append(f"JPEG quality {_LOSSY.settings['quality']}")
    data = base64.b64encode(_bytes(image, photo, format))
    return StoredPicture(size, ", ".join(words), f"image/{format.name}", data)


def _thumbnail(image: Image.Image, photo: Photo) -> tuple[str, PixelSize]:
    small = _resized(image, min(1.0, _THUMBNAIL_SIDE / max(image.size)))
    data = base64.b64encode(_bytes(small, photo, _THUMBNAIL)).decode()
    return f"data:image/webp;base64,{data}", small.size


def _resized(image: Image.Image, scale: float) -> Image.Image:
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def _bytes(image: Image.Image, photo: Photo, format: _Format) -> bytes:
    """Encodes an image with its color profile, but without EXIF, which may tell where a photograph was taken."""
    as_gray = photo.gray and format.name == "jpeg"
    # A gray profile needs a gray file, and WebP has no gray files.
    icc = photo.metadata.icc if as_gray == photo.gray else None
    buffer = io.BytesIO()
    (image.convert("L") if as_gray else image).save(buffer, format.name, icc_profile=icc, **format.settings)
    return buffer.getvalue()


def write_pictures(file: IO[bytes], index: int, encoded: StoredEntry) -> None:
    """Writes an entry's pictures. The newline after each block tells the page's script that the block is complete."""
    for number, picture in enumerate(encoded.layers):
        if isinstance(picture, StoredPicture):
            opening = f'<script type="text/plain" id="picture-{index}-{number}" data-type="{picture.type}">'
            file.write(opening.encode() + picture.data + b"</script>\n")
