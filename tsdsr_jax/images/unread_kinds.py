"""Recognizes files that are no picture of a kind that is read, to say what they are and what to do."""

from __future__ import annotations

import re

_EXPORT = "export it as JPEG or PNG first"
# What the brand of an ISO media file, such as HEIC, begins with.
_BRANDS = (
    (rb"avi[fs]", f"an AVIF picture, which is not read; {_EXPORT}, for example with ImageMagick"),
    (
        rb"hei|hev|mif1|msf1",
        f"a HEIC picture, as iPhones save them, which is not read; {_EXPORT}, for example with ImageMagick, or set the "
        'camera to "Most Compatible"',
    ),
    (rb"crx", f"a camera's raw file (CR3), which is not read; {_EXPORT}"),
    (rb"", "a film, not a picture; export single frames as PNG first"),
)
_STARTS = (
    (rb"\xff\x0a|\0\0\0\x0cJXL ", f"a JPEG XL picture, which is not read; {_EXPORT}"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", f"a JPEG 2000 picture, which is not read; {_EXPORT}"),
    (rb"8BPS", f"a Photoshop document, which is not read; {_EXPORT}"),
    (rb"gimp xcf", f"a GIMP document, which is not read; {_EXPORT}"),
    (rb"%PDF", f"a PDF document, not a picture; {_EXPORT}"),
    (rb"(?:II\*\0|MM\0\*).{4}CR", f"a camera's raw file (CR2), which is not read; {_EXPORT}"),
    (rb"FUJIFILMCCD-RAW|IIU\0|IIRO|\0MRM", f"a camera's raw file, which is not read; {_EXPORT}"),
    (rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg", f"an SVG drawing, which is not read; {_EXPORT}"),
    (rb"(?i)\s*<(?:!doctype )?html", "a web page, not a picture; download the picture itself"),
)


def unread_kind(start: bytes) -> str | None:
    """What a file is and what to do about it, if its first bytes (32 or more) tell; without its name."""
    if start[4:8] == b"ftyp":
        # The first of the compatible brands says more than the general ones that pictures of both kinds begin with.
        brands = start[8:12] + (start[16:32] if start[8:12] in (b"mif1", b"msf1") else b"")
        if re.search(_BRANDS[0][0], brands):
            return _BRANDS[0][1]
        return next(text for brand, text in _BRANDS if re.match(brand, brands))
    return next((text for pattern, text in _STARTS if re.match(pattern, start, re.DOTALL)), None)
