"""Writes an evaluation as a report: each picture's results beside its reference, with its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tsdsr_jax.evaluation import tables
from tsdsr_jax.evaluation.comparison import Column, Comparison, Layer, Summary
from tsdsr_jax.evaluation.html import write_report
from tsdsr_jax.evaluation.measure import FilePair
from tsdsr_jax.evaluation.registry import Metric
from tsdsr_jax.evaluation.tables import MeasuredMethod


def write_evaluation_report(
    path: Path,
    methods: Sequence[MeasuredMethod],
    metrics: Sequence[Metric],
    inputs: Mapping[str, Path],
    together: bool,
    notes: Sequence[str],
    progress: Callable[[], object],
) -> None:
    """Writes the report.

    Args:
      path: the HTML file.
      methods, metrics: what was measured.
      inputs: name of a result -> its low-resolution input, which is shown first.
      together: whether all methods share their references. If so, they share one entry per picture; otherwise each method
        has its own entries.
      notes: lines at the top.
      progress: called after each entry.

    Raises:
      UserError: the file cannot be written.
    """
    per_picture = [metric for metric in metrics if not metric.over_folders]
    groups = [methods] if together else [[method] for method in methods]
    entries = [entry for group in groups for entry in _entries(group, per_picture, inputs, not together)]
    header, *rows = tables.mean_table(methods, metrics)
    write_report(
        path,
        title=" · ".join(method.name for method in methods),
        entries=entries,
        columns=_columns(methods if together else methods[:1], per_picture),
        summary=Summary(tuple(header), tuple(map(tuple, rows))),
        notes=notes,
        progress=progress,
    )


def _columns(methods: Sequence[MeasuredMethod], metrics: Sequence[Metric]) -> list[Column]:
    return [
        Column(_column_name(method, metric, len(methods) > 1), metric.better)
        for metric in metrics
        for method in methods
    ]


def _column_name(method: MeasuredMethod, metric: Metric, several: bool) -> str:
    return f"{method.name} · {metric.label}" if several else metric.label


def _entries(
    methods: Sequence[MeasuredMethod], metrics: Sequence[Metric], sources: Mapping[str, Path], prefix: bool
) -> list[Comparison]:
    pairs: dict[str, list[tuple[MeasuredMethod, FilePair]]] = {}
    for method in methods:
        for pair in method.measured.pairs:
            pairs.setdefault(pair.name, []).append((method, pair))
    return [
        _entry(name, found, metrics, sources.get(name), len(methods) > 1, prefix)
        for name, found in sorted(pairs.items())
    ]


def _entry(
    name: str,
    found: Sequence[tuple[MeasuredMethod, FilePair]],
    metrics: Sequence[Metric],
    source: Path | None,
    several: bool,
    prefix: bool,
) -> Comparison:
    layers = [Layer("input", source)] if source else []
    layers += [Layer(method.name, pair.result) for method, pair in found]
    if reference := found[0][1].reference:
        layers.append(Layer("reference", reference))
    values = {
        _column_name(method, metric, several): method.measured.values[name].get(metric.name)
        for method, _ in found
        for metric in metrics
    }
    return Comparison(f"{found[0][0].name}/{name}" if prefix else name, tuple(layers), values)
