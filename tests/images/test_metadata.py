"""What belongs to a photograph beside its pixels crosses from format to format, byte for byte."""

from __future__ import annotations

import io
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational

from tsdsr_jax.images.exif import current_exif
from tsdsr_jax.images.files import Photo, read_photo, read_size
from tsdsr_jax.images.metadata import Metadata, carried_metadata
from tsdsr_jax.images.png_chunks import iptc_text, photoshop_resource
from tsdsr_jax.images.profiles import is_srgb, profile_of_chunks
from tsdsr_jax.images.writing import left_behind, write_photo

LIMIT = 10**6
MAKE, COPYRIGHT, ARTIST, EXIF_IFD, GPS_IFD = 0x010F, 0x8298, 0x013B, 0x8769, 0x8825
TEXTS = {
    MAKE: b"Maker",
    ARTIST: "山田太郎".encode(),
    COPYRIGHT: "© Jörg Müller".encode(),
}
LENS, NOTE, COMMENT = 0xA434, 0x927C, 0x9286
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="8" '
    'dc:creator="山田">\n<exif:PixelYDimension>6</exif:PixelYDimension><dc:rights>© ö</dc:rights>'
    "</rdf:Description></x:xmpmeta>"
).encode()
CURRENT_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description '
    'dc:creator="山田">\n<dc:rights>© ö</dc:rights></rdf:Description></x:xmpmeta>'
).encode()
IPTC = b"\x1c\x02\x00\x00\x02\x00\x04\x1c\x02\x78\x00\x05Stra\xdf"


def pixels(height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*chunks: bytes, image: Image.Image | None = None) -> bytes:
    data = io.BytesIO()
    (image or Image.fromarray(pixels())).save(data, "PNG")
    return data.getvalue()[:33] + b"".join(chunks) + data.getvalue()[33:]


def block(order: str = ">", orientation: int = 1, thumbnail: bytes = b"") -> bytes:
    """An EXIF block whose texts are UTF-8, with a maker's note that tells where it lies."""
    entries, below, values = [], [], b""
    start = 8 + 2 + 12 * (len(TEXTS) + 2) + 4
    start_below = start + 2 + 12 * 4 + 4

    def entry(tag: int, kind: int, content: bytes, count: int | None = None) -> bytes:
        nonlocal values
        head = struct.pack(order + "HHI", tag, kind, len(content) if count is None else count)
        if len(content) <= 4:
            return head + content.ljust(4, b"\0")
        at = start_below + len(values)
        values += content + bytes(len(content) % 2)
        return head + struct.pack(order + "I", at)

    for tag, text in sorted(TEXTS.items()):
        entries.append((tag, entry(tag, 2, text + b"\0")))
    entries.append((0x0112, entry(0x0112, 3, struct.pack(order + "H", orientation), 1)))
    entries.append((EXIF_IFD, entry(EXIF_IFD, 4, struct.pack(order + "I", start), 1)))
    below = [
        entry(NOTE, 7, b"Nikon" + struct.pack(order + "I", 4711) * 3),
        entry(COMMENT, 7, b"UNICODE\0" + "日本".encode("utf-16-be")),
        entry(0xA002, 4, struct.pack(order + "I", 8), 1),
        entry(LENS, 2, "Zoom für alle".encode() + b"\0"),
    ]
    first = struct.pack(order + "H", len(entries)) + b"".join(one for _, one in sorted(entries))
    second = struct.pack(order + "H", len(below)) + b"".join(
        sorted(below, key=lambda one: one[:2][:: -1 if order == "<" else 1])
    )
    after = start_below + len(values) if thumbnail else 0
    whole = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8)
    whole += first + struct.pack(order + "I", after) + second + struct.pack(order + "I", 0) + values
    if thumbnail:
        at = after + 2 + 2 * 12 + 4
        whole += struct.pack(order + "H", 2) + struct.pack(order + "HHII", 0x0201, 4, 1, at)
        whole += (
            struct.pack(order + "HHII", 0x0202, 4, 1, len(thumbnail))
            + struct.pack(order + "I", 0)
            + thumbnail
        )
    return b"Exif\0\0" + whole


def stored(path: Path, source: str, **options: object) -> Path:
    """A picture in a format, with an EXIF block as it is. (Pillow would rewrite a TIFF's: so ours writes it.)"""
    if source == "tiff":
        write_photo(path, pixels(), Photo(pixels(), None, False, Metadata(**options)), format="tiff")
    else:
        Image.fromarray(pixels()).save(path, {"jpg": "JPEG"}.get(source, source), **options)
    return path


