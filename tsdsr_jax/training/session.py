"""A training run, from its flags to its last checkpoint; all training commands share it.

A command describes what it trains as a `Task`. `train` starts or resumes the run, feeds it samples, and writes the log,
pictures, checkpoints and curves to the output folder.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from tsdsr_jax.atomic import replacing
from tsdsr_jax.compile_watch import CompileWatch
from tsdsr_jax.data.batches import BadSamples, Batches, RowPlan
from tsdsr_jax.data.record import Record
from tsdsr_jax.data.sources import Data
from tsdsr_jax.data.workers import read_ahead
from tsdsr_jax.devices import matmul_precision
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import versions
from tsdsr_jax.places import SOURCE_CODE
from tsdsr_jax.storage import is_copy
from tsdsr_jax.training import checkpoint, loop
from tsdsr_jax.training.agreement import check_agreement
from tsdsr_jax.training.log import RunLog, TensorBoard, Tracker, Wandb, check_trackers, read_rows
from tsdsr_jax.training.optimizer import with_new_scale
from tsdsr_jax.training.options import RunOptions
from tsdsr_jax.training.resume import (
    Start,
    changed_arithmetic,
    changed_flags,
    check_identity,
    check_rows,
)
from tsdsr_jax.training.step import Step, TrainState
from tsdsr_jax.training.summary import Curve, first_and_last, in_steps, plot_curves, summary_table


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run trains.

    Attributes:
      step: the training step on its devices.
      validate: state -> (values, picture).
      files: state -> how to make the files that a checkpoint exports. Called by every process.
      export: name of the folder for these files.
      identity: what must match a checkpoint's for it to be resumed.
      agreed: what else must be the same for all processes, though a resumed run may change it.
      losses: metrics that the progress bar shows.
      counts: metrics that should be 0 -> what it means if they are not.
      curves: what to plot.
      memory_remedies: flags that save device memory, strongest first.
      how_to_use: checkpoint folder -> hint to print at the end of training.
    """

    step: Step
    validate: Callable[[TrainState], tuple[dict[str, float], Image.Image]]
    files: Callable[[TrainState], checkpoint.Export]
    export: str
    identity: Mapping[str, Any]
    agreed: Mapping[str, Any]
    losses: Sequence[str]
    counts: Mapping[str, str]
    curves: Sequence[Curve]
    memory_remedies: str
    how_to_use: Callable[[Path], str]


def say(line: str) -> None:
    """Prints a line above the progress bar, in the first process only."""
    if jax.process_index() == 0:
        tqdm.write(line)


def announce(options: RunOptions, mesh: Mesh, data: Data, steps: int, notes: Sequence[str]) -> None:
    """Prints a one-line summary of the run, and notes about its flags."""
    hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = options.rows(mesh)
    say(
        f"{mesh.size} × {mesh.devices.flat[0].device_kind}{hosts}, {np.dtype(options.dtype)}; {len(data.source)} samples, "
        f"{steps} step{'s' * (steps != 1)} of {rows} image{'s' * (rows != 1)}"
    )
    for note in notes:
        say(f"note: {note}")


def train(options: RunOptions, task: Task, data: Data, mesh: Mesh, start: Path | None) -> None:
    """Trains to the end or until a signal, from `start`: a checkpoint from `find_start`, or None for a new run.

    Raises:
      UserError: the checkpoint does not fit, the data is bad, memory runs out, too many consecutive steps are non-finite,
        or the last checkpoint could not be saved.
      SystemExit: a signal stopped the run: 143 or 130 after saving, 1 if it could not save.
    """
    with loop.explained_memory(task.memory_remedies), CompileWatch(say):
        _Run(options, task, data, mesh).all(start)


