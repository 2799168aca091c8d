"""The page: its pieces by themselves, the server with clients, and what a visitor sees in Chromium."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms

import tiny_checkpoint as tiny
from browser import open_page
from commands import Command
from tsdsr_jax import cli
from tsdsr_jax.commands import app, upscale
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling.engine import Engine, Launched, Progress
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.upscaler import PictureArguments, Upscaler
from tsdsr_jax.weights import bundled

gr = pytest.importorskip("gradio")
from tsdsr_jax.upscaling import app as page_lib  # noqa: E402 (needs Gradio)
from tsdsr_jax.upscaling import page_events, page_pictures  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")

REPOSITORY = Path(__file__).resolve().parents[2]
RANK, WAITING = 2, 3
SMALL = [
    "--upscale", "2", "--process_size", "64", "--latent_tiled_size", "8", "--latent_tiled_overlap", "2",
    "--device", "cpu:0", "--max_pixels", "40000", "--max_upload", "1",
]  # fmt: skip


# --- a server for all tests -----------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save_everything(folder, RANK)
    return folder


def flags(root: Path, *more: str) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(root / "sd3"), "--lora_dir", str(root / "lora"),
        "--embedding_dir", str(root / "prompt"), "--rank", str(RANK), "--rank_vae", str(RANK), *SMALL, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def options(root: Path) -> app.Options:
    return cli.parse(app.Options, description="", argv=flags(root))


def loaded(options: app.Options) -> Upscaler:
    return Upscaler(load_engine(options, select_devices(options.device)), options)


@pytest.fixture(scope="module")
def upscaler(options: app.Options) -> Upscaler:
    return loaded(options)


@dataclasses.dataclass
class Served:
    url: str
    root: Path


@pytest.fixture(scope="module")
def served(upscaler: Upscaler, options: app.Options) -> Iterator[Served]:
    with app.private_folder() as folder, pytest.MonkeyPatch.context() as patch:
        # Here it was imported before there was the folder.
        patch.setattr("gradio.routes.DEFAULT_TEMP_DIR", str(folder))
        blocks = page_lib.build_page(upscaler, folder, WAITING)
        port = free_port()
        page_lib.serve_page(blocks, options.host, port, options.max_upload)
        yield Served(app.addresses(options.host, port), folder)
        blocks.close(verbose=False)
    assert not folder.exists()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def handlers(upscaler: Upscaler, tmp_path: Path) -> page_events.Handlers:
    (tmp_path / "private").mkdir()
    return page_events.Handlers(upscaler, tmp_path / "private")


def on_page(
    upscaler: Upscaler,
    source: Path,
    output: Path,
    format: str = "png",
    progress: Progress = lambda *stage: None,
    shapes: page_pictures.SeenShapes | None = None,
    **changes: object,
) -> page_pictures.PageResult:
    """What the page makes of a file, with the flags' settings or others."""
    options = upscaler.options
    arguments = PictureArguments(
        scale=options.upscale, color=options.align_method, seed=options.seed, latent=options.latent,
        tile=options.latent_tiled_size,
    )  # fmt: skip
    output.mkdir(exist_ok=True)
    return page_pictures.upscale_photo(
        upscaler, arguments | changes, format, source, output, progress, shapes or page_pictures.SeenShapes()
    )


def command_line(root: Path, source: Path, output: Path, *more: str) -> bytes:
    """What infer/upscale.py writes for one file."""
    own = flags(root, "-i", str(source), "-o", str(output), *more)
    own = [word for index, word in enumerate(own) if "--max_upload" not in (word, own[index - 1])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["infer/upscale.py", *own])
        cli.run(upscale.main)
    (file,) = output.iterdir()
    return file.read_bytes()


def photo(height: int = 33, width: int = 52, seed: int = 0) -> Image.Image:
    return Image.fromarray(tiny.synthetic_photo(height, width, seed))


