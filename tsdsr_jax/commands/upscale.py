"""Upscales a photograph, or a folder of photographs, with SD3 and TSD-SR's LoRAs. Without a model it uses the small bundled
one.

python infer/upscale.py photo.jpg -o large.png
python infer/upscale.py --pretrained_model_name_or_path sd3 -i photos -o outputs
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.commands.groups import UPSCALING
from tsdsr_jax.compile_watch import CompileWatch, say_above_bar
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError, listed, printable
from tsdsr_jax.evaluation.comparison import Comparison, Layer
from tsdsr_jax.evaluation.html import check_report_path, write_report
from tsdsr_jax.images.files import read_size
from tsdsr_jax.program_cache import keep_programs
from tsdsr_jax.upscaling.batch_run import upscale_groups
from tsdsr_jax.upscaling.jobs import FileJob, Report
from tsdsr_jax.upscaling.limits import MemoryBudget, beyond_memory, too_large
from tsdsr_jax.upscaling.loading import load_engine
from tsdsr_jax.upscaling.options import (
    UpscaleOptions,
    check_upscale_options,
    complete_options,
    several_on,
)
from tsdsr_jax.upscaling.planning import Settings, plan_groups, unfinished
from tsdsr_jax.upscaling.progress import PhotoBar, duration
from tsdsr_jax.upscaling.rehearsal import compile_ahead
from tsdsr_jax.upscaling.targets import FoundJobs, Naming, find_jobs, format_for, is_file_name

# From how many tiles on a photograph's tiles are counted, on a GPU and on a CPU. A GPU then waits after every few tiles.
_TILES_TO_COUNT = (9, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(UpscaleOptions):
    input_dir: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["-i"])]
    """Photographs, or folders of photographs; subfolders are included. The flag's name may be left out."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("outputs")
    """Folder for the results; it gets the same subfolders as the input. For one photograph it may be a file, such as
    result.png."""
    batch_size: int | None = None
    """Photographs that a device computes together if results have up to 512×512 pixels; fewer if larger. Default: 8; on a
    CPU, 1."""
    format: Literal["png", "jpg", "webp", "tiff", "bmp"] | None = None
    """File format of the results; all but jpg are lossless. Default: that of the output file's name, or png."""
    scale_in_names: bool = False
    """Add the scale to the results' names: cat_x4.png."""
    overwrite: bool = False
    """Replace results that exist; otherwise their photographs are skipped."""
    shard: str | None = None
    """Share the folder between processes: i/n does the i-th of n parts, counted from 0. Default: each process that srun,
    mpirun or torchrun has started does its part."""
    report: Path | None = None
    """Write an .html file that compares each photograph with its result under a slider."""

    def settings(self, platform: str) -> Settings:
        photos = self.batch_size or several_on(platform)
        return dataclasses.replace(super().settings(platform), photo_batch=photos)


def main() -> None:
    begun = time.perf_counter()
    parsed = cli.parse(Options, description=__doc__, groups=UPSCALING, positional="input_dir")
    options = complete_options(parsed)
    check_upscale_options(options)
    cli.at_least(options, 1, "batch_size")
    part = cli.share(options.shard)
    found = _find(options)
    if options.report:
        check_report_path(options.report)

    keep_programs(say_above_bar)
    devices = select_devices(options.device)
    settings = options.settings(devices[0].platform)
    report = Report(say_above_bar)
    if part.index == 0:  # not by every part
        for line in found.problems:
            report.left_out(line)
        for line in found.notes:
            report.note(f"note: {line}")
    budget = MemoryBudget.of(options, devices)
    explain = partial(too_large, budget=budget)
    groups = plan_groups(found.jobs, settings, len(devices), report, part, explain)
    jobs = [job for group in groups for job, _ in group.jobs]
    if not options.overwrite:
        groups = unfinished(groups, report)
        _point_out(report)
    if remark := beyond_memory(
        [(str(job.source), plan) for group in groups for job, plan in group.jobs], budget
    ):
        report.note(f"note: {remark}")
    from_others, computing = 0, 0.0
    if groups:
        compile_first = partial(compile_ahead, groups=groups, settings=settings)
        with CompileWatch() as watch:
            engine = load_engine(options, devices, meanwhile=compile_first)
            unreadable, left = len(report.failures), len(jobs) - report.skipped
            with closing(PhotoBar(left, watch)) as bar:
                report.on_done = bar.update
                upscale_groups(
                    engine,
                    groups,
                    settings,
                    report,
                    overwrite=options.overwrite,
                    progress=bar.stages,
                    progress_from=_TILES_TO_COUNT[devices[0].platform == "cpu"],
                )
                from_others = max(0, left - report.written - (len(report.failures) - unreadable))
                bar.update(from_others)
                computing = bar.seconds
    print(_summary(options, report, from_others) + _times(report, time.perf_counter() - begun, computing))
    if options.report:
        _write_page(options, options.report, jobs, report.failures)
    if report.failures or report.different:
        raise SystemExit(1)


