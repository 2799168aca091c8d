"""Photographs through the engine: which files, in which batches, and what becomes of each.

Reading, preparing and writing run in threads around the device, so that it waits for neither. One bad file costs no
other its result.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Protocol

import jax
import numpy as np

from tsdsr_jax.errors import UserError
from tsdsr_jax.images import color
from tsdsr_jax.images.buckets import Size, plan_buckets
from tsdsr_jax.images.files import Photo, read_photo, read_size
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.images.search import find_photographs
from tsdsr_jax.images.writing import check_format, lost_transparency, write_photo
from tsdsr_jax.upscaling.engine import Engine, Launched, Prepared, Settings, finish, latent_noise, prepare
from tsdsr_jax.upscaling.sizes import SizePlan, batch_size, slices

Writing = deque[Future[None]]


class Work(Protocol):
    """One photograph and where its result goes: `Job` from file to file, `upscaler.InMemory` without files."""

    @property
    def source(self) -> Path:
        """What messages call it."""
        ...

    def size(self, max_pixels: int) -> Size:
        """Its (height, width), upright. Raises UserError where it cannot be read or is larger."""
        ...

    def check(self, format: str, output: Size) -> None:
        """Raises UserError where a result of this size cannot be delivered."""
        ...

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        """What its noise depends on, and the photograph. Raises UserError as `size`."""
        ...

    def is_finished(self) -> bool:
        """Whether its result is there already."""
        ...

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None, format: str) -> str | None:
        """Takes the result; returns a remark, if there is one. Raises UserError where it cannot be written."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """One photograph and the file its result goes to."""

    source: Path
    target: Path

    def size(self, max_pixels: int) -> Size:
        return read_size(self.source, max_pixels)

    def check(self, format: str, output: Size) -> None:
        check_format(self.source, format, *output)

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        return self.source.read_bytes(), read_photo(self.source, max_pixels)

    def is_finished(self) -> bool:
        return self.target.exists()

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None, format: str) -> str | None:
        write_photo(self.target, rgb, photo, alpha, format)
        return lost_transparency(str(self.target), alpha, format)


# (bucket, portrait) -> the photographs computed so
JobsByShape = dict[tuple[Size, bool], list[tuple[Work, SizePlan]]]


@dataclasses.dataclass(frozen=True)
class Group:
    """Jobs that run as one batch.

    Attributes:
      jobs: with the sizes planned for each.
      bucket: the padded (height, width) they share, height ≤ width.
      masked: whether a photograph of this or another group does not fill the bucket.
      several: computed in the largest batch, even if it is the last and smaller, because every batch size is a compiled
        program; otherwise with one photograph per device.
    """

    jobs: tuple[tuple[Work, SizePlan], ...]
    bucket: Size
    masked: bool
    several: bool


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """What happens to a photograph on the host.

    Attributes:
      align: colour fix.
      format: of the results, see `images.FORMATS`.
      seed: for the latent noise.
      max_pixels: photographs with more output pixels than this are refused.
    """

    align: color.AlignMethod
    format: str
    seed: int
    max_pixels: int


def find_jobs(source: Path, output: Path, suffix: str, *, overwrite: bool = False) -> list[Job]:
    """The photographs of a file or folder (recursive, sorted), each with its target in `output`.

    The tree below a folder is kept. Photographs whose targets would coincide (a.jpg, a.png) get their own suffix into
    the name (a_jpg.png). Hidden files, and an output folder inside the input folder, are left out.

    Raises:
      UserError: nothing there, no images in it, or results would land among the photographs.
    """
    if source.is_file():
        files, root = [source], source.parent
    elif source.is_dir():
        files, root = find_photographs(source, output), source
    else:
        raise UserError(f"{source}: no such file or folder")
    targets = _distinct_targets(
        files, [(output / file.relative_to(root)).with_suffix(suffix) for file in files]
    )
    photographs = {file.resolve() for file in files}
    for target in targets:
        # Beside a single photograph a file of the result's name may be another photograph.
        beside = (
            overwrite and source.is_file() and target.parent.resolve() == root.resolve() and target.exists()
        )
        if beside or target.resolve() in photographs:
            raise UserError(
                f"{target}: lies among the photographs, and the result would replace it; choose another --output_dir"
            )
    return [Job(file, target) for file, target in zip(files, targets, strict=True)]


def _distinct_targets(files: Sequence[Path], targets: list[Path]) -> list[Path]:
    """Puts the file's own suffix into the name (a_jpg.png) wherever targets coincide, upper and lower case alike."""
    while True:
        taken = Counter(str(target).casefold() for target in targets)
        renamed = [
            target.with_name(f"{file.stem}_{file.suffix[1:]}{target.suffix}")
            if taken[str(target).casefold()] > 1
            else target
            for file, target in zip(files, targets, strict=True)
        ]
        # Again while names change: the new one may be another's plain one (a.jpg, a.png, a_jpg.bmp).
        if renamed == targets:
            return targets
        targets = renamed


