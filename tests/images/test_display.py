"""Pictures as a screen shows them: in sRGB and over white."""

from __future__ import annotations

import dataclasses
import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from tsdsr_jax.images.display import displayed, not_displayed
from tsdsr_jax.images.files import Photo
from tsdsr_jax.images.metadata import Metadata
from tsdsr_jax.images.profiles import in_srgb, is_srgb, profile_of_chunks

LINEAR, P3, PQ = struct.pack(">I", 100000), bytes((12, 13, 0, 1)), bytes((9, 16, 0, 1))
PROPHOTO = {
    b"gAMA": struct.pack(">I", round(1e5 / 1.8)),
    b"cHRM": struct.pack(">8I", 34567, 35850, 73470, 26530, 15960, 84040, 3660, 10),
}


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photo(rgb: np.ndarray, icc: bytes | None = None, **more: object) -> Photo:
    return Photo(rgb, more.pop("alpha", None), False, Metadata(icc=icc, **more))


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_linear_light_becomes_srgb():
    """Against the formula of the standard, to rounding."""
    linear = np.arange(256, dtype=np.uint8)
    wide = np.repeat(linear[None, :, None], 3, -1)
    shown = displayed(photo(wide, profile_of_chunks({b"gAMA": LINEAR}, gray=False)))[0, :, 1]
    back = srgb_to_linear(shown / 255)
    half_a_level = np.gradient(srgb_to_linear(np.arange(256) / 255))[shown] * 0.75
    assert (np.abs(back - linear / 255) <= half_a_level).all()


@pytest.mark.parametrize("chunks", [{b"cICP": P3}, PROPHOTO])
def test_wide_gamuts_become_srgb(chunks: dict[bytes, bytes]):
    """sRGB colors written in a wider space come back, to what eight bits leave of them."""
    profile = profile_of_chunks(chunks, gray=False)
    colors = np.random.default_rng(0).integers(20, 236, (40, 50, 3), np.uint8)
    transform = ImageCms.buildTransform(
        ImageCms.createProfile("sRGB"),
        io.BytesIO(profile),
        "RGB",
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
    )
    wide = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
    before = np.abs(wide.astype(int) - colors)
    after = np.abs(displayed(photo(wide, profile)).astype(int) - colors)
    assert before.mean() > 5 and after.mean() < 1.5 and after.mean() < before.mean() / 5


def test_display_p3_has_the_standards_primaries():
    """Its red is sRGB's (1.0930, -0.2267, -0.1501) in linear light: out of gamut, so clipped; gray stays gray."""
    profile = profile_of_chunks({b"cICP": P3}, gray=False)
    colors = np.uint8([[[255, 0, 0], [128, 128, 128], [150, 120, 100]]])
    shown = displayed(photo(colors, profile))[0].tolist()
    assert shown[:2] == [[255, 0, 0], [128, 128, 128]]
    linear = srgb_to_linear(colors[0, 2] / 255)
    matrix = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]
    assert srgb_to_linear(np.array(shown[2]) / 255) == pytest.approx(np.array(matrix) @ linear, abs=0.004)


def test_srgb_costs_nothing():
    rgb = np.zeros((2, 2, 3), np.uint8)
    for icc in (None, srgb_profile()):
        assert displayed(photo(rgb, icc)) is rgb
    assert is_srgb(srgb_profile(), gray=False)


def test_transparent_parts_are_white():
    rgb, alpha = np.zeros((1, 3, 3), np.uint8), np.uint8([[0, 51, 255]])
    assert displayed(photo(rgb, alpha=alpha))[0, :, 0].tolist() == [255, 204, 0]


def test_what_cannot_be_converted_has_a_reason():
    rgb = np.full((2, 2, 3), 100, np.uint8)
    assert not_displayed(photo(rgb)) is None
    assert "HDR" in not_displayed(photo(rgb, png_color={b"cICP": PQ}))
    empty = srgb_profile()[:128] + struct.pack(">I", 0)
    assert in_srgb(rgb, empty, gray=False) is None
    assert not_displayed(photo(rgb, empty)) == "its color profile cannot be applied"
    assert displayed(photo(rgb, empty)) is rgb


def test_gray_profiles():
    gray = np.repeat(np.uint8([[0, 55, 255]])[..., None], 3, -1)
    one = photo(gray, profile_of_chunks({b"gAMA": LINEAR}, gray=True))
    assert displayed(dataclasses.replace(one, gray=True))[0, :, 2].tolist() == [0, 128, 255]
