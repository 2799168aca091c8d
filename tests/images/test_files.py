import io
import os
import resource
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import IMAGE_SUFFIXES, Photo, read_photo, read_size
from tsdsr_jax.images.metadata import Metadata
from tsdsr_jax.images.pixels import decoded_pixels
from tsdsr_jax.images.profiles import in_srgb
from tsdsr_jax.images.transparency import over_white
from tsdsr_jax.images.writing import FORMATS, write_photo

LIMIT = 10**6
ORIENTATION, MAKE, EXIF_IFD, PIXEL_WIDTH, TAKEN = 0x0112, 0x010F, 0x8769, 0xA002, 0x9003


def _rgb(height: int = 6, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _gray(height: int = 6, width: int = 8) -> np.ndarray:
    return _rgb(height, width)[..., 0]


def _alpha() -> np.ndarray:
    """Hides nothing: hidden colors are a matter of test_transparency.py."""
    return np.maximum(_gray(), 8)


def _plain(**changes: object) -> Photo:
    fields = {"rgb": _rgb(), "alpha": None, "gray": False}
    own = {name: changes.pop(name) for name in list(changes) if name not in fields}
    return Photo(**(fields | changes), metadata=Metadata(**own))


def _exif(orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    exif[MAKE] = "Maker"
    if orientation is not None:
        exif[ORIENTATION] = orientation
    exif.get_ifd(EXIF_IFD)[TAKEN] = "2020:01:02 03:04:05"
    exif.get_ifd(EXIF_IFD)[PIXEL_WIDTH] = 8
    return exif.tobytes()


def _icc(space: bytes, connection: bytes, kind: bytes, **tags: bytes) -> bytes:
    """A minimal version 2 color profile."""
    table, body, offset = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", offset + len(body), len(content))
        body += content
    d50 = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    date = struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"", 0x02400000, kind, space, connection)
    header = (header + date + b"acsp").ljust(68, b"\0") + d50
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _rgb_icc() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def _gray_icc() -> bytes:
    white = struct.pack(">4sIIII", b"XYZ ", 0, 0xF6D6, 0x10000, 0xD32D)
    gamma = struct.pack(">4sIIHH", b"curv", 0, 1, 0x0233, 0)
    return _icc(b"GRAY", b"XYZ ", b"mntr", wtpt=white, kTRC=gamma)


def _cmyk_icc() -> bytes:
    """Paper is white, and full cyan ink prints as a strong red: nothing like the plain formula."""
    ramp = bytes(range(256))
    red, white = bytes((136, 208, 195)), bytes((255, 128, 128))
    nodes = b"".join(red if node & 8 else white for node in range(16))  # Cyan is the slowest of the four.
    identity = struct.pack(">9i", *(0x10000 if i % 4 == 0 else 0 for i in range(9)))
    table = struct.pack(">4sI4B", b"mft1", 0, 4, 3, 2, 0) + identity + ramp * 4 + nodes + ramp * 3
    return _icc(b"CMYK", b"Lab ", b"prtr", A2B0=table, A2B1=table)


def _png(
    width: int, height: int, depth: int, kind: int, rows: bytes, *, before: bytes = b"", after: bytes = b""
):
    """A PNG from filtered rows; `before` and `after` are chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + before + pixels + after + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_of(values: np.ndarray, kind: int, **chunks: bytes) -> bytes:
    """(H, W) or (H, W, C) uint8 or uint16 as PNG of the given color type."""
    rows = b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)
    height, width = values.shape[:2]
    return _png(width, height, values.dtype.itemsize * 8, kind, rows, **chunks)


def _tiff_of(
    values: np.ndarray, photometric: int, planar: int = 1, bits: int = 0, data: bytes = b""
) -> bytes:
    """(H, W) or (H, W, C) values as uncompressed little-endian TIFF; planar 2 puts channel after channel."""
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    planes = values.transpose(2, 0, 1) if planar == 2 else values[None]
    strips = [data] if data else [plane.tobytes() for plane in planes]
    count = 12
    bits_at = 8 + 2 + 12 * count + 4
    offsets_at = bits_at + 2 * channels
    sizes_at = offsets_at + 4 * len(strips)
    starts = np.cumsum([sizes_at + 4 * len(strips)] + [len(strip) for strip in strips])[:-1].tolist()
    sizes = [len(strip) for strip in strips]
    depths = [bits or values.dtype.itemsize * 8] * channels
    one = len(strips) == 1
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, depths[0] if channels == 1 else bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, len(strips), starts[0] if one else offsets_at),
        (274, 3, 1, 1),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, len(strips), sizes[0] if one else sizes_at),
        (284, 3, 1, planar),
        (339, 3, 1, {"f": 3, "i": 2}.get(values.dtype.kind, 1)),
    ]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = b"II*\0" + struct.pack("<IH", 8, count) + directory + struct.pack("<I", 0)
    lists = struct.pack(f"<{channels}H", *depths) + struct.pack(f"<{2 * len(strips)}I", *starts, *sizes)
    return head + lists + b"".join(strips)


def _saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def _put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _assert_one_line(error: pytest.ExceptionInfo, path: Path) -> None:
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# ---- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_rgb_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    photo = read_photo(_saved(tmp_path / f"a.{suffix}", Image.fromarray(_rgb()), **options), LIMIT)
    np.testing.assert_array_equal(photo.rgb, _rgb())
    assert photo.rgb.flags.writeable and photo.rgb.flags.c_contiguous
    density = photo.metadata.density if suffix == "bmp" else None  # Pillow gives every BMP one
    assert (photo.alpha, photo.gray, photo.metadata) == (None, False, Metadata(density=density))


def test_jpeg_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    photo = read_photo(_saved(tmp_path / "a.PNG", Image.fromarray(flat), format="JPEG"), LIMIT)
    assert np.abs(photo.rgb.astype(int) - flat).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff"])
def test_gray_becomes_three_equal_channels(tmp_path: Path, suffix: str) -> None:
    path = _saved(tmp_path / f"a.{suffix}", Image.fromarray(np.full((8, 8), 77, np.uint8)))
    photo = read_photo(path, LIMIT)
    assert photo.gray and photo.rgb.shape == (8, 8, 3) and (photo.rgb == 77).all()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff"])
def test_bilevel_is_black_and_white(tmp_path: Path, suffix: str) -> None:
    bits = _gray() > 127
    photo = read_photo(_saved(tmp_path / f"a.{suffix}", Image.fromarray(bits)), LIMIT)
    np.testing.assert_array_equal(photo.rgb[..., 1], bits * 255)
    assert photo.gray and photo.alpha is None


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_gray_with_alpha(tmp_path: Path, suffix: str) -> None:
    values = np.dstack([_rgb()[..., 1], _alpha()])
    photo = read_photo(_saved(tmp_path / f"a.{suffix}", Image.fromarray(values, "LA")), LIMIT)
    np.testing.assert_array_equal(photo.rgb[..., 2], values[..., 0])
    np.testing.assert_array_equal(photo.alpha, values[..., 1])
    assert photo.gray


# libwebp itself drops an alpha channel that is opaque throughout.
@pytest.mark.parametrize(
    ("suffix", "opaque"), [("png", False), ("png", True), ("tiff", False), ("tiff", True), ("webp", False)]
)
def test_rgb_with_alpha(tmp_path: Path, suffix: str, opaque: bool) -> None:
    alpha = np.full((6, 8), 255, np.uint8) if opaque else _alpha()
    image = Image.fromarray(np.dstack([_rgb(), alpha]))
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    photo = read_photo(_saved(tmp_path / f"a.{suffix}", image, **options), LIMIT)
    np.testing.assert_array_equal(photo.rgb, _rgb())
    np.testing.assert_array_equal(photo.alpha, alpha)
    assert not photo.gray


def _palette_image() -> Image.Image:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) % 3, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("transparency", "expected"), [(None, None), (1, (255, 0, 255)), (b"\x80\xff\x00", (128, 255, 0))]
)
def test_palettes(tmp_path: Path, transparency: int | bytes | None, expected: tuple | None) -> None:
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        photo = read_photo(_saved(tmp_path / "a.png", _palette_image(), **options), LIMIT)
    colors = np.array([[255, 0, 0], [0, 255, 0], [10, 20, 30]])
    visible = np.array(expected or [255] * 3) > 0
    np.testing.assert_array_equal(photo.rgb[0, :3][visible], colors[visible])
    assert photo.alpha is None if expected is None else tuple(photo.alpha[0, :3]) == expected


@pytest.mark.parametrize(
    ("depth", "row", "key", "gray", "alpha"),
    [
        (1, b"\xa0", 1, [255, 0, 255, 0], [0, 255, 0, 255]),
        (2, b"\x1b", 2, [0, 85, 170, 255], [255, 255, 0, 255]),
        (4, b"\x12\x34", 3, [17, 34, 51, 68], [255, 255, 0, 255]),
        (8, b"\x01\x02\x03\x04", 3, [1, 2, 3, 4], [255, 255, 0, 255]),
        (16, struct.pack(">4H", 0, 700, 32896, 65535), 700, [0, 3, 128, 255], [255, 0, 255, 255]),
    ],
)
def test_gray_png_with_a_transparent_value(
    tmp_path: Path, depth: int, row: bytes, key: int, gray: list, alpha: list
) -> None:
    content = _png(4, 1, depth, 0, b"\0" + row, before=_chunk(b"tRNS", struct.pack(">H", key)))
    photo = read_photo(_put(tmp_path / "a.png", content), LIMIT)
    visible = np.array(alpha) > 0
    np.testing.assert_array_equal(photo.rgb[0, visible, 0], np.array(gray)[visible])
    assert photo.alpha[0].tolist() == alpha
    assert photo.gray


@pytest.mark.parametrize("scale", [1, 256])
def test_rgb_png_with_a_transparent_color(tmp_path: Path, scale: int) -> None:
    values = np.arange(12).reshape(1, 4, 3)
    key = struct.pack(">3H", *(3 * scale, 4 * scale, 5 * scale))
    typed = (values * scale).astype(np.uint8 if scale == 1 else np.uint16)
    content = _png_of(typed, 2, before=_chunk(b"tRNS", key))
    photo = read_photo(_put(tmp_path / "a.png", content), LIMIT)
    np.testing.assert_array_equal(photo.rgb[:, [0, 2, 3]], values[:, [0, 2, 3]])
    assert photo.alpha[0].tolist() == [255, 0, 255, 255]


@pytest.mark.parametrize("layout", ["png", "tiff", "tiff big-endian", "tiff 0 is white"])
def test_sixteen_bit_gray_is_rounded_to_eight(tmp_path: Path, layout: str) -> None:
    values = np.uint16([[0, 128, 129, 385, 386], [32767, 32896, 65406, 65407, 65535]])
    expected = np.array([[0, 0, 1, 1, 2], [127, 128, 254, 255, 255]])
    if layout == "png":
        content = _png_of(values, 0)
    elif layout == "tiff big-endian":
        stored = io.BytesIO()
        Image.frombytes("I;16B", (5, 2), values.astype(">u2").tobytes()).save(stored, "TIFF")
        content = stored.getvalue()
    else:
        content = _tiff_of(values, photometric=0 if "white" in layout else 1)
    photo = read_photo(_put(tmp_path / "a", content), LIMIT)
    np.testing.assert_array_equal(photo.rgb[..., 0], 255 - expected if "white" in layout else expected)
    assert photo.gray


def test_twelve_bit_gray_fills_the_range(tmp_path: Path) -> None:
    packed = bytes((0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10))  # 0, 2048, 4095, 16
    content = _tiff_of(np.zeros((1, 4), np.uint16), photometric=1, bits=12, data=packed)
    photo = read_photo(_put(tmp_path / "a.tif", content), LIMIT)
    assert photo.rgb[0, :, 0].tolist() == [0, 128, 255, 1]


def test_integer_and_floating_point_tiffs(tmp_path: Path) -> None:
    integers = np.int32([[0, 257, 65535]])
    photo = read_photo(_put(tmp_path / "i.tif", _tiff_of(integers, 1)), LIMIT)
    assert photo.rgb[0, :, 0].tolist() == [0, 1, 255] and photo.gray
    floats = np.float32([[0, 0.5, 0.999, 1]])
    photo = read_photo(_put(tmp_path / "f.tif", _tiff_of(floats, 1)), LIMIT)
    assert photo.rgb[0, :, 0].tolist() == [0, 128, 255, 255] and photo.gray


@pytest.mark.parametrize(
    "values", [np.int32([[0, 65536]]), np.int32([[-1, 5]]), np.float32([[0, 1.5]]), np.float32([[0, np.nan]])]
)
def test_values_without_a_known_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = _put(tmp_path / "a.tif", _tiff_of(values, 1))
    with pytest.raises(UserError, match="outside") as error:
        read_photo(path, LIMIT)
    _assert_one_line(error, path)


@pytest.mark.parametrize("kind", ["png RGB", "png RGBA", "png LA", "tiff RGB"])
def test_sixteen_bit_color_keeps_its_high_byte(tmp_path: Path, kind: str) -> None:
    channels = {"png RGB": 3, "png RGBA": 4, "png LA": 2, "tiff RGB": 3}[kind]
    values = np.random.default_rng(0).integers(8 << 8, 65536, (5, 4, channels), np.uint16)
    color_type = {2: 4, 3: 2, 4: 6}[channels]
    content = _tiff_of(values, 2) if kind.startswith("tiff") else _png_of(values, color_type)
    photo = read_photo(_put(tmp_path / "a", content), LIMIT)
    high = values >> 8
    np.testing.assert_array_equal(photo.rgb, high[..., :1].repeat(3, -1) if channels == 2 else high[..., :3])
    assert photo.gray == (channels == 2)
    if channels in (2, 4):
        np.testing.assert_array_equal(photo.alpha, high[..., -1])
    else:
        assert photo.alpha is None


def test_planar_tiffs(tmp_path: Path) -> None:
    """Pillow 13 reads eight bits well and turns sixteen into noise."""
    eight = _put(tmp_path / "8.tif", _tiff_of(_rgb(), 2, planar=2))
    np.testing.assert_array_equal(read_photo(eight, LIMIT).rgb, _rgb())
    sixteen = _put(tmp_path / "16.tif", _tiff_of(_rgb().astype(np.uint16) * 257, 2, planar=2))
    with pytest.raises(UserError, match="separate color planes") as error:
        read_photo(sixteen, LIMIT)
    _assert_one_line(error, sixteen)


def test_floating_point_color_tiff_is_refused_clearly(tmp_path: Path) -> None:
    path = _put(tmp_path / "a.tif", _tiff_of(np.zeros((4, 4, 3), np.float32), 2))
    with pytest.raises(UserError, match="export it again as 8-bit") as error:
        read_photo(path, LIMIT)
    _assert_one_line(error, path)


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_ycbcr_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    flat = Image.new("RGB", (16, 16), (200, 100, 50)).convert("YCbCr")
    path = _saved(tmp_path / f"a.{suffix}", flat)
    if suffix == "tiff" and not _pillow_reads(path):  # 12.3 cannot read back what it has written
        with pytest.raises(UserError, match="damaged or cut short"):
            read_photo(path, LIMIT)
        return
    photo = read_photo(path, LIMIT)
    assert np.abs(photo.rgb.astype(int) - (200, 100, 50)).max() <= 3
    assert not photo.gray


def _pillow_reads(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("suffix", ["tiff", "jpg"])
def test_cmyk_goes_through_its_profile_and_carries_none(tmp_path: Path, suffix: str) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    photo = read_photo(_saved(tmp_path / f"plain.{suffix}", cyan), LIMIT)
    assert np.abs(photo.rgb.astype(int) - (0, 255, 255)).max() <= 3
    photo = read_photo(_saved(tmp_path / f"profile.{suffix}", cyan, icc_profile=_cmyk_icc()), LIMIT)
    red, green, blue = photo.rgb[0, 0].astype(int)
    assert red > 200 and green < 60 and blue < 60
    assert photo.metadata.icc is None
    photo = read_photo(_saved(tmp_path / f"wrong.{suffix}", cyan, icc_profile=_rgb_icc()), LIMIT)
    assert np.abs(photo.rgb.astype(int) - (0, 255, 255)).max() <= 3
    assert photo.metadata.icc is None


def test_lab_becomes_srgb(tmp_path: Path) -> None:
    colors = Image.fromarray(np.uint8([[[200, 100, 50], [20, 120, 220], [128, 128, 128]]]))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(colors, srgb, lab, outputMode="LAB")
    own = ImageCms.ImageCmsProfile(lab).tobytes()
    for options in ({}, {"icc_profile": own}, {"icc_profile": _rgb_icc()}):
        photo = read_photo(_saved(tmp_path / "a.tiff", image, **options), LIMIT)
        # Eight bits of Lab are coarser than eight bits of a dark sRGB channel.
        assert np.abs(photo.rgb.astype(int) - np.asarray(colors).astype(int)).max() <= 6
        assert photo.metadata.icc is None


@pytest.mark.parametrize("mode", ["RGBX", "RGBa", "La", "PA", "HSV", "I;16L", "I;16B", "I;16N"])
def test_modes_that_pillow_has_only_in_memory(mode: str) -> None:
    sources = {"RGBa": "RGBA", "La": "LA", "I;16L": "I;16", "I;16B": "I;16", "I;16N": "I;16"}
    source = sources.get(mode, "P" if mode == "PA" else "RGB")
    image = Image.new(source, (4, 3), {"RGB": (200, 100, 50), "RGBA": (200, 100, 50, 255)}.get(source, 0))
    if mode.startswith("I;16"):
        big = mode == "I;16B"
        image = Image.frombytes(mode, (4, 3), np.full((3, 4), 25700, ">u2" if big else "<u2").tobytes())
    else:
        image = image.convert(mode)
    rgb, alpha, gray = decoded_pixels(image, "", "a")
    assert rgb.dtype == np.uint8 and rgb.shape == (3, 4, 3)
    assert gray == (mode[0] in "LI")
    assert (alpha is not None) == (mode in ("RGBa", "La", "PA"))
    if mode in ("RGBX", "RGBa", "HSV"):
        assert np.abs(rgb.astype(int) - (200, 100, 50)).max() <= 2
    if mode.startswith("I;16"):
        assert (rgb == 100).all()


@pytest.mark.parametrize("suffix", ["webp", "tiff", "png"])
def test_the_first_of_many_frames_is_read(tmp_path: Path, suffix: str) -> None:
    frames = [Image.fromarray(_rgb(seed=seed)) for seed in range(3)]
    options = {"lossless": True} if suffix == "webp" else {}
    path = _saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as image:
        assert image.n_frames == 3
    np.testing.assert_array_equal(read_photo(path, LIMIT).rgb, _rgb())
    assert read_size(path, LIMIT) == (6, 8)


def test_a_multi_picture_jpeg_is_read(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    path = _saved(tmp_path / "a.jpg", pictures[0], format="MPO", save_all=True, append_images=pictures[1:])
    assert read_photo(path, LIMIT).rgb[0, 0, 0] > 250


# ---- orientation and metadata --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_and_removed(tmp_path: Path, suffix: str, orientation: int) -> None:
    blocks = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = np.kron(blocks, np.ones((16, 16), np.uint8))[..., None].repeat(3, -1)
    options = {"lossless": True} if suffix == "webp" else {}
    path = _saved(tmp_path / f"a.{suffix}", Image.fromarray(stored), exif=_exif(orientation), **options)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    photo = read_photo(path, LIMIT)
    np.testing.assert_array_equal(photo.rgb, expected)
    assert read_size(path, LIMIT) == photo.rgb.shape[:2] == ((48, 32) if orientation > 4 else (32, 48))
    # The corner that EXIF puts at the top left, in words of the standard: row 0 and column 0 of the picture.
    corner = {1: 0, 2: 2, 3: 5, 4: 3, 5: 0, 6: 3, 7: 5, 8: 2}[orientation]
    assert abs(int(photo.rgb[8, 8, 0]) - 40 * corner) <= 3
    carried = Image.Exif()
    carried.load(photo.metadata.exif)
    assert ORIENTATION not in carried and carried[MAKE] == "Maker"
    assert dict(carried.get_ifd(EXIF_IFD)) == {TAKEN: "2020:01:02 03:04:05"}


def test_alpha_turns_with_the_colors(tmp_path: Path) -> None:
    pixels = np.dstack([_alpha(), _rgb()[..., 1:], _alpha()])
    photo = read_photo(_saved(tmp_path / "a.png", Image.fromarray(pixels), exif=_exif(6)), LIMIT)
    np.testing.assert_array_equal(photo.alpha, np.rot90(_alpha(), -1))
    np.testing.assert_array_equal(photo.alpha, photo.rgb[..., 0])


def test_orientation_behind_the_pixels_of_a_png_counts(tmp_path: Path) -> None:
    late = _chunk(b"eXIf", _exif(6)[6:])
    path = _put(tmp_path / "a.png", _png_of(_rgb(), 2, after=late))
    assert read_size(path, LIMIT) == (8, 6)
    np.testing.assert_array_equal(read_photo(path, LIMIT).rgb, np.rot90(_rgb(), -1))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_are_ignored(tmp_path: Path, orientation: int) -> None:
    path = _saved(tmp_path / "a.png", Image.fromarray(_rgb()), exif=_exif(orientation))
    np.testing.assert_array_equal(read_photo(path, LIMIT).rgb, _rgb())
    assert read_size(path, LIMIT) == (6, 8)


def test_an_exif_block_with_nothing_left_is_not_carried(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    path = _saved(tmp_path / "a.png", Image.fromarray(_rgb()), exif=exif.tobytes())
    assert read_photo(path, LIMIT).metadata.exif is None


@pytest.mark.parametrize("damage", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0nonsense", _exif(6)[:-30]])
def test_a_broken_exif_block_does_not_stop_the_reading(tmp_path: Path, damage: bytes) -> None:
    path = _saved(tmp_path / "a.webp", Image.fromarray(_rgb()), lossless=True, exif=damage)
    photo = read_photo(path, LIMIT)
    assert photo.rgb.shape[:2] == read_size(path, LIMIT)


@pytest.mark.parametrize(
    ("mode", "profile", "kept"),
    [
        ("RGB", "rgb", True),
        ("RGBA", "rgb", True),
        ("P", "rgb", True),
        ("L", "gray", True),
        ("LA", "gray", True),
        ("RGB", "gray", False),
        ("L", "rgb", False),
        ("RGB", "cmyk", False),
        ("RGB", "broken", False),
    ],
)
def test_profiles_are_carried_where_they_describe_the_pixels(
    tmp_path: Path, mode: str, profile: str, kept: bool
) -> None:
    profiles = {"rgb": _rgb_icc(), "gray": _gray_icc(), "cmyk": _cmyk_icc(), "broken": b"not a profile"}
    image = Image.new(mode, (8, 6))
    photo = read_photo(_saved(tmp_path / "a.png", image, icc_profile=profiles[profile]), LIMIT)
    assert photo.metadata.icc == (profiles[profile] if kept else None)


def test_a_gif_is_read_like_its_png(tmp_path: Path) -> None:
    image = Image.fromarray(_rgb()).quantize(16, dither=Image.Dither.NONE)
    image.save(tmp_path / "a.gif")
    image.convert("RGB").save(tmp_path / "a.png")
    gif, png = read_photo(tmp_path / "a.gif", LIMIT), read_photo(tmp_path / "a.png", LIMIT)
    np.testing.assert_array_equal(gif.rgb, png.rgb)
    assert gif.alpha is None and read_size(tmp_path / "a.gif", LIMIT) == png.rgb.shape[:2]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"a letter, not a picture"), "not a readable"),
        (
            lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
            "not a readable",
        ),
        (lambda path: path.write_bytes(_png(0, 4, 8, 0, b"")), "not a readable"),
        (lambda path: path.write_bytes(_png(4, 0, 8, 0, b"")), "not a readable"),
        (lambda path: Image.fromarray(_rgb()).save(path, "PPM"), "not a readable"),
    ],
)
@pytest.mark.parametrize("read", [read_photo, read_size])
def test_what_is_no_photograph_is_refused_in_one_line(tmp_path: Path, read, make, words: str) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(UserError, match=words) as error:
        read(path, LIMIT)
    _assert_one_line(error, path)


@pytest.mark.parametrize("read", [read_photo, read_size])
def test_paths_that_cannot_be_looked_at_are_refused(tmp_path: Path, read) -> None:
    for path in (tmp_path / ("n" * 300 + ".png"), _put(tmp_path / "file", b"x") / "a.png"):
        with pytest.raises(UserError, match="cannot be opened") as error:
            read(path, LIMIT)
        _assert_one_line(error, path)


KINDS = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG"},
    "jpeg progressive": {"format": "JPEG", "progressive": True},
    "webp": {"format": "WEBP"},
    "webp lossless": {"format": "WEBP", "lossless": True},
    "bmp": {"format": "BMP"},
    "tiff": {"format": "TIFF"},
    "tiff lzw": {"format": "TIFF", "compression": "tiff_lzw"},
    "tiff deflate": {"format": "TIFF", "compression": "tiff_deflate"},
    "tiff jpeg": {"format": "TIFF", "compression": "jpeg"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lenient: bool
) -> None:
    """Also when some other library has told Pillow to put up with them."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = _saved(tmp_path / "whole", Image.fromarray(_rgb(80, 64)), **KINDS[kind])
    content = path.read_bytes()
    assert read_photo(path, LIMIT).rgb.shape == (80, 64, 3)
    for part in (0.05, 0.3, 0.5, 0.7, 0.9, 0.98):
        cut = _put(tmp_path / "cut", content[: int(len(content) * part)])
        with pytest.raises(UserError, match=r"cut short|not a readable|cannot be opened") as error:
            read_photo(cut, LIMIT)
        _assert_one_line(error, cut)
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_pixels_of_a_png_are_refused(tmp_path: Path) -> None:
    content = bytearray(_png_of(_rgb(40, 40), 2))
    content[len(content) // 2] ^= 0xFF
    with pytest.raises(UserError, match="damaged"):
        read_photo(_put(tmp_path / "a.png", bytes(content)), LIMIT)


def test_a_palette_that_is_missing_is_named(tmp_path: Path) -> None:
    content = _saved(tmp_path / "whole.png", _palette_image()).read_bytes()
    at = content.index(b"PLTE") - 4
    without = content[:at] + content[at + 12 + int.from_bytes(content[at : at + 4], "big") :]
    with pytest.raises(UserError, match="its palette is missing") as error:
        read_photo(path := _put(tmp_path / "a.png", without), LIMIT)
    _assert_one_line(error, path)


@pytest.mark.parametrize("read", [read_photo, read_size])
def test_large_pictures_are_refused_from_the_header(tmp_path: Path, read) -> None:
    path = _put(tmp_path / "a.png", _png(60000, 50000, 8, 2, b"no pixels at all"))
    with pytest.raises(UserError, match="3000000000 pixels, more than the limit of 2999999999") as error:
        read(path, 3 * 10**9 - 1)
    _assert_one_line(error, path)


def test_the_size_needs_no_pixels(tmp_path: Path) -> None:
    path = _put(tmp_path / "a.png", _png(60000, 50000, 8, 2, b"no pixels at all"))
    assert read_size(path, 3 * 10**9) == (50000, 60000)


def test_pillows_own_limit_neither_leaks_nor_interferes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for suffix in ("png", "jpg", "webp", "tiff", "bmp"):
        path = _saved(tmp_path / f"a.{suffix}", Image.fromarray(_rgb()))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_photo(path, 48).rgb.shape == (6, 8, 3)
            assert read_size(path, 48) == (6, 8)
            with pytest.raises(UserError, match="limit of 47"):
                read_photo(path, 47)
        assert Image.MAX_IMAGE_PIXELS == 10


# ---- writing -------------------------------------------------------------------------------------


def test_suffixes_and_formats_agree() -> None:
    assert {f".{name}" for name in FORMATS} <= set(IMAGE_SUFFIXES)
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("with_alpha", [False, True])
def test_round_trip(tmp_path: Path, format: str, gray: bool, with_alpha: bool) -> None:
    like = _plain(gray=gray, icc=_gray_icc() if gray else _rgb_icc(), exif=_exif())
    alpha = _alpha() if with_alpha else None
    path = tmp_path / "new" / "folder" / f"a.{format}"
    write_photo(path, _rgb(), like, alpha, format)
    photo = read_photo(path, LIMIT)
    expected = np.asarray(Image.fromarray(_rgb()).convert("L").convert("RGB")) if gray else _rgb()
    if gray and format in ("webp", "bmp"):  # without a place for a gray profile
        expected = in_srgb(expected, like.metadata.icc, gray=True)
    if with_alpha and format in ("jpg", "bmp"):
        expected = over_white(expected, alpha)
    if format == "jpg":
        assert np.abs(photo.rgb.astype(int) - expected).mean() < 4
    else:
        np.testing.assert_array_equal(photo.rgb, expected)
    assert photo.gray == (gray and format != "webp")
    if with_alpha and format in ("png", "webp", "tiff"):
        np.testing.assert_array_equal(photo.alpha, alpha)
    else:
        assert photo.alpha is None
    icc = None if format == "bmp" or (format == "webp" and gray) else like.metadata.icc
    assert photo.metadata.icc == icc
    with Image.open(path) as image:
        assert image.info.get("icc_profile") == icc
    if format == "bmp":
        assert photo.metadata.exif is None
    else:
        carried = Image.Exif()
        carried.load(photo.metadata.exif)
        assert carried[MAKE] == "Maker"
        assert carried.get_ifd(EXIF_IFD)[TAKEN] == "2020:01:02 03:04:05"


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("format", ["jpg", "png", "webp", "tiff"])
def test_exif_crosses_from_format_to_format(tmp_path: Path, source: str, format: str) -> None:
    """A TIFF keeps its EXIF between the tags of its pixels, which must not come along."""
    like = read_photo(_saved(tmp_path / f"a.{source}", Image.fromarray(_rgb()), exif=_exif(6)), LIMIT)
    result = _rgb(32, 24)
    write_photo(tmp_path / f"b.{format}", result, like, format=format)
    again = read_photo(tmp_path / f"b.{format}", LIMIT)
    assert again.rgb.shape == result.shape
    carried = Image.Exif()
    carried.load(again.metadata.exif)
    assert set(carried) == {MAKE, EXIF_IFD}
    assert dict(carried.get_ifd(EXIF_IFD)) == {TAKEN: "2020:01:02 03:04:05"}


def test_pixel_tags_in_the_exif_of_a_jpeg_do_not_reach_a_tiff(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[MAKE], exif[322], exif[323], exif[339] = "Maker", 16, 16, 3  # Tile sizes and a floating-point claim.
    like = read_photo(_saved(tmp_path / "a.jpg", Image.fromarray(_rgb()), exif=exif.tobytes()), LIMIT)
    write_photo(tmp_path / "b.tiff", _rgb(), like, format="tiff")
    np.testing.assert_array_equal(read_photo(tmp_path / "b.tiff", LIMIT).rgb, _rgb())
    with Image.open(tmp_path / "b.tiff") as image:
        assert image.tag_v2[MAKE] == "Maker"
        assert not {322, 323} & set(image.tag_v2)


def test_jpegs_keep_all_their_color(tmp_path: Path) -> None:
    """Red and blue columns of one pixel would blend under 4:2:0."""
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0], stripes[:, 1::2, 2] = 255, 255
    write_photo(tmp_path / "a.jpg", stripes, _plain(), format="jpg")
    assert np.abs(read_photo(tmp_path / "a.jpg", LIMIT).rgb.astype(int) - stripes).max() < 40
    with Image.open(tmp_path / "a.jpg") as image:
        best = io.BytesIO()
        Image.fromarray(stripes).save(best, "JPEG", quality=95, subsampling=0)
        assert image.quantization == Image.open(best).quantization


@pytest.mark.parametrize("format", ["png", "webp", "tiff"])
def test_colors_under_full_transparency_survive(tmp_path: Path, format: str) -> None:
    """The network's own, which continue the visible ones."""
    write_photo(tmp_path / "a", _rgb(), _plain(), np.zeros((6, 8), np.uint8), format)
    with Image.open(tmp_path / "a") as image:
        np.testing.assert_array_equal(np.asarray(image), np.dstack([_rgb(), np.zeros((6, 8), np.uint8)]))


@pytest.mark.filterwarnings("ignore:Tag data larger", "ignore:Truncated File Read")
def test_an_exif_block_too_long_for_jpeg_is_left_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[MAKE] = "x" * 70000
    like = _plain(exif=exif.tobytes())
    write_photo(tmp_path / "a.jpg", _rgb(), like, format="jpg")
    assert read_photo(tmp_path / "a.jpg", LIMIT).metadata.exif is None
    write_photo(tmp_path / "a.png", _rgb(), like, format="png")
    assert len(read_photo(tmp_path / "a.png", LIMIT).metadata.exif) > 70000
    longest = exif.tobytes()[:65533]
    write_photo(tmp_path / "b.jpg", _rgb(), _plain(exif=longest), format="jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.info["exif"] == longest


@pytest.mark.parametrize(("format", "side"), [("webp", 16384), ("jpg", 65501), ("gif", 8)])
def test_what_a_format_cannot_hold_is_refused(tmp_path: Path, format: str, side: int) -> None:
    path = tmp_path / "a"
    with pytest.raises(UserError, match=format) as error:
        write_photo(path, np.zeros((1, side, 3), np.uint8), _plain(), format=format)
    _assert_one_line(error, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "side"), [("webp", 16383), ("jpg", 65500)])
def test_the_longest_side_of_a_format_can_be_written(tmp_path: Path, format: str, side: int) -> None:
    write_photo(tmp_path / "a", np.zeros((1, side, 3), np.uint8), _plain(), format=format)
    assert read_size(tmp_path / "a", LIMIT) == (1, side)


@pytest.mark.parametrize(
    ("rgb", "alpha"),
    [
        (np.zeros((4, 4, 3), np.float32), None),
        (np.zeros((4, 4), np.uint8), None),
        (np.zeros((4, 4, 4), np.uint8), None),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2), np.uint8)),
    ],
)
def test_arrays_of_the_wrong_kind_are_a_bug(
    tmp_path: Path, rgb: np.ndarray, alpha: np.ndarray | None
) -> None:
    with pytest.raises(ValueError, match="expected"):
        write_photo(tmp_path / "a.png", rgb, _plain(), alpha)