def save(path: Path, image: Image.Image | None = None, **how: object) -> Path:
    (image or photo()).save(path, **how)
    return path


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def turned_jpeg(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    return save(folder / "turned.jpg", exif=exif, icc_profile=profile(), quality=95)


def see_through(folder: Path) -> Path:
    image = photo(52, 33)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return save(folder / "see-through.png", image)


def sixteen_bits(folder: Path) -> Path:
    values = np.asarray(photo(40, 40).convert("L")).astype(np.uint16) * 257
    return save(folder / "deep.png", Image.fromarray(values))


# --- one photograph -------------------------------------------------------------------------


@pytest.mark.parametrize("make", [turned_jpeg, see_through, sixteen_bits])
def test_the_file_is_the_command_lines_to_the_byte(upscaler, root, tmp_path, make):
    source = make(tmp_path)
    result = on_page(upscaler, source, tmp_path / "page")
    assert result.file.name == f"{source.stem}_x2.png"
    assert result.file.read_bytes() == command_line(root, source, tmp_path / "shell")
    before, after = Image.open(result.before), Image.open(result.after)
    assert before.size == after.size == Image.open(result.file).size
    shown, file = (np.asarray(image.convert("RGBA")) for image in (after, Image.open(result.file)))
    visible = file[..., 3] >= 8  # reading fills the colors of others
    np.testing.assert_array_equal(shown[..., 3], file[..., 3])
    np.testing.assert_array_equal(shown[visible], file[visible])
    assert result.notes == []


def test_changed_settings_are_the_flags(upscaler, root, tmp_path):
    source, stages = save(tmp_path / "a.png"), []
    plain = on_page(upscaler, source, tmp_path / "plain").file.read_bytes()
    result = on_page(
        upscaler, source, tmp_path / "page", "jpg", lambda *stage: stages.append(stage),
        scale=2.5, seed=-7, color="adain", tile=12,
    )  # fmt: skip
    shell = command_line(
        root, source, tmp_path / "shell", "--upscale", "2.5", "--seed", "-7", "--align_method", "adain",
        "--latent_tiled_size", "12", "--format", "jpg",
    )  # fmt: skip
    assert result.file.name == "a_x2.5.jpg" and result.file.read_bytes() == shell
    tiles = stages[4][2]
    assert tiles > 1 and stages == [
        ("start", 0, 96 * 136),
        ("compile", 0, 1),
        ("encode", 0, 1),
        *(("tiles", done, tiles) for done in range(tiles + 1)),
        ("decode", 0, 1),
        ("decode", 1, 1),
        ("write", 0, 1),
    ]
    # And the next visitor's are not.
    again = on_page(upscaler, source, tmp_path / "again")
    assert again.file.read_bytes() == plain


def test_large_results_are_shown_smaller(upscaler, tmp_path, monkeypatch):
    monkeypatch.setattr(page_pictures, "PREVIEW_PIXELS", 2000)
    result = on_page(upscaler, save(tmp_path / "a.png"), tmp_path / "page")
    assert Image.open(result.file).size == (104, 66)
    assert Image.open(result.before).size == Image.open(result.after).size == (56, 36)
    assert "Shown at 56×36; the file below has all pixels." in result.summary


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((2000, 3000), (2000, 3000)),
        ((4000, 8000), (2000, 4000)),
        ((1, 100_000), (1, 8192)),
    ],
)
def test_preview_sizes(size, expected):
    assert page_pictures.preview_size(size) == expected


def test_results_that_are_not_finite_are_computed_again(options, tmp_path, monkeypatch):
    half = loaded(dataclasses.replace(options, mixed_precision="fp16"))
    launch, tried = Engine.launch, []

    def overflow(self: Engine, photos: list, bucket: tuple, *wanted: object, **more: object) -> Launched:
        tried.append(self.dtype)
        if self.dtype == np.float32:
            return launch(self, photos, bucket, *wanted, **more)
        return Launched(
            [photos[0].plan], bucket, False, jnp.zeros((1, *bucket, 3), jnp.uint8), jnp.zeros(1, bool)
        )

    monkeypatch.setattr(Engine, "launch", overflow)
    result = on_page(half, save(tmp_path / "a.png"), tmp_path / "page")
    assert result.notes == ["a.png: not finite in float16; computing again in float32"]
    assert tried == [np.float16, np.float32]
    monkeypatch.setattr(Launched, "results", lambda launched: [None])
    with pytest.raises(UserError, match=r"^a\.png: the result is not finite, in float32 too"):
        on_page(half, tmp_path / "a.png", tmp_path / "again")


