"""Folders of photographs as training samples, cropped and degraded while they are read.

Samples show photographs as a screen does: in sRGB, and over white where they are transparent.

No jax here: Grain's workers run this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tsdsr_jax.data.degradation import DegradationConfig, DegradedPair, degrade, target
from tsdsr_jax.data.record import Record, spread
from tsdsr_jax.data.sizes import MAX_PHOTOGRAPH_PIXELS, Found, KnownSize
from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.images.display import displayed
from tsdsr_jax.images.files import read_photo
from tsdsr_jax.images.resize import pillow_bicubic, reflect_pad
from tsdsr_jax.images.search import beside, composed
from tsdsr_jax.weights.prompt_files import PromptEmbeds, load_prompt_embeds

# The autoencoder's factor times the transformer's patch size.
CROP_STEP = 16
# What to do with photographs that a crop does not fit into.
SmallPhotos = Literal["leave_out", "enlarge", "mirror"]
_STREAM = 0x70686F74  # makes draws independent of those for the samples' order


@dataclasses.dataclass(frozen=True)
class CropConfig:
    """How photographs are cropped.

    Attributes:
      height, width: size of the crops.
      minimum: photographs of fewer than minimum² pixels are left out.
      flip: probability of mirroring left to right.
      small: what becomes of photographs with a shorter side than the crops: they are left out, enlarged, or extended by
        their mirror image at the right and the bottom. Enlarged ones are blurred, and mirrored ones show objects upside
        down; the published training sets have hardly any of either.
      side: range of the longer side to which photographs are resized before they are cropped, so that crops of all show
        objects at about the same size; each draw has its own, uniform in its logarithm. None: they keep their size.
    """

    height: int = 512
    width: int = 512
    minimum: int = 384
    flip: float = 0.5
    small: SmallPhotos = "leave_out"
    side: tuple[int, int] | None = None

    def exceeds(self, height: int, width: int) -> bool:
        """Whether a crop does not fit into a photograph of this size, when it is resized to its smallest."""
        height, width = self.resized(height, width, 0.0)
        return height < self.height or width < self.width

    def fitted(self, height: int, width: int, draw: float = 0.0) -> tuple[int, int]:
        """The size at which a photograph is cropped: its own, or another if it is resized.

        Args:
          height, width: the photograph's size.
          draw: place in the range of longer sides, from 0 to 1.
        """
        height, width = self.resized(height, width, draw)
        if self.small == "mirror" or (height >= self.height and width >= self.width):
            return height, width
        scale = max(self.height / height, self.width / width)
        return max(self.height, round(height * scale)), max(self.width, round(width * scale))

    def resized(self, height: int, width: int, draw: float = 0.0) -> tuple[int, int]:
        """The size of a photograph whose longer side is brought to a place of the range, from 0 to 1."""
        if self.side is None:
            return height, width
        low, high = self.side
        scale = low * (high / low) ** draw / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


class Photograph(NamedTuple):
    """A file, its folder, and its upright size."""

    path: Path
    root: Path
    height: int
    width: int

    @property
    def name(self) -> str:
        """Its path below the folder, which does not change when the folder moves."""
        return self.path.relative_to(self.root).as_posix()


class Box(NamedTuple):
    """A rectangle in a photograph, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Survey(NamedTuple):
    """The photographs found in some folders.

    Attributes:
      photographs: the usable ones, in a fixed order.
      small: names of those with fewer pixels than the minimum, which are left out.
      below_crop: names of those with a shorter side than the crops; `CropConfig.small` says what becomes of them.
      unreadable: one message for each that cannot be read.
    """

    photographs: list[Photograph]
    small: list[str]
    below_crop: list[str]
    unreadable: list[str]