def test_the_temporary_file_is_beside_and_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append((Path(a), Path(b))) or replace(a, b))
    target = tmp_path / ("n" * 251 + ".png")  # As long as file systems allow.
    write_photo(target, _rgb(), _plain())
    [(temporary, final)] = moved
    assert final == target and temporary.parent == tmp_path
    assert temporary.name.startswith(".") and temporary.suffix not in IMAGE_SUFFIXES
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, format: str) -> None:
    """The file-size limit of the process stops the write half-way, as a full disk does."""
    path = _put(tmp_path / "a", b"the old file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as error:
            write_photo(path, _rgb(64, 64), _plain(), format=format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    _assert_one_line(error, path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied"), KeyboardInterrupt()])
def test_the_temporary_file_goes_when_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    path = _put(tmp_path / "a.png", b"the old file")
    monkeypatch.setattr(os, "replace", fail)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="Permission denied" if expected is UserError else None):
        write_photo(path, _rgb(), _plain())
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_hold_the_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    _put(tmp_path / "file", b"x")
    for path in (tmp_path / "folder.png", tmp_path / "file" / "a.png"):
        with pytest.raises(UserError, match="cannot be written") as error:
            write_photo(path, _rgb(), _plain())
        _assert_one_line(error, path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"]


def test_threads_read_and_write_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    failures = []

    def work(number: int) -> None:
        try:
            for turn in range(10):
                rgb = _rgb(64, 48, seed=100 * number + turn)
                path = tmp_path / "shared" / f"{number}-{turn}.png"
                write_photo(path, rgb, _plain(), format=("png", "tiff", "webp")[turn % 3])
                np.testing.assert_array_equal(read_photo(path, LIMIT).rgb, rgb)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(list((tmp_path / "shared").iterdir())) == 40
    assert Image.MAX_IMAGE_PIXELS == 10
