"""Measures a folder of results against a folder of references: pairs their files and computes all metrics.

Files that cannot be measured are listed and left out of all averages.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from tsdsr_jax.errors import UserError, first_line, listed, printable
from tsdsr_jax.evaluation.registry import Metric, PictureBatch, Values
from tsdsr_jax.images.buckets import Size, plan_buckets
from tsdsr_jax.images.display import displayed, not_displayed
from tsdsr_jax.images.files import read_photo, read_size
from tsdsr_jax.images.search import composed, find_photographs

_BATCH_PIXELS = 2**21  # eight pictures of 512×512


class _Pixels(NamedTuple):
    """The pictures of a pair as a screen shows them, whether parts of one are transparent, and the files' notes."""

    result: np.ndarray
    reference: np.ndarray | None
    transparent: bool
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class FilePair:
    """A result, and the reference of the same name.

    Attributes:
      name: path below the folder, without suffix, with forward slashes.
      result, reference: the files; reference is None if there is none.
    """

    name: str
    result: Path
    reference: Path | None


@dataclasses.dataclass
class Measured:
    """The measurements of one folder of results.

    Attributes:
      pairs: the measured pairs, sorted by name.
      values: pair's name -> metric's name -> value; values that could not be computed are absent.
      of_folder: metric's name -> value, for metrics of whole folders.
      problems: for each missing file or value, a line with the reason.
      notes: further lines about the files, none of which is missing.
      missing: metric's name -> why it has no value at all.
    """

    pairs: list[FilePair] = dataclasses.field(default_factory=list)
    values: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    of_folder: dict[str, float] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    def of(self, metric: str) -> list[float]:
        """All values of one metric, in the order of the pairs."""
        return [self.values[pair.name][metric] for pair in self.pairs if metric in self.values[pair.name]]


def find_pairs(results: Path, references: Path | None) -> tuple[list[FilePair], list[str]]:
    """Pairs files that have the same path below both folders, ignoring suffixes.

    Returns:
      The pairs, sorted by name, and a line for every file with no partner or several.

    Raises:
      UserError: a folder is missing or holds no images, or no file has a partner.
    """
    found, problems = by_name(results)
    if references is None:
        return [FilePair(name, file, None) for name, file in found.items()], problems
    wanted, more = by_name(references)
    problems += more
    problems += [
        f"{found[name]}: no file of this name in {references}" for name in found.keys() - wanted.keys()
    ]
    problems += [
        f"{wanted[name]}: no file of this name in {results}" for name in wanted.keys() - found.keys()
    ]
    common = sorted(found.keys() & wanted.keys())
    if not common:
        raise UserError(
            f"{results} and {references}: no file has the same name in both (for example {_first(found)} and"
            f" {_first(wanted)}); results and references are paired by name"
        )
    return [FilePair(name, found[name], wanted[name]) for name in common], sorted(problems)


def _first(files: Mapping[str, Path]) -> str:
    return next(iter(files.values())).name


