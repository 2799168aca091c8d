"""Shared by all validations: choosing samples, placing them on the devices, and PSNR."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.data.batches import SampleShapes
from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.errors import UserError
from tsdsr_jax.training.sharding import batch_sharding, global_array


def place_samples(records: Sequence[Record], mesh: Mesh) -> list[Record]:
    """Puts the records on the devices in batches of one per device; the first records are repeated to fill the last
    batch."""
    batches = []
    for first in range(0, len(records), mesh.size):
        filled = [records[index % len(records)] for index in range(first, first + mesh.size)]
        stacked = Record(
            *(None if parts[0] is None else np.stack(parts) for parts in zip(*filled, strict=True))
        )
        batches.append(stacked.map(lambda part: global_array(part, batch_sharding(mesh))))
    return batches


def image_of(part: np.ndarray | None) -> np.ndarray:
    """Returns a record's image; raises ValueError if it has none."""
    if part is None:
        raise ValueError("these samples have no images to validate on")
    return part


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all three channels of 8-bit images, in dB; 128 for equal images."""
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return float(10 * np.log10(255**2 / max(error, 1e-8)))


def pick(
    source: Source, shapes: SampleShapes, count: int, note: Callable[[str], object] = lambda line: None
) -> list[Record]:
    """Picks the first usable samples, at most `count`.

    Args:
      shapes: the shapes that a sample must have.
      note: called with a message for each sample that is left out.

    Raises:
      UserError: no sample can be used.
    """
    picked: list[Record] = []
    problems: list[str] = []
    for index in range(len(source)):
        if len(picked) == count:
            break
        try:
            record = source.read(index)
            shapes.check(record, source, index)
            picked.append(shapes.cast(record))
        except UserError as error:
            problems.append(str(error))
            note(f"left out of validation: {error}")
    if not picked:
        raise UserError(
            "no validation sample can be used:\n" + "\n".join(f"  {line}" for line in problems[:5])
        )
    return picked
