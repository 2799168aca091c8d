"""A page in the browser that upscales one photograph at a time, with Gradio.

The photograph's own bytes go through `folder`, as on the command line, so that the download is the file which
infer/upscale.py would write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import gradio as gr

from tsdsr_jax import color, folder
from tsdsr_jax.errors import UserError
from tsdsr_jax.images import FORMATS, Photo, read_photo, write_photo
from tsdsr_jax.resize import pillow_bicubic
from tsdsr_jax.sizes import Size
from tsdsr_jax.upscale_options import UpscaleOptions, check, check_tile
from tsdsr_jax.upscaler import Progress, Upscaler

# The browser gets smaller copies of larger pictures; a phone could not hold the originals.
PREVIEW_PIXELS, PREVIEW_SIDE = 8_000_000, 8192
# Photographs may wait in the queue for hours where a CPU computes.
_SWEEP_EVERY, _KEEP = 600, 6 * 3600
_MESSAGE_SECONDS = 20
_LABELS = {"upscale": "Scale", "latent_tiled_size": "Tile size", "seed": "Seed"}
# Where the bar starts and ends, and what stands above it.
_STAGES = {
    "encode": (0.0, 0.1, "Encoding"),
    "tiles": (0.1, 0.85, "Tile {} of {}"),
    "decode": (0.85, 0.95, "Decoding"),
    "write": (0.95, 1.0, "Writing"),
}
_HEAD = """## TSD-SR
Makes a small, blurry, noisy photo large and sharp. Fine detail is invented: do not rely on faces or text."""
# A finger moves the slider sideways and the page up and down. There is no place for a file until there is one. Gradio's
# badge of an error would hide the name of the file that has it.
_CSS = """
#result .slider-wrap { touch-action: pan-y }
#file:has(.empty) { display: none }
#photo [data-testid="status-tracker"] { display: none }
"""


# ---- one photograph ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What a photograph has become.

    Attributes:
      file: the result, as the command line writes it.
      before, after: photograph and result for the browser, of one size.
      summary: sizes and time, in words.
      notes: what the command line would have remarked.
    """

    file: Path
    before: Path
    after: Path
    summary: str
    notes: list[str]


def upscale_photo(
    upscaler: Upscaler,
    options: UpscaleOptions,
    format: str,
    source: Path,
    output: Path,
    progress: Progress | None = None,
) -> Result:
    """Upscales one file into the folder `output`.

    Args:
      upscaler: from `load`, with any settings.
      options: those of `load`; scale, colours, tile size and seed may differ, within `check` and `check_tile`.
      format: of the result, one of `images.FORMATS`.
      progress: see `Upscaler.with_settings`; "write" follows its stages.

    Raises:
      UserError: the photograph cannot be read, computed or written; named without its folder.
    """
    started = time.monotonic()
    settings = options.settings(upscaler.devices[0].platform)
    files = folder.FileOptions(options.align_method, format, options.seed, options.max_pixels)
    target = output / f"{source.stem}_x{options.upscale:g}.{format}"
    lines: list[str] = []
    report = folder.Report(lines.append)
    groups = folder.plan_groups([folder.Job(source, target)], settings.plan, upscaler.batch, files, report)
    folder.upscale(upscaler.with_settings(settings, progress), groups, files, report)
    if report.failures:
        raise UserError(_without_folders(report.failures[0], source, target))
    seconds = time.monotonic() - started
    if progress:
        progress("write", 0, 1)

    photo, result = (_read(path, options.max_pixels) for path in (source, target))
    before, after = output / "photo.webp", output / "result.webp"
    size = result.rgb.shape[:2]
    write_preview(before, photo, size)
    write_preview(after, result, size)
    summary = f"{_pixels(photo.rgb.shape)} → {_pixels(size)} pixels in {seconds:.1f} s."
    if preview_size(size) != size:
        summary += f" Shown at {_pixels(preview_size(size))}; the file below has all of them."
    return Result(target, before, after, summary, [_without_folders(line, source, target) for line in lines])