class Report:
    """Counts results and collects what went wrong; threads may share it."""

    def __init__(self, note: Callable[[str], object], on_done: Callable[[], object] = lambda: None):
        self.written, self.skipped, self.outdated = 0, 0, 0
        self.failures: list[str] = []
        self.note, self.on_done, self._lock = note, on_done, Lock()

    def wrote(self) -> None:
        with self._lock:
            self.written += 1
            self.on_done()

    def failed(self, path: Path, error: Exception) -> None:
        """Notes a failure: a UserError in its own words, anything else as what it is."""
        message = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        with self._lock:
            self.failures.append(message)
            self.note(message)
            self.on_done()


def plan_groups(
    jobs: Sequence[Work],
    settings: Settings,
    devices: int,
    options: FileOptions,
    report: Report,
    part: tuple[int, int] = (0, 1),
) -> list[Group]:
    """Reads the headers, and puts photographs of like shape into batches.

    The result depends on the set of files, not on which of them are finished or on the order: a resumed run computes
    each photograph exactly as an uninterrupted one, unless a device's memory runs out in one of them only.

    Args:
      jobs: the photographs.
      settings: for the sizes and how many photographs go together.
      devices: that a group is spread over.
      options: for format and size limits.
      report: takes photographs that cannot be read or are too large.
      part: (i, n): keep the i-th of n parts. Shapes follow from the whole set all the same, and which photographs a part
        has does not depend on `devices` or the batch, which may differ between the machines that share a folder.
    """

    index, parts = part

    def measure(number: int, job: Work) -> SizePlan | None:
        try:
            sizes = settings.plan(job.size(options.max_pixels))
            if sizes.padded[0] * sizes.padded[1] > options.max_pixels:
                raise UserError(
                    f"{job.source}: would be processed at {sizes.padded[1]}×{sizes.padded[0]} pixels, more than "
                    f"--max_pixels {options.max_pixels}"
                )
            job.check(options.format, sizes.output)
            return sizes
        except Exception as error:  # whatever one file provokes, the others go on
            if number % parts == index:  # once, not by every part
                report.failed(job.source, error)
            return None

    with ThreadPoolExecutor() as pool:
        plans = pool.map(measure, range(len(jobs)), jobs)
        measured = [(job, sizes) for job, sizes in zip(jobs, plans, strict=True) if sizes]
    buckets = plan_buckets([sizes.lying for _, sizes in measured])
    masked = {bucket for (_, sizes), bucket in zip(measured, buckets, strict=True) if sizes.lying != bucket}
    together: JobsByShape = {}
    for (job, sizes), bucket in zip(measured, buckets, strict=True):
        together.setdefault((bucket, sizes.portrait), []).append((job, sizes))
    mine = _dealt(together, part)
    many = {bucket: devices * settings.photos_at_a_time(bucket) for bucket, _ in mine}
    # Portraits and landscapes share programs: what one of them compiles serves the other.
    several = {
        bucket
        for (bucket, _), members in mine.items()
        if batch_size(len(members), devices, many[bucket]) > devices
    }
    return [
        Group(tuple(batch), bucket, bucket in masked, bucket in several)
        for (bucket, _), members in mine.items()
        for batch in slices(members, many[bucket] if bucket in several else devices)
    ]


def _dealt(together: JobsByShape, part: tuple[int, int]) -> JobsByShape:
    """The (i, n)-th part of all members, dealt on from one shape to the next, so that few of many shapes are shared, too."""
    (index, parts), dealt, mine = part, 0, {}
    for shape, members in sorted(together.items()):
        mine[shape] = members[(index - dealt) % parts :: parts]
        dealt += len(members)
    return mine