# --- mistakes -------------------------------------------------------------------------------


def refused(handlers: page_events.Handlers, source: Path | None, **changes: object) -> str:
    """The message of a request; nobody learns from it where the server keeps its files."""
    values = dict(scale=2.0, colors="wavelet", tile=8, seed=1, format="png", choice=page_events.Choice())
    values |= changes
    with pytest.raises(gr.Error) as error:
        handlers.upscale(None if source is None else str(source), **values)
    message = error.value.message
    assert "\n" not in message and str(handlers.root.parent) not in message
    return message


def text(path: Path) -> None:
    path.write_text("no picture")


def empty(path: Path) -> None:
    path.touch()


def cut_short(path: Path) -> None:
    data = io.BytesIO()
    photo().save(data, "png")
    path.write_bytes(data.getvalue()[:-500])


def too_large(path: Path) -> None:
    Image.new("RGB", (201, 200)).save(path)


def too_large_result(path: Path) -> None:
    Image.new("RGB", (150, 150)).save(path)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (text, "not a readable"),
        (empty, "is empty (0 bytes)"),
        (cut_short, "damaged or cut short"),
        (too_large, "has 201 x 200 = 40200 pixels, more than the limit of 40000; make it smaller$"),
        (
            too_large_result,
            "150×150 pixels enlarged 2 times make 304×304, 0.0924 megapixels, more than the 0.04 megapixels of this page; "
            "choose a scale of 1.3 or less",
        ),
    ],
)
def test_files_that_cannot_be_used(handlers, tmp_path, make, expected):
    make(tmp_path / "my photo.png")
    message = refused(handlers, tmp_path / "my photo.png")
    assert re.match(f"my photo.png: .*{expected.replace('(', '[(]').replace(')', '[)]')}", message), message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(scale=0.5), "Scale 0.5: expected 1 to 64"),
        (dict(scale=float("nan")), "Scale nan: expected 1 to 64"),
        (dict(scale=None), "Scale: enter a number"),
        (dict(seed="one"), "Seed: enter a number"),
        (dict(tile=7), "Tile size 7: expected an even number"),
        (dict(scale=10**400), "Scale inf: expected 1 to 64"),
        (dict(scale=True), "Scale: enter a number"),
        (dict(tile=2), "Tile size 2: expected more than 2, the overlap of tiles"),
        (dict(tile=8.5), "Tile size 8.5: expected a whole number"),
        (dict(tile=[8]), "Tile size: enter a number"),
        (dict(seed=float("inf")), "Seed inf: expected a whole number"),
        (dict(seed=None), "Seed: enter a number"),
        (dict(seed=-(2**53) - 1), "Seed -9.0072e+15: expected -2**53 to 2**53"),
        (dict(colors=None), "Colors: expected one of wavelet, adain, nofix"),
        (dict(format="gif"), "Format: expected one of png, jpg, webp, tiff, bmp"),
        (dict(format=["png"]), "Format: expected one of png, jpg, webp, tiff, bmp"),
        (dict(tile=100_000), "Tile size 100000: this transformer's position table ends at"),
        (dict(seed=2**200), "Seed 1.60694e+60: expected -2**53 to 2**53"),
    ],
)
def test_values_out_of_range(handlers, tmp_path, changes, expected):
    assert expected in refused(handlers, save(tmp_path / "a.png"), **changes)


