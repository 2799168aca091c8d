"""The log of a training run: one JSON line per step, and TensorBoard or wandb on request."""

from __future__ import annotations

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
# What a row says about time; everything else in it is computed, and the same in a repeated run.
TIMINGS = ("images_per_s", "waiting_s", "waiting_longest", "waiting_longest_s")
Row = Mapping[str, Any]


class Tracker(Protocol):
    """A service that displays a run while it trains."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def picture(self, step: int, name: str, picture: Image.Image) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder. A resumed run passes the `step` it continues from, and later points are hidden."""

    def __init__(self, folder: Path, step: int | None = None):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1)

    def _check(self) -> None:
        """Raises OSError if the writer thread has died, for example because the disk is full; adding to its queue would then
        block."""
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
    """A run on wandb. Its id is kept in the folder, so that a resumed run continues the same one."""

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
    """Returns the services that `--report_to` names.

    Raises:
      UserError: one of them is not installed.
    """
    wanted = tuple(_PACKAGES) if report_to == "all" else () if report_to == "none" else (report_to,)
    for name in wanted:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"--report_to {report_to}: {_PACKAGES[name]} is not installed; pip install {_PACKAGES[name]}, or pass "
                f"--report_to none ({LOG_FILE} is always written)"
            )
    return wanted


class RunLog:
    """Writes a run's `log.jsonl` and reports to the trackers.

    Args:
      folder: the run's output folder.
      step: the step that the run continues from; later lines in the log are dropped. None: a new run; all lines are dropped.
      trackers: services that get the same values. If one fails, training continues without it.
      source: the output folder whose log is continued; default: `folder`.
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
        self._warned = False

    def write(self, step: int, values: Row) -> None:
        """Adds a line. Values that are not finite become null, because JSON has no NaN."""
        line = json.dumps({"step": step, **{name: _finite(value) for name, value in values.items()}})
        self._on_disk(lambda: self._file.write(line + "\n"))
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._track(lambda tracker: tracker.scalars(step, numbers))

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        self._track(lambda tracker: tracker.picture(step, name, picture))

    def flush(self) -> None:
        self._on_disk(self._file.flush)

    def _on_disk(self, action: Callable[[], object]) -> None:
        """Runs `action`; a full disk loses lines of the log but does not stop training."""
        try:
            action()
        except OSError as error:
            if not self._warned:
                print(f"{self.path}: {error.strerror}; lines of the log are lost", flush=True)
            self._warned = True

    def close(self) -> None:
        self.flush()
        with suppress(OSError):  # the same error again
            self._file.close()
        self._track(lambda tracker: tracker.close())

    def _track(self, call: Callable[[Tracker], object]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # from a disk or a network: no reason to stop training
                self.trackers.remove(tracker)
                print(f"{type(tracker).__name__} failed, continuing without it: {error}", flush=True)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a log, skipping broken ones, such as a last line cut short when the run was killed."""
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
