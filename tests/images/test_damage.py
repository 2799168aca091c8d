"""Files that other programs read are read, with a note; what Pillow warns of is told with the file's name."""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import Photo, read_photo, read_size
from tsdsr_jax.images.metadata import Metadata
from tsdsr_jax.images.pillow_state import reading_with_pillow
from tsdsr_jax.images.writing import FORMATS, left_behind, write_photo

LIMIT = 10**6


def pixels(height: int = 40, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return (np.dstack([4 * x, 5 * y, 2 * (x + y)]) + noise).astype(np.uint8)


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    data = io.BytesIO()
    (image or Image.fromarray(pixels())).save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, content: bytes, crc: bytes | None = None) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content)) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(*chunks: bytes, late: bytes = b"", image: Image.Image | None = None) -> bytes:
    whole = encoded("PNG", image)
    return whole[:33] + b"".join(chunks) + whole[33:-12] + late + whole[-12:]


def profile(size: int = 0, name: str = "sRGB") -> bytes:
    whole = ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()
    noise = np.random.default_rng(0).integers(0, 256, max(0, size - len(whole)), np.uint8).tobytes()
    return struct.pack(">I", len(whole + noise)) + (whole + noise)[4:]


def put(folder: Path, content: bytes) -> Path:
    path = folder / "a"
    path.write_bytes(content)
    return path


LONG = b"no rhyme " * 150_000


# ---- PNG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        chunk(b"tEXt", b"workflow\0" + LONG),
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(LONG)),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
        *[b"".join(chunk(b"tEXt", f"part {n}\0".encode() + LONG) for n in range(60))],
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_long_texts_do_not_matter(tmp_path: Path, content: bytes, late: bool):
    path = put(tmp_path, png(late=content) if late else png(content))
    photo = read_photo(path, LIMIT)
    np.testing.assert_array_equal(photo.rgb, pixels())
    assert read_size(path, LIMIT) == (40, 48)
    assert len(photo.notes) == 1
    assert photo.notes[0].startswith(f"{path}: has ") and photo.notes[0].endswith(
        "of text, which results do not carry"
    )


@pytest.mark.parametrize("bomb", [b"zTXt", b"iCCP"])
def test_what_explodes_is_left_out(tmp_path: Path, bomb: bytes):
    content = chunk(bomb, b"name\0\0" + zlib.compress(bytes(2**24 + 1)))
    photo = read_photo(put(tmp_path, png(content)), LIMIT)
    assert photo.metadata.icc is None
    assert photo.notes == (f"{tmp_path / 'a'}: its {bomb.decode()} cannot be read; that is left out",)


def test_a_large_profile_of_a_png(tmp_path: Path):
    large = profile(1_300_000)
    photo = read_photo(put(tmp_path, png(chunk(b"iCCP", b"scanner\0\0" + zlib.compress(large)))), LIMIT)
    assert photo.metadata.icc == large
    assert photo.notes == (f"{tmp_path / 'a'}: has a color profile of 1.3 MB, which some programs refuse",)


@pytest.mark.parametrize("format", FORMATS)
def test_results_with_a_large_profile_can_be_read_by_all(tmp_path: Path, format: str):
    """PNG files with such profiles are refused by Pillow, and so by most programs in Python."""
    for large in (profile(1_300_000), wide_profile(1_300_000)):
        photo = read_photo(put(tmp_path, encoded("JPEG", icc_profile=large)), LIMIT)
        assert photo.metadata.icc == large
        write_photo(tmp_path / "b", photo.rgb, photo, format=format)
        with Image.open(tmp_path / "b") as image:
            image.load()
        again = read_photo(tmp_path / "b", LIMIT)
        assert again.notes == ()
        assert again.metadata.icc == (None if format in ("png", "bmp") else large)
    moved = np.abs(again.rgb.astype(int) - photo.rgb).mean()
    remark = left_behind("b", photo, None, format)
    if format in ("png", "bmp"):
        assert moved > 5 and remark.endswith("the colors are converted to sRGB")
    else:
        assert moved < 5 and remark is None