def test_no_photo_and_failures_of_the_device(handlers, tmp_path, monkeypatch):
    assert refused(handlers, None) == "Choose a photo first."
    source = save(tmp_path / "a.png")

    def fail(error: Exception) -> None:
        def launch(*arguments: object, **more: object) -> None:
            raise error

        monkeypatch.setattr(Engine, "launch", launch)

    fail(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"))
    assert refused(handlers, source).endswith(
        "a.png: out of device memory at 104×72; a smaller scale needs less"
    )
    fail(RuntimeError(f"a bug in {handlers.root}"))
    assert refused(handlers, source) == "Something went wrong; the server's terminal shows the error."
    monkeypatch.undo()
    # Whole numbers may come with a point, and the largest seed is one.
    done = handlers.upscale(str(source), 2, "wavelet", 8.0, 2**53, "png", page_events.Choice())
    assert done[1].endswith("/a_x2.png")


def test_a_canceled_photo_ends_at_the_next_step(handlers, tmp_path):
    choice = page_events.Choice()
    source = str(save(tmp_path / "a.png"))
    handlers.choose(source, choice)
    assert handlers.cancel(choice) == gr.skip()  # nothing to cancel
    said = []

    def cancel_at_tiles(share: float, desc: str) -> None:
        if desc.startswith("Tile"):
            said.append(handlers.cancel(choice))

    with pytest.raises(gr.Error, match=r"Canceled\."):
        handlers.upscale(source, 2, "wavelet", 8, 1, "png", choice, cancel_at_tiles)
    assert said == ["Canceled."]
    assert handlers.upscale(source, 2, "wavelet", 8, 1, "png", choice)[1].endswith("a_x2.png")


def test_the_page_says_why_there_is_no_result(handlers, tmp_path, monkeypatch, capsys):
    choice, source = page_events.Choice(), tmp_path / "<i>.png"
    text(source)
    request = str(source), 2, "wavelet", 8, 1, "png", choice
    slider, file, words = handlers.upscale_on_page(*request, progress=lambda share, desc: None)
    assert slider == file == gr.skip()
    assert words.startswith('<span role="alert">&lt;i&gt;.png: not a readable')
    monkeypatch.setattr(page_events, "upscale_photo", lambda *arguments: 1 / 0)
    assert "the server's terminal shows the error" in handlers.upscale_on_page(*request)[2]
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "promise"), [(None, "small model bundled"), ("sd3", "Fine detail is invented")]
)
def test_what_the_page_promises(upscaler, tmp_path, model, promise):
    options = dataclasses.replace(
        upscaler.options, pretrained_model_name_or_path=model or str(bundled.FOLDER)
    )
    page = page_lib.build_page(Upscaler(upscaler.engine, options), tmp_path, WAITING)
    (head,) = [block.value for block in page.blocks.values() if isinstance(block, gr.Markdown)]
    assert promise in head


def test_a_photo_that_was_exchanged_is_given_up(handlers, tmp_path, monkeypatch):
    first, second = (str(save(tmp_path / f"{name}.png")) for name in "ab")
    choice = page_events.Choice()
    assert handlers.choose(first, choice) == (None, None, "", "")
    assert handlers.show(first, choice)[1] == "a.png: 52×33 pixels."
    launch, launched = Engine.launch, []

    def exchange(self: Engine, *arguments: object, **more: object) -> Launched:
        handlers.choose(second, choice)
        launched.append(launch(self, *arguments, **more))
        return launched[-1]

    monkeypatch.setattr(Engine, "launch", exchange)
    with handlers.device:  # it does not wait for its turn either
        handlers.choose(first, choice)
        threading.Timer(0.1, handlers.choose, (second, choice)).start()
        assert refused(handlers, first, choice=choice) == "Another photo was chosen meanwhile."
    handlers.choose(first, choice)
    assert refused(handlers, first, choice=choice) == "Another photo was chosen meanwhile."
    assert not launched  # it did not go on to its end
    assert handlers.show(first, choice) == (gr.skip(), gr.skip())
    monkeypatch.undo()
    assert handlers.upscale(second, 2, "wavelet", 8, 1, "png", choice)[2].startswith("b.png: 52×33 → 104×66")
    handlers.choose(None, choice)
    assert refused(handlers, second, choice=choice) == "Another photo was chosen meanwhile."


