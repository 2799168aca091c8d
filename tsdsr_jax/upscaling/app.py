"""A page in the browser that upscales one photograph at a time, with Gradio.

The photograph's own bytes go through `folder`, as on the command line, so that the download is the file which
infer/upscale.py would write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import os
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import get_args

import gradio as gr
import jax

from tsdsr_jax.errors import UserError, printable
from tsdsr_jax.images import color
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.files import Photo, read_photo
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.images.writing import FORMATS, write_photo
from tsdsr_jax.upscaling import batch_run
from tsdsr_jax.upscaling.engine import Engine, Progress
from tsdsr_jax.upscaling.options import UpscaleOptions, check, check_tile

# The browser gets smaller copies of larger pictures; a phone could not hold the originals.
PREVIEW_PIXELS, PREVIEW_SIDE = 8_000_000, 8192
# Photographs may wait in the queue for hours where a CPU computes.
_SWEEP_EVERY, _KEEP = 600, 6 * 3600
_MESSAGE_SECONDS = 20
_UNKNOWN = "Something went wrong; the server's terminal says what."
# While a photograph waits for the device.
_CHECK_EVERY = 0.5
# Photographs that are made ready to be shown at a time; each is held in memory.
_PREVIEWS = 2
# Each size that is computed has its own compiled programs; what they take is given back after so many.
_MOST_SHAPES = 16
# Browsers round whole numbers beyond it.
LARGEST_WHOLE = 2**53
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


class SeenShapes:
    """Which shapes the device's programs are compiled for.

    Args:
      most: before one more than these, all programs are dropped: JAX keeps them for ever, and cannot drop a few.
    """

    def __init__(self, most: int = _MOST_SHAPES):
        self.most = most
        self._known: set[tuple] = set()

    def enter(self, shape: tuple) -> bool:
        """Notes that a shape, of whatever kind, is about to be computed; returns whether it is new."""
        if shape in self._known:
            return False
        if len(self._known) >= self.most:
            jax.clear_caches()
            self._known.clear()
        self._known.add(shape)
        return True


def upscale_photo(
    upscaler: Engine,
    options: UpscaleOptions,
    format: str,
    source: Path,
    output: Path,
    progress: Progress | None = None,
    shapes: SeenShapes | None = None,
) -> Result:
    """Upscales one file into the folder `output`.

    Args:
      upscaler: from `load`, with any settings.
      options: those of `load`; scale, colours, tile size and seed may differ, within `check` and `check_tile`.
      format: of the result, one of `images.FORMATS`.
      progress: see `Engine.with_settings`; "compile" precedes its stages where a size is new, "write" follows them.
      shapes: those computed so far; without them nothing is forgotten and every size passes for known.

    Raises:
      UserError: the photograph cannot be read, computed or written; named without its folder.
    """
    started = time.monotonic()
    settings = options.settings(upscaler.devices[0].platform)
    files = batch_run.FileOptions(options.align_method, format, options.seed, options.max_pixels)
    target = output / f"{source.stem}_x{options.upscale:g}.{format}"
    lines: list[str] = []
    report = batch_run.Report(lines.append)
    devices = len(upscaler.devices)
    groups = batch_run.plan_groups([batch_run.Job(source, target)], settings, devices, files, report)
    if shapes and groups and shapes.enter((groups[0].bucket, settings.latent_tile)) and progress:
        progress("compile", 0, 1)
    batch_run.upscale(upscaler.with_settings(settings, progress), groups, files, report)
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
    summary = f"{source.name}: {_pixels(photo.rgb.shape)} → {_pixels(size)} pixels in {seconds:.1f} s."
    summary += " Left: the photo, enlarged bicubically; right: the result."
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


@dataclasses.dataclass
class Choice:
    """The photograph that a visitor has chosen; one object for each visit.

    Attributes:
      made: whether the page has told of a choice at all; programs that call the API do not.
      path: the file, None after it was removed.
    """

    made: bool = False
    path: str | None = None

    def check(self, path: str) -> None:
        """Refuses to go on with a photograph that has been exchanged for another one since."""
        if self.made and self.path != path:
            raise UserError("Another photo was chosen meanwhile.")


class _Bar:
    """What stands on the page while a photograph is computed; see `Progress`.

    Args:
      show: Gradio's, called with a fraction and words.
      check: called at every step; may raise.
    """

    def __init__(self, show: gr.Progress, check: Callable[[], object]):
        self.show, self.check, self.compiles = show, check, False

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.check()
        if stage == "compile":
            self.compiles = True
            return
        start, end, words = _STAGES[stage]
        words = words.format(min(done + 1, total), total)
        if self.compiles and done == 0 and stage != "write":
            words += ", compiling for this size"
        self.show(start + (end - start) * done / total, desc=words)


class Handlers:
    """What the page's events do.

    Args:
      upscaler, options: the networks, and the flags that the page starts from.
      root: the private folder.
    """

    def __init__(self, upscaler: Engine, options: UpscaleOptions, root: Path):
        self.upscaler, self.options, self.root = upscaler, options, root
        self.shapes = SeenShapes()
        # A cancelled photograph leaves Gradio's queue at once, but the device only at its next step.
        self._device = threading.Lock()
        self._previews = threading.Semaphore(_PREVIEWS)

    def choose(self, source: str | None, choice: Choice) -> tuple:
        """A new photograph, or none: empties slider, file, summary and the words about the photograph."""
        choice.made, choice.path = True, source
        return None, None, "", ""

    def show(self, source: str | None, choice: Choice) -> tuple:
        """The photograph on both sides of the slider, and its name and size, or why it cannot be used, in words.

        Nothing is raised: outside the queue an error would be a failed request to the browser.
        """
        if source is None:
            return None, ""
        pair, words = None, ""
        try:
            with self._previews:
                choice.check(source)
                photo = _read(Path(source), self.options.max_pixels)
                path = self._new_folder() / "photo.webp"
                write_preview(path, photo, photo.rgb.shape[:2])
            pair, words = (str(path), str(path)), f"{Path(source).name}: {_pixels(photo.rgb.shape)} pixels."
        except UserError as error:
            words = str(error)
        except Exception:
            traceback.print_exc()
            words = _UNKNOWN
        if choice.made and choice.path != source:
            return gr.skip(), gr.skip()
        return pair, _html(words)

    def upscale(
        self,
        photo: str | None,
        scale: object,
        colours: object,
        tile: object,
        seed: object,
        format: object,
        choice: Choice,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> tuple:
        """Upscales a photograph; returns the slider's two pictures, the result's file and its sizes in words.

        The settings come as they were sent, of any type.
        """
        with _told():
            if photo is None:
                raise UserError("Choose a photo first.")
            _check_choice("Format", format, FORMATS)
            options = self._options(upscale=scale, align_method=colours, latent_tiled_size=tile, seed=seed)
            result = self._upscale(options, format, photo, choice, progress)
        for note in result.notes:
            gr.Info(html.escape(note, quote=False), duration=_MESSAGE_SECONDS)
        return (str(result.before), str(result.after)), str(result.file), _html(result.summary)

    def _upscale(
        self, options: UpscaleOptions, format: str, photo: str, choice: Choice, progress: gr.Progress
    ) -> Result:
        """`upscale_photo`, when its turn has come, and while the photograph is the one that is wanted."""

        def check() -> None:
            choice.check(photo)

        progress(0, desc="Waiting")
        with self._turn(check):
            progress(0, desc="Reading")
            bar, output = _Bar(progress, check), self._new_folder()
            result = upscale_photo(self.upscaler, options, format, Path(photo), output, bar, self.shapes)
            check()
        return result

    @contextlib.contextmanager
    def _turn(self, check: Callable[[], object]) -> Iterator[None]:
        """Holds the device; `check` may raise meanwhile, so that nobody's thread waits for what is given up."""
        while not self._device.acquire(timeout=_CHECK_EVERY):
            check()
        try:
            check()
            yield
        finally:
            self._device.release()

    def _options(self, **values: object) -> UpscaleOptions:
        """The flags with the page's values in their place.

        Raises:
          UserError: a value is of another type than the flag, or out of its range; named by the page's label.
        """
        values["upscale"] = _number("Scale", values["upscale"])
        for name in ("latent_tiled_size", "seed"):
            values[name] = _whole(_LABELS[name], values[name])
        _check_choice("Colours", values["align_method"], get_args(color.AlignMethod))
        tile, overlap = values["latent_tiled_size"], self.options.latent_tiled_overlap
        if tile <= overlap:
            raise UserError(f"Tile size {tile}: expected larger than {overlap}, by which tiles overlap")
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


