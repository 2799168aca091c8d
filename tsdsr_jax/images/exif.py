"""EXIF blocks, byte for byte: Pillow decodes texts and encodes them as ASCII, which loses every other character.

A block is b"Exif", two zero bytes, and a small TIFF file: directories of fields, which point to each other and to values by
their offset.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
from PIL.ExifTags import IFD, Base

_PREFIX = b"Exif\0\0"
_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
_HEADERS = {order: header for header, order in _ORDERS.items()}
# Type of a field -> bytes of a value, and of the numbers that byte order applies to.
_TYPES = {
    **dict.fromkeys((1, 2, 6, 7, 129), (1, 1)),
    **dict.fromkeys((3, 8), (2, 2)),
    **dict.fromkeys((4, 9, 11, 13), (4, 4)),
    **dict.fromkeys((5, 10), (8, 4)),
    12: (8, 8),
}
_DIRECTORIES = (IFD.Exif, IFD.GPSInfo, IFD.Interop)

# Untrue of the result: its pixels are upright, and there are more of them.
_STALE_TAGS = (Base.Orientation, Base.ImageWidth, Base.ImageLength, Base.ExifImageWidth, Base.ExifImageHeight)
# In a TIFF the EXIF fields share their directory with those that lay out the pixels. Only these are kept.
_TEXT, _NUMBER, _FRACTION = (1, 2, 7, 129), (3,), (5,)
_DESCRIPTIVE_TAGS: dict[int, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            Base.ImageDescription,
            Base.Make,
            Base.Model,
            Base.Software,
            Base.DateTime,
            Base.Artist,
            Base.HostComputer,
            Base.Copyright,
        ),
        _TEXT,
    ),
    Base.XResolution: _FRACTION,
    Base.YResolution: _FRACTION,
    Base.ResolutionUnit: _NUMBER,
}
# Where the thumbnail's directory says that its JPEG lies, and how long it is.
_THUMBNAIL = (Base.JpegIFOffset, Base.JpegIFByteCount)


class ExifError(ValueError):
    """A block or a directory that cannot be read."""


class TiffField(NamedTuple):
    """A field's values as they are stored: their type (see `_TYPES`), their number, and their bytes."""

    kind: int
    number: int
    value: bytes


Directory = dict[int, "TiffField | Directory"]


# ---- blocks --------------------------------------------------------------------------------------


def current_exif(block: bytes) -> bytes | None:
    """Removes from a block what is untrue of a result: orientation, pixel sizes and the thumbnail.

    Everything else stays in its place, because makers' notes hold offsets of their own.

    Returns:
      The block; None if nothing is left in it.

    Raises:
      ExifError: it cannot be read.
    """
    data = bytearray(block.removeprefix(_PREFIX))
    order = _order_of(data)
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        entries, following = _entries(data, order, first)
        if following:
            _remove_thumbnail(data, order, following)
        by_tag = {_tag(entry, order): entry for entry in reversed(entries)}  # the first of each counts
        broken = [tag for tag, entry in by_tag.items() if not _is_cleaned(data, order, entry)]
        left = _remove_stale(data, order, first, (*_STALE_TAGS, *broken))
        if following:
            struct.pack_into(order + "I", data, first + 2 + 12 * left, 0)
    except struct.error as error:
        raise ExifError(str(error)) from error
    return _PREFIX + bytes(data) if left else None


def exif_of_tiff(content: bytes) -> bytes | None:
    """The descriptive fields of a TIFF file, as a block; None if there are none.

    Raises:
      ExifError: they cannot be read.
    """
    order = _order_of(content)
    fields = _descriptive(content, order)
    return (
        _PREFIX + _HEADERS[order] + struct.pack(order + "I", 8) + _laid_out(fields, order, 8)
        if fields
        else None
    )


def with_fields(tiff: bytes, block: bytes | None, more: Mapping[int, TiffField]) -> bytes:
    """A TIFF file of 8-bit samples with further fields.

    Args:
      tiff: the file.
      block: an EXIF block, whose descriptive fields are taken, unchanged.
      more: tag -> field of single bytes.
    """
    own = _order_of(tiff)
    (first,) = struct.unpack_from(own + "I", tiff, 4)
    fields, order = _directory(tiff, own, first), own
    if block:
        data = block.removeprefix(_PREFIX)
        order = _order_of(data)
        # The whole file takes the block's byte order: what is inside a maker's note cannot be turned.
        fields = {tag: _turned(field) for tag, field in fields.items()} if order != own else fields
        fields |= _descriptive(data, order)
    fields |= more
    start = len(tiff) + len(tiff) % 2
    head = _HEADERS[order] + struct.pack(order + "I", start)
    # In one step: the file may have hundreds of megabytes.
    return b"".join([head, memoryview(tiff)[8:], bytes(start - len(tiff)), _laid_out(fields, order, start)])


def _descriptive(data: bytes, order: str) -> Directory:
    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
    except struct.error as error:
        raise ExifError(str(error)) from error
    fields = _directory(data, order, first)
    kept = {tag: field for tag, field in fields.items() if _is_descriptive(tag, field)}
    if isinstance(below := kept.get(IFD.Exif), dict):
        for tag in _STALE_TAGS:
            below.pop(tag, None)
    return kept