def test_a_photo_is_shown_or_why_not(handlers, tmp_path, monkeypatch):
    monkeypatch.setattr(page_pictures, "PREVIEW_PIXELS", 500)
    choice, source = page_events.Choice(), tmp_path / "<i>&.png"
    text(source)
    assert handlers.show(None, choice) == (None, "")
    assert handlers.show(str(source), choice)[1].startswith("&lt;i&gt;&amp;.png: not a readable")
    pair, words = handlers.show(str(save(source)), choice)
    assert words == "&lt;i&gt;&amp;.png: 52×33 pixels."
    assert pair[0] == pair[1] and Image.open(pair[0]).size == (28, 18)
    monkeypatch.setattr(page_events, "write_preview", lambda *arguments: 1 / 0)
    assert handlers.show(str(source), choice) == (
        None,
        "Something went wrong; the server's terminal shows the error.",
    )


def test_lost_transparency_is_pointed_out_and_names_are_no_markup(handlers, tmp_path):
    source = see_through(tmp_path).rename(tmp_path / "<i>&.png")
    words = []
    *_, summary = handlers.upscale(
        str(source), 2, "wavelet", 8, 1, "jpg", page_events.Choice(), lambda share, desc: words.append(desc)
    )
    assert words[:3] == ["Waiting", "Reading", "Encoding, compiling for this size"] and words[-1] == "Writing"
    assert summary.endswith(
        " &lt;i&gt;&amp;_x2.jpg: jpg cannot hold its transparency; the picture lies over white."
    )
    cut_short(source)
    assert refused(handlers, source).startswith("&lt;i&gt;&amp;.png: the image is damaged")


# --- the server -----------------------------------------------------------------------------


def test_requests_are_done_one_after_the_other(served, upscaler, tmp_path, monkeypatch):
    client_lib = pytest.importorskip("gradio_client")
    computing, most = [], []
    real = page_events.upscale_photo

    def counted(*arguments: object, **more: object) -> object:
        computing.append(1)
        most.append(len(computing))
        try:
            return real(*arguments, **more)
        finally:
            computing.pop()

    monkeypatch.setattr(page_events, "upscale_photo", counted)
    client = client_lib.Client(served.url, verbose=False, download_files=tmp_path)
    sources = [save(tmp_path / f"{name}.png", photo(seed=index)) for index, name in enumerate("abc")]
    jobs = [
        client.submit(client_lib.handle_file(source), 2, "wavelet", 8, 42, "png", api_name="/upscale")
        for source in sources
    ]
    for source, job in zip(sources, jobs, strict=True):
        file = Path(job.result(timeout=60)[1])
        expected = on_page(upscaler, source, tmp_path / f"own_{source.stem}").file
        assert file.name == expected.name and file.read_bytes() == expected.read_bytes()
    assert most == [1, 1, 1]
    for values, said in (
        ((65, "wavelet", 8, 42, "png"), "Scale 65: expected 1 to 64"),
        (("x", "wavelet", 8, 42, "png"), "Scale: enter a number"),
        ((2, "wavelet", 8.5, 42, "png"), "Tile size 8.5: expected a whole number"),
        ((2, "sepia", 8, 42, "png"), "Colors: expected one of"),
        ((2, "wavelet", 8, 42, None), "Format: expected one of"),
    ):
        with pytest.raises(Exception, match=said):
            client.predict(client_lib.handle_file(sources[0]), *values, api_name="/upscale")
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/upscale"]


def test_only_the_private_folder_is_served(served, tmp_path):
    def get(path: Path) -> int:
        try:
            return urllib.request.urlopen(f"{served.url}gradio_api/file={path}").status
        except urllib.error.HTTPError as error:
            return error.code

    (served.root / "mine.txt").touch()
    assert get(served.root / "mine.txt") == 200
    assert served.root.stat().st_mode & 0o77 == 0
    secret = save(tmp_path / "secret.png")
    for path in (secret, REPOSITORY / "README.md", served.root / os.path.relpath(secret, served.root)):
        assert get(path) in (403, 404), path
    # Nor is such a file read, if somebody names it in place of an upload.
    pretended = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [pretended, 2, "wavelet", 8, 42, "png"]}).encode()
    call = f"{served.url}gradio_api/call/upscale"
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    assert urllib.request.urlopen(f"{call}/{event}").read().startswith(b"event: error")


# --- in the browser -------------------------------------------------------------------------


