"""One photograph for the page: its result as the file that infer/upscale.py would write, and previews for the browser."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import jax
from PIL import Image

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.files import Photo, decode_photo, read_photo
from tsdsr_jax.images.metadata import Metadata
from tsdsr_jax.images.pixels import decoded_pixels
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.images.writing import check_format, encode_photo, left_behind, write_photo
from tsdsr_jax.upscaling.engine import Progress
from tsdsr_jax.upscaling.limits import MemoryBudget, too_large_on_page
from tsdsr_jax.upscaling.targets import Naming
from tsdsr_jax.upscaling.upscaler import PictureArguments, UpscaleError, Upscaler

# The browser gets smaller copies of larger pictures; a phone could not hold the originals.
PREVIEW_PIXELS, PREVIEW_SIDE = 8_000_000, 8192
# Browsers round larger whole numbers.
LARGEST_WHOLE = 2**53
# Compiled programs take memory. They are dropped after this many sizes.
_MOST_SHAPES = 16


@dataclasses.dataclass(frozen=True)
class PageResult:
    """The outcome for one photograph.

    Attributes:
      file: the result, as infer/upscale.py writes it.
      before, after: previews of the photograph and the result, of the same size.
      summary: sizes and time, in words.
      notes: remarks that infer/upscale.py would have printed.
    """

    file: Path
    before: Path
    after: Path
    summary: str
    notes: list[str]


class SeenShapes:
    """Remembers which shapes (padded size, tile) have compiled programs.

    Args:
      most: the most shapes to keep. Before one more is added, all programs are dropped: JAX keeps them forever and cannot
        drop single ones.
    """

    def __init__(self, most: int = _MOST_SHAPES):
        self.most = most
        self._known: set[tuple[Size, int]] = set()

    def enter(self, shape: tuple[Size, int]) -> bool:
        """Notes that a shape is about to be computed; returns whether it is new."""
        if shape in self._known:
            return False
        if len(self._known) >= self.most:
            jax.clear_caches()
            self._known.clear()
        self._known.add(shape)
        return True


def upscale_photo(
    upscaler: Upscaler,
    arguments: PictureArguments,
    format: str,
    source: Path,
    output: Path,
    progress: Progress,
    shapes: SeenShapes,
) -> PageResult:
    """Upscales one file; writes the result and previews into the folder `output`.

    Args:
      arguments: for the upscaler.
      format: of the result, one of `FORMATS`.
      progress: called as `Upscaler.__call__` calls `on_stage`. The stage "start" comes first, with the number of pixels,
        then "compile" if a size is new, and "write" last.
      shapes: those that have compiled programs.

    Raises:
      UserError: the photograph cannot be read, computed or written. The message names it without its folder.
    """
    started = time.monotonic()
    settings, max_pixels = upscaler.settings(**arguments), upscaler.options.max_pixels
    photo = read_for_page(source, max_pixels)
    height, width = photo.rgb.shape[:2]
    plan = settings.plan((height, width))
    if settings.refuses(plan):
        budget = MemoryBudget.of(upscaler.options, upscaler.engine.devices)
        raise UserError(too_large_on_page(source.name, plan, settings, budget))
    check_format(source.name, format, *plan.output)

    progress("start", 0, plan.padded[0] * plan.padded[1])

    def on_stage(stage: str, done: int, total: int) -> None:
        if stage == "encode" and shapes.enter((plan.lying, settings.latent_tile)):
            progress("compile", 0, 1)
        progress(stage, done, total)

    notes: list[str] = []
    try:
        image = upscaler(source, **arguments, on_stage=on_stage, on_note=notes.append)
    except UpscaleError as error:
        raise UserError(_for_page(str(error), source)) from None
    seconds = time.monotonic() - started
    progress("write", 0, 1)

    naming = Naming(format, settings.upscale, upscaler.options_with(**arguments).made_with())
    target = output / naming.name(source)
    result = _write_result(target, image, photo, naming, notes)
    before, after = output / "photo.webp", output / "result.webp"
    write_preview(before, photo, plan.output)
    write_preview(after, result, plan.output)
    return PageResult(
        target,
        before,
        after,
        _summary(source.name, photo, plan.output, seconds),
        [_for_page(note, source) for note in notes],
    )


def _write_result(target: Path, image: Image.Image, like: Photo, naming: Naming, notes: list[str]) -> Photo:
    """Writes the upscaler's image as infer/upscale.py would; returns what the file holds."""
    pixels = image.width * image.height
    rgb, alpha, _ = decoded_pixels(image, "", target.name)
    encoded = encode_photo(rgb, like, alpha, naming.format, target.name, naming.made_with)
    with replacing(target) as temporary:
        temporary.write_bytes(encoded)
    if remark := left_behind(target.name, like, alpha, naming.format):
        notes.append(remark)
    return decode_photo(encoded, target.name, pixels)


def _summary(name: str, photo: Photo, size: Size, seconds: float) -> str:
    summary = f"{name}: {in_words(photo.rgb.shape)} → {in_words(size)} pixels in {seconds:.1f} s."
    summary += " Left: the photo, enlarged bicubically; right: the result."
    if preview_size(size) != size:
        summary += f" Shown at {in_words(preview_size(size))}; the file below has all pixels."
    return summary


def read_for_page(path: Path, max_pixels: int) -> Photo:
    """Reads a photograph; a UserError names it without its folder."""
    try:
        return read_photo(path, max_pixels)
    except UserError as error:
        raise UserError(_for_page(str(error), path)) from None


def _for_page(message: str, path: Path) -> str:
    """Rewrites a message: the file's name instead of its path, and nothing that only the server's owner can do."""
    return message.replace(str(path), path.name).replace(
        "make it smaller or raise the limit", "make it smaller"
    )


def in_words(size: tuple[int, ...]) -> str:
    """(height, width, ...) as width×height."""
    return f"{size[1]}×{size[0]}"


def preview_size(size: Size) -> Size:
    """The (height, width) of a picture's preview: the same, or the largest size that browsers handle well."""
    scale = min(1, (PREVIEW_PIXELS / (size[0] * size[1])) ** 0.5, PREVIEW_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def write_preview(path: Path, photo: Photo, size: Size) -> None:
    """Writes a lossless preview of a photograph: resized bicubically to `size`, or to the preview of that size.

    It has no metadata, which may tell where a photograph was taken, except what its colors mean.
    """
    size = preview_size(size)
    like = dataclasses.replace(photo, metadata=Metadata(icc=photo.metadata.icc))
    alpha = None if photo.alpha is None else pillow_bicubic(photo.alpha, *size)
    write_photo(path, pillow_bicubic(photo.rgb, *size), like, alpha, "webp")
