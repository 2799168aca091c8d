"""Color profiles: reading and applying them, and making them from what a PNG says about its colors."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageCms

# (x, y) of white, red, green and blue, as PNG's cHRM orders them.
_Primaries = tuple[float, ...]
# Parameters of an ICC curve: exponent; or g, a, b, c, d of (a x + b)^g from d on and c x below.
_Curve = tuple[float, ...]

_SRGB: _Primaries = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
_SRGB_CURVE: _Curve = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_REC709_CURVE: _Curve = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
# Numbers of ITU-T H.273, which cICP uses.
_CICP_PRIMARIES: dict[int, _Primaries] = {
    1: _SRGB,
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
_CICP_CURVES: dict[int, _Curve] = {
    **dict.fromkeys((1, 6, 14, 15), _REC709_CURVE),
    4: (2.2,),
    5: (2.8,),
    8: (1.0,),
    13: _SRGB_CURVE,
}
_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


# ---- applying profiles ---------------------------------------------------------------------------


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


def through_profile(image: Image.Image) -> Image.Image:
    """CMYK or Lab as sRGB: with the embedded profile if it fits, otherwise by the plain formula."""
    profile = _profile(image.info.get("icc_profile"))
    if profile is None:
        return image.convert("RGB")
    try:
        transform = _built(profile, image.mode)
    except ImageCms.PyCMSError:  # A profile of another color space, or with broken or missing tables.
        return image.convert("RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # as always if it does not convert in place
    return converted


def in_srgb(rgb: np.ndarray, icc: bytes, gray: bool) -> np.ndarray | None:
    """(H, W, 3) uint8 pixels in sRGB; None if the profile cannot be applied.

    Args:
      icc: what describes the pixels.
      gray: whether it describes gray values, of which `rgb` holds three copies.
    """
    transform = _to_srgb(icc, gray)
    if transform is None or transform == "none needed":
        return None if transform is None else rgb
    assert not isinstance(transform, str)
    converted = ImageCms.applyTransform(_as_image(rgb, gray), transform)
    return np.asarray(converted)


def is_srgb(icc: bytes, gray: bool) -> bool:
    """Whether a profile changes no color by more than a level."""
    return _to_srgb(icc, gray) == "none needed"


def _as_image(rgb: np.ndarray, gray: bool) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(rgb[..., 0]) if gray else rgb)


@functools.lru_cache(maxsize=16)  # the pictures of a folder often share a profile
def _to_srgb(icc: bytes, gray: bool) -> ImageCms.ImageCmsTransform | str | None:
    """The transform; "none needed" for sRGB itself, which most profiles are; None if there is none."""
    profile = _profile(icc)
    if profile is None:
        return None
    try:
        transform = _built(profile, "L" if gray else "RGB")
    except ImageCms.PyCMSError:
        return None
    steps = np.linspace(0, 255, 18).astype(np.uint8)
    colors = (
        np.stack([steps] * 3, -1)[None]
        if gray
        else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(18, -1, 3)
    )
    converted = np.asarray(ImageCms.applyTransform(_as_image(colors, gray), transform))
    return "none needed" if np.abs(converted.astype(int) - colors).max() <= 1 else transform


def _built(profile: ImageCms.ImageCmsProfile, mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        profile,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


# ---- making profiles -----------------------------------------------------------------------------


def profile_of_chunks(chunks: Mapping[bytes, bytes], gray: bool) -> bytes | None:
    """The profile that a PNG's chunks about color amount to; None for sRGB and for what profiles cannot say.

    Args:
      chunks: kind -> content, of the right length.
      gray: whether the picture is gray.
    """
    primaries, curve = _SRGB, _SRGB_CURVE
    if cicp := chunks.get(b"cICP"):
        if cicp[0] not in _CICP_PRIMARIES or cicp[1] not in _CICP_CURVES or (not gray and cicp[2]):
            return None
        primaries, curve = _CICP_PRIMARIES[cicp[0]], _CICP_CURVES[cicp[1]]
    elif b"sRGB" not in chunks:
        if (chroma := chunks.get(b"cHRM")) and not gray:
            primaries = tuple(value / 1e5 for value in struct.unpack(">8I", chroma))
        if gamma := int.from_bytes(chunks.get(b"gAMA", b""), "big"):
            # 1/2.2 is how a PNG without further knowledge says sRGB.
            curve = _SRGB_CURVE if abs(gamma - 45455) < 500 else (1e5 / gamma,)
    if curve == _SRGB_CURVE and np.abs(np.subtract(primaries, _SRGB)).max() < 0.002:
        return None
    try:
        return _gray_profile(curve) if gray else _matrix_profile(primaries, curve)
    except (
        ZeroDivisionError,
        np.linalg.LinAlgError,
        struct.error,
    ):  # nonsense, such as colors without extent
        return None


def is_high_range(chunks: Mapping[bytes, bytes]) -> bool:
    """Whether the pixels are HDR (PQ or HLG), which sRGB cannot show."""
    return chunks.get(b"cICP", b"\0\0")[1] in (16, 18)


def _matrix_profile(primaries: _Primaries, curve: _Curve) -> bytes:
    xyz = np.array(
        [(x / y, 1.0, (1 - x - y) / y) for x, y in zip(primaries[::2], primaries[1::2], strict=True)]
    )
    white, colors = xyz[0], xyz[1:].T
    colors = colors * np.linalg.solve(colors, white)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD @ colors
    tags = {f"{name}XYZ": _xyz(column) for name, column in zip("rgb", adapted.T, strict=True)}
    return _packed(b"RGB ", tags | {f"{name}TRC": _curve(curve) for name in "rgb"})


def _gray_profile(curve: _Curve) -> bytes:
    return _packed(b"GRAY", {"kTRC": _curve(curve)})


def _fixed(values: tuple[float, ...] | np.ndarray) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _xyz(values: tuple[float, ...] | np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _curve(curve: _Curve) -> bytes:
    return struct.pack(">4sIHH", b"para", 0, 0 if len(curve) == 1 else 3, 0) + _fixed(curve)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return struct.pack(">4sIII2s2sII", b"mluc", 0, 1, 12, b"en", b"US", len(encoded), 28) + encoded


def _packed(space: bytes, tags: Mapping[str, bytes]) -> bytes:
    """A display profile of ICC's version 4."""
    tags = {"desc": _text("Colors of a PNG"), "cprt": _text("No copyright"), "wtpt": _xyz(_D50), **tags}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x04000000, b"mntr", space, b"XYZ ")
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    header = (header + date + b"acsp").ljust(68, b"\0") + _fixed(_D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
