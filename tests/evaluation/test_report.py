"""The report as a file, in a browser, and written by `infer/upscale.py --report`."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

import tiny_checkpoint as tiny
from browser import open_page
from commands import Command
from tsdsr_jax.commands import upscale
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation import pictures
from tsdsr_jax.evaluation.comparison import Column, Comparison, Layer, Summary
from tsdsr_jax.evaluation.html import check_report_path, write_report

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 60), (40, 60, 220), (230, 210, 40)
HOSTILE = (
    "<script>fetch('http://example.com')</script>",
    "</script><img src=http://example.com/x onerror=alert(1)>",
    "\"quotes\" & 'more' <!--<script>",
    "Ümläut\u2028\u2029 ${name} $title 100% #?",
    os.fsdecode(b"not utf-8 \xff"),
)


def picture(folder: Path, name: str, color: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> Path:
    """A PNG of one color, (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(folder / f"{name}.png")
    return folder / f"{name}.png"


def noise(path: Path, *shape: int) -> np.ndarray:
    """Writes a PNG of (H, W, C) or (H, W) random bytes."""
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    Image.fromarray(values).save(path)
    return values


def pairs(folder: Path, count: int = 3) -> list[Comparison]:
    """Entries a, b, c …: red or green inputs, blue or yellow results four times as large; PSNR rises, the last has none."""
    entries = []
    for i in range(count):
        name = chr(ord("a") + i)
        low = picture(folder, f"{name}_low", (RED, GREEN)[i % 2], (16, 12))
        result = picture(folder, f"{name}_result", (BLUE, YELLOW)[i % 2])
        values = {"PSNR": None if i == count - 1 else 20.0 + i, "LPIPS": (0.3, 0.1, 0.2)[i % 3]}
        entries.append(Comparison(name, (Layer("input", low), Layer("result", result)), values))
    return entries


COLUMNS = (Column("PSNR", "higher", 2), Column("LPIPS", "lower"))


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


def stored(text: str) -> dict[str, Image.Image]:
    """The full pictures by their ids."""
    block = r'<script type="text/plain" id="([-\w]+)" data-type="[\w/]+">([^<]*)</script>\n'
    return {id: Image.open(io.BytesIO(base64.b64decode(code))) for id, code in re.findall(block, text)}


# --- the file -----------------------------------------------------------------------------


def test_small_pictures_are_exact_and_thumbnails_come_first(tmp_path):
    values = noise(tmp_path / "noise.png", 40, 60, 3)
    done = []
    entry = Comparison("noise", (Layer("input", tmp_path / "noise.png"),))
    write_report(tmp_path / "new/r.html", "title", [entry], progress=lambda: done.append(1))
    text = (tmp_path / "new/r.html").read_text("utf-8")
    np.testing.assert_array_equal(np.asarray(stored(text)["picture-0-0"]), values)
    assert data_of(text)["entries"][0]["layers"] == [
        {"title": "input", "size": [60, 40], "encoding": "lossless"}
    ]
    assert text.index("data:image/webp") < text.index("picture-0-0") and text.endswith("</html>\n")
    assert done == [1] and [path.name for path in (tmp_path / "new").iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("size", "stored_size", "encoding"),
    [
        ((1000, 600), (1000, 600), "JPEG quality 92"),
        ((4096, 2048), (2896, 1448), "shown at 2896×1448 (71%), JPEG quality 92"),
        ((20000, 10), (16383, 8), "shown at 16383×8 (82%), lossless"),
    ],
)
def test_large_pictures_say_what_was_done_to_them(tmp_path, size, stored_size, encoding):
    entry = Comparison("x", (Layer("result", picture(tmp_path, "x", GREEN, size)),))
    write_report(tmp_path / "r.html", "title", [entry])
    text = (tmp_path / "r.html").read_text("utf-8")
    image = stored(text)["picture-0-0"]
    assert image.size == stored_size
    assert np.abs(np.asarray(image.convert("RGB"), int) - GREEN).max() <= 3
    layer = data_of(text)["entries"][0]["layers"][0]
    assert (tuple(layer["size"]), layer["encoding"]) == (size, encoding)


def test_noise_in_a_large_picture(tmp_path):
    """Incompressible: more than a byte per pixel, even as JPEG."""
    noise(tmp_path / "noise.png", 800, 800, 3)
    write_report(tmp_path / "r.html", "title", [Comparison("x", (Layer("input", tmp_path / "noise.png"),))])
    text = (tmp_path / "r.html").read_text("utf-8")
    assert stored(text)["picture-0-0"].size == (800, 800)
    assert data_of(text)["entries"][0]["layers"][0]["encoding"] == "JPEG quality 92"


def test_a_picture_that_cannot_be_encoded_costs_no_other(tmp_path, monkeypatch):
    good, bad = picture(tmp_path, "good", RED), picture(tmp_path, "bad", GREEN, (31, 31))
    encode = pictures._encode

    def refuse(image, photo):
        if image.size == (31, 31):
            raise OSError("broken data stream")
        return encode(image, photo)

    monkeypatch.setattr(pictures, "_encode", refuse)
    write_report(tmp_path / "r.html", "t", [Comparison("x", (Layer("input", good), Layer("result", bad)))])
    layers = data_of((tmp_path / "r.html").read_text("utf-8"))["entries"][0]["layers"]
    assert layers[0]["encoding"] == "lossless" and "bad.png: broken data stream" in layers[1]["error"]


def test_transparency_and_profile_stay_and_exif_does_not(tmp_path):
    noise(tmp_path / "alpha.png", 20, 20, 4)
    noise(tmp_path / "grey.png", 800, 800)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.new("RGB", (20, 20), RED).save(tmp_path / "profile.jpg", icc_profile=profile, exif=exif)
    paths = [tmp_path / name for name in ("alpha.png", "grey.png", "profile.jpg")]
    write_report(tmp_path / "r.html", "t", [Comparison("x", tuple(Layer(p.name, p) for p in paths))])
    alpha, grey, profiled = stored((tmp_path / "r.html").read_text("utf-8")).values()
    assert (alpha.mode, grey.mode, profiled.info["icc_profile"]) == ("RGBA", "L", profile)
    assert not profiled.getexif()


def test_a_picture_that_cannot_be_read_is_replaced_by_the_reason(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = picture(tmp_path, "good", RED)
    entries = [
        Comparison("one", (Layer("input", good), Layer("result", tmp_path / "bad.png"))),
        Comparison("none", (Layer("input", tmp_path / "absent.png"),)),
    ]
    write_report(tmp_path / "r.html", "t", entries)
    text = (tmp_path / "r.html").read_text("utf-8")
    (_, bad), (absent,) = (entry["layers"] for entry in data_of(text)["entries"])
    assert "not a readable PNG" in bad["error"] and "does not exist" in absent["error"]
    assert list(stored(text)) == ["picture-0-0"]
    assert "result: cannot be shown" in text and text.count('class="broken"') == 1


def test_numbers_are_shown_in_full_and_the_best_method_stands_out(tmp_path):
    columns = [Column(f"{m} · {k}", b, 1) for m in "AB" for k, b in (("PSNR", "higher"), ("NIQE", "lower"))]
    values = {"A · PSNR": math.inf, "B · PSNR": 20.04, "A · NIQE": 3.0, "B · NIQE": math.nan}
    write_report(tmp_path / "r.html", "t", [Comparison("x", (), values)], columns)
    text = (tmp_path / "r.html").read_text("utf-8")
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', text)
    assert rows == ['PSNR ↑</th><td class="best">∞</td><td>20.0</td>', "NIQE ↓</th><td>3.0</td><td>–</td>"]
    assert data_of(text)["entries"][0]["values"] == [1.7e308, 3.0, 20.04, None]


def test_notes_and_summary(tmp_path):
    table = Summary(("method", "PSNR"), (("A<b>", "20 ± 1"),))
    write_report(tmp_path / "r.html", "t", [], summary=table, notes=[f"note <{i}>" for i in range(7)])
    text = (tmp_path / "r.html").read_text("utf-8")
    assert '<tr><th scope="row">A&lt;b&gt;</th><td>20 ± 1</td></tr>' in text
    assert "<details><summary>2 more</summary><ul><li>note &lt;5&gt;" in text


def test_names_cannot_become_markup(tmp_path):
    path = picture(tmp_path, "x", RED)
    entries = [Comparison(name, (Layer(name, path),), {name: 1.0}, {name: name}) for name in HOSTILE]
    columns = [Column(name, "higher") for name in HOSTILE]
    plain, hostile = tmp_path / "plain.html", tmp_path / "hostile.html"
    write_report(plain, "t", [Comparison("x", (Layer("x", path),))] * len(HOSTILE), notes="abcde")
    write_report(hostile, HOSTILE[1], entries, columns, Summary(HOSTILE, (HOSTILE,)), HOSTILE)
    text = hostile.read_text("utf-8")
    for tag in ("<script", "</script", "<img ", "<!--"):
        assert text.count(tag) == plain.read_text("utf-8").count(tag), tag
    names = [entry["name"] for entry in data_of(text)["entries"]]
    assert names == [*HOSTILE[:-1], "not utf-8 \ufffd"]


def test_only_our_own_reports_are_replaced(tmp_path):
    (tmp_path / "mine.html").write_text("<title>precious</title>")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "dangling.html").symlink_to("nowhere")
    for name, reason in {
        "mine.html": "not a report", "folder.html": "is a folder", "r.png": "ends in .html", "r": "ends in .html",
        "file/r.html": "not a writable folder", "pipe.html": "not a report", "dangling.html": "not a report",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=re.escape(name) + f".*{reason}"):
            write_report(tmp_path / name, "t", [])
    assert (tmp_path / "mine.html").read_text() == "<title>precious</title>"
    check_report_path(tmp_path / "new/folder/r.HTM")
    assert not (tmp_path / "new").exists()
    for title in ("first", "second"):
        write_report(tmp_path / "r.html", title, [])
    assert "second" in (tmp_path / "r.html").read_text("utf-8")


def test_an_interrupted_report_leaves_the_older_one(tmp_path):
    write_report(tmp_path / "r.html", "older", [])

    def interrupt():
        raise KeyboardInterrupt

    entries = pairs(tmp_path / "in", 30)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "r.html", "newer", entries, progress=interrupt)
    assert "older" in (tmp_path / "r.html").read_text("utf-8")
    assert sorted(tmp_path.iterdir()) == before