def _is_descriptive(tag: int, field: TiffField | Directory) -> bool:
    """Whether a field describes the photograph, and is of a type and number that readers of TIFF files accept there."""
    if isinstance(field, dict):
        return tag in (IFD.Exif, IFD.GPSInfo)
    kinds = _DESCRIPTIVE_TAGS.get(tag, ())
    return field.kind in kinds and (kinds == _TEXT or field.number == 1)


# ---- directories ---------------------------------------------------------------------------------


def _order_of(data: bytes | bytearray) -> str:
    try:
        return _ORDERS[bytes(data[:4])]
    except KeyError:
        raise ExifError("not a TIFF directory") from None


def _tag(entry: bytes, order: str) -> int:
    return int(struct.unpack_from(order + "H", entry)[0])


def _offset(entry: bytes, order: str) -> int:
    return int(struct.unpack_from(order + "I", entry, 8)[0])


def _has_value(entry: bytes, order: str, length: int) -> bool:
    """Whether an entry's value lies within so many bytes."""
    _, kind, count, at = struct.unpack(order + "HHII", entry)
    size = count * _TYPES.get(kind, (0, 0))[0]
    return size <= 4 or at + size <= length


def _entries(data: bytes | bytearray, order: str, start: int) -> tuple[list[bytes], int]:
    """A directory's entries of twelve bytes, and the offset of the next directory; 0 if there is none."""
    (count,) = struct.unpack_from(order + "H", data, start)
    end = start + 2 + 12 * count
    entries = [bytes(data[at : at + 12]) for at in range(start + 2, end, 12)]
    if end > len(data):
        raise ExifError("a directory exceeds the data")
    # Some writers leave out the last offset.
    return entries, struct.unpack_from(order + "I", data, end)[0] if end + 4 <= len(data) else 0


def _remove_stale(data: bytearray, order: str, start: int, stale: Collection[int] = _STALE_TAGS) -> int:
    """Removes entries from a directory in its place, also those whose values are missing; returns how many are left."""
    entries, following = _entries(data, order, start)
    kept = [
        entry for entry in entries if _tag(entry, order) not in stale and _has_value(entry, order, len(data))
    ]
    if len(kept) < len(entries):
        new = struct.pack(order + "H", len(kept)) + b"".join(kept) + struct.pack(order + "I", following)
        data[start : start + 2 + 12 * len(entries)] = new.ljust(2 + 12 * len(entries), b"\0")
    return len(kept)


def _is_cleaned(data: bytearray, order: str, entry: bytes) -> bool:
    """Removes stale entries from the directory that an entry points to; returns whether there is none or it can be read."""
    if _tag(entry, order) not in (IFD.Exif, IFD.GPSInfo):
        return True
    try:
        return _remove_stale(data, order, _offset(entry, order)) > 0
    except (ExifError, struct.error):
        return False


def _remove_thumbnail(data: bytearray, order: str, start: int) -> None:
    """Blanks the thumbnail of a directory, or cuts it off where it is the last thing in the block."""
    try:
        entries, _ = _entries(data, order, start)
    except (ExifError, struct.error):  # then no reader finds it either
        return
    found = {_tag(entry, order): _offset(entry, order) for entry in entries}
    if not all(tag in found for tag in _THUMBNAIL):
        return
    at, end = found[_THUMBNAIL[0]], found[_THUMBNAIL[0]] + found[_THUMBNAIL[1]]
    if start < at <= end == len(data):
        del data[at:]
    elif start < at <= end < len(data):
        data[at:end] = bytes(end - at)


def _directory(data: bytes, order: str, start: int, depth: int = 0) -> Directory:
    """Reads a directory and those below it."""
    try:
        fields: Directory = {}
        for entry in _entries(data, order, start)[0]:
            tag, kind, count = struct.unpack_from(order + "HHI", entry)
            if tag in fields:
                continue
            if tag in _DIRECTORIES and depth < 2:
                fields[tag] = _directory(data, order, _offset(entry, order), depth + 1)
            elif kind in _TYPES:
                size = count * _TYPES[kind][0]
                at = _offset(entry, order)
                value = entry[8 : 8 + size] if size <= 4 else bytes(data[at : at + size])
                if len(value) == size:  # otherwise it lies beyond the end, and is lost
                    fields[tag] = TiffField(kind, count, value)
    except struct.error as error:
        raise ExifError(str(error)) from error
    return fields


def _laid_out(fields: Directory, order: str, start: int) -> bytes:
    """A directory as bytes for the offset `start`, with the values and the directories below it."""
    entries, beyond = b"", b""
    base = start + 2 + 12 * len(fields) + 4
    for tag, field in sorted(fields.items()):
        at = base + len(beyond)
        if isinstance(field, dict):
            entries += struct.pack(order + "HHII", tag, 4, 1, at)
            beyond += _laid_out(field, order, at)
        elif len(field.value) <= 4:
            entries += struct.pack(order + "HHI", tag, field.kind, field.number) + field.value.ljust(4, b"\0")
        else:
            entries += struct.pack(order + "HHII", tag, field.kind, field.number, at)
            beyond += field.value
        beyond += bytes(len(beyond) % 2)  # offsets are even
    return struct.pack(order + "H", len(fields)) + entries + struct.pack(order + "I", 0) + beyond


def _turned(field: TiffField | Directory) -> TiffField | Directory:
    """A field in the other byte order."""
    if isinstance(field, dict):
        return {tag: _turned(one) for tag, one in field.items()}
    width = _TYPES[field.kind][1]
    return field._replace(value=np.frombuffer(field.value, f"u{width}").byteswap().tobytes())