@contextlib.contextmanager
def visit(served: Served, **how: object) -> Iterator:
    """The page, loaded; it asks nobody else for anything."""
    with open_page(**how) as page:
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(served.url)
        page.wait_for_selector("#upscale")
        yield page
    outside = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert not outside, outside


def upload(page, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", path)


def clear(page) -> None:
    page.click("#photo .icon-button-wrapper button[aria-label='Clear']")


# Collects in `announced` what the page tells screen readers.
RECORD_ANNOUNCEMENTS = """() => {
    window.announced = [];
    const look = () => document.querySelectorAll("[aria-live]").forEach(
        region => region.textContent.trim() && announced.push(region.textContent.trim()));
    setInterval(look, 50);
}"""


def message(page) -> str:
    """The one message on the page, which is then closed."""
    toast = page.get_by_test_id("toast-text")
    toast.first.wait_for()
    assert toast.count() == 1
    words = toast.inner_text()
    page.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return words


def test_a_visit(served, root, tmp_path):
    source = turned_jpeg(tmp_path)
    with visit(served) as page:
        page.click("#upscale")
        page.wait_for_selector("#summary [role=alert]:has-text('Choose a photo first.')")
        upload(page, source)
        page.wait_for_selector("#about:has-text('turned.jpg: 33×52 pixels.')")
        page.wait_for_selector("#result img")
        # The reason stays until the next one, and until there is a result.
        for scale in ("65", "99"):
            page.fill("#scale input", scale)
            page.click("#upscale")
            page.wait_for_selector(f"#summary [role=alert]:has-text('Scale {scale}: expected 1 to 64')")
        assert page.inner_text("#summary").strip() == "Scale 99: expected 1 to 64"
        page.evaluate(RECORD_ANNOUNCEMENTS)
        page.fill("#scale input", "3")
        page.click("#upscale")
        page.wait_for_selector("#summary:has-text('turned.jpg: 33×52 → 99×156 pixels in')")
        assert page.locator("#summary [role=alert]").count() == 0

        images = page.locator("#result img")
        assert images.count() == 2
        sizes = images.evaluate_all("all => all.map(image => [image.naturalWidth, image.naturalHeight])")
        assert sizes == [[99, 156], [99, 156]]
        covered = images.nth(1).get_attribute("style")
        handle = page.get_by_test_id("slider").bounding_box()
        x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
        page.mouse.move(x, y)
        page.mouse.down()
        page.mouse.move(x - 30, y, steps=3)
        page.mouse.up()
        assert images.nth(1).get_attribute("style") != covered

        # What screen readers are told is words.
        page.wait_for_function("announced.length > 0", timeout=10_000)
        assert page.evaluate("announced.filter(words => words.includes('common.'))") == []
        with page.expect_download() as download:
            page.click("#file a")
        assert download.value.suggested_filename == "turned_x3.png"
        data = Path(download.value.path()).read_bytes()
    assert data == command_line(root, source, tmp_path / "shell", "--upscale", "3")
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == Image.open(source).info["icc_profile"]


def test_bad_uploads_on_a_phone(served, tmp_path):
    cut_short(tmp_path / "a & b.png")
    good = save(tmp_path / "good.png").rename(tmp_path / "good")
    big = tmp_path / "big.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)).save(big)
    with visit(served, phone=True) as page:
        upload(page, tmp_path / "a & b.png")
        page.wait_for_selector("#about:has-text('a & b.png: the image is damaged or cut short')")
        page.click("#upscale")
        page.wait_for_selector(
            "#summary [role=alert]:has-text('a & b.png: the image is damaged or cut short')"
        )
        clear(page)
        page.wait_for_selector("#about:has-text('damaged')", state="detached")
        upload(page, big)
        assert "1" in message(page)
        upload(page, good)
        page.wait_for_selector("#about:has-text('good: 52×33 pixels.')")
        page.tap("#upscale")
        page.wait_for_selector("#file a")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@contextlib.contextmanager
def slow_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Semaphore, threading.Semaphore]]:
    """Photographs are computed one for each release of the first semaphore; the second counts those begun."""
    go, begun, real = threading.Semaphore(0), threading.Semaphore(0), page_events.upscale_photo

    def wait(*arguments: object) -> object:
        begun.release()
        assert go.acquire(timeout=30)
        return real(*arguments)

    monkeypatch.setattr(page_events, "upscale_photo", wait)
    try:
        yield go, begun
    finally:
        go.release(100)