# --- in a browser -------------------------------------------------------------------------


@contextmanager
def opened(path: Path, **context) -> Iterator:
    """Opens the page from its file, offline; any other request fails the test."""
    address = path.as_uri()
    with open_page(offline=True, **context) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        others = [url for url in asked if not url.startswith("data:") and url.split("#")[0] != address]
        assert not others


def open_viewer(page, name: str) -> None:
    page.click(f".card:has(.name:text-is('{name}')) button")
    seen(page, name)


def wait_until(page, expression: str, arg: object = None) -> None:
    """Playwright's own `wait_for_function` polls by `eval`, which the page's policy forbids."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def seen(page, name: str) -> None:
    """Waits until the image of this name is decoded."""
    wait_until(
        page,
        "name => document.querySelector('#name').textContent === name && "
        "[...document.querySelectorAll('#stage img')].some(image => image.alt.endsWith(': ' + name))",
        arg=name,
    )


def color_at(page, x: float, y: float) -> tuple[int, ...]:
    """At a place on the page, in CSS pixels."""
    clip = {"x": x, "y": y, "width": 1, "height": 1}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0))


def divider_at(page) -> int:
    return int(page.get_attribute("#divider", "aria-valuenow"))


def box(page, selector: str) -> tuple[float, float, float, float]:
    """x, y, width and height."""
    found = page.locator(selector).first.bounding_box()
    return found["x"], found["y"], found["width"], found["height"]


def names_in_order(page) -> str:
    # Uses the DOM's order, because browsers delay the layout of cards far down.
    names = page.locator(".card:not([hidden]) .name")
    return names.evaluate_all("names => names.map(name => name.textContent).join('')")


def test_the_viewer_compares_at_a_movable_divider(tmp_path):
    write_report(tmp_path / "r.html", "t", pairs(tmp_path / "in"), COLUMNS)
    with opened(tmp_path / "r.html") as page:
        open_viewer(page, "a")
        x, y, width, height = box(page, "#stage img")
        assert width / height == pytest.approx(4 / 3, rel=0.01)
        assert box(page, ".pane:nth-child(2) img") == pytest.approx((x, y, width, height))
        middle, row = x + width / 2, y + height / 4
        assert (color_at(page, middle - 30, row), color_at(page, middle + 30, row)) == (RED, BLUE)

        page.mouse.move(middle + 8, y + height / 2)
        page.mouse.down()
        page.mouse.move(middle + 8 + width / 4, y + height / 2, steps=4)
        page.mouse.up()
        assert divider_at(page) == 75
        assert (color_at(page, middle + 30, row), color_at(page, x + width - 20, row)) == (RED, BLUE)
        page.mouse.click(x + width / 10, row)
        assert divider_at(page) == 10 and color_at(page, middle, row) == BLUE

        for key, expected in (("ArrowLeft", 8), ("Shift+ArrowRight", 18), ("Home", 0), ("End", 100)):
            page.keyboard.press(key)
            assert divider_at(page) == expected
        assert color_at(page, x + width - 20, row) == RED
        page.keyboard.press("Space")
        wait_until(page, "document.querySelector('#left-tag').textContent === 'result'")
        assert color_at(page, middle, row) == BLUE
        page.select_option("#left", label="input")
        wait_until(page, "document.querySelector('#left-tag').textContent === 'input'")
        assert page.inner_text("#captions").strip() == "input 16×12, lossless"


def test_the_viewer_zooms_pans_and_goes_on(tmp_path):
    write_report(tmp_path / "r.html", "t", pairs(tmp_path / "in"), COLUMNS)
    with opened(tmp_path / "r.html") as page:
        open_viewer(page, "a")
        x, y, width, height = box(page, "#stage img")
        page.mouse.move(x + width / 4, y + height / 4)
        page.mouse.wheel(0, -300)
        wait_until(page, "width => document.querySelector('#stage img').clientWidth > 1.5 * width", arg=width)
        left, top, wide, high = box(page, "#stage img")
        assert left + wide / 4 == pytest.approx(x + width / 4, abs=1)
        assert top + high / 4 == pytest.approx(y + height / 4, abs=1)

        place = divider_at(page)
        page.mouse.move(700, 300)
        page.mouse.down()
        page.mouse.move(640, 280, steps=3)
        page.mouse.up()
        assert box(page, "#stage img")[:2] == pytest.approx((left - 60, top - 20), abs=1)
        assert divider_at(page) == place
        page.keyboard.press("1")
        assert page.inner_text("#percent") == "100 %"
        assert box(page, "#stage img")[2] == pytest.approx(64, abs=1)
        page.keyboard.press("+")
        assert page.inner_text("#percent") == "150 %"
        page.keyboard.press("0")
        assert box(page, "#stage img") == pytest.approx((x, y, width, height), abs=1)

        page.keyboard.press("x")
        assert (
            page.evaluate("getComputedStyle(document.querySelector('#stage img')).imageRendering")
            == "pixelated"
        )
        page.keyboard.press("ArrowDown")
        seen(page, "b")
        assert color_at(page, x + 20, y + 20) == GREEN and page.inner_text("#place") == "2 of 3"
        assert page.inner_text("#values") == "PSNR ↑\t21.00\nLPIPS ↓\t0.1000" and page.url.endswith("#b")
        page.click("#next")
        seen(page, "c")
        assert page.is_disabled("#next")
        page.keyboard.press("p")
        seen(page, "b")
        page.keyboard.press("Escape")
        assert page.is_hidden("#viewer")
        wait_until(page, "location.hash === ''")
        assert page.evaluate("document.activeElement.textContent") == "b"

        open_viewer(page, "a")
        page.go_back()
        wait_until(page, "!document.querySelector('#viewer').open")


def test_sorting_and_filtering(tmp_path):
    entries = [*pairs(tmp_path / "in"), Comparison("Ü10", ()), Comparison("ü9", ())]
    write_report(tmp_path / "r.html", "t", entries, COLUMNS)
    with opened(tmp_path / "r.html") as page:
        assert names_in_order(page) == "abcü9Ü10" and page.inner_text("#count") == "5 images"
        page.click("#direction")
        assert names_in_order(page) == "Ü10ü9cba"
        page.select_option("#sort", label="LPIPS")
        assert names_in_order(page) == "acbü9Ü10" and page.inner_text("#direction") == "worst first"
        page.click("#direction")
        assert names_in_order(page) == "bcaü9Ü10"
        open_viewer(page, "b")
        page.keyboard.press("n")
        seen(page, "c")
        page.click("#close")
        page.fill("#filter", "Ü")
        assert names_in_order(page) == "ü9Ü10" and page.inner_text("#count") == "2 of 5"
        page.fill("#filter", "nothing")
        assert page.is_visible("#empty") and names_in_order(page) == ""
        page.fill("#filter", "")
        page.keyboard.press("Enter")
        page.click(".card:has-text('Ü10') button")
        page.wait_for_selector("#stage p:text('has no picture')")


def test_hostile_names_and_broken_pictures_in_the_page(tmp_path):
    good = picture(tmp_path, "x", RED)
    layers = (Layer("input", good), Layer("<b>result</b>", tmp_path / "</script>absent.png"))
    entries = [Comparison(name, layers, {name: 1.0}, {name: name}) for name in HOSTILE]
    columns = [Column(name, "higher") for name in HOSTILE]
    write_report(tmp_path / "r.html", HOSTILE[0], entries, columns, Summary(HOSTILE, (HOSTILE,)), HOSTILE)
    with opened(tmp_path / "r.html") as page:
        assert page.title() == HOSTILE[0] == page.inner_text("h1")
        texts = page.locator(".card .name").evaluate_all("all => all.map(name => name.textContent)")
        assert sorted(texts) == sorted([*HOSTILE[:-1], "not utf-8 \ufffd"])
        page.locator(".card button").first.click()
        for _ in HOSTILE:
            seen(page, page.inner_text("#name"))
            assert "absent.png: does not exist" in page.inner_text("#stage p")
            page.keyboard.press("n")
        assert page.locator("b", has_text="result").count() == 1  # the caption's own
        address = page.url
        page.goto("about:blank")
        page.goto(address)  # a link to an image opens it
        seen(page, page.inner_text("#name"))
        assert page.inner_text("#name") == texts[-1]


def touch(page, session, *steps: Sequence[tuple[float, float]]) -> None:
    """Fingers go down at the first step's places, move through the others', and up."""
    for number, places in enumerate(steps):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(places)]
        kind = "touchMove" if number else "touchStart"
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_on_a_phone(tmp_path):
    wide = Summary(tuple(f"column {i}" for i in range(12)), (tuple("1234567890ab"),))
    write_report(
        tmp_path / "r.html", "long " + "x" * 80, pairs(tmp_path / "in", 4), COLUMNS, wide, ["n" * 90]
    )
    with opened(tmp_path / "r.html", phone=True) as page:
        session = page.context.new_cdp_session(page)
        fits = "document.documentElement.scrollWidth <= innerWidth"
        assert page.evaluate(fits) and page.evaluate("innerWidth") == 390
        page.tap(".card button")
        seen(page, "a")
        assert page.evaluate(fits) and page.evaluate(
            "document.querySelector('dialog').scrollWidth <= innerWidth"
        )
        x, y, width, height = box(page, "#stage img")
        middle, row = x + width / 2, y + height / 2
        touch(page, session, [(middle, row)], [(middle + 40, row)], [(middle + width / 4, row)])
        assert divider_at(page) == 75 and color_at(page, middle + 20, y + 20) == RED
        page.touchscreen.tap(x + width / 5, row)
        assert divider_at(page) == 20

        touch(page, session, [(x + 300, row)], [(x + 200, row)], [(x + 150, row)])
        seen(page, "b")
        touch(page, session, [(x + 150, row)], [(x + 300, row)])
        seen(page, "a")
        apart = [[(middle - d, row), (middle + d, row)] for d in (40, 60, 80)]
        touch(page, session, *apart)
        assert box(page, "#stage img")[2] == pytest.approx(2 * width, rel=0.02)
        before = box(page, "#stage img")[0]
        touch(page, session, [(x + 300, row)], [(x + 270, row)], [(x + 250, row)])
        assert box(page, "#stage img")[0] == pytest.approx(before - 50, abs=1)
        page.tap("#fit")
        page.tap("#close")
        wait_until(page, "!document.querySelector('#viewer').open")


def test_a_picture_still_on_its_way_is_waited_for(tmp_path):
    write_report(tmp_path / "r.html", "t", pairs(tmp_path / "in"))
    text = (tmp_path / "r.html").read_text("utf-8")
    with opened(tmp_path / "r.html") as page:
        page.goto("about:blank")
        # As a parser leaves a page of which half has arrived: open to more.
        cut = text.index('">', text.index('id="picture-0-1"')) + 20
        page.evaluate("text => { document.open(); document.write(text); }", text[:cut])
        page.click(".card button")
        page.wait_for_selector("#waiting:visible")
        page.evaluate("text => { document.write(text); document.close(); }", text[cut:])
        seen(page, "a")


# --- behind the upscaling command -----------------------------------------------------------


class Upscale(Command):
    def flags(self, output: Path, *more: str, source: Path | None = None) -> list[str]:
        return [
            "--pretrained_model_name_or_path", str(self.root / "sd3"), "--lora_dir", str(self.root / "lora"),
            "--embedding_dir", str(self.root / "prompt"), "--rank", "2", "--rank_vae", "2", "--upscale", "2",
            "--process_size", "64", "--latent_tiled_size", "8", "--latent_tiled_overlap", "2", "--device", "cpu:0",
            "-i", str(source), "-o", str(output), *more,
        ]  # fmt: skip


@pytest.fixture
def command(quick_compilation, tmp_path, monkeypatch, capsys) -> Upscale:
    tiny.save_everything(tmp_path / "models")
    return Upscale(upscale.main, "infer/upscale.py", tmp_path / "models", monkeypatch, capsys)


def test_upscaling_reports_what_has_a_result(command, tmp_path, monkeypatch):
    source, output, page = tmp_path / "in", tmp_path / "out", tmp_path / "r.html"
    for name in ("b", "a", "sub/c"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.synthetic_photo(32, 40, 0)).save(source / f"{name}.png")
    (source / "bad.png").write_bytes(b"no image")
    outcome = command(output, "--report", str(page), source=source)
    assert outcome.status == 1 and f"3 photographs compared in {command.relative(str(page))}\n" in outcome.out
    text = page.read_text("utf-8")
    entries = data_of(text)["entries"]
    assert [entry["name"] for entry in entries] == ["a.png", "b.png", "sub/c.png"]
    assert entries[0]["facts"] == [["size", "40×32 → 80×64"]]
    assert [layer["title"] for layer in entries[0]["layers"]] == ["input", "result"]
    assert re.search(r'<ul class="notes"><li>[^<]*bad\.png: not a readable', text)
    np.testing.assert_array_equal(stored(text)["picture-0-1"], Image.open(output / "a.png"))

    (source / "bad.png").unlink()
    (output / "b.png").write_bytes(b"overwritten by something else")
    monkeypatch.setattr(upscale, "load_engine", None)  # nothing is left to compute
    outcome = command(output, "--report", str(page), source=source)
    assert outcome.status == 1 and "b.png (not a readable picture)" in outcome.err
    entries = data_of(page.read_text("utf-8"))["entries"]
    assert len(entries) == 3 and "not a readable" in entries[1]["layers"][1]["error"]
    assert entries[1]["facts"] == []
    command(output, "--report", str(page), "--shard", "1/3", source=source)
    assert len(data_of(page.read_text("utf-8"))["entries"]) == 1


def test_upscaling_refuses_a_place_for_its_report_before_the_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr(upscale, "load_engine", None)
    source = picture(tmp_path / "in", "a", RED).parent
    assert "ends in .html" in command.refused(tmp_path / "out", "--report", "r.pdf", source=source)
    (tmp_path / "mine.html").write_text("mine")
    line = command.refused(tmp_path / "out", "--report", str(tmp_path / "mine.html"), source=source)
    assert "not a report" in line and (tmp_path / "mine.html").read_text() == "mine"