def _read(path: Path, max_pixels: int) -> Photo:
    """`read_photo`, with messages for the page."""
    try:
        return read_photo(path, max_pixels)
    except UserError as error:
        raise UserError(_without_folders(str(error), path)) from None


def _without_folders(message: str, *paths: Path) -> str:
    """A message with the files' names only, and the limit by its flag."""
    for path in paths:
        message = message.replace(str(path), path.name)
    return message.replace("raise the limit", "raise --max_pixels")


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[1]}×{size[0]}"


def preview_size(size: Size) -> Size:
    """What of (height, width) the browser is given: the same, or as much as it can well hold."""
    scale = min(1, (PREVIEW_PIXELS / (size[0] * size[1])) ** 0.5, PREVIEW_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def write_preview(path: Path, photo: Photo, size: Size) -> None:
    """Writes a photograph for the browser: enlarged bicubically to `size`, or to its preview's; lossless."""
    size = preview_size(size)
    alpha = None if photo.alpha is None else pillow_bicubic(photo.alpha, *size)
    write_photo(path, pillow_bicubic(photo.rgb, *size), dataclasses.replace(photo, exif=None), alpha, "webp")


# ---- the page ----------------------------------------------------------------------------


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder for uploads and results, the only one that Gradio serves files of; removed at the end."""
    root = Path(tempfile.mkdtemp(prefix="tsdsr_page_")).resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(root)  # read when components are made
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


class Handlers:
    """What the page's events do.

    Args:
      upscaler, options: the networks, and the flags that the page starts from.
      root: from `private_folder`.
    """

    def __init__(self, upscaler: Upscaler, options: UpscaleOptions, root: Path):
        self.upscaler, self.options, self.root = upscaler, options, root

    def show(self, source: str | None) -> Iterator[tuple]:
        """A new photograph, or none: empties the page, then shows it on both sides of the slider."""
        yield None, None, ""
        if source is None:
            return
        with _told():
            photo = _read(Path(source), self.options.max_pixels)
            path = self._new_folder() / "photo.webp"
            write_preview(path, photo, photo.rgb.shape[:2])
        yield (str(path), str(path)), None, f"{Path(source).name}: {_pixels(photo.rgb.shape)} pixels."

    def upscale(
        self,
        photo: str | None,
        scale: float | None,
        colours: str,
        tile: int | None,
        seed: int | None,
        format: str,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> tuple:
        """Upscales a photograph; returns the slider's two pictures, the result's file and its sizes in words."""

        def tell(stage: str, done: int, total: int) -> None:
            start, end, words = _STAGES[stage]
            progress(start + (end - start) * done / total, desc=words.format(min(done + 1, total), total))

        with _told():
            if photo is None:
                raise UserError("Choose a photo first.")
            options = self._options(upscale=scale, align_method=colours, latent_tiled_size=tile, seed=seed)
            progress(0, desc="Reading")
            result = upscale_photo(
                self.upscaler, options, format, Path(photo), self._new_folder(), progress=tell
            )
        for note in result.notes:
            gr.Info(html.escape(note, quote=False), duration=_MESSAGE_SECONDS)
        return (str(result.before), str(result.after)), str(result.file), result.summary

    def _options(self, **values: object) -> UpscaleOptions:
        """The flags with the page's values in their place."""
        for name, label in _LABELS.items():
            if not isinstance(values[name], int | float):
                raise UserError(f"{label}: enter a number")
        options = dataclasses.replace(self.options, **values)
        try:
            check(options)
            check_tile(options.latent_tiled_size, self.upscaler.largest_tile)
        except UserError as error:
            message = str(error)
            for name, label in _LABELS.items():
                message = message.replace(f"--{name} ", f"{label} ")
            raise UserError(message) from None
        return options

    def _new_folder(self) -> Path:
        """One that nobody can guess: Gradio serves whatever is asked for below the root."""
        path = self.root / secrets.token_hex(16)
        path.mkdir()
        return path


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns errors into a message on the page; those that are no user's mistake keep their traceback in the terminal."""
    try:
        yield
    except UserError as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=_MESSAGE_SECONDS, print_exception=False) from None
    except Exception as error:
        raise gr.Error("Something went wrong; the server's terminal says what.") from error


