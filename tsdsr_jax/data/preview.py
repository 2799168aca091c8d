"""A sheet of degraded samples, to look at before a set is prepared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tsdsr_jax.atomic import replacing
from tsdsr_jax.data.degradation import DegradationConfig, degrade, to_bytes
from tsdsr_jax.data.photos import CropConfig, Photograph, random_crop
from tsdsr_jax.data.sizes import MAX_PHOTOGRAPH_PIXELS
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.display import displayed
from tsdsr_jax.images.files import read_photo
from tsdsr_jax.images.pillow_state import reading_with_pillow
from tsdsr_jax.images.sheet import comparison_sheet

PREVIEW_DRAWS = 3
# Tells our sheets, which may be overwritten, from any other picture.
_MARK = ("Comment", "degraded samples by tsdsr_jax")


def check_preview_path(path: Path) -> None:
    """Refuses to overwrite anything except an earlier sheet."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--preview {path}: expected a name that ends in .png")
    if path.exists():
        try:
            with reading_with_pillow(), Image.open(path) as image:
                earlier = image.info.get(_MARK[0]) == _MARK[1]
        except Exception:  # Pillow's decoders raise whatever they stumble over
            earlier = False
        if not earlier:
            raise UserError(
                f"--preview {path}: exists and is not a preview of this program; choose another name"
            )


def write_preview_sheet(
    path: Path,
    photographs: Sequence[Photograph],
    count: int,
    crop: CropConfig,
    degradation: DegradationConfig,
    seed: int,
    note: Callable[[str], object],
) -> int:
    """Writes a sheet of evenly spaced photographs, each with its target and a few degraded versions.

    Args:
      path: the PNG file.
      photographs: all photographs.
      count: how many of them to show.
      crop, degradation: how samples are made.
      seed: seed of crops and degradations.
      note: called with a message for each photograph that cannot be read.

    Returns:
      How many photographs the sheet shows.
    """
    count = min(count, len(photographs))
    rows = []
    for index in range(count):
        image = _first_crop(photographs[index * len(photographs) // count :], crop, [seed, index], note)
        generator = np.random.default_rng([seed, index, 1])
        pairs = [degrade(image, generator, degradation) for _ in range(PREVIEW_DRAWS)]
        images = to_bytes(image), pairs[0].hr, *(pair.lr for pair in pairs)
        rows.append([Image.fromarray(image) for image in images])
    target = "target (sharpened)" if degradation.sharpen else "target"
    titles = ["photograph", target, *(f"degraded {draw + 1}" for draw in range(PREVIEW_DRAWS))]
    sheet, mark = comparison_sheet(rows, titles, cell_width=min(384, crop.width)), PngInfo()
    mark.add_text(*_MARK)
    with replacing(path) as temporary:
        sheet.save(temporary, format="png", pnginfo=mark)
    return count


def _first_crop(
    photographs: Sequence[Photograph], crop: CropConfig, seed: Sequence[int], note: Callable[[str], object]
) -> np.ndarray:
    """A random crop, float32 in [0, 1], of the first photograph that can be read."""
    for photograph in photographs:
        try:
            photo = displayed(read_photo(photograph.path, MAX_PHOTOGRAPH_PIXELS))
        except UserError as error:
            note(f"left out: {error}")
            continue
        return random_crop(photo, crop, np.random.default_rng(seed)).astype(np.float32) / 255
    raise UserError("none of the photographs can be read")
