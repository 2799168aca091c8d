"""Summarizes a run's log: curves, and each value at the beginning and at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tsdsr_jax.atomic import replacing
from tsdsr_jax.training.log import Row


@dataclasses.dataclass(frozen=True)
class Curve:
    """One panel of the plot: a title and the logged values in it."""

    title: str
    names: tuple[str, ...]
    log_scale: bool = False


def plot_curves(rows: Sequence[Row], curves: Sequence[Curve], path: Path, title: str) -> None:
    """Plots the curves that have values to a PNG: the values in a faint color, their running mean on top."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = {name: _series(rows, name) for curve in curves for name in curve.names}
    curves = [curve for curve in curves if any(len(series[name][0]) for name in curve.names)]
    if not curves:
        return
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    for index, curve in enumerate(curves):
        axes = figure.add_subplot(lines, columns, index + 1)
        for number, name in enumerate(name for name in curve.names if len(series[name][0])):
            steps, values = series[name]
            color, few = f"C{number}", len(steps) < 30
            axes.plot(steps, values, "o-" if few else "-", color=color, alpha=1 if few else 0.25, ms=3, lw=1,
                      label=name if few else None)  # fmt: skip
            if not few:
                axes.plot(*_running_mean(steps, values), color=color, label=name)
        axes.set_title(curve.title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        if curve.log_scale:
            axes.set_yscale("log")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _series(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _running_mean(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = max(2, len(values) // 20)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    return steps[width - 1 :], (sums[width:] - sums[:-width]) / width


def first_and_last(rows: Sequence[Row], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Averages the first and the last tenth of each named value."""
    summary = {}
    for name in names:
        _, values = _series(rows, name)
        if len(values):
            width = max(1, len(values) // 10)
            summary[name] = {"first": float(values[:width].mean()), "last": float(values[-width:].mean())}
    return summary


def summary_table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the summary as a table for the terminal."""
    width = max([len(name) for name in summary], default=0)
    lines = [f"  {'':{width}}  {'first':>11}  {'last':>11}"]
    lines += [f"  {name:{width}}  {v['first']:11.4g}  {v['last']:11.4g}" for name, v in summary.items()]
    return "\n".join(lines)


def in_steps(rows: Sequence[Row], start: int, images: int, seconds: float) -> str:
    """Says how much of a run's time went into steps.

    Args:
      rows: the log.
      start: the step that the run started from.
      images: images per step.
      seconds: how long the run took in all.
    """
    own = [row for row in rows if row["step"] > start and row.get("images_per_s")]
    trained = sum(images / row["images_per_s"] for row in own)
    waited = sum(row.get("waiting_s") or 0 for row in own)
    return (
        f"{trained:.0f} of {seconds:.0f} s went into steps ({trained / seconds:.0%}), {waited:.0f} of them into waiting for "
        "data; the rest into starting, compiling, validating and saving"
    )