def test_a_jpegs_profile_that_lacks_a_piece_is_named(tmp_path: Path):
    """Profiles of more than 64 kB are in several pieces, and programs that copy segments may lose some."""
    content = encoded("JPEG", icc_profile=profile(150_000))
    second = content.index(b"ICC_PROFILE\0\x02") - 4
    without = (
        content[:second] + content[second + 2 + int.from_bytes(content[second + 2 : second + 4], "big") :]
    )
    photo = read_photo(put(tmp_path, without), LIMIT)
    assert photo.metadata.icc is None
    assert [note.split(": ")[1] for note in photo.notes] == [
        "a piece of its color profile is missing; the colors count as sRGB"
    ]
    assert read_photo(put(tmp_path, content), LIMIT).notes == ()


def wide_profile(size: int) -> bytes:
    """sRGB's profile with the primaries exchanged: red looks blue."""
    whole = profile(size)
    return whole.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("kind", [b"tEXt", b"pHYs", b"gAMA", b"iCCP", b"eXIf", b"tRNS"])
def test_a_wrong_checksum_beside_the_pixels(tmp_path: Path, kind: bytes):
    content = {b"gAMA": struct.pack(">I", 100000), b"tRNS": bytes(6)}.get(kind, b"Comment\0hello")
    path = put(tmp_path, png(chunk(kind, content, crc=b"\0\0\0\0")))
    photo = read_photo(path, LIMIT)
    np.testing.assert_array_equal(photo.rgb, pixels())
    assert photo.alpha is None and photo.metadata == Metadata()
    assert read_size(path, LIMIT) == (40, 48)
    assert photo.notes == (f"{path}: the checksum of its {kind.decode()} is wrong; that is left out",)


@pytest.mark.parametrize("kind", [b"prVt", b"tIME", b"sBIT", b"bKGD"])
def test_checksums_of_what_nobody_reads_are_not_even_looked_at(tmp_path: Path, kind: bytes):
    assert read_photo(put(tmp_path, png(chunk(kind, b"\1\2\3", crc=b"\0\0\0\0"))), LIMIT).notes == ()


def test_a_wrong_checksum_of_the_size_is_refused(tmp_path: Path):
    content = bytearray(png())
    content[20] ^= 1
    with pytest.raises(UserError, match="not a readable"):
        read_photo(put(tmp_path, bytes(content)), LIMIT)


@pytest.mark.parametrize("cut", [4, 8, 12])
def test_a_png_without_its_end(tmp_path: Path, cut: int):
    photo = read_photo(put(tmp_path, png()[:-cut]), LIMIT)
    np.testing.assert_array_equal(photo.rgb, pixels())
    assert photo.notes == (f"{tmp_path / 'a'}: its end is missing",)


def test_what_follows_the_end_does_not_matter(tmp_path: Path):
    assert read_photo(put(tmp_path, png() + b"more" * 100), LIMIT).notes == ()


# ---- JPEG ----------------------------------------------------------------------------------------

JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "optimized": {"optimize": True, "quality": 95, "subsampling": 0},
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("gray", [False, True])
def test_a_jpeg_that_lacks_only_its_end_marker(tmp_path: Path, kind: str, cut: int, gray: bool):
    image = Image.fromarray(pixels()).convert("L" if gray else "RGB")
    whole = encoded("JPEG", image, **JPEGS[kind])
    photo = read_photo(put(tmp_path, whole[:-cut]), LIMIT)
    np.testing.assert_array_equal(photo.rgb, np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
    assert photo.notes == (f"{tmp_path / 'a'}: its end marker is missing; its pixels are all there",)


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_lacks_pixels_is_refused(tmp_path: Path, kind: str):
    whole = encoded("JPEG", **JPEGS[kind])
    scan = whole.rindex(b"\xff\xda")
    for cut in (*range(3, 40), *range(40, len(whole) - scan, 97)):
        with pytest.raises(UserError, match="damaged or cut short"):
            read_photo(put(tmp_path, whole[:-cut]), LIMIT)


@pytest.mark.parametrize("kind", ["baseline", "restarts", "optimized"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("rest", [b"", b"a film" * 100])
def test_a_jpeg_that_lacks_pixels_before_its_end_marker_is_refused(
    tmp_path: Path, kind: str, mode: str, rest: bytes
):
    """As programs that repair files leave it, or a transfer that lost a part; decoders fill in gray."""
    whole = encoded("JPEG", Image.fromarray(pixels()).convert(mode), **JPEGS[kind])
    scan = whole.rindex(b"\xff\xda")
    for part in (0.2, 0.5, 0.8):
        cut = whole[: scan + int((len(whole) - scan) * part)].rstrip(b"\xff")
        with pytest.raises(UserError, match="its last pixels are missing"):
            read_photo(put(tmp_path, cut + b"\xff\xd9" + rest), LIMIT)
    assert read_photo(put(tmp_path, whole + rest), LIMIT).notes == ()


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_ends_in_gray_lacks_nothing(tmp_path: Path, kind: str, mode: str):
    gray = np.full_like(pixels(), 128)
    for image in (gray, np.vstack([pixels(), gray])):
        for metadata in ({}, {"exif": b"Exif\0\0" + encoded("JPEG")}):  # a thumbnail is a JPEG, too
            content = encoded("JPEG", Image.fromarray(image).convert(mode), **JPEGS[kind], **metadata)
            for rest in (b"", content, b"a film"):
                assert read_photo(put(tmp_path, content + rest), 2 * LIMIT).rgb.shape == image.shape


def test_a_jpeg_cut_before_a_restart_marker_is_refused(tmp_path: Path):
    """There the data so far is complete, and decoders fill in the rest with gray."""
    whole = encoded("JPEG", **JPEGS["restarts"])
    for number in (0, 1):
        at = whole.index(bytes((0xFF, 0xD0 + number)))
        for end in (at, at + 2):
            with pytest.raises(UserError, match="damaged or cut short"):
                read_photo(put(tmp_path, whole[:end]), LIMIT)


def test_a_progressive_jpeg_cut_between_scans_is_refused(tmp_path: Path):
    whole = encoded("JPEG", progressive=True)
    tables = [at for at in range(len(whole)) if whole.startswith(b"\xff\xc4", at)]
    for at in tables[1:]:
        with pytest.raises(UserError, match=r"damaged or cut short|not a readable"):
            read_photo(put(tmp_path, whole[:at]), LIMIT)


# ---- warnings ------------------------------------------------------------------------------------


def corrupt() -> bytes:
    """A WebP with an EXIF block that Pillow warns of."""
    exif = Image.Exif()
    exif[0x010F] = "Maker of long name"
    return encoded("WEBP", exif=exif.tobytes()[:-8])


@pytest.mark.parametrize("action", ["default", "error", "ignore", "once"])
def test_warnings_become_notes_whatever_the_filters(tmp_path: Path, action: str):
    path = put(tmp_path, corrupt())
    with warnings.catch_warnings(record=True) as escaped:
        warnings.simplefilter(action)
        filters = list(warnings.filters)
        for _ in range(2):  # the second file has the same fault
            photo = read_photo(path, LIMIT)
            assert photo.notes == (f"{path}: Pillow remarks: Truncated File Read",)
            assert photo.metadata.exif is None, "its only value is missing"
        assert read_size(path, LIMIT) == (40, 48)
        assert warnings.filters == filters
    assert escaped == []


def test_warnings_of_others_are_left_alone(tmp_path: Path):
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning = lambda message, *rest, **more: shown.append(str(message))
        with reading_with_pillow() as heard:
            warnings.warn("mine", stacklevel=1)
            other = threading.Thread(target=pillow_warns)
            other.start()
            other.join()
            pillow_warns()
            pillow_warns()
        assert warnings.showwarning is before
    assert shown == ["mine", "not a file of ours"]
    assert [str(warning) for warning in heard] == ["not a file of ours"]


def pillow_warns() -> None:
    warnings.warn_explicit("not a file of ours", UserWarning, Image.__file__, 1, "PIL.Image")


def test_filters_exchanged_meanwhile_get_no_lasting_entry():
    before = list(warnings.filters)
    reading = reading_with_pillow()
    reading.__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reading.__exit__(None, None, None)
    assert warnings.filters == before


def test_pillows_log_is_not_printed(capfd: pytest.CaptureFixture[str]):
    logger = logging.getLogger("PIL.TiffImagePlugin")
    assert logger.parent is not None and any(
        isinstance(one, logging.NullHandler) for one in logger.parent.handlers
    )


# ---- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_the_first_page_is_read_and_the_others_are_counted(tmp_path: Path, kind: str):
    colors = ["red", "blue", "lime"]
    first, *others = (Image.new("RGB", (16, 12), color) for color in colors)
    path = put(tmp_path, encoded(kind, first, save_all=True, append_images=others))
    photo = read_photo(path, LIMIT)
    assert np.abs(photo.rgb.astype(int) - (255, 0, 0)).max() < 4
    called = "pages" if kind == "TIFF" else "frames"
    assert photo.notes == (f"{path}: has 3 {called}; only the first is read",)
    alone = read_photo(put(tmp_path, encoded(kind, first)), LIMIT)
    assert alone.notes == ()


def test_pages_that_are_damaged_do_not_matter(tmp_path: Path):
    pages = [Image.new("RGB", (16, 12), color) for color in ("red", "blue")]
    content = encoded("TIFF", pages[0], save_all=True, append_images=pages[1:])
    photo = read_photo(put(tmp_path, content[: len(content) - 16 * 12 * 3 - 20]), LIMIT)
    assert (photo.rgb == (255, 0, 0)).all()


# ---- what is not read ----------------------------------------------------------------------------


def box(brand: bytes, *compatible: bytes) -> bytes:
    content = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", 8 + len(content)) + b"ftyp" + content + bytes(400)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (box(b"heic", b"mif1", b"heic"), "a HEIC picture, as iPhones save them"),
        (box(b"mif1", b"mif1", b"heic"), "a HEIC picture"),
        (box(b"msf1", b"msf1", b"hevc"), "a HEIC picture"),
        (box(b"avif", b"avif", b"mif1"), "an AVIF picture"),
        (box(b"mif1", b"miaf", b"avif"), "an AVIF picture"),
        (box(b"crx ", b"crx ", b"isom"), "a camera's raw file (CR3)"),
        (box(b"isom", b"mp41"), "a film"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), "a JPEG XL picture"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL picture"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "a JPEG 2000 picture"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(40), "a camera's raw file (CR2)"),
        (b"8BPS\0\1" + bytes(40), "a Photoshop document"),
        (b"%PDF-1.7\n" + bytes(40), "a PDF document"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"\n<!DOCTYPE HTML><html><body>404</body></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    ],
)
@pytest.mark.parametrize("read", [read_photo, read_size])
def test_the_message_says_what_it_is_and_what_to_do(tmp_path: Path, read, content: bytes, words: str):
    for name in ("a.jpg", "a.heic"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read(path, LIMIT)
        message = str(error.value)
        assert message.startswith(f"{path}: is {words}") and "\n" not in message
        assert any(word in message for word in ("export", "download", "git lfs pull"))


def test_a_raw_file_that_looks_like_a_tiff_is_not_mistaken_for_its_preview(tmp_path: Path):
    path = put(tmp_path, encoded("TIFF", tiffinfo={50706: b"\1\4\0\0"}))
    for read in (read_photo, read_size):
        with pytest.raises(UserError, match=r"a camera's raw file \(DNG\)"):
            read(path, LIMIT)


def test_an_avif_from_pillow(tmp_path: Path):
    try:
        content = encoded("AVIF")
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    with pytest.raises(UserError, match="an AVIF picture"):
        read_photo(put(tmp_path, content), LIMIT)


def test_a_photo_of_our_own_without_a_file_has_no_notes():
    assert Photo(pixels(), None, False).notes == ()
