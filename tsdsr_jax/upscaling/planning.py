"""From the sizes of photographs to what is computed: output size, padding, shared buckets, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from tsdsr_jax.cli import EVERYTHING, Share
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size, plan_buckets
from tsdsr_jax.images.color import AlignMethod
from tsdsr_jax.models.params import LATENT_FACTOR, PATCH_SIZE
from tsdsr_jax.upscaling.jobs import FileJob, Job, Report

Item = TypeVar("Item")
AnyJob = TypeVar("AnyJob", bound=Job)
GroupedJob = TypeVar("GroupedJob", bound=Job, covariant=True)

_PHOTO_PIXELS = 512**2


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """The sizes one photograph goes through, each (height, width) in pixels.

    Attributes:
      source: the photograph's own size.
      resized: after bicubic interpolation; what the network should see.
      padded: `resized`, extended by reflection at the bottom and right to what the latents need. Cropped off again.
      output: the result's size, source × upscale. It differs from `resized` where the photograph was too small to be
        processed as it was; the result is then resized to it.
    """

    source: Size
    resized: Size
    padded: Size
    output: Size

    @property
    def latent(self) -> Size:
        return self.padded[0] // LATENT_FACTOR, self.padded[1] // LATENT_FACTOR

    @property
    def portrait(self) -> bool:
        """Whether it is processed lying on its side, so that portraits and landscapes share programs."""
        return self.padded[0] > self.padded[1]

    @property
    def lying(self) -> Size:
        """`padded` with the short side first."""
        return min(self.padded), max(self.padded)


def plan_size(source: Size, upscale: float, process_size: int, latent_tile: int) -> SizePlan:
    """Plans the sizes of one photograph.

    A photograph whose result would have a short side below `process_size` is first enlarged to the size that the original
    gives it: multiplied in floating point, then truncated. Sides are padded to multiples of 8 for the autoencoder. Where the
    latent is not longer than a tile, they are padded to multiples of 16, because the tile must hold whole patches; longer
    sides are covered by overlapping tiles and need no more padding.
    """
    minimum = max(1, int(process_size // upscale))
    height, width = source
    if min(source) < minimum:
        scale = minimum / min(source)
        # Truncation leaves short sides of 49, 98, 103 and 107 a pixel below 128, where the original crashes.
        height, width = (max(minimum, int(scale * side)) for side in source)
    resized = round(height * upscale), round(width * upscale)

    def pad(side: int) -> int:
        latent = -(-side // LATENT_FACTOR)
        if latent <= latent_tile:
            latent = -(-latent // PATCH_SIZE) * PATCH_SIZE
        return latent * LATENT_FACTOR

    padded = pad(resized[0]), pad(resized[1])
    return SizePlan(source, resized, padded, (round(source[0] * upscale), round(source[1] * upscale)))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one call. The defaults are the original's flags.

    Attributes:
      upscale: output size over input size, at least 1.
      process_size: photographs whose result would have a shorter side are processed at this size, in pixels.
      latent_tile, latent_overlap: transformer tiles, in latent pixels.
      tile_batch: tiles per device and transformer call.
      photo_batch: photographs of 512×512 output pixels per device and call; fewer where they are larger.
      sample: draw the latent from the encoder's posterior; otherwise take its mean.
      seed: seed of the latent noise.
      align: color correction.
      max_pixels: photographs with more pixels, in or out, are refused.
    """

    upscale: float = 4.0
    process_size: int = 512
    latent_tile: int = 64
    latent_overlap: int = 8
    tile_batch: int = 1
    photo_batch: int = 1
    sample: bool = True
    seed: int = 42
    align: AlignMethod = "wavelet"
    max_pixels: int = 100_000_000

    def plan(self, source: Size) -> SizePlan:
        """Plans the sizes of a photograph of (height, width) `source`."""
        return plan_size(source, self.upscale, self.process_size, self.latent_tile)

    def refuses(self, plan: SizePlan) -> bool:
        """Whether a result would have too many pixels."""
        return plan.padded[0] * plan.padded[1] > self.max_pixels

    def photos_at_a_time(self, size: Size) -> int:
        """The most photographs of (height, width) `size` that a device computes together; small ones count as 512×512."""
        return max(1, min(self.photo_batch, self.photo_batch * _PHOTO_PIXELS // (size[0] * size[1])))


# The photograph's name, its plan, the settings -> why its result is too large.
Explain = Callable[[str, SizePlan, Settings], str]


@dataclasses.dataclass(frozen=True)
class Group(Generic[GroupedJob]):
    """Jobs of one shape, planned together; the run cuts them into smaller batches if memory is short.

    Attributes:
      jobs: each job with its planned sizes.
      bucket: the padded (height, width) that they share, height ≤ width.
      masked: whether any photograph of this bucket, in any group, is smaller than it.
      several: use the large batch size, filled up with repeats if the jobs are fewer, because every batch size is a
        compiled program; if False, one photograph per device.
    """

    jobs: tuple[tuple[GroupedJob, SizePlan], ...]
    bucket: Size
    masked: bool
    several: bool


# (bucket, portrait) -> the photographs that are computed in this shape
_JobsByShape = dict[tuple[Size, bool], list[tuple[AnyJob, SizePlan]]]


def plan_groups(
    jobs: Sequence[AnyJob],
    settings: Settings,
    devices: int,
    report: Report,
    part: Share = EVERYTHING,
    explain: Explain | None = None,
) -> list[Group[AnyJob]]:
    """Reads the image headers and puts photographs of similar shape into batches.

    The result depends on the set of jobs, not on their order or on which of them are finished: a resumed run computes
    each photograph exactly as an uninterrupted run, unless a device runs out of memory in only one of them.

    Args:
      jobs: the photographs.
      settings: for the sizes, and how many photographs go together.
      devices: number of devices that a group is spread over.
      report: receives photographs that cannot be read or are too large.
      part: the machine's part to keep. Shapes still follow from the whole set. Which photographs are in a part
        does not depend on `devices` or the batch size, which may differ between the machines that share a folder.
      explain: says why a result is too large; see `limits.too_large`.
    """
    measured = _measured(jobs, settings, report, part, explain or _more_than_limit)
    buckets = plan_buckets([sizes.lying for _, sizes in measured])
    masked = {bucket for (_, sizes), bucket in zip(measured, buckets, strict=True) if sizes.lying != bucket}
    by_shape: _JobsByShape[AnyJob] = {}
    for (job, sizes), bucket in zip(measured, buckets, strict=True):
        by_shape.setdefault((bucket, sizes.portrait), []).append((job, sizes))
    mine = _dealt(by_shape, part)
    largest = {bucket: devices * settings.photos_at_a_time(bucket) for bucket, _ in mine}
    # Portraits and landscapes share programs: what is compiled for one serves the other.
    several = {
        bucket
        for (bucket, _), members in mine.items()
        if batch_size(len(members), devices, largest[bucket]) > devices
    }
    return [
        Group(tuple(batch), bucket, bucket in masked, bucket in several)
        for (bucket, _), members in mine.items()
        for batch in slices(members, largest[bucket] if bucket in several else devices)
    ]


def _more_than_limit(name: str, plan: SizePlan, settings: Settings) -> str:
    height, width = plan.padded
    return (
        f"{name}: would be processed at {width}×{height} pixels, more than --max_pixels {settings.max_pixels}"
    )


def _measured(
    jobs: Sequence[AnyJob], settings: Settings, report: Report, part: Share, explain: Explain
) -> list[tuple[AnyJob, SizePlan]]:
    """The jobs whose photographs can be processed, with their sizes."""

    def measure(number: int, job: AnyJob) -> SizePlan | None:
        try:
            sizes = settings.plan(job.size(settings.max_pixels))
            if settings.refuses(sizes):
                raise UserError(explain(str(job.source), sizes, settings))
            job.check_output(sizes.output)
            return sizes
        except Exception as error:  # whatever is wrong with one file, the others go on
            if number % part.of == part.index:  # reported once, not by every part
                report.failed(job.source, error)
            return None

    with ThreadPoolExecutor() as pool:
        plans = pool.map(measure, range(len(jobs)), jobs)
        return [(job, sizes) for job, sizes in zip(jobs, plans, strict=True) if sizes]


def _dealt(by_shape: _JobsByShape[AnyJob], part: Share) -> _JobsByShape[AnyJob]:
    """One machine's part. Photographs are dealt out across shapes, so that many shapes with few photographs are also shared
    evenly."""
    dealt = 0
    mine: _JobsByShape[AnyJob] = {}
    for shape, members in sorted(by_shape.items(), key=lambda item: item[0]):
        mine[shape] = members[(part.index - dealt) % part.of :: part.of]
        dealt += len(members)
    return mine


def unfinished(groups: Sequence[Group[FileJob]], report: Report) -> list[Group[FileJob]]:
    """The groups in which results are missing; counts the results that exist, and names those of other settings.

    A group with only some of its results stays whole: all are computed, so that each result is the same as in an
    uninterrupted run, and only the missing ones are written.
    """
    incomplete = []
    for group in groups:
        finished = [(job, plan) for job, plan in group.jobs if job.is_finished()]
        report.skipped += len(finished)
        report.outdated += sum(job.is_outdated() for job, _ in finished)
        report.different += filter(None, (job.difference(plan.output) for job, plan in finished))
        if len(finished) < len(group.jobs):
            incomplete.append(group)
    return incomplete


def batch_size(items: int, small: int, large: int) -> int:
    """The large batch size if this many items fill at least half of it, otherwise the small one. Each size is a compiled
    program."""
    return large if items > large // 2 else small


def slices(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cuts a sequence into pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
