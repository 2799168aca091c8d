"""Flags for data: where samples and prompts come from, and how photographs are cropped and degraded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, Self

from tsdsr_jax.data.degradation import STRENGTHS, DegradationConfig
from tsdsr_jax.data.photos import CROP_STEP, CropConfig, SmallPhotos
from tsdsr_jax.errors import UserError
from tsdsr_jax.weights.bundled import prompt_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropOptions:
    """How photographs are cropped; the same flags for preparing a set and for training."""

    crop_size: tuple[int, ...] = ()
    """Side of the crops, or their height and width, in multiples of 16. Default: 512, or the longest side that a smaller
    model can handle."""
    min_size: int | None = None
    """Leave out photographs with fewer pixels than a square of this side. Default: 3/4 of the crops' shorter side."""
    small_photos: SmallPhotos = "leave_out"
    """What to do with photographs that have a shorter side than the crops: leave_out; enlarge, which makes them blurred; or
    mirror, which extends them by their mirror image, as the published pipeline does."""
    photo_side: tuple[int, ...] = ()
    """Resize photographs to this longer side before they are cropped; with two numbers, to one between them, drawn for each
    crop. Small and large photographs then show objects at about the same size. Default: photographs keep their size."""
    sharpen_gt: bool = True
    """Sharpen the photographs with an unsharp mask before they are used, as the published pipeline does by default."""

    def fitted(self, longest_side: int) -> Self:
        """Sets the default of --crop_size for a model with this longest side."""
        return self if self.crop_size else dataclasses.replace(self, crop_size=(min(512, longest_side),))

    def crop(self) -> CropConfig:
        sides = self.crop_size or (512,)
        height, width = sides if len(sides) == 2 else sides * 2
        minimum = min(height, width) * 3 // 4 if self.min_size is None else self.min_size
        side = (self.photo_side[0], self.photo_side[-1]) if self.photo_side else None
        return CropConfig(height, width, minimum, small=self.small_photos, side=side)

    def degradation(self) -> DegradationConfig:
        return DegradationConfig(sharpen=self.sharpen_gt)

    def check_crop(self) -> None:
        if len(self.crop_size) > 2 or any(side < 1 or side % CROP_STEP for side in self.crop_size):
            given = " ".join(map(str, self.crop_size))
            raise UserError(
                f"--crop_size {given}: expected one side, or height and width, multiples of {CROP_STEP}"
            )
        if len(self.photo_side) > 2 or any(side < CROP_STEP for side in self.photo_side):
            given = " ".join(map(str, self.photo_side))
            raise UserError(f"--photo_side {given}: expected one or two sides of at least {CROP_STEP} pixels")
        if self.photo_side and self.photo_side[0] > self.photo_side[-1]:
            raise UserError(
                f"--photo_side {self.photo_side[0]} {self.photo_side[1]}: expected the smaller one first"
            )
        if self.min_size is not None and self.min_size < 1:
            raise UserError(f"--min_size {self.min_size}: expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(CropOptions):
    """How photographs become training pairs."""

    jpeg: Literal["model", "codec"] = "model"
    """JPEG compression: simulated as in the published pipeline (model), or with a real codec."""
    degradation_strength: Literal["published", "light", "camera"] = "published"
    """How strongly to degrade: as published; with less blur, noise and compression (light), for small crops; or with the
    blur of a good camera and hardly anything else (camera)."""

    def degradation(self) -> DegradationConfig:
        config = dataclasses.replace(super().degradation(), codec=self.jpeg == "codec")
        return STRENGTHS[self.degradation_strength](config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(PairOptions):
    """Where the samples and prompts of a training run come from."""

    data_dir: tuple[Path, ...] = ()
    """Prepared set, made by train/prepare.py or in the original's folders (gt, lr_bicubic, latent_hr, prompt_embeds,
    pool_embeds); repeat the flag for several sets."""
    hr_dir: tuple[Path, ...] = ()
    """Instead of a prepared set: folder of photographs, including its subfolders, to crop and degrade during training;
    repeat the flag for several folders."""
    default_embedding_dir: Path | None = None
    """Folder with the default prompt's embedding, for photographs without an embedding of their own. Default:
    dataset/default; for weights/tiny, its own."""
    null_embedding_dir: Path | None = None
    """Folder with the empty prompt's embedding, for guidance. Default: dataset/null; for weights/tiny, its own."""

    def prompted(self, model: str) -> Self:
        """Sets the defaults of the prompts' folders for a model."""
        default = self.default_embedding_dir or prompt_folder(model, "default")
        null = self.null_embedding_dir or prompt_folder(model, "null")
        return dataclasses.replace(self, default_embedding_dir=default, null_embedding_dir=null)

    def check_data(self) -> None:
        self.check_crop()
        if bool(self.data_dir) == bool(self.hr_dir):
            raise UserError(
                "give either prepared sets with --data_dir or folders of photographs with --hr_dir"
            )
