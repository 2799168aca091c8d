"""PNG files in chunks: what belongs to the pixels is left to Pillow, the rest is read here.

Pillow refuses files whose texts or profiles are large, or that have a wrong checksum where no pixels are. It also does not
hand out everything that a result can carry.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from tsdsr_jax.images.metadata import Metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Kinds whose content says what the colors mean -> its length.
COLOR_CHUNKS = {b"cICP": 4, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1}
XMP_KEYWORD = b"XML:com.adobe.xmp"
_RAW_PROFILE = b"Raw profile type "
# Pillow's own limit, for texts and profiles.
PILLOWS_LIMIT = 2**20

# Ancillary chunks that belong to the pixels. (Kinds that begin with a capital letter all do.)
_OF_PIXELS = (b"tRNS",)
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_WANTED = (*_TEXTS, *COLOR_CHUNKS, b"iCCP", b"eXIf", b"pHYs", b"acTL")
# No profile and no text of use is longer, decompressed.
_MOST_BYTES = 2**24
_INCH = 0.0254


@dataclasses.dataclass
class PngParts:
    """A PNG file, taken apart.

    Attributes:
      picture: a PNG file with the chunks that belong to the pixels, and EXIF and XMP, which may hold the orientation.
      metadata: what the other chunks hold.
      frames: how many frames an animation has; otherwise 1.
      remarks: what is unusual about the file, without its name.
    """

    picture: bytes = b""
    metadata: Metadata = dataclasses.field(default_factory=Metadata)
    frames: int = 1
    remarks: list[str] = dataclasses.field(default_factory=list)


class _Chunk(NamedTuple):
    """A chunk: its kind, its content, and the whole of it as it is in the file."""

    kind: bytes
    content: bytes
    whole: bytes


def is_png(start: bytes) -> bool:
    return start.startswith(SIGNATURE)


def read_png(file: BinaryIO, pixels: bool) -> PngParts:
    """Takes a PNG file apart.

    Args:
      file: the file, at its beginning.
      pixels: whether `picture` gets them; if not, an empty chunk stands for them.
    """
    parts, before, after, ended, texts = PngParts(), list[bytes](), list[bytes](), False, 0
    found = parts.metadata
    for chunk in _chunks(file, pixels):
        if chunk.kind == b"IEND":
            ended = True
            break
        ancillary = chunk.kind[0] & 0x20
        if ancillary and chunk.whole != _chunk(chunk.kind, chunk.content):
            parts.remarks.append(f"the checksum of its {chunk.kind.decode()} is wrong; that is left out")
        elif not ancillary or chunk.kind in _OF_PIXELS:
            (after if chunk.kind == b"IDAT" or after else before).append(chunk.whole)
        else:
            try:
                if chunk.kind == b"acTL":
                    parts.frames = max(1, int.from_bytes(chunk.content[:4], "big"))
                elif chunk.kind in _TEXTS:
                    texts += _take_text(found, chunk)
                else:
                    _take(found, chunk)
            # Whatever the content is, the pixels are still worth reading.
            except (ValueError, IndexError, struct.error, zlib.error):
                parts.remarks.append(f"its {chunk.kind.decode()} cannot be read; that is left out")
    if pixels and after and not ended:
        parts.remarks.append("its end is missing")
    if texts > PILLOWS_LIMIT:
        parts.remarks.append(f"has {texts / 1e6:.1f} MB of text, which results do not carry")
    if found.icc and len(found.icc) > PILLOWS_LIMIT:
        parts.remarks.append(
            f"has a color profile of {len(found.icc) / 1e6:.1f} MB, which some programs refuse"
        )
    if found.exif:
        before.append(_chunk(b"eXIf", found.exif[6:]))
    if found.xmp:
        before.append(_chunk(b"iTXt", xmp_text(found.xmp)))
    parts.picture = b"".join([SIGNATURE, *before, *after, *([_chunk(b"IEND", b"")] if ended else [])])
    return parts


def xmp_text(xmp: bytes) -> bytes:
    """The content of the iTXt chunk that holds XMP, uncompressed."""
    return XMP_KEYWORD + b"\0\0\0\0\0" + xmp


def iptc_text(iptc: bytes) -> bytes:
    """The content of the tEXt chunk that holds IPTC, in the form that ImageMagick has introduced."""
    resource = photoshop_resource(iptc)
    digits = resource.hex()
    lines = "\n".join(digits[at : at + 72] for at in range(0, len(digits), 72))
    return _RAW_PROFILE + f"iptc\0\niptc\n{len(resource):8d}\n{lines}\n".encode()


def photoshop_resource(iptc: bytes) -> bytes:
    """IPTC as one of Photoshop's resources."""
    return b"8BIM\x04\x04\0\0" + struct.pack(">I", len(iptc)) + iptc + bytes(len(iptc) % 2)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _chunks(file: BinaryIO, pixels: bool) -> Iterator[_Chunk]:
    """The chunks up to the end, or to where the file is cut or broken."""
    file.seek(len(SIGNATURE))
    while len(head := file.read(8)) == 8 and head[4:].isalpha():
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if (kind == b"IDAT" and not pixels) or (kind[0] & 0x20 and kind not in (*_WANTED, *_OF_PIXELS)):
            file.seek(length + 4, os.SEEK_CUR)
            if kind == b"IDAT":
                yield _Chunk(kind, b"", _chunk(kind, b""))
            continue
        rest = file.read(length + 4)
        if len(rest) == length + 4 or kind == b"IDAT":
            yield _Chunk(kind, rest[:length], head + rest)