def unfinished(groups: Sequence[Group], report: Report) -> list[Group]:
    """The groups with a result still missing; counts the results that exist.

    A group of which only some results exist stays whole: all are computed, so that each comes out as in an uninterrupted
    run, and the missing ones are written.
    """
    todo = []
    for group in groups:
        finished = [job for job, _ in group.jobs if job.target.exists()]
        report.skipped += len(finished)
        report.outdated += sum(job.target.stat().st_mtime < job.source.stat().st_mtime for job in finished)
        if len(finished) < len(group.jobs):
            todo.append(group)
    return todo


def upscale(
    upscaler: Engine,
    groups: Sequence[Group],
    options: FileOptions,
    report: Report,
    *,
    overwrite: bool = False,
    threads: int = 4,
) -> None:
    """Runs the groups. A result that exists is written again only with `overwrite`."""
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        run = _Run(upscaler, options, report, overwrite, readers, writers, threads)
        try:
            run.all(groups)
        except BaseException as error:
            # What has been computed is still written, unless the user wants to leave now.
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=isinstance(error, KeyboardInterrupt))
            raise


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The loop around the device: two batches read ahead, two on the device, a bounded number being written."""

    upscaler: Engine
    options: FileOptions
    report: Report
    overwrite: bool
    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor
    threads: int
    crowded: set[Size] = dataclasses.field(default_factory=set)

    def all(self, groups: Sequence[Group]) -> None:
        upcoming, ahead = iter(groups), deque()
        running: deque[tuple[list[_Slot], Group, Launched]] = deque()
        writing: Writing = deque()
        for _ in range(2):
            self._read_next(upcoming, ahead)
        while ahead:
            group, futures = ahead.popleft()
            self._read_next(upcoming, ahead)
            slots = [slot for future in futures if (slot := future.result())]
            for few, batch in self._batches(slots, group):
                if launched := self._launch(few, group, batch, writing):
                    running.append((few, group, launched))
                while len(running) > 1:
                    self._fetch(*running.popleft(), writing)
            while running and not ahead:
                self._fetch(*running.popleft(), writing)
            while len(writing) > 2 * self.threads:
                writing.popleft().result()
        for future in writing:
            future.result()

    def _read_next(self, upcoming: Iterator[Group], ahead: deque) -> None:
        group = next(upcoming, None)
        if group:
            ahead.append((group, [self.readers.submit(self._read, job, plan) for job, plan in group.jobs]))

    def _read(self, job: Work, plan: SizePlan) -> _Slot | None:
        """Reads and prepares one photograph; None where that fails, and a line in the report if its result is wanted."""
        try:
            content, photo = job.read(self.options.max_pixels)
            if photo.rgb.shape[:2] != plan.source:
                raise UserError(f"{job.source}: changed while it was being processed; run again")
            shape = (*plan.latent, self.upscaler.latent_channels)
            sample = self.upscaler.settings.sample
            noise = latent_noise(content, self.options.seed, shape) if sample else np.zeros(shape, np.float32)
            return _Slot(job, plan, photo, prepare(photo.rgb, plan, noise))
        except Exception as error:  # whatever one file provokes, the others go on
            if self._is_wanted(job):
                self.report.failed(job.source, error)
            return None

    def _batches(self, slots: list[_Slot], group: Group) -> Iterator[tuple[list[_Slot], int]]:
        """Photographs and the batch to compute them in; without those of which every result is there.

        The batch is asked for each time: a large one may have failed meanwhile.
        """
        while slots:
            batch = self._batch(group)
            few, slots = slots[:batch], slots[batch:]
            if any(self._is_wanted(slot.job) for slot in few):
                yield few, batch

    def _batch(self, group: Group) -> int:
        """As many as the upscaler takes, or one per device where a large batch of this bucket has failed."""
        few = not group.several or group.bucket in self.crowded
        return len(self.upscaler.devices) if few else self.upscaler.largest_batch(group.bucket)

    def _launch(self, slots: list[_Slot], group: Group, batch: int, writing: Writing) -> Launched | None:
        try:
            photos = [slot.prepared for slot in slots]
            return self.upscaler.launch(photos, group.bucket, masked=group.masked, batch=batch)
        except jax.errors.JaxRuntimeError as error:
            again = self._after_failure(slots, group, batch, error)
        # Not while the error is at hand, whose traceback holds the batch's arrays.
        self._compute(again, group, writing)
        return None

    def _fetch(self, slots: list[_Slot], group: Group, launched: Launched, writing: Writing) -> None:
        """Waits for a batch and hands its pictures to the writers."""
        pictures, again = None, []
        try:
            pictures = launched.results()
        except jax.errors.JaxRuntimeError as error:
            again = self._after_failure(slots, group, launched.batch, error)
        if pictures is None:
            self._compute(again, group, writing)
            return
        self._write_later(slots, pictures, writing)
        pairs = zip(slots, pictures, strict=True)
        overflowed = [slot for slot, picture in pairs if picture is None and self._is_wanted(slot.job)]
        for again in slices(overflowed, len(self.upscaler.devices)):
            self._write_later(again, self._in_float32(again, launched), writing, last=True)

    def _in_float32(self, slots: list[_Slot], launched: Launched) -> list[np.ndarray | None]:
        """Computes photographs again, one per device, whose results overflowed in half precision."""
        if self.upscaler.dtype == np.float32:
            return [None] * len(slots)
        for slot in slots:
            self.report.note(
                f"{slot.job.source}: not finite in {self.upscaler.dtype}; computing again in float32"
            )
        try:
            photos = [slot.prepared for slot in slots]
            return self.upscaler.in_float32.launch(photos, launched.bucket, masked=launched.masked).results()
        except jax.errors.JaxRuntimeError as error:
            self._out_of_memory(slots, error)
            return []

    def _write_later(
        self,
        slots: list[_Slot],
        pictures: list[np.ndarray | None],
        writing: Writing,
        last: bool = False,
    ) -> None:
        """Queues the pictures that are there; on the last try, reports those that are not."""
        for slot, picture in zip(slots, pictures, strict=False):
            if picture is not None:
                if self._is_wanted(slot.job):
                    writing.append(self.writers.submit(self._write, slot.job, slot.plan, slot.photo, picture))
            elif last:
                reason = (
                    f"{slot.job.source}: the result is not finite, in float32 too; are the weights damaged?"
                )
                self.report.failed(slot.job.source, UserError(reason))

    def _is_wanted(self, job: Work) -> bool:
        """Some are computed only so that their companions come out as in an uninterrupted run."""
        return self.overwrite or not job.is_finished()

    def _write(self, job: Work, plan: SizePlan, photo: Photo, picture: np.ndarray) -> None:
        """Finishes and writes one result; a failure goes into the report."""
        try:
            rgb = finish(picture, photo.rgb, plan, self.options.align)
            alpha = None if photo.alpha is None else pillow_bicubic(photo.alpha, *plan.output)
            if remark := job.deliver(rgb, photo, alpha, self.options.format):
                self.report.note(remark)
            self.report.wrote()
        except Exception as error:  # whatever one file provokes, the others go on
            self.report.failed(job.source, error)

    def _after_failure(self, slots: list[_Slot], group: Group, batch: int, error: Exception) -> list[_Slot]:
        """The photographs to compute again: those of a large batch, whatever the error is called.

        Libraries below XLA name a lack of memory in words of their own. One photograph per device that fails so is
        reported, and anything else is a bug and goes up.
        """
        few = len(self.upscaler.devices)
        if batch <= few:
            self._out_of_memory([slot for slot in slots if self._is_wanted(slot.job)], error)
            return []
        if group.bucket not in self.crowded:
            height, width = group.bucket
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.report.note(
                f"{batch} photographs of {width}×{height} at a time failed ({reason}); going on with {few}, as with "
                "--batch_size 1"
            )
        self.crowded.add(group.bucket)
        return [slot for slot in slots if self._is_wanted(slot.job)]

    def _compute(self, slots: list[_Slot], group: Group, writing: Writing) -> None:
        """One batch after the other."""
        for few, batch in self._batches(slots, group):
            if launched := self._launch(few, group, batch, writing):
                self._fetch(few, group, launched, writing)

    def _out_of_memory(self, slots: list[_Slot], error: Exception) -> None:
        """Costs a batch, not the run; anything else is a bug and goes up."""
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise error
        for slot in slots:
            height, width = slot.plan.padded
            message = (
                f"{slot.job.source}: out of device memory at {width}×{height}; --is_use_tile (with a smaller "
                "--vae_decoder_tiled_size) or a smaller --tile_batch_size lowers the peak"
            )
            self.report.failed(slot.job.source, UserError(message))


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """One photograph on its way through."""

    job: Work
    plan: SizePlan
    photo: Photo
    prepared: Prepared