def survey(files: Sequence[Found], sizes: Sequence[KnownSize | str], crop: CropConfig) -> Survey:
    """Sorts out the photographs that can be used.

    Args:
      files: pairs of a file and the folder below which it was found.
      sizes: the size of each, or why it cannot be read; see `KnownSizes.look`.
      crop: decides which photographs are too small.

    Raises:
      UserError: no photograph can be used.
    """
    unreadable = [size for size in sizes if isinstance(size, str)]
    photographs = [
        Photograph(*file, size.height, size.width)
        for file, size in zip(files, sizes, strict=True)
        if isinstance(size, KnownSize)
    ]
    small: list[Photograph] = []
    below: list[Photograph] = []
    used: list[Photograph] = []
    for photo in photographs:
        few, exceeded = photo.height * photo.width < crop.minimum**2, crop.exceeds(photo.height, photo.width)
        if exceeded and (crop.small == "leave_out" or not few):
            below.append(photo)
        elif few:
            small.append(photo)
        if not few and not (exceeded and crop.small == "leave_out"):
            used.append(photo)
    if not used:
        roots = ", ".join(sorted({str(root) for _, root in files}))
        reasons = "; ".join(_why_none(small, below, unreadable, crop))
        raise UserError(f"{roots}: none of the {len(files)} images can be used: {reasons}")
    return Survey(
        used, [str(photo.path) for photo in small], [str(photo.path) for photo in below], unreadable
    )


