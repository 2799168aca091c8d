"""Times a folder of photographs from files to files, against PyTorch on a CPU, in float32 with the same random weights.

    python bench/whole_folder.py --size tiny --photos drealsr/test_LR

Everything except loading the networks is timed: reading, enlarging, both networks, color correction and writing PNG. The
first run, which compiles, is listed separately. PyTorch runs the tests' oracle, one photograph after another. The files must
agree.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import timing
import torch
from PIL import Image
from torch_networks import TorchNetworks
from torch_pipeline import PNG_LEVEL

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]
from oracle_pipeline import OraclePipeline
from tsdsr_jax import cli, devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.engine import Bands, Engine
from tsdsr_jax.upscaling.jobs import FileJob, Report
from tsdsr_jax.upscaling.planning import Settings, plan_groups
from tsdsr_jax.upscaling.targets import find_jobs

# Mean difference of a file, in gray levels.
FARTHEST = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    photos: Path
    """Folder of photographs."""
    size: Literal["tiny", "half", "full"] = "tiny"
    """Size of both networks."""
    process_size: int = 512
    """Smallest side, in output pixels, that is processed without enlarging."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.process_size < 64 or options.process_size % 16:
        raise UserError(f"--process_size {options.process_size}: expected a multiple of 16 from 64")
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(devices.cores())
    networks = TorchNetworks.random(options.size, "cpu", torch.float32)
    settings = Settings(sample=False, process_size=options.process_size)
    engine = networks.engine(options.size, Bands(), "fp32")
    pipeline = OraclePipeline(
        networks.transformer, networks.vae, *networks.text, process_size=options.process_size
    )
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        jobs = find_jobs([options.photos], out).jobs
        first = timed(lambda: ours(engine, settings, jobs, out, "first"))
        again = min(
            timed(lambda name=name: ours(engine, settings, jobs, out, name)) for name in ("again", "third")
        )
        theirs = min(timed(lambda: in_torch(pipeline, jobs, out)) for _ in range(2))
        apart = max(difference(moved(job, out, "again"), moved(job, out, "torch")) for job in jobs)
    print(
        f"{len(jobs)} files to files: {again:.1f} s, with compilation {first:.1f} s; PyTorch {theirs:.1f} s "
        f"(ratio {theirs / again:.2f}, {theirs / first:.2f}); at most {apart:.2f} gray levels apart"
    )
    if not apart <= FARTHEST:
        raise UserError(f"expected at most {FARTHEST:g} gray levels: the two sides do not compute the same")
    if options.json:
        row = {
            "size": options.size,
            "process_size": options.process_size,
            "photos": len(jobs),
            "ours": again,
            "first": first,
            "eager": theirs,
            "apart": apart,
        }
        row["versions"] = timing.versions("torch", "diffusers")
        options.json.write_text(json.dumps(row, indent=2) + "\n")


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(engine: Engine, settings: Settings, jobs: list[FileJob], out: Path, name: str) -> None:
    notes: list[str] = []
    report = Report(notes.append)
    again = [dataclasses.replace(job, target=moved(job, out, name)) for job in jobs]
    groups = plan_groups(again, settings, 1, report)
    upscale_groups(engine, groups, settings, report)
    if notes or report.written != len(jobs):
        raise UserError((notes or [f"{report.written} of {len(jobs)} photographs were written"])[0])


def moved(job: FileJob, out: Path, name: str) -> Path:
    """A photograph's result in `out/name`."""
    return out / name / job.target.relative_to(out)


def in_torch(pipeline: OraclePipeline, jobs: list[FileJob], out: Path) -> None:
    for job in jobs:
        target = moved(job, out, "torch")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            picture = pipeline.upscale_image(Image.open(job.source))
        except AssertionError as error:
            raise UserError(
                f"{job.source}: PyTorch's side cannot process this size, like the original ({error})"
            ) from None
        picture.save(target, compress_level=PNG_LEVEL)


def difference(some: Path, other: Path) -> float:
    return float(np.abs(pixels(some) - pixels(other)).mean())


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32)


if __name__ == "__main__":
    cli.run(main)
