"""What a training run tells: a JSON line per step, TensorBoard and wandb on request."""

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
