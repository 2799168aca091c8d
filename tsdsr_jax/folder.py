"""A folder of photographs through the upscaler: which files, in which batches, and what becomes of each.

Reading, preparing and writing run in threads around the device, so that it waits for neither. One bad file costs no
other its result.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import jax
import numpy as np
from PIL import Image

from tsdsr_jax import color
from tsdsr_jax.errors import UserError
from tsdsr_jax.images import IMAGE_SUFFIXES, Photo, read_photo, read_size, write_photo
from tsdsr_jax.sizes import Size, SizePlan, plan_buckets
from tsdsr_jax.upscaler import Launched, Prepared, Upscaler, finish, latent_noise, prepare


@dataclasses.dataclass(frozen=True)
class Job:
    """One photograph and the file its result goes to."""

    source: Path
    target: Path


@dataclasses.dataclass(frozen=True)
class Group:
    """Jobs that run as one batch.

    Attributes:
      jobs: with the sizes planned for each.
      bucket: the padded (height, width) they share, height ≤ width.
    """

    jobs: tuple[tuple[Job, SizePlan], ...]
    bucket: Size


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """What happens to a photograph on the host.

    Attributes:
      align: colour fix.
      format: of the results, see `images.FORMATS`.
      seed: for the latent noise.
      max_pixels: photographs with more output pixels than this are refused.
    """

    align: color.Method
    format: str
    seed: int
    max_pixels: int


def find_jobs(source: Path, output: Path, suffix: str) -> list[Job]:
    """The photographs of a file or folder (recursive, sorted), each with its target in `output`.

    The tree below a folder is kept. Photographs whose targets would coincide (a.jpg, a.png) get their own suffix into
    the name (a_jpg.png). Hidden files, and an output folder inside the input folder, are left out.

    Raises:
      UserError: nothing there, no images in it, or results would land among the photographs.
    """
    if source.is_file():
        files, root = [source], source.parent
    elif source.is_dir():
        root = source
        if output.resolve() == source.resolve():
            raise UserError(
                f"{output}: input and output folder are the same; results would mix with the photographs"
            )
        files = sorted(_images_below(source, output))
        if not files:
            raise UserError(
                f"{source}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, in subfolders too)"
            )
    else:
        raise UserError(f"{source}: no such file or folder")
    plain = [(output / file.relative_to(root)).with_suffix(suffix) for file in files]
    taken = Counter(str(target).casefold() for target in plain)
    jobs = []
    for file, target in zip(files, plain, strict=True):
        if taken[str(target).casefold()] > 1:
            target = target.with_name(f"{file.stem}_{file.suffix[1:]}{suffix}")
        if target.exists() and target.samefile(file):
            raise UserError(
                f"{target}: the result would replace the photograph itself; choose another --output_dir"
            )
        jobs.append(Job(file, target))
    return jobs


def _images_below(folder: Path, output: Path) -> Iterable[Path]:
    excluded = output.resolve()
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            continue
        if excluded not in path.resolve().parents:
            yield path


class Report:
    """Counts results and collects what went wrong; threads may share it."""

    def __init__(self, note: Callable[[str], object], on_done: Callable[[], object] = lambda: None):
        self.written, self.skipped = 0, 0
        self.failures: list[str] = []
        self.note, self._on_done, self._lock = note, on_done, Lock()

    def wrote(self) -> None:
        with self._lock:
            self.written += 1
            self._on_done()

    def failed(self, message: str) -> None:
        with self._lock:
            self.failures.append(message)
            self.note(message)
            self._on_done()


def plan_groups(
    jobs: Sequence[Job], plan: Callable[[Size], SizePlan], batch: int, max_pixels: int, report: Report
) -> list[Group]:
    """Reads the headers, and puts photographs of like shape into batches.

    The result depends on the set of files, not on which of them are finished or on the order: a resumed run computes
    each photograph exactly as an uninterrupted one.
    """

    def measure(job: Job) -> SizePlan | None:
        try:
            sizes = plan(read_size(job.source, max_pixels))
            pixels = sizes.padded[0] * sizes.padded[1]
            if pixels > max_pixels:
                raise UserError(
                    f"{job.source}: would be processed at {sizes.padded[1]}×{sizes.padded[0]} pixels, more than "
                    f"--max_pixels {max_pixels}"
                )
            return sizes
        except UserError as error:
            report.failed(str(error))
            return None

    with ThreadPoolExecutor() as pool:
        measured = [(job, sizes) for job, sizes in zip(jobs, pool.map(measure, jobs), strict=True) if sizes]
    buckets = plan_buckets([sizes.lying for _, sizes in measured])
    together: dict[tuple[Size, bool], list[tuple[Job, SizePlan]]] = {}
    for (job, sizes), bucket in zip(measured, buckets, strict=True):
        together.setdefault((bucket, sizes.portrait), []).append((job, sizes))
    return [
        Group(tuple(members[start : start + batch]), bucket)
        for (bucket, _), members in sorted(together.items())
        for start in range(0, len(members), batch)
    ]


def upscale(
    upscaler: Upscaler,
    groups: Sequence[Group],
    options: FileOptions,
    report: Report,
    *,
    overwrite: bool = False,
    threads: int = 4,
) -> None:
    """Runs the groups.

    Groups whose results all exist are skipped. In a group of which only some exist all are computed, so that each
    comes out as in an uninterrupted run, and the missing ones are written.
    """
    todo = []
    for group in groups:
        finished = 0 if overwrite else sum(job.target.exists() for job, _ in group.jobs)
        report.skipped += finished
        if finished < len(group.jobs):
            todo.append(group)
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        run = _Run(upscaler, options, report, overwrite, readers, writers, threads)
        try:
            run.all(todo)
        except BaseException:
            # What is being written finishes; what waits does not start.
            readers.shutdown(wait=False, cancel_futures=True)
            writers.shutdown(wait=False, cancel_futures=True)
            raise


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """The loop around the device: two batches read ahead, two on the device, a bounded number being written."""

    upscaler: Upscaler
    options: FileOptions
    report: Report
    overwrite: bool
    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor
    threads: int

    def all(self, groups: Sequence[Group]) -> None:
        upcoming, ahead = iter(groups), deque()
        running: deque[tuple[list[_Slot], Launched]] = deque()
        writing: deque[Future[None]] = deque()
        for _ in range(2):
            self._read_next(upcoming, ahead)
        while ahead:
            bucket, futures = ahead.popleft()
            self._read_next(upcoming, ahead)
            slots = [slot for future in futures if (slot := future.result())]
            launched = self._launch(slots, bucket) if slots else None
            if launched:
                running.append((slots, launched))
            while len(running) > 1 or (running and not ahead):
                self._fetch(*running.popleft(), writing)
            while len(writing) > 2 * self.threads:
                writing.popleft().result()
        for future in writing:
            future.result()

    def _read_next(self, upcoming: Iterator[Group], ahead: deque) -> None:
        group = next(upcoming, None)
        if group:
            ahead.append(
                (group.bucket, [self.readers.submit(self._read, job, plan) for job, plan in group.jobs])
            )

    def _read(self, job: Job, plan: SizePlan) -> _Slot | None:
        """Reads and prepares one photograph; None, and a line in the report, where that fails."""
        try:
            content = job.source.read_bytes()
            photo = read_photo(job.source, self.options.max_pixels)
            if photo.rgb.shape[:2] != plan.source:
                raise UserError(f"{job.source}: changed while it was being processed; run again")
        except OSError as error:
            self.report.failed(f"{job.source}: cannot be read ({error.strerror})")
            return None
        except UserError as error:
            self.report.failed(str(error))
            return None
        shape = (*plan.latent, self.upscaler.latent_channels)
        sample = self.upscaler.settings.sample
        noise = latent_noise(content, self.options.seed, shape) if sample else np.zeros(shape, np.float32)
        return _Slot(job, plan, photo, prepare(photo.rgb, plan, noise))

    def _launch(self, slots: list[_Slot], bucket: Size) -> Launched | None:
        try:
            return self.upscaler.launch([slot.prepared for slot in slots], bucket)
        except jax.errors.JaxRuntimeError as error:
            self._device_failure(slots, error)
            return None

    def _fetch(self, slots: list[_Slot], launched: Launched, writing: deque[Future[None]]) -> None:
        """Waits for a batch and hands its pictures to the writers."""
        try:
            pictures = launched.results()
            if any(picture is None for picture in pictures):
                pictures = self._in_float32(slots, launched, pictures)
        except jax.errors.JaxRuntimeError as error:
            self._device_failure(slots, error)
            return
        for slot, picture in zip(slots, pictures, strict=True):
            if picture is None:
                self.report.failed(
                    f"{slot.job.source}: the result is not finite, in float32 too; are the weights damaged?"
                )
            elif self.overwrite or not slot.job.target.exists():
                writing.append(self.writers.submit(self._write, slot, picture))

    def _in_float32(
        self, slots: list[_Slot], launched: Launched, pictures: list[np.ndarray | None]
    ) -> list[np.ndarray | None]:
        """Replaces pictures that overflowed by what float32 gives."""
        if self.upscaler.dtype == np.float32:
            return pictures
        again = self.upscaler.in_float32.launch([slot.prepared for slot in slots], launched.bucket).results()
        for slot, picture in zip(slots, pictures, strict=True):
            if picture is None:
                self.report.note(
                    f"{slot.job.source}: not finite in {self.upscaler.dtype}; computed again in float32"
                )
        return [old if old is not None else new for old, new in zip(pictures, again, strict=True)]

    def _write(self, slot: _Slot, picture: np.ndarray) -> None:
        """Finishes and writes one result; a failure goes into the report."""
        plan, photo = slot.plan, slot.photo
        try:
            rgb = finish(picture, photo.rgb, plan, self.options.align)
            alpha = photo.alpha
            if alpha is not None:
                alpha = np.asarray(Image.fromarray(alpha).resize(plan.output[::-1], Image.Resampling.BICUBIC))
            write_photo(slot.job.target, rgb, photo, alpha, self.options.format)
            self.report.wrote()
        except UserError as error:
            self.report.failed(str(error))

    def _device_failure(self, slots: list[_Slot], error: Exception) -> None:
        """Out of memory costs a batch, not the run; anything else is a bug and goes up."""
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise error
        for slot in slots:
            height, width = slot.plan.padded
            self.report.failed(
                f"{slot.job.source}: out of device memory at {width}×{height}; --is_use_tile (smaller "
                "--vae_decoder_tiled_size, --vae_encoder_tiled_size) or a smaller --tile_batch_size lowers the peak"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Slot:
    """One photograph on its way through."""

    job: Job
    plan: SizePlan
    photo: Photo
    prepared: Prepared
