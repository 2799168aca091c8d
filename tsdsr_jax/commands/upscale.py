"""Upscales a photograph, or a folder of them, with SD3 and TSD-SR's LoRAs; or, where no model is named, with a small one
that lies in the repository.

python infer/upscale.py --pretrained_model_name_or_path sd3 -i photos -o outputs
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.commands.groups import UPSCALING
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation.comparison import Comparison, Layer
from tsdsr_jax.evaluation.html import check_report_path, write_report
from tsdsr_jax.images.files import read_size
from tsdsr_jax.upscaling import batch_run
from tsdsr_jax.upscaling.engine import Settings
from tsdsr_jax.upscaling.options import UpscaleOptions, check, completed, load, several_on


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(UpscaleOptions):
    input_dir: Annotated[Path, tyro.conf.arg(aliases=["-i"])]
    """A photograph, or a folder (with its subfolders)."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("outputs")
    """Folder for the results; the input's tree is kept."""
    batch_size: int | None = None
    """Photographs processed at up to 512×512 per device and call, larger ones fewer; default: 8, on a CPU 1."""
    format: Literal["png", "jpg", "webp", "tiff", "bmp"] = "png"
    """File format of the results; all but jpg are lossless."""
    overwrite: bool = False
    """Compute results again that exist already."""
    shard: str = "0/1"
    """i/n: do only the i-th of n parts of the folder, so that n processes can share it."""
    report: Path | None = None
    """Write a web page here, one .html file, that compares each photograph with its result under a movable divider."""

    def settings(self, platform: str) -> Settings:
        photos = self.batch_size or several_on(platform)
        return dataclasses.replace(super().settings(platform), photo_batch=photos)


def main() -> None:
    options = completed(cli.parse(Options, description=__doc__, groups=UPSCALING))
    check(options)
    cli.at_least(options, 1, "batch_size")
    part = cli.share(options.shard)
    jobs = batch_run.find_jobs(
        options.input_dir, options.output_dir, f".{options.format}", overwrite=options.overwrite
    )
    cli.check_writable(options.output_dir)
    if options.report:
        check_report_path(options.report)

    devices = select_devices(options.device)
    settings = options.settings(devices[0].platform)
    files = batch_run.FileOptions(options.align_method, options.format, options.seed, options.max_pixels)
    report = batch_run.Report(lambda line: tqdm.write(line, file=sys.stderr))
    groups = batch_run.plan_groups(jobs, settings, len(devices), files, report, part)
    mine = [job for group in groups for job, _ in group.jobs]
    if not options.overwrite:
        groups = batch_run.unfinished(groups, report)
    others = 0
    if groups:
        upscaler = load(options, settings, devices)
        unread, left = len(report.failures), len(mine) - report.skipped
        with tqdm(total=left, unit=" images", disable=None) as bar:
            report.on_done = bar.update
            batch_run.upscale(upscaler, groups, files, report, overwrite=options.overwrite)
            others = max(0, left - report.written - (len(report.failures) - unread))
            bar.update(others)
    older = f", {report.outdated} of them older than their photographs" if report.outdated else ""
    again = "--overwrite computes them again"
    finished = f", {report.skipped} existed already{older} ({again})" if report.skipped else ""
    meanwhile = f", {others} came from another process meanwhile" if others else ""
    failed = f", {len(report.failures)} failed" if report.failures else ""
    print(f"{report.written} upscaled into {options.output_dir}{finished}{meanwhile}{failed}")
    if options.report:
        write_page(options, mine, report.failures)
    if report.failures:
        raise SystemExit(1)


def write_page(options: Options, jobs: Sequence[batch_run.Job], failures: Sequence[str]) -> None:
    """`--report`: of all photographs that have a result, whenever it was made."""
    root = options.input_dir if options.input_dir.is_dir() else options.input_dir.parent
    entries = []
    for job in sorted(jobs, key=lambda job: job.source):
        if job.target.exists():
            layers = Layer("input", job.source), Layer("result", job.target)
            name = job.source.relative_to(root).as_posix()
            entries.append(Comparison(name, layers, facts=sizes_of(job, options.max_pixels)))
    title = f"{options.input_dir} → {options.output_dir}"
    with tqdm(total=len(entries), desc="report", unit=" images", leave=False, disable=None) as bar:
        write_report(options.report, title, entries, notes=failures, progress=bar.update)
    print(f"{len(entries)} compared in {options.report}")


def sizes_of(job: batch_run.Job, max_pixels: int) -> dict[str, str]:
    """Of the files as they are: a result may be of an earlier run with other flags."""
    try:
        sizes = [read_size(path, max_pixels) for path in (job.source, job.target)]
    except UserError:  # the report says it in the picture's place
        return {}
    return {"size": " → ".join(f"{width}×{height}" for height, width in sizes)}