class _Run:
    def __init__(self, options: RunOptions, task: Task, data: Data, mesh: Mesh):
        self.options, self.task, self.data = options, task, data
        self.folder, self.began = options.output_dir, time.perf_counter()
        self.rows = options.rows(mesh)
        self.steps = options.steps(len(data.source), mesh)
        self.identity = {"seed": options.seed, **task.identity, **data.identity}

    def all(self, path: Path | None) -> None:
        options = self.options
        with matmul_precision(options.dtype):
            begun = self.begin(path)
            if begun is None:
                return
            self.start, state = begun
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output_dir {self.folder}: cannot be created ({error.strerror})") from None
            self.checkpoints = checkpoint.Checkpoints(
                self.folder,
                options.checkpoints_total_limit,
                say,
                self.task.export,
                options.save_timeout,
                alone=is_copy(self.folder),
            )
            self.checkpoints.check(state)
            self.bad = BadSamples(len(self.data.source), options.max_bad_samples)
            self.log = self.open_log() if jax.process_index() == 0 else None
            stop = loop.StopSignal()
            try:
                if self.start.step == 0:
                    self.validate(state, 0)
                with closing(self.batches()) as batches:
                    _, step = loop.run_loop(
                        state, self.task.step, batches, self.schedule(), self.hooks(), stop
                    )
            finally:
                self.checkpoints.close()
                if self.log:
                    self.log.close()
                    self.plot(self.log)
            self.finish(step, stop)

    # --- beginning ---------------------------------------------------------------------------

    def begin(self, path: Path | None) -> tuple[Start, Any] | None:
        """Creates a new state or loads a checkpoint's; None if all steps are done already."""
        meta = checkpoint.read_meta(path) if path else None
        # Whatever a process has found by itself. Where nothing decides, nothing is compared.
        found = {
            "checkpoint's step": meta["step"] if meta else 0,
            "images per step": self.rows,
            "steps": self.steps,
        }
        check_agreement({**self.identity, **self.task.agreed, **found}, "data, weights or checkpoints")
        if path and meta:
            return self.resume(path, meta)
        if self.options.resume_from_checkpoint:
            say(f"nothing to resume in {self.folder}: starting a new run")
        return Start(), self.task.step.new_state()

    def resume(self, path: Path, meta: Mapping[str, Any]) -> tuple[Start, Any] | None:
        check_identity(path, meta["identity"], self.identity)
        if meta["rows"] != self.rows:
            check_rows(path, meta["rows"], self.rows, by_epochs=self.options.max_train_steps is None)
            say(f"note: {self.rows} images per step, {meta['rows']} before the checkpoint")
        if meta["step"] >= self.steps:
            say(
                f"{path}: all {self.steps} steps are done; raise --max_train_steps or --num_train_epochs to train longer"
            )
            return None
        for line in changed_flags(meta["options"], self.options.as_json()):
            say(f"note: changed since the checkpoint: --{line}")
        if changed := changed_arithmetic(meta.get("versions", {}), versions()):
            say(f"note: steps round differently than before the checkpoint ({'; '.join(changed)})")
        state = checkpoint.read_state(path, self.task.step.shapes)
        if meta["options"].get("mixed_precision") != self.options.mixed_precision:
            state = with_new_scale(state, self.options.dynamic_scale)
        say(f"resuming from {path}: {meta['step']} steps done, {meta['samples']} samples seen")
        return Start(meta["step"], meta["samples"], path), state

    def open_log(self) -> RunLog:
        options = self.options
        folder, start = self.folder / options.logging_dir, self.start
        with replacing(self.folder / "config.json") as temporary:
            temporary.write_text(json.dumps(options.as_json() | {"versions": versions()}, indent=2) + "\n")
        trackers: list[Tracker] = []
        for name in check_trackers(options.report_to):
            if name == "tensorboard":
                trackers.append(TensorBoard(folder, start.step or None))
            else:
                code = SOURCE_CODE if options.log_code else None
                trackers.append(Wandb(folder, options.log_name, options.as_json(), code, new=not start.step))
        source = start.path.resolve().parent if start.path else None
        return RunLog(self.folder, start.step or None, trackers, source)

    # --- running -----------------------------------------------------------------------------

    def batches(self) -> Generator[Record, None, None]:
        parts = self.options.gradient_accumulation_steps
        steps_left = self.steps - self.start.step
        rows = RowPlan(
            self.start.samples,
            steps_left,
            parts,
            self.rows // parts,
            jax.process_index(),
            jax.process_count(),
        )
        batches = Batches(self.data.source, self.data.shapes, rows, self.options.seed)
        with closing(read_ahead(batches, self.options.dataloader_num_workers)) as reader:
            for batch in reader:
                for message in self.bad.add(batch.problems):
                    # Printed by every process, because each one reads other samples.
                    tqdm.write(f"left out: {message}")
                yield self.task.step.put(batch)

    def schedule(self) -> loop.LoopSchedule:
        options = self.options
        return loop.LoopSchedule(
            start=self.start.step,
            end=self.steps,
            log=options.logging_steps,
            checkpoint=options.checkpointing_steps,
            validation=options.validation_steps,
            max_bad_steps=options.max_bad_steps,
            images=self.rows,
            shown=tuple(self.task.losses),
            profile=(*steps, self.folder / "profile") if (steps := options.profiled()) else None,
        )

    def hooks(self) -> loop.Hooks:
        write = self.log.write if self.log else lambda step, values: None
        return loop.Hooks(log=write, validate=self.validate, save=self.save)

    def validate(self, state: Any, step: int) -> None:
        values, picture = self.task.validate(state)
        say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        if self.log:
            self.log.write(step, values)
            self.log.picture(step, "validation", picture)
            path = self.folder / "validation" / f"step_{step:0{checkpoint.DIGITS}d}.png"
            try:
                with replacing(path) as temporary:
                    picture.save(temporary, format="png")
            except UserError as error:  # a failed picture must not stop the run
                say(str(error))

    def save(self, state: Any, step: int) -> None:
        if self.log:
            self.log.flush()
        meta = {
            "step": step,
            "samples": self.start.samples + (step - self.start.step) * self.rows,
            "rows": self.rows,
            "identity": self.identity,
            "options": self.options.as_json(),
            "versions": versions(),
        }
        self.checkpoints.save(step, state, meta, self.task.files(state))

    def plot(self, log: RunLog) -> None:
        title = f"{self.options.log_name}: {self.folder.resolve().name}"
        try:
            plot_curves(read_rows(log.path), self.task.curves, self.folder / "curves.png", title)
        except Exception as error:  # likewise, whatever it is
            say(f"the curves could not be drawn: {error}")

    # --- ending ------------------------------------------------------------------------------

    def finish(self, step: int, stop: loop.StopSignal) -> None:
        path = self.folder / self.checkpoints.path(step).name
        unsaved = self.checkpoints.failed is not None
        if stop.received is not None and step < self.steps:
            where = (
                "could not save" if unsaved else f"saved {path}" if path.is_dir() else "nothing new to save"
            )
            # Once the folder holds a checkpoint, resuming from any other place is refused.
            again = "latest" if checkpoint.find(self.folder, "latest") else self.start.path
            hint = f"; continue with --resume_from_checkpoint {shlex.quote(str(again))}" if again else ""
            say(f"stopped after {step} of {self.steps} steps; {where}{hint}")
            raise SystemExit(1 if unsaved else 128 + stop.received)
        if self.log:
            self.summarize(step, self.log)
        if self.bad.names:
            say(f"{len(self.bad.names)} samples were left out: {', '.join(self.bad.names[:5])}")
        if unsaved:
            raise UserError(f"{path}: the last checkpoint could not be saved ({self.checkpoints.failed})")
        if self.checkpoints.unexported:
            raise UserError(
                f"{path}: can be resumed, but its {self.task.export} could not be written ({self.checkpoints.unexported}); "
                "make room, and continue with --resume_from_checkpoint latest and a larger --max_train_steps"
            )
        say(self.task.how_to_use(path))

    def summarize(self, step: int, log: RunLog) -> None:
        """Prints a summary of the log and writes it to summary.json."""
        rows = read_rows(log.path)
        values = first_and_last(rows, [name for curve in self.task.curves for name in curve.names])
        skipped = sum((row.get("bad_steps") or 0) > 0 for row in rows)
        say(f"{step} steps done. Mean of each value over its first and last tenth:\n{summary_table(values)}")
        if skipped:
            say(f"{skipped} of these steps were skipped, because gradients or updates were not finite")
        for name, meaning in self.task.counts.items():
            if steps := sum((row.get(name) or 0) > 0 for row in rows):
                say(f"in {steps} steps, {meaning} ({name} in the log)")
        if self.options.profiled():
            folder = shlex.quote(str(self.folder / "profile"))
            say(f"trace: {folder}; look at it with: xprof --logdir {folder}")
        say(in_steps(rows, self.start.step, self.rows, time.perf_counter() - self.began))
        say(f"curves: {self.folder / 'curves.png'}; pictures: {self.folder / 'validation'}; log: {log.path}")
        summary = {
            "steps": step,
            "samples": self.start.samples + (step - self.start.step) * self.rows,
            "skipped_steps": skipped,
            "bad_samples": self.bad.names,
            "values": values,
        }
        with replacing(self.folder / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")