def build(upscaler: Upscaler, options: UpscaleOptions, root: Path, max_waiting: int) -> gr.Blocks:
    """The page, not yet served.

    Args:
      upscaler, options, root: see `Handlers`.
      max_waiting: requests that may wait, one being computed at a time.
    """
    handlers = Handlers(upscaler, options, root)
    page = gr.Blocks(title="TSD-SR", analytics_enabled=False, delete_cache=(_SWEEP_EVERY, _KEEP))
    with page:
        gr.Markdown(_HEAD)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo, settings = _controls(options)
                button = gr.Button("Upscale", variant="primary", elem_id="upscale")
            with gr.Column(scale=3, min_width=340):
                outputs = _results()
        photo.change(
            handlers.show,
            photo,
            outputs,
            show_progress_on=outputs[0],
            concurrency_limit=2,
            trigger_mode="always_last",
            api_visibility="private",
        )
        button.click(
            handlers.upscale,
            [photo, *settings],
            outputs,
            scroll_to_output=True,
            show_progress_on=outputs[0],
            api_name="upscale",
        )
    return page.queue(max_size=max_waiting, default_concurrency_limit=1)


def _controls(options: UpscaleOptions) -> tuple[gr.File, list[gr.components.Component]]:
    """The photograph, and the settings in the order of `Handlers.upscale`."""
    # A plain file: Gradio's image component would drop the profile, the EXIF and all but 8 bits.
    photo = gr.File(label="Photo", file_types=["image"], height=140, elem_id="photo")
    with gr.Row():
        scale = gr.Number(options.upscale, label="Scale", step=0.5, min_width=120, elem_id="scale")
        format = gr.Dropdown(list(FORMATS), value="png", label="Format", min_width=120, elem_id="format")
    with gr.Accordion("More settings", open=False):
        colours = gr.Dropdown(
            list(get_args(color.Method)),
            value=options.align_method,
            label="Colours",
            info="From the photo its low frequencies (wavelet), its mean and contrast (adain), or neither.",
            elem_id="colours",
        )
        seed = gr.Number(
            options.seed, precision=0, label="Seed", info="Another seed gives other details.", elem_id="seed"
        )
        tile = gr.Number(
            options.latent_tiled_size,
            precision=0,
            step=8,
            label="Tile size",
            info="One is 8 pixels of the result. Smaller tiles need less memory, larger ones see more at once.",
            elem_id="tile",
        )
    return photo, [scale, colours, tile, seed, format]


def _results() -> list[gr.components.Component]:
    """Slider, file and words, in the order that `Handlers` returns them."""
    slider = gr.ImageSlider(
        type="filepath",
        interactive=False,
        label="Photo, enlarged bicubically | Result",
        buttons=["fullscreen"],
        max_height=560,
        elem_id="result",
    )
    words = gr.Markdown(elem_id="summary")
    file = gr.File(label="Result, full size and quality", interactive=False, height=100, elem_id="file")
    return [slider, file, words]


def serve(page: gr.Blocks, host: str, port: int, max_upload: int) -> str:
    """Starts the server in a thread; returns its address.

    Args:
      max_upload: megabytes.

    Raises:
      UserError: the port is taken.
    """
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost")))
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            max_file_size=f"{max_upload}mb",
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=_CSS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inline=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
        )
    except OSError:
        raise UserError(f"--port {port}: cannot be listened at; choose another") from None
    return url
