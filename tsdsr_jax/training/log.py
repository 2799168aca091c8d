"""What a training run tells: a JSON line per step, TensorBoard and wandb on request, curves, a summary."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError

ReportTo = Literal["none", "tensorboard", "wandb", "all"]
LOG_FILE = "log.jsonl"
Row = Mapping[str, Any]


class Tracker(Protocol):
    """A service that shows a run while it goes on."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder; `step` is the one that a resumed run continues from, later points are hidden."""

    def __init__(self, folder: Path, step: int | None = None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)

    def _check(self) -> None:
        """Its writing thread dies of a full disk, and whoever adds to the queue in front of it then waits for ever."""
        events = getattr(getattr(self._writer, "file_writer", None), "event_writer", None)
        thread = getattr(events, "_worker", None)
        if thread is not None and not thread.is_alive():
            raise OSError("TensorBoard's event file cannot be written")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._check()
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._check()
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._check()
        self._writer.close()


class Wandb:
    """A run on wandb; its id is kept in the folder, so that a resumed run goes on in the same one."""

    def __init__(
        self, folder: Path, project: str, config: Mapping[str, Any], code: Path | None, new: bool = True
    ):
        import wandb

        self._wandb = wandb
        kept = folder / "wandb_id.txt"
        if new or not kept.is_file():
            with replacing(kept) as temporary:
                temporary.write_text(uuid4().hex[:12])
        name = kept.read_text().strip()
        self._run = wandb.init(project=project, dir=str(folder), config=dict(config), id=name, resume="allow")
        if code is not None:
            self._run.log_code(str(code))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self._run.finish()


_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_trackers(report_to: ReportTo) -> tuple[str, ...]:
    """The services a `--report_to` flag names.

    Raises:
      UserError: one of them is not installed.
    """
    wanted = tuple(_PACKAGES) if report_to == "all" else () if report_to == "none" else (report_to,)
    for name in wanted:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"--report_to {report_to}: {_PACKAGES[name]} is not installed; pip install {_PACKAGES[name]}, or pass "
                f"--report_to none ({LOG_FILE} is written in any case)"
            )
    return wanted


class RunLog:
    """A run's `log.jsonl`, and the trackers.

    Args:
      folder: the run's output folder.
      step: the step that the run continues from; later lines, of work that was lost, are dropped. None: a new run, and
        all are.
      trackers: services that get the same. One that fails is left out from then on; the training goes on.
      source: the output folder that the run continues from; default: the same.
    """

    def __init__(
        self, folder: Path, step: int | None, trackers: Sequence[Tracker] = (), source: Path | None = None
    ):
        self.path, self.trackers = folder / LOG_FILE, list(trackers)
        earlier = read_rows((source or folder) / LOG_FILE)
        kept = [] if step is None else [row for row in earlier if row["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self.path, "a")  # noqa: SIM115 (closed by `close`)
        self._told = False

    def write(self, step: int, values: Row) -> None:
        """Adds a line. What is not finite is written as null, which JSON can say."""
        line = json.dumps({"step": step, **{name: _finite(value) for name, value in values.items()}})
        self._on_disk(lambda: self._file.write(line + "\n"))
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._track(lambda tracker: tracker.scalars(step, numbers))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._track(lambda tracker: tracker.picture(step, name, picture))

    def flush(self) -> None:
        self._on_disk(self._file.flush)

    def _on_disk(self, action: Callable[[], object]) -> None:
        """A full disk costs lines of the log, not the training."""
        try:
            action()
        except OSError as error:
            if not self._told:
                print(f"{self.path}: {error.strerror}; lines of the log are lost", flush=True)
            self._told = True

    def close(self) -> None:
        self.flush()
        with suppress(OSError):  # the same once more
            self._file.close()
        self._track(lambda tracker: tracker.close())

    def _track(self, call: Callable[[Tracker], object]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # a disk, a network: nothing that training should end for
                self.trackers.remove(tracker)
                print(f"{type(tracker).__name__} is left out from now on: {error}", flush=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill has cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True)
class Curve:
    """One panel of the plot: a title and the logged values in it."""

    title: str
    names: tuple[str, ...]
    log_scale: bool = False


def plot_curves(rows: Sequence[Row], curves: Sequence[Curve], path: Path, title: str) -> None:
    """Draws the curves that have values, each value faint and its running mean strong; a PNG."""
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
            colour, few = f"C{number}", len(steps) < 30
            axes.plot(steps, values, "o-" if few else "-", color=colour, alpha=1 if few else 0.25, ms=3, lw=1,
                      label=name if few else None)  # fmt: skip
            if not few:
                axes.plot(*_running_mean(steps, values), color=colour, label=name)
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


def summarise(rows: Sequence[Row], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """First and last value of each logged name, each a mean over up to a tenth of its values."""
    summary = {}
    for name in names:
        _, values = _series(rows, name)
        if len(values):
            width = max(1, len(values) // 10)
            summary[name] = {"first": float(values[:width].mean()), "last": float(values[-width:].mean())}
    return summary


def summary_table(summary: Mapping[str, Mapping[str, float]]) -> str:
    """The summary as lines for a terminal."""
    width = max([len(name) for name in summary], default=0)
    lines = [f"  {'':{width}}  {'first':>11}  {'last':>11}"]
    lines += [f"  {name:{width}}  {v['first']:11.4g}  {v['last']:11.4g}" for name, v in summary.items()]
    return "\n".join(lines)