def texts(exif: bytes) -> dict[int, bytes]:
    """All fields of types text and undefined, by tag, found without Pillow."""
    data, found = exif[6:], {}
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    pending = [struct.unpack_from(order + "I", data, 4)[0]]
    while pending:
        at = pending.pop()
        for number in range(struct.unpack_from(order + "H", data, at)[0]):
            where = at + 2 + 12 * number
            tag, kind, count, value = struct.unpack_from(order + "HHII", data, where)
            if tag == EXIF_IFD:
                pending.append(value)
            elif kind in (2, 7):
                found[tag] = data[value : value + count] if count > 4 else data[where + 8 : where + 8 + count]
    return found


WANTED = {
    **{tag: text + b"\0" for tag, text in TEXTS.items()},
    LENS: "Zoom für alle".encode() + b"\0",
    COMMENT: b"UNICODE\0" + "日本".encode("utf-16-be"),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("format", ["jpg", "png", "webp", "tiff"])
def test_texts_keep_their_bytes(tmp_path: Path, source: str, format: str, order: str):
    """Pillow takes them for Latin-1 and writes question marks."""
    like = read_photo(stored(tmp_path / "a", source, exif=block(order)), LIMIT)
    assert like.notes == ()
    write_photo(tmp_path / "b", pixels(24, 32), like, format=format)
    again = read_photo(tmp_path / "b", LIMIT)
    np.testing.assert_array_equal(again.rgb.shape, (24, 32, 3))
    found = texts(again.metadata.exif)
    assert {tag: found[tag] for tag in WANTED} == WANTED
    note = b"Nikon" + struct.pack(order + "I", 4711) * 3
    assert found[NOTE] == note, "what is inside a maker's note has the block's byte order"
    with Image.open(tmp_path / "b") as image:  # another reader finds the same
        exif = image.getexif()
        assert exif[COPYRIGHT].encode("latin-1").rstrip(b"\0") == TEXTS[COPYRIGHT]
        assert 0xA002 not in exif.get_ifd(EXIF_IFD) and 0x0112 not in exif


def test_a_makers_note_stays_where_it_was(tmp_path: Path):
    """It may hold offsets from the beginning of the block."""
    whole = block(orientation=6, thumbnail=b"\xff\xd8 an old picture \xff\xd9")
    like = read_photo(stored(tmp_path / "a.jpg", "jpg", exif=whole), LIMIT)
    assert like.rgb.shape == (8, 6, 3)
    kept = like.metadata.exif
    assert kept.index(b"Nikon") == whole.index(b"Nikon")
    assert b"an old picture" not in kept
    exif = Image.Exif()
    exif.load(kept)
    assert 0x0112 not in exif and exif[MAKE] == "Maker"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:40], lambda b: b"Exif\0\0" + b"nonsense", lambda b: b[:10] + b"\xff" * 4]
)
def test_damaged_exif_is_left_out_with_a_note(tmp_path: Path, damage):
    photo = read_photo(stored(tmp_path / "a.webp", "webp", exif=damage(block())), LIMIT)
    assert photo.metadata.exif is None
    assert f"{tmp_path / 'a.webp'}: its EXIF is damaged; that is left out" in photo.notes


def test_what_is_left_of_damaged_exif_is_kept(tmp_path: Path):
    """A directory below that lies nowhere must not take the others with it."""
    whole = bytearray(block())
    at = whole.index(struct.pack(">HHI", EXIF_IFD, 4, 1)) + 8
    whole[at : at + 4] = b"\x7f" * 4
    exif = read_photo(stored(tmp_path / "a.png", "png", exif=bytes(whole)), LIMIT).metadata.exif
    assert texts(exif) == {tag: text + b"\0" for tag, text in TEXTS.items()}


# ---- XMP, IPTC, density --------------------------------------------------------------------------


