"""Runs groups of photographs through the engine: reads them, computes, finishes and delivers.

Threads read and write while the device computes, so that it never waits for files. A bad file does not affect other results.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from tsdsr_jax.errors import UserError
from tsdsr_jax.images import color
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.files import Photo
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.upscaling.engine import Engine, Launched, Prepared, Progress
from tsdsr_jax.upscaling.jobs import Job, Report
from tsdsr_jax.upscaling.planning import Group, Settings, SizePlan, slices
from tsdsr_jax.upscaling.tiling import cut_batch


def upscale_groups(
    engine: Engine,
    groups: Sequence[Group[Job]],
    settings: Settings,
    report: Report,
    *,
    overwrite: bool = False,
    threads: int = 4,
    progress: Progress | None = None,
    progress_from: int = 0,
) -> None:
    """Computes the groups and delivers their results.

    Args:
      settings: those that the groups were planned with.
      report: receives counts, remarks and failures.
      overwrite: replace results that exist; otherwise these are kept.
      threads: number of threads that read, and of threads that write.
      progress: see `Engine.launch`. An exception that it raises ends the run.
      progress_from: only photographs of at least this many tiles report progress, because the device waits for it.
    """
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        run = _Run(
            engine, settings, report, overwrite, readers, writers, 2 * threads, progress, progress_from
        )
        try:
            run.all(groups)
        except BaseException as error:
            # What has been computed is still written, unless the user wants to leave now.
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=isinstance(error, KeyboardInterrupt))
            raise


# ---- one photograph, on the host -------------------------------------------------------------


def latent_noise(content: bytes, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise that depends only on the seed and the file's content."""
    digest = hashlib.sha256(seed.to_bytes(16, "little", signed=True) + content).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.standard_normal(shape, dtype=np.float32)


def finish_picture(
    picture: np.ndarray, rgb: np.ndarray, plan: SizePlan, align: color.AlignMethod
) -> np.ndarray:
    """Brings the network's picture to the output size and gives it the photograph's colors.

    Args:
      picture: (H, W, 3) uint8 of size `plan.padded`.
      rgb: the photograph, (h, w, 3) uint8.

    Returns:
      (H, W, 3) uint8 of size `plan.output`.
    """
    picture = picture[: plan.resized[0], : plan.resized[1]]
    if plan.output != plan.resized:
        picture = pillow_bicubic(picture, *plan.output)
    upscaled = pillow_bicubic(rgb, *plan.output) if align == "wavelet" else picture
    return color.align(align, picture, rgb, upscaled)


# ---- the loop around the device --------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """One photograph while it is processed."""

    job: Job
    plan: SizePlan
    photo: Photo
    prepared: Prepared


