"""Measures folders of results: PSNR, SSIM, NIQE, LPIPS and others, as papers on super-resolution do.

python infer/evaluate.py --inp_imgs outputs --gt_imgs test_HR --log logs/metrics
"""

from __future__ import annotations

if __name__ == "__main__":
    # Ctrl-C while the libraries load: leave at once. `cli.run` takes over when the work begins.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from tsdsr_jax import cli, evaluation_report, evaluation_tables
from tsdsr_jax.atomic import replacing
from tsdsr_jax.devices import select_devices
from tsdsr_jax.errors import UserError
from tsdsr_jax.evaluation import find_pairs, measure
from tsdsr_jax.evaluation_tables import Method
from tsdsr_jax.metric_set import PAPER, Metric, Sources, load_metrics
from tsdsr_jax.report import check_report_path
from tsdsr_jax.session import versions

LOGS = ("txt", "csv", "json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    inp_imgs: tuple[Path, ...]
    """Folders of results, subfolders included."""
    gt_imgs: tuple[Path, ...] = ()
    """Folders of references: one for all results, or one each. Files are paired by name."""
    names: tuple[str, ...] = ()
    """What tables call each folder of results; default: the folder's name."""
    metrics: tuple[str, ...] = PAPER
    """psnr, ssim, niqe, lpips, or any other of pyiqa's by its name there."""
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


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    references, names = check(options)
    logs = log_files(options)
    if options.report:
        check_report_path(options.report)
    found = [
        find_pairs(results, reference)
        for results, reference in zip(options.inp_imgs, references, strict=True)
    ]
    sources = Sources(bool(options.gt_imgs), options.niqe_params, options.lpips_weights)
    metrics, missing = load_metrics(options.metrics, sources)
    if not metrics:
        raise UserError(f"nothing to compute; {'; '.join(not_computed([], missing))}")
    device = select_devices(options.device)[0]
    methods = []
    with tqdm(total=sum(len(pairs) for pairs, _ in found), unit=" images", disable=None, leave=False) as bar:
        for name, (pairs, problems) in zip(names, found, strict=True):
            measured = measure(pairs, metrics, device, options.max_pixels, bar.update)
            measured.problems[:0] = problems
            methods.append(Method(name, measured))
    text = tables(methods, metrics, missing, options.compare)
    print(text)
    if options.log:
        write_logs(options, logs, text, methods, metrics, missing)
    if options.report:
        write_report(options, methods, metrics, not_computed(methods, missing))
    complain(methods)
    if any(method.measured.problems or method.measured.missing for method in methods):
        raise SystemExit(1)
    if missing and options.metrics != PAPER:  # asked for by name
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
    if not options.log_name or Path(options.log_name).name != options.log_name:
        raise UserError(f"--log_name {options.log_name}: expected a file name, without folders")
    names = list(options.names) or [folder.resolve().name for folder in options.inp_imgs]
    if not options.names and len(set(names)) < count:
        names = [str(folder) for folder in options.inp_imgs]
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"{repeated[0]}: stands for several folders; tell them apart with --names")
    references = list(options.gt_imgs) * (count if len(options.gt_imgs) == 1 else 1)
    return references or [None] * count, names


def log_files(options: Options) -> dict[str, Path]:
    """Suffix -> file; refuses to replace any unless asked to."""
    if options.log is None:
        return {}
    if options.log.exists() and not options.log.is_dir():
        raise UserError(f"{options.log}: is a file; --log is a folder")
    files = {suffix: options.log / f"{options.log_name}.{suffix}" for suffix in LOGS}
    there = [str(file) for file in files.values() if file.exists()]
    if there and not options.overwrite:
        raise UserError(f"{there[0]}: exists; choose another --log or --log_name, or pass --overwrite")
    return files


def tables(
    methods: Sequence[Method], metrics: Sequence[Metric], missing: Mapping[str, str], compared: bool
) -> str:
    text = evaluation_tables.layout(evaluation_tables.means(methods, metrics))
    if compared:
        rows = evaluation_tables.differences(methods, metrics)
        text += (
            f"\n\nDifferences to {methods[0].name}, on the same pictures\n{evaluation_tables.layout(rows)}"
        )
    lines = not_computed(methods, missing)
    return text + ("\n\nNot computed\n" + "\n".join(lines) if lines else "")


def not_computed(methods: Sequence[Method], missing: Mapping[str, str]) -> list[str]:
    """A line per reason why metrics are not there."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        names.setdefault(reason, []).append(name)
    for method in methods:
        for name, reason in method.measured.missing.items():
            names.setdefault(reason, []).append(f"{name} of {method.name}")
    return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]


def write_logs(
    options: Options,
    files: Mapping[str, Path],
    text: str,
    methods: Sequence[Method],
    metrics: Sequence[Metric],
    missing: Mapping[str, str],
) -> None:
    content = evaluation_tables.as_json(methods, metrics, missing, options.compare)
    content["folders"] = {
        "inp_imgs": [str(folder) for folder in options.inp_imgs],
        "gt_imgs": [str(folder) for folder in options.gt_imgs],
    }
    content["versions"] = versions()
    written = {
        "txt": text + "\n",
        "csv": evaluation_tables.as_csv(methods, metrics),
        "json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
    }
    for suffix, file in files.items():
        with replacing(file) as temporary:
            temporary.write_text(written[suffix], encoding="utf-8")
    print(f"\nin {options.log}: {', '.join(file.name for file in files.values())}")


def write_report(
    options: Options, methods: Sequence[Method], metrics: Sequence[Metric], missing: Sequence[str]
) -> None:
    notes = [f"not computed: {line}" for line in missing]
    notes += [f"not measured: {line}" for method in methods for line in method.measured.problems]
    count = len({pair.name for method in methods for pair in method.measured.pairs})
    with tqdm(total=count, desc="report", unit=" images", disable=None, leave=False) as bar:
        evaluation_report.write(options.report, methods, metrics, options.lr_imgs, notes, bar.update)
    print(f"Look at {options.report}")


def complain(methods: Sequence[Method]) -> None:
    """Names, last and on stderr, everything the averages leave out."""
    for method in methods:
        for line in method.measured.problems:
            print(line, file=sys.stderr)
    count = sum(len(method.measured.problems) for method in methods)
    if count:
        print(f"evaluate.py: {count} of these; the means leave them out", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