def _take(found: Metadata, chunk: _Chunk) -> None:
    """Enters the content of an ancillary chunk; the first of each kind counts."""
    kind, content = chunk.kind, chunk.content
    if kind in COLOR_CHUNKS:
        if len(content) == COLOR_CHUNKS[kind]:
            found.png_color.setdefault(kind, content)
    elif kind == b"iCCP":
        found.icc = found.icc or _inflated(content.split(b"\0", 1)[1][1:])
    elif kind == b"eXIf":
        found.exif = b"Exif\0\0" + content
    elif kind == b"pHYs":
        across, down, unit = struct.unpack(">IIB", content)
        found.density = (across * _INCH, down * _INCH) if unit == 1 else None


def _take_text(found: Metadata, chunk: _Chunk) -> int:
    """Enters a text if it holds metadata that results carry; returns its length."""
    keyword, text = chunk.content.split(b"\0", 1)
    if chunk.kind == b"iTXt":
        compressed, text = text[0] == 1, text[2:].split(b"\0", 2)[2]
    else:
        compressed, text = chunk.kind == b"zTXt", text[chunk.kind == b"zTXt" :]
    text = _inflated(text) if compressed else text
    if keyword == XMP_KEYWORD:
        found.xmp = found.xmp or text
    elif keyword.startswith(_RAW_PROFILE):
        _take_raw_profile(found, keyword.removeprefix(_RAW_PROFILE), text)
    else:
        return len(text)
    return 0


def _take_raw_profile(found: Metadata, name: bytes, text: bytes) -> None:
    """Enters metadata that older programs store as hexadecimal digits, below a name and a length."""
    data = bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    if name in (b"exif", b"APP1") and data.startswith(b"Exif\0\0"):
        found.exif = found.exif or data
    elif name == b"xmp":
        found.xmp = found.xmp or data
    elif name == b"iptc":
        found.iptc = found.iptc or iptc_of_resources(data)


def iptc_of_resources(data: bytes) -> bytes | None:
    """The IPTC block among Photoshop's resources, or `data` itself if it is such a block."""
    if data.startswith(b"\x1c"):
        return data
    while data.startswith(b"8BIM"):
        name = data[6] + 1 + (data[6] + 1) % 2
        (length,) = struct.unpack_from(">I", data, 6 + name)
        start = 10 + name
        if data[4:6] == b"\x04\x04":
            return data[start : start + length]
        data = data[start + length + length % 2 :]
    return None


def _inflated(data: bytes) -> bytes:
    """Decompresses; raises ValueError if the result were larger than anything useful."""
    decompressor = zlib.decompressobj()
    content = decompressor.decompress(data, _MOST_BYTES)
    if decompressor.unconsumed_tail:
        raise ValueError("too large")
    return content
