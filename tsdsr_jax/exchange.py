"""What the processes of a run tell each other. Where there is only one, nothing is sent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")
R = TypeVar("R")


def _count() -> int:
    """How many processes there are. Asking JAX would start its devices, which preparing a set may not need."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def _index() -> int:
    return jax.process_index() if jax.distributed.is_initialized() else 0


def of_everyone(value: Any) -> list[Any]:
    """Returns the value of each process; every process must call it. Values must survive JSON."""
    if _count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(text.size)).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """Returns what process 0 makes; every process must call it."""
    return of_everyone(make() if _index() == 0 else None)[0]


def shared_out(items: Sequence[T], work: Callable[[Sequence[T]], list[R]]) -> list[R]:
    """Works on items, each in one process only; every process must call it, with the same items.

    Args:
      items: what to work on.
      work: some of the items -> a result for each, which must survive JSON.

    Returns:
      The results of all items, in their order.
    """
    count = _count()
    parts = of_everyone(work(items[_index() :: count]))
    return [parts[index % count][index // count] for index in range(len(items))]
