"""Upscaling from Python: `Upscaler.from_pretrained()`, called with pictures.

The same way through the networks as infer/upscale.py's, with pictures in memory in place of files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np
from PIL import Image

from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.color import AlignMethod
from tsdsr_jax.images.files import Photo, photo_of, read_photo
from tsdsr_jax.images.writing import as_image
from tsdsr_jax.upscaling import batch_run
from tsdsr_jax.upscaling.engine import Engine
from tsdsr_jax.upscaling.options import UpscaleOptions, check, completed, load, several_on

Picture = Image.Image | np.ndarray | str | Path
"""A PIL image, (H, W, 3) uint8 in RGB, or an image file's path."""

_LOG = logging.getLogger("tsdsr_jax")
# What messages call flags -> the arguments here.
_ARGUMENTS = {
    "--pretrained_model_name_or_path": "model",
    "--lora_dir": "lora",
    "--lora_scale": "lora_scale",
    "--embedding_dir": "prompt",
    "--device": "device",
    "--mixed_precision": "dtype",
    "--upscale": "scale",
    "--align_method": "color",
    "--seed": "seed",
    "--max_pixels": "max_pixels",
}


class Upscaler:
    """An upscaling model on its devices. Made by `from_pretrained`; calling it upscales pictures.

    Attributes:
      engine: the networks.
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
          model: SD3, as a diffusers folder, a hub id or a folder written by convert/sd3.py. None: the small model that
            comes with this package.
          lora: folder with TSD-SR's transformer.safetensors and vae.safetensors; "none": there are none. Default:
            checkpoint/tsdsr, for the small model "none".
          prompt: folder of the prompt's embeddings. Default: dataset/default, for the small model its own.
          lora_scale: factor on the LoRAs; below 1 stays closer to plain SD3.
          device: "cuda", "cuda:N", "cpu" or "tpu". None: all devices of the best kind.
          dtype: of computation. None: "fp16" on a GPU, "bf16" on a TPU, "fp32" on a CPU.
          weights: keep the transformer's blocks in eight bits, for small GPUs.
          max_pixels: pictures with more pixels, in or out, are refused.
          revision, variant: of a hub id; of weight files, such as "fp16".

        Raises:
          ValueError: an argument is wrong, or files are missing or do not fit; the message names which.
        """
        given = UpscaleOptions(
            pretrained_model_name_or_path=None if model is None else str(model),
            lora_dir=None if lora is None else str(lora),
            embedding_dir=None if prompt is None else Path(prompt),
            rank=None,
            rank_vae=None,
            lora_scale=lora_scale,
            device=device,
            mixed_precision=dtype,
            weights=weights,
            max_pixels=max_pixels,
            revision=revision,
            variant=variant,
        )
        with _in_arguments():
            options = completed(given, say=_LOG.info)
            check(options)
            devices = select_devices(device)
            engine = load(options, options.settings(devices[0].platform), devices, say=_LOG.info)
        return cls(engine, options)

    @overload
    def __call__(self, pictures: Image.Image | str | Path, **settings) -> Image.Image: ...
    @overload
    def __call__(self, pictures: np.ndarray, **settings) -> np.ndarray: ...
    @overload
    def __call__(self, pictures: Sequence[Picture], **settings) -> list[Image.Image | np.ndarray]: ...

    def __call__(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        scale: float = 4.0,
        color: AlignMethod = "wavelet",
        seed: int = 42,
        latent: Literal["sample", "mode"] = "sample",
        progress: Callable[[int, int], object] | None = None,
    ):
        """Upscales a picture, or several together.

        Args:
          pictures: one, or a list or tuple of them.
          scale: output side over input side, 1 to 64.
          color: take low frequencies ("wavelet") or mean and contrast ("adain") from the picture, or neither ("nofix").
          seed: of the latent noise, which depends on it and on the picture, on nothing else.
          latent: draw the latent from the encoder's posterior, or take its mean.
          progress: told of (pictures done, their number), from several threads.

        Returns:
          An image for an image or a path, with its transparency; an array (H, W, 3) uint8 for an array; for several
          a list. A file's picture has the pixels that infer/upscale.py writes for it.

        Raises:
          ValueError: an argument is wrong, or a picture cannot be read or upscaled; all of these are named.
        """
        several = isinstance(pictures, list | tuple)
        works = [_work(picture, number) for number, picture in enumerate(pictures if several else [pictures])]
        options = dataclasses.replace(
            self.options, upscale=scale, align_method=color, seed=seed, latent=latent
        )
        with _in_arguments():
            _check_choice("color", color, ("wavelet", "adain", "nofix"))
            _check_choice("latent", latent, ("sample", "mode"))
            check(options)
            self._run(works, options, progress)
        results = [work.result for work in works]
        return results if several else results[0]

    def _run(
        self,
        works: list[InMemory],
        options: UpscaleOptions,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        platform, devices = self.engine.devices[0].platform, len(self.engine.devices)
        settings = dataclasses.replace(options.settings(platform), photo_batch=several_on(platform))
        report = batch_run.Report(_LOG.info)
        if progress:
            report.on_done = lambda: progress(report.written + len(report.failures), len(works))
        files = batch_run.FileOptions(options.align_method, "png", options.seed, options.max_pixels)
        groups = batch_run.plan_groups(works, settings, devices, files, report)
        batch_run.upscale(self.engine.with_settings(settings), groups, files, report)
        if report.failures:
            raise UserError("\n".join(report.failures))


@dataclasses.dataclass(eq=False)
class InMemory:
    """A picture that has been read, and its result; see `batch_run.Work`.

    Attributes:
      source: what messages call it.
      content: what its noise depends on.
      photo: the picture.
      as_array: give an array, not an image.
      result: when it is there.
    """

    source: Path
    content: bytes
    photo: Photo
    as_array: bool
    result: Image.Image | np.ndarray | None = None

    def size(self, max_pixels: int) -> Size:
        height, width = self.photo.rgb.shape[:2]
        if height * width > max_pixels:
            raise UserError(
                f"{self.source}: has {width}×{height} pixels, more than --max_pixels {max_pixels}"
            )
        return height, width

    def check(self, format: str, output: Size) -> None:
        """Memory holds any size."""

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        return self.content, self.photo

    def is_finished(self) -> bool:
        return self.result is not None

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None, format: str) -> None:
        if self.as_array:
            self.result = rgb
            return
        self.result = as_image(rgb, photo, alpha)
        if photo.icc:
            self.result.info["icc_profile"] = photo.icc  # `save` writes it


