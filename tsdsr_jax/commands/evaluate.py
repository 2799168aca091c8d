"""Measures folders of results with PSNR, SSIM, NIQE, LPIPS and other metrics, as papers on super-resolution do.

python infer/evaluate.py --inp_imgs outputs --gt_imgs test_HR --log logs/metrics
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from tsdsr_jax import cli
from tsdsr_jax.atomic import replacing
from tsdsr_jax.cli import check_writable
from tsdsr_jax.commands.groups import EVALUATING
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError, printable
from tsdsr_jax.evaluation import report, tables
from tsdsr_jax.evaluation.html import check_report_path
from tsdsr_jax.evaluation.measure import Measured, by_name, complete, find_pairs, measure_pictures
from tsdsr_jax.evaluation.registry import PAPER, Metric, Sources, load_metrics
from tsdsr_jax.evaluation.shared import SharedEvaluation
from tsdsr_jax.evaluation.tables import MeasuredMethod
from tsdsr_jax.identity import versions

_LOGS = ("txt", "csv", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    inp_imgs: tuple[Path, ...]
    """Folders of results, including their subfolders."""
    gt_imgs: tuple[Path, ...] = ()
    """Folders of references: one for all results, or one for each. Files are paired by name."""
    names: tuple[str, ...] = ()
    """Names of the folders of results in tables. Default: the folders' own names."""
    metrics: tuple[str, ...] = ()
    """psnr, ssim, niqe, lpips, detail (correlation of the finest wavelet bands), or any other metric by its name in pyiqa.
    Default: the nine metrics of the paper's tables."""
    niqe_params: Path | None = None
    """NIQE's parameters: niqe_pris_params.npz or niqe_modelparameters.mat."""
    lpips_weights: Path | None = None
    """LPIPS weights, written by convert/lpips.py."""
    compare: bool = False
    """Also compare each folder with the first, picture by picture."""
    log: Path | None = None
    """Folder for three files: the table as text, a CSV with every picture, and JSON with intervals and versions."""
    log_name: str = "METRICS"
    """Name of the three files, without suffix."""
    overwrite: bool = False
    """Replace existing files in --log."""
    report: Path | None = None
    """HTML file that shows the pictures side by side, with sliders; needs only a browser."""
    shard: str | None = None
    """Share the work between processes: i/n measures the i-th of n parts, counted from 0, and leaves it in --log; who comes
    last writes the tables. Default: each process that srun, mpirun or torchrun has started does its part."""
    lr_imgs: Path | None = None
    """Folder of the low-resolution inputs, for the report."""
    device: str | None = None
    """Where to compute: cuda, cuda:N, cpu or tpu. Default: the best device available."""
    max_pixels: int = 100_000_000
    """Leave out pictures with more pixels."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of the metrics; accepts spellings such as PSNR or psnr,ssim."""
        given = [name.strip().lower() for value in self.metrics for name in value.split(",")]
        return tuple(name for name in given if name) or PAPER


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """The results of a run.

    Attributes:
      methods: one per folder of results.
      metrics: the metrics that could be computed.
      missing: name -> reason, for all other metrics.
      compared: whether to show differences between methods.
    """

    methods: Sequence[MeasuredMethod]
    metrics: Sequence[Metric]
    missing: Mapping[str, str]
    compared: bool

    @property
    def problems(self) -> list[str]:
        return [line for method in self.methods for line in method.measured.problems]

    def not_computed(self) -> list[str]:
        """A line for each reason why metrics are missing."""
        names: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            names.setdefault(reason, []).append(name)
        for method in self.methods:
            for name, reason in method.measured.missing.items():
                names.setdefault(reason, []).append(f"{name} of {method.name}")
        return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]

    @cached_property
    def tables(self) -> str:
        """The text to print."""
        text = tables.layout_columns(tables.mean_table(self.methods, self.metrics))
        if self.compared:
            rows = tables.layout_columns(tables.difference_table(self.methods, self.metrics))
            text += f"\n\nDifferences from {self.methods[0].name}, on the same pictures\n{rows}"
        lines = self.not_computed()
        return text + ("\n\nNot computed\n" + "\n".join(lines) if lines else "")


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=EVALUATING)
    references, names = _check(options)
    part = cli.share(options.shard)
    if part.of > 1 and options.log is None:
        raise UserError("--shard: needs --log, the folder where the parts are left")
    logs = _log_files(options)
    inputs, unusable = by_name(options.lr_imgs) if options.lr_imgs else ({}, [])
    for line in unusable:
        print(f"note: {printable(line)}", file=sys.stderr)
    found = [
        find_pairs(results, reference)
        for results, reference in zip(options.inp_imgs, references, strict=True)
    ]
    sources = Sources(bool(options.gt_imgs), options.niqe_params, options.lpips_weights)
    metrics, missing = load_metrics(options.wanted, sources)
    if not metrics:
        raise UserError(
            f"nothing to compute; {'; '.join(_Evaluation((), (), missing, False).not_computed())}"
        )
    pairs = {name: of_name for name, (of_name, _) in zip(names, found, strict=True)}
    parts = SharedEvaluation(
        options.log or Path(), options.log_name, part.of, pairs, [metric.name for metric in metrics]
    )
    measured = _measured(options, parts, part.index, metrics)
    if measured is None:
        print(f"part {part.index} of {part.of} is measured; the process that comes last writes the tables")
        return
    methods = []
    for name, (_, problems) in zip(names, found, strict=True):
        complete(measured[name], metrics)
        measured[name].problems[:0] = problems
        methods.append(MeasuredMethod(name, measured[name]))
    evaluation = _Evaluation(methods, metrics, missing, options.compare)
    print(evaluation.tables, flush=True)
    for line in dict.fromkeys(note for method in methods for note in method.measured.notes):
        print(printable(line), file=sys.stderr)
    _complain(evaluation.problems)
    if logs:
        _write_logs(options, logs, evaluation)
        parts.remove()
    if options.report:
        _write_report(options.report, evaluation, inputs, together=len(set(references)) == 1)
    asked = missing if options.metrics else {}  # metrics of the default may be missing
    if evaluation.problems or asked or any(method.measured.missing for method in methods):
        raise SystemExit(1)


