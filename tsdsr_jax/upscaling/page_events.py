"""What the page does when a visitor chooses a photograph or asks for its result."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import math
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from tsdsr_jax.errors import UserError, printable
from tsdsr_jax.images.color import AlignMethod
from tsdsr_jax.images.writing import FORMATS
from tsdsr_jax.upscaling.page_pictures import (
    LARGEST_WHOLE,
    PageResult,
    SeenShapes,
    in_words,
    read_for_page,
    upscale_photo,
    write_preview,
)
from tsdsr_jax.upscaling.page_progress import ProgressBar, StageTimes
from tsdsr_jax.upscaling.upscaler import PictureArguments, UpscaleError, Upscaler

_UNKNOWN = "Something went wrong; the server's terminal shows the error."
# Seconds between two looks at whether a photograph that waits for the device is still wanted.
_CHECK_EVERY = 0.5
# Photographs that are prepared for display at a time; each is held in memory.
_PREVIEWS = 2
# What messages call an argument -> what the page calls it.
_LABELS = {"scale": "Scale", "tile": "Tile size", "seed": "Seed"}


@dataclasses.dataclass
class Choice:
    """The photograph that a visitor has chosen; each visit has its own object.

    Attributes:
      made: whether the page has reported a choice at all; programs that call the API do not.
      path: the file; None after it was removed.
      run: what stands for the request that is being computed; None after it was canceled.
    """

    made: bool = False
    path: str | None = None
    run: object | None = None

    def check(self, path: str) -> None:
        """Raises UserError if another photograph has been chosen since."""
        if self.made and self.path != path:
            raise UserError("Another photo was chosen meanwhile.")

    def check_run(self, run: object) -> None:
        """Raises UserError if the request that `run` stands for has been canceled."""
        if self.made and self.run is not run:
            raise UserError("Canceled.")


class Handlers:
    """The page's events.

    Args:
      upscaler: the model.
      root: the private folder.
    """

    def __init__(self, upscaler: Upscaler, root: Path):
        self.upscaler, self.root = upscaler, root
        self.shapes, self.times = SeenShapes(), StageTimes()
        # A canceled photograph leaves Gradio's queue at once, but the device only at its next step.
        self.device = threading.Lock()
        self._previews = threading.Semaphore(_PREVIEWS)

    def choose(self, source: str | None, choice: Choice) -> tuple[None, None, str, str]:
        """Handles a new photograph, or its removal: empties slider, file, summary and the photograph's description."""
        choice.made, choice.path = True, source
        return None, None, "", ""

    def show(self, source: str | None, choice: Choice) -> tuple[Any, Any]:
        """Returns the photograph for both sides of the slider, and its name and size, or the reason why it cannot be used.

        It raises nothing: outside the queue, the browser would see a failed request.
        """
        if source is None:
            return None, ""
        pair, words = None, ""
        try:
            with self._previews:
                choice.check(source)
                photo = read_for_page(Path(source), self.upscaler.options.max_pixels)
                path = self._new_folder() / "photo.webp"
                height, width = photo.rgb.shape[:2]
                # As large as the result of the first settings, so that the picture stays when the result comes.
                scale = self.upscaler.options.upscale
                write_preview(path, photo, (round(height * scale), round(width * scale)))
            pair, words = (str(path), str(path)), f"{Path(source).name}: {in_words((height, width))} pixels."
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
        colors: object,
        tile: object,
        seed: object,
        format: object,
        choice: Choice,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio finds it)
    ) -> tuple[tuple[str, str], str, str]:
        """Upscales a photograph; returns the slider's two pictures, the result's file, and its sizes in words.

        The settings come as they were sent, of any type.
        """
        with _told():
            if photo is None:
                raise UserError("Choose a photo first.")
            arguments = self._arguments(scale, colors, tile, seed)
            result = self._upscale(arguments, _choice("Format", format, FORMATS), photo, choice, progress)
        words = " ".join([result.summary, *(f"{note}." for note in result.notes)])
        return (str(result.before), str(result.after)), str(result.file), _html(words)

    def upscale_on_page(self, *request: Any, progress: gr.Progress = gr.Progress()) -> tuple[Any, Any, str]:  # noqa: B008
        """`upscale` for the page: if there is no result, the summary says why, until the next outcome."""
        upscale: Callable[..., tuple[Any, Any, str]] = self.upscale
        try:
            return upscale(*request, progress)
        except gr.Error as error:
            if error.__cause__ is not None:  # a bug
                traceback.print_exception(error.__cause__)
            return gr.skip(), gr.skip(), f'<span role="alert">{error.message}</span>'

    def cancel(self, choice: Choice) -> Any:
        """Ends the work on a photograph at the device's next step; returns the new summary."""
        canceled, choice.run = choice.run is not None, None
        return "Canceled." if canceled else gr.skip()

    def _upscale(
        self, arguments: PictureArguments, format: str, photo: str, choice: Choice, progress: gr.Progress
    ) -> PageResult:
        """Upscales a photograph when its turn comes, unless another one has been chosen since."""

        choice.run = run = object()

        def check() -> None:
            choice.check(photo)
            choice.check_run(run)

        progress(0, desc="Waiting")
        with self._turn(check):
            progress(0, desc="Reading")
            with ProgressBar(progress, check, self.times) as bar:
                result = upscale_photo(
                    self.upscaler, arguments, format, Path(photo), self._new_folder(), bar, self.shapes
                )
            check()
        choice.run = None
        return result

    @contextlib.contextmanager
    def _turn(self, check: Callable[[], object]) -> Iterator[None]:
        """Waits for the device and holds it. `check` may raise while waiting, so that no thread waits for an abandoned
        request."""
        while not self.device.acquire(timeout=_CHECK_EVERY):
            check()
        try:
            check()
            yield
        finally:
            self.device.release()

    def _arguments(self, scale: object, colors: object, tile: object, seed: object) -> PictureArguments:
        """Converts what was sent to the upscaler's arguments.

        Raises:
          UserError: a value is of the wrong type or out of range. The message names it by the page's label.
        """
        arguments = PictureArguments(
            scale=_number("Scale", scale),
            color=_choice("Colors", colors, get_args(AlignMethod)),
            tile=_whole("Tile size", tile),
            seed=_whole("Seed", seed),
            latent=self.upscaler.options.latent,
        )
        try:
            self.upscaler.settings(**arguments)
        except UpscaleError as error:
            raise UserError(re.sub(r"^\w+", lambda name: _LABELS[name[0]], str(error))) from None
        return arguments

    def _new_folder(self) -> Path:
        """Makes a folder with a name that nobody can guess, because Gradio serves any file below the root to whoever
        asks."""
        path = self.root / secrets.token_hex(16)
        path.mkdir()
        return path


def _number(label: str, value: object) -> float:
    """Reads a number from what was sent, which may be any JSON value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{label}: enter a number")
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return math.inf


def _whole(label: str, value: object) -> int:
    """Reads a whole number, like `_number`."""
    number = _number(label, value)
    if not number.is_integer():  # NaN and infinities are none
        raise UserError(f"{label} {number:g}: expected a whole number")
    assert isinstance(value, int | float)
    if abs(value) > LARGEST_WHOLE:
        raise UserError(f"{label} {number:g}: expected -2**53 to 2**53; browsers round larger numbers")
    return int(value)


def _choice(label: str, value: object, choices: Collection[str]) -> Any:
    """Reads one of several words from what was sent."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{label}: expected one of {', '.join(choices)}")
    return value


def _html(words: str) -> str:
    """Escapes text for HTML; it may contain a file's name, which may be anything."""
    return html.escape(printable(words), quote=False)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Turns errors into Gradio's, with a message that visitors may see. Bugs keep their traceback in the terminal."""
    try:
        yield
    except UserError as error:
        message = html.escape(str(error), quote=False)
        raise gr.Error(message, print_exception=False) from None
    except Exception as error:
        raise gr.Error(_UNKNOWN) from error
