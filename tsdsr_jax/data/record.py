"""A training sample on the host, whatever its source. No jax here: Grain's workers import this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One training sample, or a batch of them.

    The arrays of a batch have leading axes and are on the host or on devices. Parts that the source does not have, or was
    not asked for, are None.

    Attributes:
      lr, hr: (H, W, 3) uint8; lr is degraded and enlarged to hr's size.
      latent_hr: (h, w, C) float32, times the scaling factor; if None, hr has to be encoded.
      prompt, pooled: (S, D) and (P,), float16, bfloat16 or float32; if None, the default prompt is used.
    """

    lr: np.ndarray | None
    hr: np.ndarray | None
    latent_hr: np.ndarray | None
    prompt: np.ndarray | None
    pooled: np.ndarray | None

    def map(self, function: Callable[[np.ndarray], Any]) -> Record:
        """Applies a function to every part that is not None."""
        return Record(*(None if part is None else function(part) for part in self))


class Source(Protocol):
    """A data set: samples by index."""

    def __len__(self) -> int: ...

    def read(self, index: int, epoch: int = 0) -> Record:
        """Reads a sample; it depends only on the index and the epoch.

        Raises:
          UserError: the sample cannot be used.
        """
        ...

    def name(self, index: int) -> str: ...

    def fingerprint(self) -> str:
        """A hash that identifies the data set, wherever its files are."""
        ...


def spread(count: int, most: int = 16) -> range:
    """At most `most` evenly spaced indices below `count`, for fingerprints."""
    return range(0, count, max(1, -(-count // most)))
