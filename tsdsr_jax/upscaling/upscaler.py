"""Upscaling from Python: `Upscaler.from_pretrained()`, called with pictures.

Pictures are processed as in infer/upscale.py, but in memory instead of in files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import numpy as np
from PIL import Image

from tsdsr_jax.devices import DTYPES, select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.color import AlignMethod
from tsdsr_jax.images.files import Photo, decode_photo, photo_of, read_content
from tsdsr_jax.images.writing import as_image
from tsdsr_jax.models.eight_bits import EightBits
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.engine import Engine, Progress
from tsdsr_jax.upscaling.jobs import Report
from tsdsr_jax.upscaling.limits import MemoryBudget, too_large
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import (
    UpscaleOptions,
    check_tile,
    check_upscale_options,
    complete_options,
    default_overlap,
    filled_in,
    several_on,
)
from tsdsr_jax.upscaling.planning import Settings, plan_groups

Picture = Image.Image | np.ndarray | str | Path
"""A PIL image, an array (H, W, 3) of uint8 in RGB, or the path of an image file."""
Latent = Literal["sample", "mode"]

_LOG = logging.getLogger("tsdsr_jax")
# What messages call flags -> the arguments here.
_ARGUMENTS = {
    "--pretrained_model_name_or_path": "model",
    "--lora_dir": "lora",
    "--lora_scale": "lora_scale",
    "--embedding_dir": "prompt",
    "--device": "device",
    "--mixed_precision": "dtype",
    "--revision": "revision",
    "--upscale": "scale",
    "--align_method": "color",
    "--seed": "seed",
    "--latent_tiled_size": "tile",
    "--max_pixels": "max_pixels",
    # There are no arguments for these.
    "--is_use_tile (with a smaller --vae_decoder_tiled_size) or a smaller --tile_batch_size lowers the peak": (
        "a smaller scale needs less"
    ),
}


class UpscaleError(ValueError):
    """An argument or a picture that cannot be used. The message names it and says what was expected."""


class PictureArguments(TypedDict, total=False):
    """The arguments of `Upscaler.__call__` that the result depends on; see there."""

    scale: float
    color: AlignMethod
    seed: int
    latent: Latent
    tile: int | None


class CallArguments(PictureArguments, total=False):
    """All arguments of `Upscaler.__call__` except the pictures."""

    progress: Callable[[int, int], object] | None
    on_stage: Progress | None
    on_note: Callable[[str], object] | None


class Upscaler:
    """A super-resolution model on its devices. Load it with `from_pretrained`, and call it with pictures.

    >>> upscale = Upscaler.from_pretrained()
    >>> large = upscale(Image.open("photo.jpg"))                    # one picture in, one out
    >>> arrays = upscale([array, other], scale=2, color="adain")    # several are computed in batches

    Attributes:
      engine: the networks and their compiled programs.
      options: what they were loaded with.
    """

    def __init__(self, engine: Engine, options: UpscaleOptions):
        self.engine, self.options = engine, options

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        lora: str | Path | None = None,
        prompt: str | Path | None = None,
        lora_scale: float = 1.0,
        device: str | None = None,
        dtype: Literal["fp16", "bf16", "fp32"] | None = None,
        weights: Literal["full", "int8", "fp8"] = "full",
        max_pixels: int = 100_000_000,
        revision: str | None = None,
        variant: str | None = None,
    ) -> Upscaler:
        """Loads a model.

        Args:
          model: SD3: a diffusers folder, a hub id, or a folder written by convert/sd3.py. Default: the small bundled model.
          lora: folder with TSD-SR's transformer.safetensors and vae.safetensors; "none" for no LoRA. Default:
            checkpoint/tsdsr; for the bundled model, its own.
          prompt: folder with the prompt's embedding. Default: dataset/default; for the bundled model, its own.
          lora_scale: factor on the LoRAs; below 1 the result stays closer to plain SD3.
          device: "cuda", "cuda:N", "cpu" or "tpu". Default: all devices of the best kind.
          dtype: precision of the computation. Default: "fp16" on a GPU, "bf16" on a TPU, "fp32" on a CPU.
          weights: "int8" and "fp8" keep the transformer's blocks in eight bits, to fit small GPUs; "fp8" also computes in
            them on GPUs that can, which is faster and less accurate.
          max_pixels: pictures with more pixels, before or after upscaling, are refused.
          revision: branch, tag or commit of a hub id.
          variant: variant of the weight files to read, such as "fp16".

        Raises:
          ValueError: an argument is wrong, or files are missing or do not fit. The message names which.
        """
        with _in_arguments():
            _check_number("lora_scale", lora_scale)
            _check_choice("dtype", dtype, (None, *DTYPES))
            _check_choice("weights", weights, ("full", *get_args(EightBits)))
            for argument, value in (("device", device), ("revision", revision), ("variant", variant)):
                _path(argument, value)
            given = UpscaleOptions(
                pretrained_model_name_or_path=_path("model", model),
                lora_dir=_path("lora", lora),
                embedding_dir=None if prompt is None else Path(_path("prompt", prompt) or ""),
                rank=None,
                rank_vae=None,
                lora_scale=lora_scale,
                device=device,
                mixed_precision=dtype,
                weights=weights,
                max_pixels=_whole("max_pixels", max_pixels),
                revision=revision,
                variant=variant,
            )
            options = complete_options(given, say=_LOG.info)
            check_upscale_options(options)
            engine = load_engine(options, select_devices(device), say=_LOG.info)
        return cls(engine, options)

    @overload
    def __call__(
        self, pictures: Image.Image | str | Path, **arguments: Unpack[CallArguments]
    ) -> Image.Image: ...
    @overload
    def __call__(self, pictures: np.ndarray, **arguments: Unpack[CallArguments]) -> np.ndarray: ...
    @overload
    def __call__(
        self, pictures: list[Any] | tuple[Any, ...], **arguments: Unpack[CallArguments]
    ) -> list[Any]: ...

    def __call__(
        self,
        pictures: Picture | list[Any] | tuple[Any, ...],
        *,
        scale: float = 4.0,
        color: AlignMethod = "wavelet",
        seed: int = 42,
        latent: Latent = "sample",
        tile: int | None = None,
        progress: Callable[[int, int], object] | None = None,
        on_stage: Progress | None = None,
        on_note: Callable[[str], object] | None = None,
    ) -> Image.Image | np.ndarray | list[Any]:
        """Upscales one picture, or several in batches.

        Args:
          pictures: a PIL image, an array (H, W, 3) of uint8 in RGB, or an image file's path; or a list or tuple of them.
          scale: factor by which both sides are enlarged, 1 to 64.
          color: color correction: take the low frequencies ("wavelet") or the mean and contrast ("adain") from the picture;
            "nofix": no correction.
          seed: seed of the latent noise, which depends only on the seed and the picture.
          latent: draw the latent from the encoder's posterior ("sample"), or take its mean ("mode").
          tile: side of the transformer's tiles, in latent pixels (8 pixels of the result each); even. Default: the model's.
          progress: called with the number of pictures done and their total, from worker threads. An exception that it
            raises ends the call.
          on_stage: called with the stage of a batch ("encode", "tiles", "decode"), the steps done, and their number. The
            device then waits for it. An exception that it raises ends the call.
          on_note: called with remarks, such as that a result is computed again in float32. Default: they are logged.

        Returns:
          A PIL image for an image or a path, with its transparency and color profile; an array (H, W, 3) of uint8 for an
          array; a list for a list or tuple. The result of a file has the same pixels that infer/upscale.py writes.

        Raises:
          ValueError: an argument is wrong, or a picture cannot be read or upscaled. The message names them all.
        """
        settings = self.settings(scale=scale, color=color, seed=seed, latent=latent, tile=tile)
        several = isinstance(pictures, list | tuple)
        given = pictures if isinstance(pictures, list | tuple) else [pictures]
        if not given:
            raise UpscaleError("pictures: is empty; expected at least one picture")
        report = Report(on_note or _LOG.info)
        with _in_arguments():
            jobs = [
                _memory_job(picture, f"pictures[{index}]" if several else "pictures", settings.max_pixels)
                for index, picture in enumerate(given)
            ]
            if progress:
                report.on_done = lambda: progress(report.written + len(report.failures), len(jobs))
            explain = partial(too_large, budget=MemoryBudget.of(self.options, self.engine.devices))
            groups = plan_groups(jobs, settings, len(self.engine.devices), report, explain=explain)
            upscale_groups(self.engine, groups, settings, report, progress=on_stage)
            if report.failures:
                raise UserError("\n".join(report.failures))
        results = [job.result for job in jobs if job.result is not None]
        return results if several else results[0]

    def settings(self, **arguments: Unpack[PictureArguments]) -> Settings:
        """Checks the arguments of a call; returns the settings that they make.

        Raises:
          ValueError: an argument is of a wrong type or out of range.
        """
        platform = self.engine.devices[0].platform
        settings = self.options_with(**arguments).settings(platform)
        return dataclasses.replace(settings, photo_batch=several_on(platform))

    def options_with(
        self,
        *,
        scale: float = 4.0,
        color: AlignMethod = "wavelet",
        seed: int = 42,
        latent: Latent = "sample",
        tile: int | None = None,
    ) -> UpscaleOptions:
        """The options with which infer/upscale.py would do what a call with these arguments does; see `settings`."""
        with _in_arguments():
            _check_number("scale", scale)
            if not 1 <= scale <= 64:
                text = f"{scale:g}" if isinstance(scale, float) else str(scale)
                raise UserError(f"scale {text}: expected 1 to 64")
            _check_choice("color", color, get_args(AlignMethod))
            _check_choice("latent", latent, get_args(Latent))
            overlap = filled_in(self.options.latent_tiled_overlap)
            loaded = filled_in(self.options.latent_tiled_size)
            tile = loaded if tile is None else _whole("tile", tile)
            if overlap == default_overlap(loaded):  # nobody asked for another: it follows the tile
                overlap = default_overlap(tile)
            if tile <= overlap:
                raise UserError(f"tile {tile}: expected more than {overlap}, the overlap of tiles")
            options = dataclasses.replace(
                self.options,
                upscale=float(scale),
                align_method=color,
                seed=_whole("seed", seed),
                latent=latent,
                latent_tiled_size=tile,
                latent_tiled_overlap=overlap,
            )
            check_upscale_options(options)
            check_tile(tile, self.engine.largest_tile)
        return options


@dataclasses.dataclass(eq=False)
class MemoryJob:
    """A picture that has been read, and its result; see `jobs.Job`.

    Attributes:
      source: what messages call it.
      content: what its noise depends on.
      photo: the picture.
      as_array: whether the result is an array, not an image.
      result: None until it is delivered.
    """

    source: Path
    content: bytes
    photo: Photo
    as_array: bool
    result: Image.Image | np.ndarray | None = None

    def size(self, max_pixels: int) -> Size:
        height, width = self.photo.rgb.shape[:2]
        return height, width

    def check_output(self, size: Size) -> None:
        """Accepts any size."""

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        return self.content, self.photo

    def is_finished(self) -> bool:
        return self.result is not None

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None) -> None:
        if self.as_array:
            self.result = rgb
            return
        image = as_image(rgb, photo, alpha)
        if photo.metadata.icc:
            image.info["icc_profile"] = photo.metadata.icc  # `save` writes it
        self.result = image


def _memory_job(picture: Any, name: str, max_pixels: int) -> MemoryJob:
    if isinstance(picture, str | Path):
        path = Path(os.path.expanduser(_path(name, picture) or ""))
        content = read_content(path)
        return MemoryJob(path, content, decode_photo(content, str(path), max_pixels), as_array=False)
    if isinstance(picture, Image.Image):
        photo = photo_of(picture, name, max_pixels)
        return MemoryJob(Path(name), _content(picture, photo), photo, as_array=False)
    if not isinstance(picture, np.ndarray):
        raise UserError(f"{name}: is a {type(picture).__name__}; expected a PIL image, an array or a path")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise UserError(f"{name}: is {picture.dtype} {picture.shape}; expected uint8 (H, W, 3)")
    height, width = picture.shape[:2]
    if height * width > max_pixels:
        raise UserError(f"{name}: has {width}×{height} pixels, more than --max_pixels {max_pixels}")
    photo = Photo(picture, alpha=None, gray=False)
    return MemoryJob(Path(name), _pixel_bytes(photo), photo, as_array=True)


def _content(image: Image.Image, photo: Photo) -> bytes:
    """The file's bytes if the image is unchanged since it was opened from a file, for the same noise; otherwise its
    pixels."""
    named = getattr(image, "filename", "")
    file = Path(os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else "")
    if file.is_file():
        with contextlib.suppress(UserError):
            content, pixels = read_content(file), photo.rgb.shape[0] * photo.rgb.shape[1]
            if np.array_equal(decode_photo(content, str(file), pixels).rgb, photo.rgb):
                return content
    return _pixel_bytes(photo)


def _pixel_bytes(photo: Photo) -> bytes:
    return str(photo.rgb.shape).encode() + photo.rgb.tobytes()


def _path(argument: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str | Path):
        raise UserError(f"{argument}: is a {type(value).__name__}; expected a path or a name")
    if "\0" in str(value):
        raise UserError(f"{argument} {str(value)!r}: holds a null character; expected a path or a name")
    return None if value is None else str(value)


def _check_choice(argument: str, value: object, choices: Sequence[object]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise UserError(f"{argument} {value!r}: expected one of {', '.join(map(str, choices))}")


def _check_number(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UserError(f"{argument} {value!r}: expected a number")


def _whole(argument: str, value: object) -> int:
    """A whole number of any kind, NumPy's included, as an int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UserError(f"{argument} {value!r}: expected a whole number")
    return int(value)


@contextlib.contextmanager
def _in_arguments() -> Iterator[None]:
    """Turns a UserError, which names flags, into an UpscaleError that names arguments."""
    try:
        yield
    except UserError as error:
        # A command in the message keeps its flags.
        message, command_follows, command = str(error).partition("Make it with: ")
        for flag, argument in _ARGUMENTS.items():
            message = message.replace(flag, argument)
        raise UpscaleError(message + command_follows + command) from None