def _why_none(
    small: Sequence[Photograph], below: Sequence[Photograph], unreadable: Sequence[str], crop: CropConfig
) -> list[str]:
    reasons = []
    if below:
        # What half of them would fit.
        side = sorted(min(crop.resized(photo.height, photo.width)) for photo in below)[len(below) // 2]
        smaller = (
            f" (--crop_size {side // CROP_STEP * CROP_STEP} would fit most)" if side >= CROP_STEP else ""
        )
        reasons.append(
            f"{len(below)} are smaller than the crops of {crop.height}×{crop.width} pixels{_when(crop)}; choose smaller "
            f"ones{smaller}, or --small_photos enlarge"
        )
    if small:
        reasons.append(f"{len(small)} have fewer than {crop.minimum}×{crop.minimum} pixels (see --min_size)")
    if unreadable:
        reasons.append(f"{len(unreadable)} cannot be read, such as {unreadable[0]}")
    return reasons


def _when(crop: CropConfig) -> str:
    return f" at a longer side of {crop.side[0]} (see --photo_side)" if crop.side else ""


def left_out(found: Survey, crop: CropConfig) -> list[str]:
    """Messages that say how many photographs are left out or changed, which ones, and why."""
    lines = []
    if found.small:
        lines.append(
            f"{len(found.small)} photographs have fewer than {crop.minimum}×{crop.minimum} pixels and are left out "
            f"(see --min_size): {listed(found.small, 5)}"
        )
    if found.below_crop:
        become = {
            "leave_out": "left out",
            "enlarge": "enlarged",
            "mirror": "extended by their mirror image, with objects upside down",
        }
        lines.append(
            f"{len(found.below_crop)} photographs are smaller than the crops of {crop.height}×{crop.width} pixels"
            f"{_when(crop)} and are {become[crop.small]} (see --small_photos): {listed(found.below_crop, 5)}"
        )
    if found.unreadable:
        lines.append(f"{len(found.unreadable)} images cannot be read and are left out:")
        lines += [f"  {line}" for line in found.unreadable[:5]]
        lines += ["  ..."] if len(found.unreadable) > 5 else []
    return lines


def random_crop(image: np.ndarray, config: CropConfig, generator: np.random.Generator) -> np.ndarray:
    """A random crop, flipped left to right at random, of an (H, W, 3) image of any size -> (height, width, 3)."""
    if generator.random() < config.flip:
        image = image[:, ::-1]
    # Without a range there is no draw, so that crops stay what they were before there were ranges.
    draw = generator.random() if config.side and config.side[0] < config.side[1] else 0.0
    image = _extended(_fitted(image, config, draw), config.height, config.width)
    top = int(generator.integers(image.shape[0] - config.height + 1))
    left = int(generator.integers(image.shape[1] - config.width + 1))
    return image[top : top + config.height, left : left + config.width]


def cut_out(image: np.ndarray, box: Box) -> np.ndarray:
    """The part of an image in a box, which may exceed the image."""
    image = _extended(image, box.top + box.height, box.left + box.width)
    return image[box.top : box.top + box.height, box.left : box.left + box.width]


def _fitted(image: np.ndarray, config: CropConfig, draw: float = 0.0) -> np.ndarray:
    """Resizes an image to the size at which it is cropped."""
    height, width = image.shape[:2]
    size = config.fitted(height, width, draw)
    return image if size == (height, width) else pillow_bicubic(np.ascontiguousarray(image), *size)


def _extended(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Extends an image to at least (height, width) by reflection at the bottom and on the right."""
    return reflect_pad(image, max(height, image.shape[0]), max(width, image.shape[1]))


class Photographs:
    """Photographs as samples, each cropped and degraded differently in every epoch.

    A sample depends only on the seed, the epoch and its index, not on the process that reads it.

    Args:
      photographs: the files, as `survey` finds them.
      crop: how to crop them.
      degradation: how to degrade them.
      seed: seed of all draws.
      default: prompt for photographs without their own, used if others have one.
      with_lr: whether records have `lr`; if not, nothing is degraded.
      own_prompts: whether to use embeddings beside the photographs.
    """

    def __init__(
        self,
        photographs: Sequence[Photograph],
        crop: CropConfig,
        degradation: DegradationConfig,
        seed: int,
        default: PromptEmbeds | None = None,
        with_lr: bool = True,
        own_prompts: bool = True,
    ):
        self.photographs, self.crop, self.degradation, self.seed = photographs, crop, degradation, seed
        self.default, self.with_lr = default, with_lr
        self.prompts = [own_prompt(photo.path) if own_prompts else None for photo in photographs]

    def __len__(self) -> int:
        return len(self.photographs)

    def name(self, index: int) -> str:
        return str(self.photographs[index].path)

    def read(self, index: int, epoch: int = 0) -> Record:
        """Reads, crops and degrades; see `Source.read`."""
        prompt = self._prompt(index)
        texts = (None, None) if prompt is None else (prompt.prompt, prompt.pooled)
        if self.with_lr:
            return Record(*self.pair(index, epoch), None, *texts)
        crop, _ = self._crop(index, epoch, None)
        return Record(None, target(crop, self.degradation), None, *texts)

    def pair(self, index: int, draw: int, box: Box | None = None) -> DegradedPair:
        """A pair made from one photograph.

        Args:
          index: which photograph.
          draw: number of the random draw; each gives a different degradation.
          box: the crop; None: a random one, the same as in epoch `draw`.
        """
        crop, generator = self._crop(index, draw, box)
        return degrade(crop, generator, self.degradation)

    def _crop(self, index: int, draw: int, box: Box | None) -> tuple[np.ndarray, np.random.Generator]:
        """A crop, float32 in [0, 1], and the generator for all further draws."""
        photo = displayed(read_photo(self.photographs[index].path, MAX_PHOTOGRAPH_PIXELS))
        generator = np.random.default_rng([_STREAM, self.seed, draw, index])
        if box is None:
            crop = random_crop(photo, self.crop, generator)
        else:
            crop = cut_out(_fitted(photo, self.crop), box)
        return crop.astype(np.float32) / 255, generator

    def _prompt(self, index: int) -> PromptEmbeds | None:
        path = self.prompts[index]
        return self.default if path is None else load_prompt_embeds(path)

    def fingerprint(self) -> str:
        """A hash of all names and sizes, of which photographs have prompts, and of the content of 16 evenly spaced ones."""
        digest = hashlib.sha256()
        for photo, prompt in zip(self.photographs, self.prompts, strict=True):
            digest.update(
                f"{composed(photo.name)} {photo.height} {photo.width} {prompt is not None}\n".encode()
            )
        for index in spread(len(self)):
            digest.update(self.photographs[index].path.read_bytes())
        return digest.hexdigest()

    def prompts_fingerprint(self) -> str | None:
        """A hash of the prompt of every photograph; None if none has its own.

        Of each file it covers the size and the end, where the pooled embedding is, which depends on the whole text.
        """
        own = [path for path in self.prompts if path]
        if not own:
            return None
        digest = hashlib.sha256()
        with ThreadPoolExecutor(16) as pool:
            for end in pool.map(_end_of, own):
                digest.update(end)
        if self.default:
            digest.update(self.default.prompt.tobytes() + self.default.pooled.tobytes())
        return digest.hexdigest()

    def some_prompts(self) -> str:
        """A hash of at most 16 photographs' own prompts, evenly spaced."""
        own = [path for path in self.prompts if path]
        return hashlib.sha256(b"".join(_end_of(own[index]) for index in spread(len(own)))).hexdigest()


def _end_of(file: Path, most: int = 4096) -> bytes:
    """The last bytes of a file, and its size."""
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - most))
        return stream.read() + size.to_bytes(8, "little")


def own_prompt(path: Path) -> Path | None:
    """The prompt embedding beside a photograph, as `convert/prompts.py` writes it, if there is one."""
    return beside(path, ".safetensors")