def _work(picture: Picture, number: int) -> InMemory:
    name = Path(f"pictures[{number}]")
    with _in_arguments():
        if isinstance(picture, str | Path):
            path = Path(picture).expanduser()
            photo = read_photo(path, max_pixels=2**31)
            return InMemory(path, path.read_bytes(), photo, as_array=False)
        if isinstance(picture, Image.Image):
            photo = photo_of(picture, str(name), max_pixels=2**31)
            return InMemory(name, _content(picture, photo), photo, as_array=False)
        if not isinstance(picture, np.ndarray):
            raise UserError(
                f"{name}: is a {type(picture).__name__}; expected a PIL image, an array or a path"
            )
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise UserError(f"{name}: is {picture.dtype}{picture.shape}; expected uint8 (H, W, 3)")
        photo = Photo(picture, alpha=None, gray=False, icc=None, exif=None)
        return InMemory(name, _pixels(photo), photo, as_array=True)


def _content(image: Image.Image, photo: Photo) -> bytes:
    """The file's bytes, where the image is as it was opened from one; otherwise its pixels."""
    file = Path(getattr(image, "filename", "") or "")
    if file.is_file():
        with contextlib.suppress(UserError):
            if np.array_equal(read_photo(file, max_pixels=2**31).rgb, photo.rgb):
                return file.read_bytes()
    return _pixels(photo)


def _pixels(photo: Photo) -> bytes:
    return str(photo.rgb.shape).encode() + photo.rgb.tobytes()


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{argument} {value!r}: expected one of {', '.join(choices)}")


@contextlib.contextmanager
def _in_arguments() -> Iterator[None]:
    """Turns a UserError, which names flags, into a ValueError that names arguments."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for flag, argument in _ARGUMENTS.items():
            message = message.replace(flag, argument)
        raise ValueError(message) from None
