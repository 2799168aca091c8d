"""What a training sample is on the host, whatever it is read from. No jax here: Grain's workers import this."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np


class Record(NamedTuple):
    """One training sample, or a batch of them, whose arrays have leading axes and lie on the host or on devices.

    None stands for what the source does not have or was not asked for.

    Attributes:
      lr, hr: (H, W, 3) uint8; lr is degraded, and resized to hr's size.
      latent_hr: (h, w, C) float32, times the scaling factor; None: to be encoded from hr.
      prompt, pooled: (S, D) and (P,), float16, bfloat16 or float32; None: the default prompt.
    """

    lr: np.ndarray | None
    hr: np.ndarray | None
    latent_hr: np.ndarray | None
    prompt: np.ndarray | None
    pooled: np.ndarray | None

    def map(self, function: Callable[[np.ndarray], Any]) -> Record:
        """Applied to what is there."""
        return Record(*(None if part is None else function(part) for part in self))


class Source(Protocol):
    """Samples by index."""

    def __len__(self) -> int: ...

    def read(self, index: int, epoch: int = 0) -> Record:
        """The sample, the same for the same index and epoch wherever it is read.

        Raises:
          UserError: it cannot be used.
        """
        ...

    def name(self, index: int) -> str: ...

    def fingerprint(self) -> str:
        """A hash that tells the set from others, the same wherever it lies."""
        ...


def spread(count: int, most: int = 16) -> range:
    """At most so many of `count` indices, evenly: what a fingerprint looks at closely."""
    return range(0, count, max(1, -(-count // most)))