def _number(label: str, value: object) -> float:
    """What was sent for a number, which may be anything that JSON holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{label}: enter a number")
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _whole(label: str, value: object) -> int:
    """The same for a whole number."""
    number = _number(label, value)
    if not number.is_integer():  # NaN and infinities are none
        raise UserError(f"{label} {number:g}: expected a whole number")
    if abs(value) > LARGEST_WHOLE:
        raise UserError(f"{label} {number:g}: expected at most 2**53, up or down; browsers round beyond it")
    return int(value)


def _check_choice(label: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{label}: expected one of {', '.join(choices)}")


def _html(words: str) -> str:
    """Words, of which a file's name may be any, as the page's HTML."""
    return html.escape(printable(words), quote=False)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns errors into a message on the page; those that are no user's mistake keep their traceback in the terminal."""
    try:
        yield
    except UserError as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, duration=_MESSAGE_SECONDS, print_exception=False) from None
    except Exception as error:
        raise gr.Error(_UNKNOWN) from error


def build(upscaler: Engine, options: UpscaleOptions, root: Path, max_waiting: int) -> gr.Blocks:
    """The page, not yet served.

    Args:
      upscaler, options, root: see `Handlers`.
      max_waiting: requests that may wait, one being computed at a time.
    """
    handlers = Handlers(upscaler, options, root)
    page = gr.Blocks(title="TSD-SR", analytics_enabled=False, delete_cache=(_SWEEP_EVERY, _KEEP))
    with page:
        gr.Markdown(_HEAD)
        choice = gr.State(Choice())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo, about, settings = _controls(options)
                button = gr.Button("Upscale", variant="primary", elem_id="upscale")
            with gr.Column(scale=3, min_width=340):
                outputs = _results()
        click = button.click(
            handlers.upscale,
            [photo, *settings, choice],
            outputs,
            scroll_to_output=True,
            show_progress_on=outputs[0],
            api_name="upscale",
        )
        _show_choices(handlers, photo, choice, click, [*outputs, about])
    return page.queue(max_size=max_waiting, default_concurrency_limit=1)


