"""Padded sizes that many images share, because each size is a compiled program."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]  # (height, width)


def plan_buckets(sizes: Sequence[Size], most: int = 6, ratio: float = 1.2, grid: int = 16) -> list[Size]:
    """Assigns every size to one of a few padded sizes (buckets).

    Starts with the sizes themselves. Keeps merging the two buckets whose union costs the fewest extra pixels, while
    there are more than `most`, or while all padded pixels together stay within `ratio` of the valid ones. The result
    depends on the set of sizes, not on their order.

    Args:
      sizes: (height, width) of each image.
      most: largest number of buckets.
      ratio: padded over valid pixels, up to which padding is cheaper than another compilation.
      grid: with hundreds of distinct sizes, sides are first rounded up to a multiple of this, doubled as needed.

    Returns:
      One (height, width) per entry of `sizes`.
    """
    if not sizes:
        return []
    exact, counts = np.unique(np.asarray(sizes, np.int64), axis=0, return_counts=True)
    starts = exact
    while len(np.unique(starts, axis=0)) > 400:  # merging takes cubic time
        starts = -(-exact // grid) * grid
        grid *= 2
    labels = _merge(starts, counts, int((exact.prod(axis=1) * counts).sum()), most, ratio)
    bucket = {label: exact[labels == label].max(axis=0) for label in set(labels.tolist())}
    by_size = {
        tuple(size): bucket[label] for size, label in zip(exact.tolist(), labels.tolist(), strict=True)
    }
    return [(int(by_size[tuple(size)][0]), int(by_size[tuple(size)][1])) for size in sizes]


def _merge(starts: np.ndarray, counts: np.ndarray, valid: int, most: int, ratio: float) -> np.ndarray:
    """Merges sizes (n, 2) agglomeratively; returns the cluster label of each."""
    boxes, inverse = np.unique(starts, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    weight = np.bincount(inverse, counts).astype(np.int64)
    labels, alive = np.arange(len(boxes)), np.ones(len(boxes), bool)
    while alive.sum() > 1:
        index = np.flatnonzero(alive)
        box, count = boxes[index], weight[index]
        cost = box.prod(axis=1) * count
        union = np.maximum(box[:, None], box[None]).prod(axis=2) * (count[:, None] + count[None])
        extra = union - cost[:, None] - cost[None]
        np.fill_diagonal(extra, np.iinfo(np.int64).max)
        first, second = np.unravel_index(extra.argmin(), extra.shape)
        if len(index) <= most and cost.sum() + extra[first, second] > ratio * valid:
            break
        keep, drop = index[min(first, second)], index[max(first, second)]
        boxes[keep] = np.maximum(boxes[keep], boxes[drop])
        weight[keep] += weight[drop]
        labels[labels == drop] = keep
        alive[drop] = False
    return labels[inverse]