def _find(options: Options) -> FoundJobs:
    """The photographs and their targets; refuses an output that cannot be written."""
    output = options.output_dir
    if options.scale_in_names and is_file_name(output):
        raise UserError(
            f"--scale_in_names: --output_dir {output} is the result's name already; drop the flag, or name a folder"
        )
    format = format_for(output, options.format)
    naming = Naming(format, options.upscale if options.scale_in_names else None, options.made_with())
    found = find_jobs(options.input_dir, output, naming, overwrite=options.overwrite)
    cli.check_writable(output.parent if is_file_name(output) else output)
    return found


def _point_out(report: Report) -> None:
    """Names results of other settings, which are kept."""
    if report.different:
        count = len(report.different)
        which = "1 result exists that was" if count == 1 else f"{count} results exist that were"
        report.note(
            f"{which} made with other settings: {listed(report.different, 5)}; --overwrite computes them again, and "
            "another --output_dir keeps both"
        )


def _summary(options: Options, report: Report, from_others: int) -> str:
    older = f", {report.outdated} of them older than their photographs" if report.outdated else ""
    again = "--overwrite computes them again"
    meanwhile = f", {from_others} written by another process meanwhile" if from_others else ""
    other = f", {len(report.different)} of them with other settings" if report.different else ""
    skipped = f", {report.skipped} already existed{older}{other} ({again})" if report.skipped else ""
    failures = len(report.failures) - report.omitted
    failed = f", {failures} failed" if failures else ""
    failed += f", {report.omitted} left out" if report.omitted else ""
    return f"{report.written} upscaled into {options.output_dir}{skipped}{meanwhile}{failed}"


def _times(report: Report, total: float, computing: float) -> str:
    """How long the run took, and how long an image took without loading and compiling."""
    if not report.written:
        return ""
    return f"; {duration(total)} in all, {duration(computing / report.written)} an image"


def _write_page(options: Options, page: Path, jobs: Sequence[FileJob], failures: Sequence[str]) -> None:
    """Writes `--report`: all photographs that have a result, from this run or an earlier one."""
    entries = []
    for job in sorted(jobs, key=lambda job: job.source):
        if job.is_finished():
            layers = Layer("input", job.source), Layer("result", job.target)
            entries.append(Comparison(job.name, layers, facts=_sizes(job, options.max_pixels)))
    sources = listed([_last_part(source) for source in options.input_dir], 3)
    title = printable(f"{sources} → {_last_part(options.output_dir)}")
    with tqdm(total=len(entries), desc="report", unit=" images", leave=False, disable=None) as bar:
        write_report(page, title, entries, notes=failures, progress=bar.update)
    print(f"{len(entries)} photograph{'s' * (len(entries) != 1)} compared in {page}")


def _last_part(path: Path) -> str:
    """A file's or folder's own name."""
    return os.path.basename(os.path.abspath(path)) or str(path)


def _sizes(job: FileJob, max_pixels: int) -> dict[str, str]:
    """The sizes are read from the files, because a result may come from an earlier run with other flags."""
    try:
        sizes = [read_size(path, max_pixels) for path in (job.source, job.target)]
    except UserError:  # the report says it in the picture's place
        return {}
    return {"size": " → ".join(f"{width}×{height}" for height, width in sizes)}