def _show_choices(
    handlers: Handlers,
    photo: gr.File,
    choice: gr.State,
    click: gr.events.Dependency,
    outputs: list[gr.components.Component],
) -> None:
    """Has a new photograph shown at once, and what was to become of the last one cancelled.

    Outside the queue: that may be full of photographs to compute.

    Args:
      outputs: slider, file, summary and the words about the photograph.
    """
    chosen = photo.change(
        handlers.choose,
        [photo, choice],
        outputs,
        queue=False,
        show_progress="hidden",
        cancels=[click],
        trigger_mode="always_last",
        api_visibility="private",
    )
    chosen.then(
        handlers.show,
        [photo, choice],
        [outputs[0], outputs[-1]],
        queue=False,
        show_progress_on=outputs[0],
        trigger_mode="multiple",
        api_visibility="private",
    )


def _raw(component: gr.components.Component) -> gr.components.Component:
    """Hands on what the browser or an API caller sent: `Handlers` checks it, with messages that name the field, where
    Gradio would round or stumble. Not by a subclass: Gradio writes a .pyi file beside the source of each.
    """
    component.preprocess = lambda payload: payload
    return component


def _controls(options: UpscaleOptions) -> tuple[gr.File, gr.HTML, list[gr.components.Component]]:
    """The photograph, words about it, and the settings in the order of `Handlers.upscale`."""
    # A plain file: Gradio's image component would drop the profile, the EXIF and all but 8 bits.
    # Of any name: what it holds is looked at, and a photograph may lack a suffix.
    photo = gr.File(label="Photo", height=140, elem_id="photo")
    about = gr.HTML(elem_id="about")
    with gr.Row():
        scale = _raw(gr.Number(options.upscale, label="Scale", step=0.5, min_width=120, elem_id="scale"))
        format = _raw(
            gr.Dropdown(list(FORMATS), value="png", label="Format", min_width=120, elem_id="format")
        )
    with gr.Accordion("More settings", open=False):
        colours = _raw(
            gr.Dropdown(
                list(get_args(color.AlignMethod)),
                value=options.align_method,
                label="Colours",
                info="From the photo its low frequencies (wavelet), its mean and contrast (adain), or neither.",
                elem_id="colours",
            )
        )
        seed = _raw(
            gr.Number(options.seed, label="Seed", info="Another seed gives other details.", elem_id="seed")
        )
        tile = _raw(
            gr.Number(
                options.latent_tiled_size,
                step=8,
                label="Tile size",
                info="One is 8 pixels of the result. Smaller tiles need less memory, larger ones see more at once.",
                elem_id="tile",
            )
        )
    return photo, about, [scale, colours, tile, seed, format]


def _results() -> list[gr.components.Component]:
    """Slider, file and words, in the order that `Handlers` returns them."""
    slider = gr.ImageSlider(
        type="filepath",
        interactive=False,
        label="Preview",
        buttons=["fullscreen"],
        max_height=560,
        elem_id="result",
    )
    words = gr.HTML(elem_id="summary")
    file = gr.File(label="Result, full size and quality", interactive=False, height=100, elem_id="file")
    return [slider, file, words]


def serve(page: gr.Blocks, host: str, port: int, max_upload: int) -> None:
    """Starts the server in a thread.

    Args:
      max_upload: megabytes.

    Raises:
      UserError: the port is taken.
    """
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost")))
    try:
        page.launch(
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