def _measured(
    options: Options, parts: SharedEvaluation, index: int, metrics: Sequence[Metric]
) -> dict[str, Measured] | None:
    """Measures a part of the pictures; returns all measurements, or None while other parts are missing."""
    device = select_devices(options.device)[0]
    shares = {method: parts.share(method, index) for method in parts.pairs}
    found = {}
    with tqdm(total=sum(map(len, shares.values())), unit=" images", disable=None, leave=False) as bar:
        for method, share in shares.items():
            found[method] = measure_pictures(share, metrics, device, options.max_pixels, bar.update)
    if parts.of == 1:
        return found
    parts.write(index, found)
    return parts.joined()


def _check(options: Options) -> tuple[list[Path | None], list[str]]:
    """Refuses flags that do not fit together; returns each folder's references and name."""
    count = len(options.inp_imgs)
    if len(options.gt_imgs) not in (0, 1, count):
        raise UserError(
            f"--gt_imgs: {len(options.gt_imgs)} folders for {count} of --inp_imgs; give one for all, or one each"
        )
    if options.names and len(options.names) != count:
        raise UserError(f"--names: {len(options.names)} names for {count} folders of --inp_imgs")
    if options.compare and count < 2:
        raise UserError("--compare: needs at least two folders in --inp_imgs")
    if options.compare and len(set(options.gt_imgs)) > 1:
        raise UserError("--compare: methods are compared on the same pictures; give one folder of --gt_imgs")
    if options.max_pixels < 1:
        raise UserError(f"--max_pixels {options.max_pixels}: expected at least 1")
    if options.lr_imgs and not options.report:
        raise UserError("--lr_imgs: is only used in the report; add --report report.html")
    if options.report:
        check_report_path(options.report)
    references: list[Path | None] = list(options.gt_imgs) or [None]
    return references * (count if len(references) == 1 else 1), _method_names(options)


def _method_names(options: Options) -> list[str]:
    """`--names`, or the folders' own names, with as many of the folders above as tell them apart."""
    names = list(options.names)
    paths = [folder.resolve().parts for folder in options.inp_imgs]
    for parts in range(1, max(map(len, paths)) + 1):
        if not options.names:
            names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    names = [printable(name) for name in names]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{repeated[0]}: names several folders; give different names with --names")
    return names


def _log_files(options: Options) -> dict[str, Path]:
    """Suffix -> log file; refuses files that cannot be written, or that exist without --overwrite."""
    name = options.log_name
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"--log_name {name}: expected a file name, without folders")
    if options.log is None:
        return {}
    check_writable(options.log, "--log")
    files = {suffix: options.log / f"{name}.{suffix}" for suffix in _LOGS}
    for file in files.values():
        if os.path.isdir(file):
            raise UserError(f"{file}: is a folder; choose another --log or --log_name")
        if os.path.lexists(file) and not options.overwrite:
            raise UserError(f"{file}: exists; choose another --log or --log_name, or pass --overwrite")
    return files


def _complain(problems: Sequence[str]) -> None:
    """Lists on stderr everything that the means leave out."""
    for line in problems:
        print(printable(line), file=sys.stderr)
    if problems:
        print(
            f"{cli.script_name()}: {len(problems)} files or values are left out of the means",
            file=sys.stderr,
        )


def _write_logs(options: Options, files: Mapping[str, Path], evaluation: _Evaluation) -> None:
    """Writes all three files, or none."""
    methods, metrics = evaluation.methods, evaluation.metrics
    content = tables.as_json(methods, metrics, evaluation.missing, evaluation.compared)
    content["folders"] = {
        "inp_imgs": [printable(str(folder)) for folder in options.inp_imgs],
        "gt_imgs": [printable(str(folder)) for folder in options.gt_imgs],
    }
    content["versions"] = versions()
    written = {
        "txt": evaluation.tables + "\n",
        "csv": tables.as_csv(methods, metrics),
        "json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
    }
    with ExitStack() as stack:
        for suffix, file in files.items():
            temporary = stack.enter_context(replacing(file))
            temporary.write_bytes(written[suffix].encode("utf-8", "backslashreplace"))
    print(f"\nin {options.log}: {', '.join(file.name for file in files.values())}")


def _write_report(path: Path, evaluation: _Evaluation, inputs: Mapping[str, Path], *, together: bool) -> None:
    methods, metrics = evaluation.methods, evaluation.metrics
    notes = [f"not computed: {line}" for line in evaluation.not_computed()]
    notes += [f"not measured: {line}" for line in evaluation.problems]
    with tqdm(desc="report", unit=" images", disable=None, leave=False) as bar:
        report.write_evaluation_report(path, methods, metrics, inputs, together, notes, bar.update)
    print(f"Look at {path}")
