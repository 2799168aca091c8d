"""Chooses the crops of a prepared set, and makes pairs from them in Grain's workers, which must not import jax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import cv2
import numpy as np

from tsdsr_jax.data.photos import CROP_STEP, Box, CropConfig, Photograph, Photographs
from tsdsr_jax.data.shard_sets import pack_image
from tsdsr_jax.errors import UserError

Crops = Literal["random", "grid", "whole"]
SetLayout = Literal["shards", "folders"]
LONGEST_WEBP = 16383


class Planned(NamedTuple):
    """A planned sample.

    Attributes:
      photograph: index of the photograph.
      number: which of its crops.
      box: where the crop lies; None: at a random place.
    """

    photograph: int
    number: int
    box: Box | None


def plan(
    photographs: Sequence[Photograph], crops: Crops, config: CropConfig, per_photograph: int = 1
) -> list[Planned]:
    """Lists all samples to make, in the photographs' order.

    Args:
      photographs: all photographs.
      crops: `random`: `per_photograph` random crops, of which crop n is the one that training directly from photographs
        sees in epoch n; `grid`: as many as fit side by side, around the center; `whole`: the photograph, cut to multiples
        of 16 pixels.
      config: the crops' size.
    """
    planned = []
    for index, photograph in enumerate(photographs):
        if crops == "random":
            planned += [Planned(index, number, None) for number in range(per_photograph)]
        else:
            boxes = [_whole(photograph, config)] if crops == "whole" else _grid(photograph, config)
            planned += [Planned(index, number, box) for number, box in enumerate(boxes)]
    return planned


def _whole(photograph: Photograph, config: CropConfig) -> Box:
    sides = config.fitted(photograph.height, photograph.width)
    height, width = (max(CROP_STEP, side // CROP_STEP * CROP_STEP) for side in sides)
    top, left = (max(0, side - kept) // 2 for side, kept in zip(sides, (height, width), strict=True))
    return Box(top, left, height, width)


def _grid(photograph: Photograph, config: CropConfig) -> list[Box]:
    height, width = config.fitted(photograph.height, photograph.width)
    rows, columns = max(1, height // config.height), max(1, width // config.width)
    top, left = (max(0, height - rows * config.height) // 2, max(0, width - columns * config.width) // 2)
    return [
        Box(top + row * config.height, left + column * config.width, config.height, config.width)
        for row in range(rows)
        for column in range(columns)
    ]


# --- made by Grain's workers ----------------------------------------------------------------------


class EncodedPair(NamedTuple):
    """What a worker makes from a planned sample.

    Attributes:
      lr, hr: (bytes,) uint8, compressed without loss.
      image: hr again, (H, W, 3) uint8.
      problem: why the sample cannot be made; then the other fields are empty.
    """

    lr: np.ndarray
    hr: np.ndarray
    image: np.ndarray
    problem: str


class Pairs:
    """The pairs of some planned samples, as a sequence for Grain.

    Args:
      source: the photographs.
      samples: the samples to make.
      layout: `shards` store WebP; `folders` store PNG, which the original reads.
    """

    def __init__(self, source: Photographs, samples: Sequence[Planned], layout: SetLayout):
        self.source, self.samples, self.layout = source, samples, layout
        self.compress = pack_image if layout == "shards" else pack_png

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedPair:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample = self.samples[int(index)]
        try:
            lr, hr = self.source.pair(sample.photograph, sample.number, sample.box)
            if self.layout == "shards" and max(hr.shape) > LONGEST_WEBP:
                name = self.source.name(sample.photograph)
                raise UserError(
                    f"{name}: a side exceeds {LONGEST_WEBP} pixels; crop it, or use --layout folders"
                )
        except UserError as error:
            nothing = np.zeros(0, np.uint8)
            return EncodedPair(nothing, nothing, nothing, str(error))
        packed_lr, packed_hr = (np.frombuffer(self.compress(image), np.uint8) for image in (lr, hr))
        return EncodedPair(packed_lr, packed_hr, hr, "")


def pack_png(image: np.ndarray) -> bytes:
    _, file = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 3])
    return file.tobytes()