def ask(served: Served) -> int:
    """The status of a request that waits for its turn, and will then be refused for want of a photograph."""
    body = json.dumps({"data": [None, 2, "wavelet", 8, 42, "png"]}).encode()
    call = f"{served.url}gradio_api/call/upscale"
    request = urllib.request.Request(call, body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


def test_cancel(served, tmp_path, monkeypatch):
    launch, launched = Engine.launch, []
    monkeypatch.setattr(
        Engine,
        "launch",
        lambda self, *photos, **more: launched.append(launch(self, *photos, **more)) or launched[-1],
    )
    with slow_device(monkeypatch) as (go, begun), visit(served) as page:
        page.click("#cancel")  # nothing to cancel
        upload(page, save(tmp_path / "a.png"))
        page.wait_for_selector("#result img")
        page.click("#upscale")
        assert begun.acquire(timeout=10)
        # Meanwhile the photograph is visible, under no cover.
        assert page.locator("#result img").first.is_visible()
        assert page.locator("#result [data-testid=status-tracker] .progress-level").count() == 0
        page.wait_for_selector("#summary .progress-level:has-text('Reading')")
        page.click("#cancel")
        page.wait_for_selector("#summary:has-text('Canceled.')")
        assert page.locator("#summary .error").is_hidden()
        # The device is free at its next step, and the page ready.
        page.click("#upscale")
        go.release(2)
        page.wait_for_selector("#summary:has-text('a.png: 52×33 → 104×66 pixels in')")
    assert len(launched) == 1  # the first one never began


def test_another_photo_while_one_is_computed(served, tmp_path, monkeypatch):
    name = "# [l](x) & <b>.png"
    first, second = save(tmp_path / "first.png"), save(tmp_path / name, photo(40, 40))
    with slow_device(monkeypatch) as (go, begun), visit(served) as page:
        upload(page, first)
        page.wait_for_selector("#about:has-text('first.png')")
        page.click("#upscale")
        assert begun.acquire(timeout=10)

        # Other visitors see their photographs even while the queue is full.
        assert [ask(served) for _ in range(WAITING)] == [200] * WAITING
        assert ask(served) == 503
        other = page.context.new_page()
        other.goto(served.url)
        other.wait_for_selector("#upscale")
        upload(other, first)
        other.wait_for_selector("#about:has-text('first.png: 52×33 pixels.')")
        other.close()

        clear(page)
        upload(page, second)
        page.wait_for_selector("#about:has-text('40×40 pixels.')")
        words = page.inner_text("#about").strip()
        assert words.startswith("# [l](x)")  # what else is in the name Gradio leaves out
        page.click("#upscale")
        assert not begun.acquire(timeout=0.5)  # the first one is still on the device
        go.release(2)
        page.wait_for_selector("#summary:has-text('40×40 → 80×80 pixels in')")
        assert page.inner_text("#summary").startswith(words.removesuffix("40×40 pixels."))
        assert page.get_by_test_id("toast-text").count() == 0
        # The browser may still be decoding it.
        page.wait_for_function("document.querySelector('#result img').naturalWidth === 80")


# --- the command ----------------------------------------------------------------------------


class App(Command):
    def flags(self, output: Path, *more: str) -> list[str]:
        return flags(self.root, *more)


@pytest.fixture
def command(root, monkeypatch, capsys) -> App:
    return App(app.main, "infer/app.py", root, monkeypatch, capsys)


def test_help(command, tmp_path):
    said = command.done(tmp_path, "--help")
    assert all(flag in said for flag in ("--host", "--port", "--max_upload", "--max_waiting", "--upscale"))


def test_mistakes_are_told_before_anything_starts(command, tmp_path, monkeypatch):
    def line(*more: str) -> str:
        said = command.refused(tmp_path, *more)
        assert said.count("\n") == 1
        return said

    assert "nowhere" in line("--pretrained_model_name_or_path", str(tmp_path / "nowhere"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}: is in use; choose another port" in line("--port", port)
    assert "--port 0: expected 1 to 65535" in line("--port", "0")
    assert "--max_upload 0: expected at least 1" in line("--max_upload", "0")
    assert "--host no.such.name.invalid: no such address" in line("--host", "no.such.name.invalid")
    assert "--host 192.0.2.1: the server cannot listen on it" in line("--host", "192.0.2.1")
    assert "--upscale 0.5: expected 1 to 64" in line("--upscale", "0.5")
    assert f"--seed {2**53 + 1}: expected -2**53 to 2**53" in line("--seed", str(2**53 + 1))
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        assert "no temporary folder can be made (No such file or directory); set TMPDIR" in line()
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "tsdsr_jax.upscaling.app")
    monkeypatch.delattr("tsdsr_jax.upscaling.app")
    assert "pip install 'tsdsr_jax[app]'" in line()


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:80/"),
        ("::1", "http://[::1]:80/"),
        ("0", "http://localhost:80/, from other machines http://box:80/"),
        ("0.0.0.0", "http://localhost:80/, from other machines http://box:80/"),
        ("::", "http://localhost:80/, from other machines http://box:80/"),
    ],
)
def test_addresses_can_be_gone_to(host, expected, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    assert app.addresses(host, 80) == expected


def start(root: Path, cache: Path, folder: Path, port: int) -> subprocess.Popen:
    """The command in an empty folder, with its temporary files in `folder/tmp` and its user's in `folder/home`."""
    for name in ("tmp", "home"):
        (folder / name).mkdir(parents=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
        "PYTHONPATH": str(REPOSITORY),
    }
    return subprocess.Popen(
        [sys.executable, REPOSITORY / "infer/app.py", *flags(root, "--port", str(port))],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_it_ends_at_once_and_leaves_nothing(root, cache, tmp_path):
    kinds, servers = {signal.SIGINT: 130, signal.SIGTERM: 143}, {}
    for kind in kinds:
        port = free_port()
        servers[kind] = (port, start(root, cache, tmp_path / kind.name, port))
    for kind, status in kinds.items():
        port, process = servers[kind]
        folder = tmp_path / kind.name
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        first, ready = process.stdout.readline(), process.stdout.readline()
        assert "float32" in first and f"http://127.0.0.1:{port}/" in ready
        (private,) = (folder / "tmp").iterdir()
        assert private.name.startswith("tsdsr_page_")
        process.send_signal(kind)
        out, err = process.communicate()
        watchdog.cancel()
        assert process.returncode == status
        assert out == "" and err == ("interrupted\n" if kind == signal.SIGINT else "")
        left = {path.name: [str(each) for each in path.rglob("*")] for path in folder.iterdir()}
        assert left == {"tmp": [], "home": []}


# --- memory; last, because the other tests share what is compiled ------------------------------


def test_programs_are_dropped_after_many_sizes(upscaler, tmp_path, monkeypatch):
    clear, cleared = jax.clear_caches, []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(clear()))
    shapes, files = page_pictures.SeenShapes(most=2), []

    def new(height: int, width: int) -> bool:
        stages, source = [], save(tmp_path / "a.png", photo(height, width))
        output = tmp_path / f"{len(files)}"
        result = on_page(
            upscaler, source, output, progress=lambda *stage: stages.append(stage), shapes=shapes
        )
        files.append(result.file.read_bytes())
        assert stages[-1] == ("write", 0, 1)
        return stages[1] == ("compile", 0, 1)

    # A portrait, and a size that is padded to the same, are nothing new.
    assert [new(33, 52), new(52, 33)] == [True, False]
    assert [shapes.enter(each) for each in ("other", "other")] == [True, False] and not cleared
    assert shapes.enter("third") and len(cleared) == 1
    assert new(33, 52) and len(cleared) == 1
    assert files[2] == files[0]
    assert page_pictures.SeenShapes().most == 16