class _Batch(NamedTuple):
    """Photographs of a group that are computed together, in a program for `size` of them."""

    slots: list[_Slot]
    group: Group[Job]
    size: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The state of a run: two groups read ahead, two batches on the device, a bounded number of pictures being written.

    Attributes:
      most_writing: pictures that may wait to be written before the device is given more.
      crowded: buckets of which only one photograph per device fits into memory.
      banded: buckets of which not even one fits, unless it is computed in bands.
    """

    engine: Engine
    settings: Settings
    report: Report
    overwrite: bool
    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor
    most_writing: int
    progress: Progress | None
    progress_from: int
    crowded: set[Size] = dataclasses.field(default_factory=set)
    banded: set[Size] = dataclasses.field(default_factory=set)
    writing: deque[Future[None]] = dataclasses.field(default_factory=deque)

    def all(self, groups: Sequence[Group[Job]]) -> None:
        upcoming = iter(groups)
        reading: deque[tuple[Group[Job], list[Future[_Slot | None]]]] = deque()
        running: deque[tuple[_Batch, Launched]] = deque()

        def read_next() -> None:
            if group := next(upcoming, None):
                jobs = [self.readers.submit(self._read, job, plan) for job, plan in group.jobs]
                reading.append((group, jobs))

        for _ in range(2):
            read_next()
        while reading:
            group, futures = reading.popleft()
            read_next()
            slots = [slot for future in futures if (slot := future.result())]
            for batch in self._batches(slots, group):
                if launched := self._launch(batch):
                    running.append((batch, launched))
                while len(running) > 1:
                    self._fetch(*running.popleft())
            while running and not reading:
                self._fetch(*running.popleft())
            while len(self.writing) > self.most_writing:
                self.writing.popleft().result()
        for future in self.writing:
            future.result()

    def _read(self, job: Job, plan: SizePlan) -> _Slot | None:
        """Reads and prepares one photograph. If that fails, returns None and reports it, if its result is wanted."""
        try:
            content, photo = job.read(self.settings.max_pixels)
            if photo.rgb.shape[:2] != plan.source:
                raise UserError(f"{job.source}: changed while it was being processed; run again")
            shape = (*plan.latent, self.engine.latent_channels)
            if self._is_wanted(job):
                for note in photo.notes:
                    self.report.note(note)
            sample, seed = self.settings.sample, self.settings.seed
            noise = latent_noise(content, seed, shape) if sample else np.zeros(shape, np.float32)
            return _Slot(job, plan, photo, Prepared(plan, photo.rgb, noise))
        except Exception as error:  # whatever is wrong with one file, the others go on
            if self._is_wanted(job):
                self.report.failed(job.source, error)
            return None

    def _batches(self, slots: list[_Slot], group: Group[Job]) -> Iterator[_Batch]:
        """Cuts photographs into batches, and leaves out batches whose results all exist.

        The batch size is looked up each time, because a large batch may have failed in the meantime.
        """
        while slots:
            size = self._batch_size(group)
            batch, slots = _Batch(slots[:size], group, size), slots[size:]
            if self._wanted(batch.slots):
                yield batch

    def _batch_size(self, group: Group[Job]) -> int:
        """As many photographs as the engine takes; one per device if a large batch of this bucket has failed."""
        if group.several and group.bucket not in self.crowded:
            return self.engine.largest_batch(group.bucket, self.settings)
        return len(self.engine.devices)

    def _engine(self, bucket: Size) -> Engine:
        return self.engine.in_bands or self.engine if bucket in self.banded else self.engine

    def _launch(self, batch: _Batch) -> Launched | None:
        try:
            return self._engine(batch.group.bucket).launch(
                [slot.prepared for slot in batch.slots],
                batch.group.bucket,
                self.settings,
                masked=batch.group.masked,
                batch=batch.size,
                progress=self._progress_of(batch),
            )
        except jax.errors.JaxRuntimeError as error:
            again = self._after_failure(batch, error)
        # Outside `except`: the error's traceback holds the batch's arrays.
        self._compute(again, batch.group)
        return None

    def _progress_of(self, batch: _Batch) -> Progress | None:
        tiles = max(len(cut_batch([slot.plan], self.settings)) for slot in batch.slots)
        return self.progress if tiles >= self.progress_from else None

    def _fetch(self, batch: _Batch, launched: Launched) -> None:
        """Waits for a batch and hands its pictures to the writers."""
        try:
            pictures = launched.results()
        except jax.errors.JaxRuntimeError as error:
            pictures, again = None, self._after_failure(batch, error)
        if pictures is None:
            self._compute(again, batch.group)
            return
        overflowed = []
        for slot, picture in zip(batch.slots, pictures, strict=True):
            if picture is not None:
                self._write_later(slot, picture)
            elif self._is_wanted(slot.job):
                overflowed.append(slot)
        for slots in slices(overflowed, len(self.engine.devices)):
            self._compute_in_float32(slots, launched)

    def _compute_in_float32(self, slots: Sequence[_Slot], launched: Launched) -> None:
        """Computes photographs whose results overflowed in half precision again, one per device."""
        pictures: Sequence[np.ndarray | None] = [None] * len(slots)
        if self.engine.dtype != np.float32:
            dtype = np.dtype(self.engine.dtype)
            for slot in slots:
                self.report.note(f"{slot.job.source}: not finite in {dtype}; computing again in float32")
            try:
                photos = [slot.prepared for slot in slots]
                again = self.engine.in_float32.launch(
                    photos, launched.bucket, self.settings, masked=launched.masked, progress=self.progress
                )
                pictures = again.results()
            except jax.errors.JaxRuntimeError as error:
                self._out_of_memory(slots, error)
                return
        for slot, picture in zip(slots, pictures, strict=True):
            if picture is not None:
                self._write_later(slot, picture)
                continue
            reason = f"{slot.job.source}: the result is not finite, in float32 too; are the weights damaged?"
            self.report.failed(slot.job.source, UserError(reason))

    def _write_later(self, slot: _Slot, picture: np.ndarray) -> None:
        if self._is_wanted(slot.job):
            self.writing.append(self.writers.submit(self._write, slot, picture))

    def _write(self, slot: _Slot, picture: np.ndarray) -> None:
        """Finishes and delivers one result; a failure goes into the report."""
        job, plan, photo = slot.job, slot.plan, slot.photo
        try:
            rgb = finish_picture(picture, photo.rgb, plan, self.settings.align)
            alpha = None if photo.alpha is None else pillow_bicubic(photo.alpha, *plan.output)
            if remark := job.deliver(rgb, photo, alpha):
                self.report.note(remark)
        except Exception as error:  # whatever is wrong with one file, the others go on
            self.report.failed(job.source, error)
        else:
            self.report.wrote()

    def _is_wanted(self, job: Job) -> bool:
        """Whether the result is to be delivered. Others are computed only so that their batch gives the same results as in
        an uninterrupted run."""
        return self.overwrite or not job.is_finished()

    def _wanted(self, slots: Sequence[_Slot]) -> list[_Slot]:
        return [slot for slot in slots if self._is_wanted(slot.job)]

    def _after_failure(self, batch: _Batch, error: jax.errors.JaxRuntimeError) -> list[_Slot]:
        """Returns the photographs to compute again, one per device: those of a failed large batch, whatever the error was.

        Libraries below XLA report a lack of memory in various ways. If one photograph per device runs out of memory, too, it
        is computed in bands, and if that does not help, reported; any other error is a bug and is raised.
        """
        one_each, bucket = len(self.engine.devices), batch.group.bucket
        if batch.size <= one_each:
            if _is_lack_of_memory(error) and bucket not in self.banded and self.engine.in_bands:
                self.report.note(
                    f"a photograph of {bucket[1]}×{bucket[0]} does not fit; computing it in bands"
                )
                self.banded.add(bucket)
                return self._wanted(batch.slots)
            self._out_of_memory(self._wanted(batch.slots), error)
            return []
        if bucket not in self.crowded:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.report.note(
                f"{batch.size} photographs of {bucket[1]}×{bucket[0]} at a time failed ({reason}); continuing with "
                f"{one_each}, as with --batch_size 1"
            )
        self.crowded.add(bucket)
        return self._wanted(batch.slots)

    def _compute(self, slots: list[_Slot], group: Group[Job]) -> None:
        """Computes photographs now, one batch after the other."""
        for batch in self._batches(slots, group):
            if launched := self._launch(batch):
                self._fetch(batch, launched)

    def _out_of_memory(self, slots: Sequence[_Slot], error: jax.errors.JaxRuntimeError) -> None:
        """Reports that memory ran out, which ends a batch but not the run; any other error is raised."""
        if not _is_lack_of_memory(error):
            raise error
        for slot in slots:
            height, width = slot.plan.padded
            message = (
                f"{slot.job.source}: out of device memory at {width}×{height}; --is_use_tile (with a smaller "
                "--vae_decoder_tiled_size) or a smaller --tile_batch_size lowers the peak"
            )
            self.report.failed(slot.job.source, UserError(message))


def _is_lack_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