def with_everything(path: Path, source: str) -> Path:
    if source == "png":
        content = png(
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
            chunk(b"tEXt", iptc_text(IPTC)),
            chunk(b"pHYs", struct.pack(">IIB", 11811, 5906, 1)),
        )
    elif source == "jpg":
        segment = b"Photoshop 3.0\0" + b"8BIM\x04\x0c\0\0\0\0\0\x02ab" + photoshop_resource(IPTC)
        data = io.BytesIO()
        Image.fromarray(pixels()).save(
            data,
            "JPEG",
            xmp=XMP,
            dpi=(300, 150),
            extra=b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment,
        )
        content = data.getvalue()
    elif source == "webp":
        data = io.BytesIO()
        Image.fromarray(pixels()).save(data, "WEBP", xmp=XMP)
        content = data.getvalue()
    else:
        data = io.BytesIO()
        Image.fromarray(pixels()).save(data, "TIFF", tiffinfo={700: XMP, 33723: IPTC}, dpi=(300, 150))
        content = data.getvalue()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("source", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("format", ["jpg", "png", "webp", "tiff", "bmp"])
def test_xmp_iptc_and_density_cross_from_format_to_format(tmp_path: Path, source: str, format: str):
    photo = read_photo(with_everything(tmp_path / "a", source), LIMIT)
    assert photo.rgb.shape == (8, 6, 3), "without EXIF, the orientation in the XMP counts"
    assert read_size(tmp_path / "a", LIMIT) == (8, 6)
    assert photo.metadata.xmp == CURRENT_XMP
    assert photo.metadata.iptc == (None if source == "webp" else IPTC)
    write_photo(tmp_path / "b", pixels(), photo, format=format)
    again = read_photo(tmp_path / "b", LIMIT).metadata
    assert again.xmp == (None if format == "bmp" else CURRENT_XMP)
    assert again.iptc == (None if format in ("bmp", "webp") else photo.metadata.iptc)
    if source != "webp" and format != "webp":
        expected = (300, 150) if source == "tiff" else (150, 300)
        assert again.density == pytest.approx(expected, abs=0.02)
    lost = {"bmp": ["XMP", "IPTC"], "webp": ["IPTC"]}.get(format, [])
    lost = [word for word in lost if word != "IPTC" or source != "webp"]
    remark = left_behind("b", photo, None, format)
    assert (remark is None) == (not lost)
    assert all(word in remark for word in lost)


def test_xmp_about_pictures_that_the_result_does_not_have_is_left_out(tmp_path: Path):
    """The gain maps and films of phones. What else there is, such as a copyright, stays."""
    packet = (
        b'<x:xmpmeta><rdf:Description hdrgm:Version="1.0" GCamera:MotionPhoto="1" dc:rights="mine">\n'
        b'<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Length="9"/></rdf:li></rdf:Seq></Container:Directory>'
        b"<GDepth:Near>1</GDepth:Near><GImage:Data/><dc:title>a</dc:title></rdf:Description></x:xmpmeta>"
    )
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", xmp=packet)
    photo = read_photo(tmp_path / "a.jpg", LIMIT)
    left = (
        b'<x:xmpmeta><rdf:Description dc:rights="mine">\n<dc:title>a</dc:title></rdf:Description></x:xmpmeta>'
    )
    assert photo.metadata.xmp == left and photo.notes == ()


@pytest.mark.parametrize("element", ["<GImage:a>", "<GImage:a{}>", "<GImage:a", " GDepth:Data='", "  "])
def test_xmp_that_does_not_end_takes_no_time(element: str):
    packet = "".join(element.format(number) for number in range(50_000)).encode()
    started = time.monotonic()
    carried, _ = carried_metadata(Image.new("RGB", (1, 1)), Metadata(xmp=packet), False, (False,) * 3, None)
    assert carried.xmp is not None and time.monotonic() - started < 5


def test_densities_in_other_units(tmp_path: Path):
    data = io.BytesIO()
    Image.fromarray(pixels()).save(data, "JPEG", dpi=(118, 118))
    content = bytearray(data.getvalue())
    content[content.index(b"JFIF") + 7] = 2  # per centimeter
    (tmp_path / "a.jpg").write_bytes(content)
    assert read_photo(tmp_path / "a.jpg", LIMIT).metadata.density == pytest.approx((299.72, 299.72))
    content[content.index(b"JFIF") + 7] = 0  # only the ratio
    (tmp_path / "a.jpg").write_bytes(content)
    assert read_photo(tmp_path / "a.jpg", LIMIT).metadata.density is None
    (tmp_path / "a.png").write_bytes(png(chunk(b"pHYs", struct.pack(">IIB", 2, 1, 0))))
    assert read_photo(tmp_path / "a.png", LIMIT).metadata.density is None


@pytest.mark.parametrize("across", [0, 1, 2**31, 2**32 - 1])
def test_senseless_densities_are_ignored(tmp_path: Path, across: int):
    (tmp_path / "a.png").write_bytes(png(chunk(b"pHYs", struct.pack(">IIB", across, 2835, 1))))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    assert photo.metadata.density is None
    for resolution in (float("inf"), 1e9, IFDRational(1, 0)):
        Image.fromarray(pixels()).save(tmp_path / "a.tif", tiffinfo={282: resolution, 283: 72.0, 296: 2})
        assert read_photo(tmp_path / "a.tif", LIMIT).metadata.density is None


@pytest.mark.parametrize("part", ["xmp", "iptc", "exif"])
def test_what_is_too_long_for_a_jpeg_is_left_out_and_named(tmp_path: Path, part: str):
    long = {"xmp": b"<x/>" * 20000, "iptc": IPTC * 5000, "exif": current_exif(block()) + bytes(70000)}[part]
    like = Photo(pixels(), None, False, Metadata(**{part: long}))
    write_photo(tmp_path / "a", pixels(), like, format="jpg")
    assert getattr(read_photo(tmp_path / "a", LIMIT).metadata, part) is None
    assert left_behind("a", like, None, "jpg") == f"a: jpg cannot hold its {part.upper()}; it is left out"
    write_photo(tmp_path / "b", pixels(), like, format="png")
    assert getattr(read_photo(tmp_path / "b", LIMIT).metadata, part) == long


@pytest.mark.parametrize("part", ["xmp", "iptc"])
def test_the_longest_segments_of_a_jpeg(tmp_path: Path, part: str):
    most = {"xmp": 65533 - 29, "iptc": 65533 - 27}[part]
    like = Photo(pixels(), None, False, Metadata(**{part: b"\x1c" + b"x" * (most - 1)}))
    write_photo(tmp_path / "a", pixels(), like, format="jpg")
    assert getattr(read_photo(tmp_path / "a", LIMIT).metadata, part) == getattr(like.metadata, part)


# ---- what a PNG says about its colors ------------------------------------------------------------

SRGB_CHROMA = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
LINEAR, P3 = struct.pack(">I", 100000), bytes((12, 13, 0, 1))


@pytest.mark.parametrize(
    "chunks",
    [
        {b"gAMA": struct.pack(">I", 45455), b"cHRM": SRGB_CHROMA},
        {b"gAMA": LINEAR},
        {b"cICP": P3},
        {b"cICP": bytes((9, 16, 0, 1))},
        {b"sRGB": b"\0"},
    ],
)
def test_chunks_about_color_are_kept(tmp_path: Path, chunks: dict[bytes, bytes]):
    (tmp_path / "a.png").write_bytes(png(*(chunk(kind, content) for kind, content in chunks.items())))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    assert photo.metadata.png_color == chunks
    write_photo(tmp_path / "b.png", pixels(), photo)
    assert read_photo(tmp_path / "b.png", LIMIT).metadata.png_color == chunks
    content = (tmp_path / "b.png").read_bytes()
    assert all(content.index(kind) < content.index(b"IDAT") for kind in chunks)


@pytest.mark.parametrize("format", ["jpg", "webp", "tiff"])
def test_other_formats_get_a_profile_that_means_the_same(tmp_path: Path, format: str):
    (tmp_path / "a.png").write_bytes(png(chunk(b"gAMA", LINEAR)))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    assert not is_srgb(photo.metadata.icc, gray=False)
    write_photo(tmp_path / "b", pixels(), photo, format=format)
    assert read_photo(tmp_path / "b", LIMIT).metadata.icc == photo.metadata.icc
    assert left_behind("b", photo, None, format) is None


def test_bmp_becomes_srgb(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(chunk(b"gAMA", LINEAR)))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    write_photo(tmp_path / "b", np.full((6, 8, 3), 55, np.uint8), photo, format="bmp")
    assert (
        read_photo(tmp_path / "b", LIMIT).rgb[0, 0].tolist() == [128] * 3
    )  # (128 / 255)^2.2 = 0.22 = 55 / 255
    assert (
        left_behind("b", photo, None, "bmp")
        == "b: bmp cannot hold its color profile; the colors are converted to sRGB"
    )


def test_hdr_is_kept_in_png_and_named_elsewhere(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(chunk(b"cICP", bytes((9, 16, 0, 1)))))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    assert left_behind("b", photo, None, "png") is None
    assert left_behind("b", photo, None, "jpg") == "b: jpg cannot hold its HDR colors; it is left out"


def test_what_means_srgb_needs_no_profile():
    usual = {b"gAMA": struct.pack(">I", 45455), b"cHRM": SRGB_CHROMA}
    assert profile_of_chunks(usual, gray=False) is None
    assert profile_of_chunks({b"gAMA": LINEAR, b"sRGB": b"\0"}, gray=False) is None
    assert profile_of_chunks({b"cICP": bytes((1, 13, 0, 1)), b"gAMA": LINEAR}, gray=False) is None


@pytest.mark.parametrize("chroma", [bytes(32), struct.pack(">8I", *[31270, 32900] * 4)])
def test_impossible_colors_are_ignored(tmp_path: Path, chroma: bytes):
    (tmp_path / "a.png").write_bytes(png(chunk(b"cHRM", chroma)))
    assert read_photo(tmp_path / "a.png", LIMIT).metadata.icc is None


def test_a_gray_picture_gets_a_gray_profile(tmp_path: Path):
    gray = Image.fromarray(np.full((6, 8), 55, np.uint8))
    (tmp_path / "a.png").write_bytes(png(chunk(b"gAMA", LINEAR), image=gray))
    photo = read_photo(tmp_path / "a.png", LIMIT)
    assert (
        photo.gray and ImageCms.ImageCmsProfile(io.BytesIO(photo.metadata.icc)).profile.xcolor_space == "GRAY"
    )
    write_photo(
        tmp_path / "b", photo.rgb, photo, format="webp"
    )  # without gray pictures, and so without gray profiles
    assert read_photo(tmp_path / "b", LIMIT).rgb[0, 0].tolist() == [128] * 3


def test_an_rgb_profile_of_a_gray_picture(tmp_path: Path):
    """sRGB's curve is meant, and is what counts without a profile; another is named."""
    gray = Image.fromarray(np.full((6, 8), 55, np.uint8))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, notes in ((srgb, 0), (profile_of_chunks({b"cICP": P3}, gray=False), 1)):
        gray.save(tmp_path / "a.png", icc_profile=profile)
        photo = read_photo(tmp_path / "a.png", LIMIT)
        assert photo.metadata.icc is None and len(photo.notes) == notes
    assert photo.notes[0].endswith("its color profile is for RGB, not for GRAY; the colors count as sRGB")


def test_a_big_tiff_is_read_without_its_exif(tmp_path: Path):
    Image.fromarray(pixels()).save(tmp_path / "a.tif", big_tiff=True)
    photo = read_photo(tmp_path / "a.tif", LIMIT)
    np.testing.assert_array_equal(photo.rgb, pixels())
    assert photo.notes == (f"{tmp_path / 'a.tif'}: is a BigTIFF, whose EXIF is left out",)


@pytest.mark.parametrize(
    "mark", [b"tiff:Orientation=\"6'", b"tiff:Orientation>6<", b"tiff:Orientation = '6' "]
)
def test_orientation_in_broken_xmp_is_not_applied_twice(tmp_path: Path, mark: bytes):
    Image.fromarray(pixels()).save(tmp_path / "a.jpg", xmp=b"<x:xmpmeta " + mark)
    photo = read_photo(tmp_path / "a.jpg", LIMIT)
    write_photo(tmp_path / "b.png", photo.rgb, photo)
    np.testing.assert_array_equal(read_photo(tmp_path / "b.png", LIMIT).rgb, photo.rgb)


def test_only_fields_that_readers_accept_go_into_a_tiff(tmp_path: Path):
    """EXIF 3.0 has a type for UTF-8; a resolution with two values is an error in a TIFF."""
    values = "Ōsaka".encode() + b"\0", struct.pack("<4I", 72, 1, 72, 1)
    start = 8 + 2 + 2 * 12 + 4
    fields = struct.pack("<H", 2) + struct.pack("<HHII", MAKE, 129, len(values[0]), start)
    fields += struct.pack("<HHII", 0x011A, 5, 2, start + len(values[0])) + bytes(4)
    like = Photo(pixels(), None, False, Metadata(exif=b"Exif\0\0II*\0\x08\0\0\0" + fields + b"".join(values)))
    write_photo(tmp_path / "a.tif", pixels(), like, format="tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(tmp_path / "a.tif") as image:
            assert 0x011A not in image.tag_v2
    exif = read_photo(tmp_path / "a.tif", LIMIT).metadata.exif
    assert values[0] in exif
