"""Measures the host's work beside a GPU: reading, enlarging, color correction and writing, with a device that takes no time.

    python bench/host.py --photos drealsr/test_LR          # images per second and core; cores that keep one GPU busy

It runs on one core and counts CPU time, so that other work on the machine matters little.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tsdsr_jax import cli
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.resize import pillow_bicubic
from tsdsr_jax.images.writing import FORMATS
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.engine import Prepared
from tsdsr_jax.upscaling.jobs import Report
from tsdsr_jax.upscaling.planning import Settings, plan_groups
from tsdsr_jax.upscaling.targets import Naming, find_jobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    photos: Path
    """Folder of photographs; 128×128 give outputs of 512×512."""
    repeat: int = 3
    """Number of runs; the fastest counts."""
    gpu_ms: float = 12.0
    """Milliseconds that a GPU takes per image."""
    formats: tuple[str, ...] = ("png", "jpg", "webp")
    """Formats to write; repeat for several."""
    json: Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Done:
    """Stands in for the result of `Engine.launch`, available at once."""

    pictures: list[np.ndarray]
    batch: int

    def results(self) -> list[np.ndarray]:
        return self.pictures


class NoDevice:
    """Stands in for the engine; its pictures are the enlarged photographs, which it makes once."""

    devices, latent_channels, dtype = ("none",), 16, np.dtype(np.float32)

    def __init__(self) -> None:
        self.pictures: dict[bytes, np.ndarray] = {}

    def _picture(self, photo: Prepared) -> np.ndarray:
        key = photo.image.tobytes()
        if key not in self.pictures:
            self.pictures[key] = pillow_bicubic(photo.image, *photo.plan.padded)
        return self.pictures[key]

    def launch(
        self, photos: Sequence[Prepared], bucket: Size, settings: Settings, *, batch: int, **more: object
    ) -> Done:
        return Done([self._picture(photo) for photo in photos], batch)

    def largest_batch(self, bucket: Size, settings: Settings) -> int:
        return settings.photos_at_a_time(bucket)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    unknown = set(options.formats) - set(FORMATS)
    if unknown:
        raise UserError(f"--formats {', '.join(unknown)}: expected some of {', '.join(FORMATS)}")
    if not options.gpu_ms > 0:
        raise UserError(f"--gpu_ms {options.gpu_ms:g}: expected more than 0")
    if options.repeat < 1:
        raise UserError(f"--repeat {options.repeat}: expected at least 1")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = [measured(options, name) for name in options.formats]
    if options.json:
        options.json.write_text(json.dumps({"gpu_ms": options.gpu_ms, "rows": rows}, indent=2) + "\n")


def measured(options: Options, name: str) -> dict[str, float | str]:
    """Runs the folder; the copies to and from a real device are not in it. A first run, in which the pictures are made, does
    not count."""
    device, settings, seconds, problems = NoDevice(), Settings(photo_batch=8), [], []
    with tempfile.TemporaryDirectory() as made:
        for index in range(options.repeat + 1):
            jobs = find_jobs([options.photos], Path(made) / str(index), Naming(name)).jobs
            report = Report(problems.append)
            start = time.process_time()
            groups = plan_groups(jobs, settings, 1, report)
            upscale_groups(device, groups, settings, report)
            seconds.append(time.process_time() - start)
    if problems:
        raise UserError(problems[0])
    rate = len(jobs) / min(seconds[1:])
    cores = 1000 / options.gpu_ms / rate
    print(
        f"{name}: {rate:.1f} images per second on one core; {cores:.1f} cores for a GPU at {options.gpu_ms:g} ms per image"
    )
    return {"format": name, "images_per_second_and_core": rate, "cores_per_gpu": cores}


if __name__ == "__main__":
    cli.run(main)
