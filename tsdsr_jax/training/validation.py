"""What the validations of all networks share: which samples, where they lie, and how close a picture comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.data.batches import SampleShapes
from tsdsr_jax.data.record import Record, Source
from tsdsr_jax.errors import UserError
from tsdsr_jax.training.sharding import batch_sharding, global_array


def place_samples(records: Sequence[Record], mesh: Mesh) -> list[Record]:
    """Places the records on the devices, as batches of one sample per device; the last is filled up with the first ones."""
    batches = []
    for first in range(0, len(records), mesh.size):
        filled = [records[index % len(records)] for index in range(first, first + mesh.size)]
        stacked = Record(
            *(None if parts[0] is None else np.stack(parts) for parts in zip(*filled, strict=True))
        )
        batches.append(stacked.map(lambda part: global_array(part, batch_sharding(mesh))))
    return batches


def image_of(part: np.ndarray | None) -> np.ndarray:
    """A record's image, which validation cannot do without."""
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
    """The first samples that can be used, at most `count`: those of the training samples' shapes.

    Args:
      note: told of each one that is left out.

    Raises:
      UserError: there is none.
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
            note(f"not validated on: {error}")
    if not picked:
        raise UserError(
            "no validation sample can be used:\n" + "\n".join(f"  {line}" for line in problems[:5])
        )
    return picked
