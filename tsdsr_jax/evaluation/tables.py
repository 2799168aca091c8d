"""An evaluation as text: a table of means, a table of differences, CSV with a line per picture, JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tsdsr_jax.evaluation.measure import Measured
from tsdsr_jax.evaluation.registry import Metric
from tsdsr_jax.evaluation.statistics import Difference, Estimate, difference, estimate

ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}
TableRows = list[list[str]]


@dataclasses.dataclass(frozen=True, eq=False)
class MeasuredMethod:
    """A method, with the measurements of its folder of results.

    Attributes:
      name: its name in tables.
      measured: see `measure.Measured`.
    """

    name: str
    measured: Measured

    @cached_property
    def means(self) -> dict[str, Estimate]:
        """Metric's name -> its mean over the pictures that have it. Cached, because intervals take time."""
        names = dict.fromkeys(name for values in self.measured.values.values() for name in values)
        return {name: estimate(self.measured.of(name)) for name in names}


def mean_table(methods: Sequence[MeasuredMethod], metrics: Sequence[Metric]) -> TableRows:
    """A header and a row per method: means with four decimals, and the number of pictures."""
    rows = [["", *(metric.label + ARROWS[metric.better] for metric in metrics), "images"]]
    for method in methods:
        count = len(method.measured.pairs)
        rows.append([method.name, *(_mean_cell(method, metric, count) for metric in metrics), str(count)])
    return rows


def _mean_cell(method: MeasuredMethod, metric: Metric, count: int) -> str:
    if metric.over_folders:
        value = method.measured.of_folder.get(metric.name)
        return "–" if value is None else f"{value:.4f}"
    found = method.means.get(metric.name)
    if found is None:
        return "–"
    return f"{found.mean:.4f}" + (f" ({found.count})" if found.count != count else "")


def compare(
    first: MeasuredMethod, second: MeasuredMethod, metrics: Sequence[Metric]
) -> dict[str, tuple[Difference, list[str]]]:
    """Metric's name -> the second method's differences from the first, and the names of the pictures that both have."""
    result = {}
    for metric in metrics:
        names = [
            pair.name
            for pair in first.measured.pairs
            if metric.name in first.measured.values[pair.name]
            and metric.name in second.measured.values.get(pair.name, {})
        ]
        if names:
            ours, theirs = (
                [method.measured.values[name][metric.name] for name in names] for method in (first, second)
            )
            result[metric.name] = difference(ours, theirs, metric.better), names
    return result


def difference_table(methods: Sequence[MeasuredMethod], metrics: Sequence[Metric]) -> TableRows:
    """A header and a row per method and metric: its difference from the first method, on the same pictures."""
    rows = [["", "metric", "difference", "95 % interval", "better", "worse", "images"]]
    for method in methods[1:]:
        compared = compare(methods[0], method, metrics)
        for metric in metrics:
            if metric.name not in compared:
                continue
            found, names = compared[metric.name]
            change = found.change
            interval = "–" if change.low is None else f"{change.low:+.4f} to {change.high:+.4f}"
            counts = ["–" if count is None else str(count) for count in (found.wins, found.losses)]
            label = metric.label + ARROWS[metric.better]
            rows.append([method.name, label, f"{change.mean:+.4f}", interval, *counts, str(len(names))])
    return rows


def layout_columns(rows: TableRows) -> str:
    """Text in columns: the first column is left-aligned, all others are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_csv(methods: Sequence[MeasuredMethod], metrics: Sequence[Metric]) -> str:
    """CSV with a line per picture; missing values are empty. Numbers have full precision."""
    text = io.StringIO()
    names = [metric.name for metric in metrics if not metric.over_folders]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "image", *names])
    for method in methods:
        for pair in method.measured.pairs:
            values = method.measured.values[pair.name]
            writer.writerow(
                [method.name, pair.name, *(repr(values[n]) if n in values else "" for n in names)]
            )
    return text.getvalue()


def as_json(
    methods: Sequence[MeasuredMethod], metrics: Sequence[Metric], missing: Mapping[str, str], compared: bool
) -> dict[str, Any]:
    """Everything except the values of single pictures."""
    found: dict[str, Any] = {
        "metrics": {
            metric.name: {"better": metric.better, "computed_by": metric.source} for metric in metrics
        },
        "not_computed": dict(missing),
        "methods": {method.name: _method(method, metrics) for method in methods},
    }
    if compared:
        found["differences"] = {
            "to": methods[0].name,
            "methods": {method.name: _differences(methods[0], method, metrics) for method in methods[1:]},
        }
    return found


def _method(method: MeasuredMethod, metrics: Sequence[Metric]) -> dict[str, Any]:
    measured = method.measured
    figures = {m.name: _estimate(method.means[m.name]) for m in metrics if m.name in method.means}
    figures |= {name: {"value": value} for name, value in measured.of_folder.items()}
    return {
        "images": len(measured.pairs),
        "metrics": figures,
        "not_computed": measured.missing,
        "not_measured": measured.problems,
    }


def _differences(first: MeasuredMethod, second: MeasuredMethod, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {
        name: _estimate(found.change) | {"better": found.wins, "worse": found.losses}
        for name, (found, _) in compare(first, second, metrics).items()
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    interval = None if found.low is None else [found.low, found.high]
    return {"mean": found.mean, "sd": found.deviation, "ci95": interval, "images": found.count}
