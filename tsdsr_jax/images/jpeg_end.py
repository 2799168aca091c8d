"""JPEG files that lack nothing but their end marker, and those that have it but lack pixels."""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

_END = b"\xff\xd9"
# Bits for pixels that are missing: a decoder makes different pixels of them. The same after every restart marker, for a file
# that is cut just before one.
_BITS = (b"\x00" * 64, b"\x55" * 64, b"\xaa" * 64)
_FILLINGS = (
    *_BITS,
    *(b"".join(bytes((0xFF, 0xD0 + number)) + bits for number in range(8)) for bits in _BITS[1:]),
)
_SCAN = re.compile(rb"\xff\xda")
# Within a scan, 0xFF stands before a zero or the number of a restart; anything else ends the scan.
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# What decoders make of missing pixels, and how far conversion to RGB may move it.
_MISSING, _TOLERANCE = 128, 2


def with_end_marker(content: bytes) -> bytes | None:
    """A JPEG file with its end marker; None if more than that is missing.

    Decoders fill missing pixels with gray as soon as they see an end marker, without an error. So the file is decoded with
    different bits before the marker: they change the picture unless all of its pixels were there.
    """
    content = content.removesuffix(_END[:1])
    if not content.startswith(b"\xff\xd8") or not _SCAN.search(content) or not _finishes_scans(content):
        return None
    whole = _decoded(content + _END)
    for filling in _FILLINGS:
        other = _decoded(content + filling + _END)
        if whole is None or other is None or not np.array_equal(whole, other):
            return None
    return content + _END


def lacks_pixels(image: Image.Image, content: bytes) -> bool:
    """Whether the last pixels of a decoded JPEG file are missing, although it has an end marker.

    As after a repair, or a transfer that left out a part: decoders fill in gray without an error. A file is looked at
    closely only if its last pixel is of this gray.
    """
    last = np.asarray(image.crop((image.width - 1, image.height - 1, image.width, image.height))).astype(int)
    end = _end_of_pixels(content) if np.abs(last - _MISSING).max() <= _TOLERANCE else None
    return end is not None and with_end_marker(content[:end]) is None


def _end_of_pixels(content: bytes) -> int | None:
    """Where the end marker of a file's first picture is; None if there is none, or if the file is odd."""
    at = 2
    while content[at : at + 1] == b"\xff":
        marker = content[at + 1 : at + 2]
        if marker == _END[1:]:
            return at
        if marker == b"\xff":  # padding
            at += 1
            continue
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if marker == b"\xda":
            found = _END_OF_SCAN.search(content, at)
            at = found.start() if found else len(content)
    return None


def _finishes_scans(content: bytes) -> bool:
    """Whether the scans that begin refine every coefficient of every component to its last bit.

    Only progressive files have several scans per component, and a cut between two would go unnoticed.
    """
    if b"\xff\xc2" not in content:
        return True
    last: dict[tuple[int, bool], int] = {}
    for found in _SCAN.finditer(content):
        header = content[found.end() : found.end() + 2 + 1 + 8 + 3]
        components = header[2] if len(header) > 2 else 0
        if not 1 <= components <= 4 or int.from_bytes(header[:2], "big") != 6 + 2 * components:
            continue  # these two bytes are in a thumbnail or a profile
        if len(header) < 6 + 2 * components:
            return False
        start, _, precision = header[3 + 2 * components : 6 + 2 * components]
        for component in header[3 : 3 + 2 * components : 2]:
            last[component, start > 0] = precision & 15
    return all(bits == 0 for bits in last.values()) and len({ac for _, ac in last}) == 2


def _decoded(content: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return np.asarray(image)
    # Pillow's decoders raise whatever they stumble over in a damaged file.
    except Exception:
        return None