def by_name(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Lists a folder's images by name, including subfolders.

    Returns:
      Name -> file, and a line for each name that several files share and for whatever cannot be read. Names are composed
      Unicode: macOS decomposes those of its files.

    Raises:
      UserError: the folder is missing or holds no images.
    """
    if os.path.isfile(folder):
        raise UserError(f"{folder}: is a file; expected a folder of images")
    together: dict[str, list[Path]] = {}
    photographs = find_photographs(folder)
    for file in photographs.files:
        name = composed(file.relative_to(folder).with_suffix("").as_posix())
        together.setdefault(printable(name), []).append(file)
    problems = photographs.left_out() + [
        f"{', '.join(map(str, files))}: several files with one name; keep only one"
        for files in together.values()
        if len(files) > 1
    ]
    return {name: files[0] for name, files in together.items() if len(files) == 1}, problems


def measure(
    pairs: Sequence[FilePair],
    metrics: Sequence[Metric],
    device: jax.Device,
    max_pixels: int,
    on_done: Callable[[int], object] = lambda count: None,
) -> Measured:
    """Computes all metrics for all pairs that can be read and agree in size; see `measure_pictures` and `complete`."""
    measured = measure_pictures(pairs, metrics, device, max_pixels, on_done)
    complete(measured, metrics)
    return measured


def complete(measured: Measured, metrics: Sequence[Metric]) -> None:
    """Adds what all pictures together decide: metrics of folders, and which metrics have no value."""
    measured.pairs.sort(key=lambda pair: pair.name)
    for metric in metrics:
        if metric.over_folders:
            _of_folder(metric, measured)
        elif not measured.of(metric.name):
            measured.missing[metric.name] = "no picture could be measured"


def measure_pictures(
    pairs: Sequence[FilePair],
    metrics: Sequence[Metric],
    device: jax.Device,
    max_pixels: int,
    on_done: Callable[[int], object] = lambda count: None,
) -> Measured:
    """Computes the metrics of pictures for all pairs that can be read and agree in size.

    Threads read files while the device computes. Pictures of similar size share a batch and a compiled program.

    Args:
      pairs: the pairs to measure.
      metrics: the metrics; those of folders are left out.
      device: where JAX computes.
      max_pixels: pictures with more pixels are left out.
      on_done: called with the number of pairs finished since the last call.
    """
    measured = Measured()
    per_picture = [metric for metric in metrics if metric.start]
    with ThreadPoolExecutor() as pool:
        sizes = pool.map(lambda pair: _size(pair, max_pixels), pairs)
        sized = list(zip(pairs, sizes, strict=True))
        measured.problems += [size for _, size in sized if isinstance(size, str)]
        on_done(len(measured.problems))
        running: deque[tuple[_Read, list[Values]]] = deque()

        def finish() -> None:
            read, started = running.popleft()
            _record(read, per_picture, started, measured)
            on_done(len(read.pairs))

        sound = [(pair, size) for pair, size in sized if not isinstance(size, str)]
        transparent: list[str] = []
        for read in _batches(sound, device, max_pixels, pool):
            measured.problems += read.unread
            measured.notes += read.notes
            transparent += read.transparent
            on_done(len(read.unread))
            running.append((read, [_start(metric, read.batch) for metric in per_picture]))
            if len(running) > 1:
                finish()
        while running:
            finish()
    if transparent:
        names = listed(sorted(transparent))
        measured.notes.append(
            f"{names}: measured over white, because they or their references are transparent"
        )
    return measured


def _size(pair: FilePair, max_pixels: int) -> Size | str:
    """The size that both pictures of a pair have, or a line with the reason why there is none."""
    try:
        result = read_size(pair.result, max_pixels)
        reference = read_size(pair.reference, max_pixels) if pair.reference else result
    except UserError as error:
        return str(error)
    if result != reference:
        return (
            f"{pair.result}: {result[1]}×{result[0]} pixels, but {pair.reference} has {reference[1]}×{reference[0]};"
            " not measured"
        )
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """A batch of pairs with their pixels, a line for each that could not be read, the results of those with transparency,
    and notes."""

    pairs: list[FilePair]
    batch: PictureBatch
    unread: list[str]
    transparent: list[str]
    notes: list[str]


def _batches(
    sound: Sequence[tuple[FilePair, Size]], device: jax.Device, max_pixels: int, pool: ThreadPoolExecutor
) -> Iterator[_Read]:
    """Yields batches; threads read the next one ahead."""
    buckets = plan_buckets([size for _, size in sound])
    together: dict[Size, list[FilePair]] = {}
    for (pair, _), bucket in zip(sound, buckets, strict=True):
        together.setdefault(bucket, []).append(pair)
    groups = []
    for bucket, members in sorted(together.items()):
        count = max(1, min(len(members), _BATCH_PIXELS // (bucket[0] * bucket[1])))
        groups += [(bucket, count, members[start : start + count]) for start in range(0, len(members), count)]

    def read(group: tuple[Size, int, list[FilePair]]) -> list[Future[_Pixels | str]]:
        return [pool.submit(_pixels, pair, max_pixels) for pair in group[2]]

    upcoming = read(groups[0]) if groups else []
    for number, (bucket, count, members) in enumerate(groups):
        files, upcoming = upcoming, read(groups[number + 1]) if number + 1 < len(groups) else []
        yield _stack(members, [file.result() for file in files], bucket, count, device)


def _pixels(pair: FilePair, max_pixels: int) -> _Pixels | str:
    """A pair's result and reference as a screen shows them, or a line with the reason why they cannot be measured."""
    try:
        files = [file for file in (pair.result, pair.reference) if file]
        photos = [read_photo(file, max_pixels) for file in files]
        for file, photo in zip(files, photos, strict=True):
            if reason := not_displayed(photo):
                return f"{file}: {reason}; not measured"
        result, reference = [*map(displayed, photos), None][:2]
        assert result is not None
        transparent = any(photo.alpha is not None and photo.alpha.min() < 255 for photo in photos)
        return _Pixels(result, reference, transparent, [note for photo in photos for note in photo.notes])
    except UserError as error:
        return str(error)
    except MemoryError:
        return f"{pair.result}: not enough memory to read it; a lower --max_pixels leaves such pictures out"


def _stack(
    members: Sequence[FilePair],
    pixels: Sequence[_Pixels | str],
    bucket: Size,
    count: int,
    device: jax.Device,
) -> _Read:
    """Places pictures in the top left corners of a batch of fixed size."""
    sound = [(pair, found) for pair, found in zip(members, pixels, strict=True) if not isinstance(found, str)]
    results = np.zeros((count, *bucket, 3), np.uint8)
    references = np.zeros_like(results) if any(pair.reference for pair, _ in sound) else None
    sizes = np.full((count, 2), bucket, np.int32)
    for index, (_, (result, reference, *_)) in enumerate(sound):
        height, width = sizes[index] = result.shape[:2]
        results[index, :height, :width] = result
        if reference is not None and references is not None:
            references[index, :height, :width] = reference
    batch = PictureBatch(results, references, sizes, len(sound), device)
    return _Read(
        [pair for pair, _ in sound],
        batch,
        unread=[found for found in pixels if isinstance(found, str)],
        transparent=[str(pair.result) for pair, one in sound if one.transparent],
        notes=[note for _, one in sound for note in one.notes],
    )


def _start(metric: Metric, batch: PictureBatch) -> Values:
    """Starts a metric on a batch. If memory runs out, that is the reason why the pictures have no value."""
    assert metric.start, "metrics of folders are computed elsewhere"
    if not any(metric.fits(*size) for size in batch.sizes[: batch.count].tolist()):
        return lambda: [""] * batch.count
    try:
        wait = metric.start(batch)
    except Exception as error:
        return partial(_no_memory, error, batch.count)

    def values() -> Sequence[float | str]:
        try:
            return wait()
        except Exception as error:
            return _no_memory(error, batch.count)

    return values


def _no_memory(error: Exception, count: int) -> list[str]:
    """Turns an out-of-memory error into a reason for each picture; re-raises any other error, which is a bug."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if not exhausted and not isinstance(error, MemoryError):
        raise error
    return ["out of memory; try --device cpu"] * count


def _record(read: _Read, metrics: Sequence[Metric], started: Sequence[Values], measured: Measured) -> None:
    """Waits for a batch's values and stores them."""
    measured.pairs += read.pairs
    measured.values |= {pair.name: {} for pair in read.pairs}
    for metric, wait in zip(metrics, started, strict=True):
        for pair, size, value in zip(read.pairs, read.batch.sizes.tolist(), wait(), strict=False):
            if not metric.fits(*size):
                needed = "×".join(map(str, sorted(metric.smallest, reverse=True)))
                value = f"{size[1]}×{size[0]} pixels are too few; at least {needed} are needed"
            if isinstance(value, float) and math.isfinite(value):
                measured.values[pair.name][metric.name] = value
            else:
                measured.problems.append(f"{pair.result}: no {metric.label} ({value})")


def _of_folder(metric: Metric, measured: Measured) -> None:
    assert metric.over_folders
    try:
        results = [pair.result for pair in measured.pairs]
        references = [pair.reference for pair in measured.pairs if pair.reference]
        value = metric.over_folders(results, references)
        if math.isfinite(value):
            measured.of_folder[metric.name] = value
        else:
            measured.missing[metric.name] = f"is {value} for these files"
    except Exception as error:  # another package's error, from its own files and downloads
        measured.missing[metric.name] = f"failed on these files ({first_line(error)})"
