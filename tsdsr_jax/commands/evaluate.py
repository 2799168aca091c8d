"""Measures folders of results: PSNR, SSIM, NIQE, LPIPS and others, as papers on super-resolution do.

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
from tsdsr_jax.evaluation.measure import by_name, find_pairs, measure
from tsdsr_jax.evaluation.registry import PAPER, Metric, Sources, load_metrics
from tsdsr_jax.evaluation.tables import MeasuredMethod
from tsdsr_jax.identity import versions

LOGS = ("txt", "csv", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    inp_imgs: tuple[Path, ...]
    """Folders of results, subfolders included; required."""
    gt_imgs: tuple[Path, ...] = ()
    """Folders of references: one for all results, or one each. Files are paired by name."""
    names: tuple[str, ...] = ()
    """What tables call each folder of results; default: the folder's name."""
    metrics: tuple[str, ...] = ()
    """psnr, ssim, niqe, lpips, detail (correlation of the finest wavelet bands), or any other of pyiqa's by its name there;
    default: the nine of the paper's tables."""
    niqe_params: Path | None = None
    """NIQE's parameters: niqe_pris_params.npz or niqe_modelparameters.mat."""
    lpips_weights: Path | None = None
    """LPIPS's weights, made by convert/lpips.py."""
    compare: bool = False
    """Differences to the first folder, picture by picture."""
    log: Path | None = None
    """Folder for the table as text, a CSV with every picture, and JSON with intervals and versions."""
    log_name: str = "METRICS"
    """What the three files are called."""
    overwrite: bool = False
    """Replace the three files."""
    report: Path | None = None
    """HTML file to look at the pictures in, with sliders; needs nothing but a browser."""
    lr_imgs: Path | None = None
    """Folder of the low-resolution inputs, for the report."""
    device: str | None = None
    """cuda, cuda:N, cpu or tpu, for what JAX computes; default: the best there is."""
    max_pixels: int = 100_000_000
    """Leave out pictures with more pixels."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Names of metrics, however they were written: PSNR, or psnr,ssim."""
        given = [name.strip().lower() for value in self.metrics for name in value.split(",")]
        return tuple(name for name in given if name) or PAPER


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What has come of it.

    Attributes:
      methods: one per folder of results.
      metrics: those that could be computed.
      missing: the others -> why not.
      compared: whether differences between methods are wanted.
    """

    methods: Sequence[MeasuredMethod]
    metrics: Sequence[Metric]
    missing: Mapping[str, str]
    compared: bool

    @property
    def problems(self) -> list[str]:
        return [line for method in self.methods for line in method.measured.problems]

    def not_computed(self) -> list[str]:
        """A line per reason why metrics are not there."""
        names: dict[str, list[str]] = {}
        for name, reason in self.missing.items():
            names.setdefault(reason, []).append(name)
        for method in self.methods:
            for name, reason in method.measured.missing.items():
                names.setdefault(reason, []).append(f"{name} of {method.name}")
        return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]

    @cached_property
    def tables(self) -> str:
        """The text that is printed."""
        text = tables.layout(tables.means(self.methods, self.metrics))
        if self.compared:
            rows = tables.layout(tables.differences(self.methods, self.metrics))
            text += f"\n\nDifferences to {self.methods[0].name}, on the same pictures\n{rows}"
        lines = self.not_computed()
        return text + ("\n\nNot computed\n" + "\n".join(lines) if lines else "")


def main() -> None:
    options = cli.parse(Options, description=__doc__, groups=EVALUATING)
    references, names = check(options)
    logs = log_files(options)
    inputs = by_name(options.lr_imgs)[0] if options.lr_imgs else {}
    found = [
        find_pairs(results, reference)
        for results, reference in zip(options.inp_imgs, references, strict=True)
    ]
    sources = Sources(bool(options.gt_imgs), options.niqe_params, options.lpips_weights)
    metrics, missing = load_metrics(options.wanted, sources)
    if not metrics:
        raise UserError(f"nothing to compute; {'; '.join(Evaluation((), (), missing, False).not_computed())}")
    device = select_devices(options.device)[0]
    methods = []
    with tqdm(total=sum(len(pairs) for pairs, _ in found), unit=" images", disable=None, leave=False) as bar:
        for name, (pairs, problems) in zip(names, found, strict=True):
            measured = measure(pairs, metrics, device, options.max_pixels, bar.update)
            measured.problems[:0] = problems
            methods.append(MeasuredMethod(name, measured))
    evaluation = Evaluation(methods, metrics, missing, options.compare)
    print(evaluation.tables, flush=True)
    complain(evaluation.problems)
    if logs:
        write_logs(options, logs, evaluation)
    if options.report:
        write_report(options, evaluation, inputs, together=len(set(references)) == 1)
    asked = missing if options.metrics else {}  # of the default's, some may be missing
    if evaluation.problems or asked or any(method.measured.missing for method in methods):
        raise SystemExit(1)


def check(options: Options) -> tuple[list[Path | None], list[str]]:
    """The reference folder and the name of each folder of results; refuses flags that do not go together."""
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
        raise UserError("--lr_imgs: is for the report; add --report report.html")
    if options.report:
        check_report_path(options.report)
    references = list(options.gt_imgs) * (count if len(options.gt_imgs) == 1 else 1)
    return references or [None] * count, method_names(options)


def method_names(options: Options) -> list[str]:
    """`--names`, or the folders' own names, or where those repeat their paths."""
    names = list(options.names) or [folder.resolve().name for folder in options.inp_imgs]
    if not options.names and len(set(names)) < len(names):
        names = [str(folder) for folder in options.inp_imgs]
    names = [printable(name) for name in names]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{repeated[0]}: stands for several folders; tell them apart with --names")
    return names


def log_files(options: Options) -> dict[str, Path]:
    """Suffix -> file; refuses what cannot be written, and to replace anything unless asked to."""
    name = options.log_name
    if not name or name.startswith(".") or Path(name).name != name:
        raise UserError(f"--log_name {name}: expected a file name, without folders")
    if options.log is None:
        return {}
    check_writable(options.log, "--log")
    files = {suffix: options.log / f"{name}.{suffix}" for suffix in LOGS}
    for file in files.values():
        if os.path.isdir(file):
            raise UserError(f"{file}: is a folder; choose another --log or --log_name")
        if os.path.lexists(file) and not options.overwrite:
            raise UserError(f"{file}: exists; choose another --log or --log_name, or pass --overwrite")
    return files


def complain(problems: Sequence[str]) -> None:
    """Names on stderr everything that the averages leave out."""
    for line in problems:
        print(printable(line), file=sys.stderr)
    if problems:
        print(f"{cli.script_name()}: {len(problems)} of these; the means leave them out", file=sys.stderr)


def write_logs(options: Options, files: Mapping[str, Path], evaluation: Evaluation) -> None:
    """All three files, or none."""
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


def write_report(
    options: Options, evaluation: Evaluation, inputs: Mapping[str, Path], *, together: bool
) -> None:
    methods, metrics = evaluation.methods, evaluation.metrics
    notes = [f"not computed: {line}" for line in evaluation.not_computed()]
    notes += [f"not measured: {line}" for line in evaluation.problems]
    with tqdm(desc="report", unit=" images", disable=None, leave=False) as bar:
        report.write(options.report, methods, metrics, inputs, together, notes, bar.update)
    print(f"Look at {options.report}")
