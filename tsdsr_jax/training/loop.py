"""The training loop: when to log, validate, save and stop. It does not know what is trained."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from tsdsr_jax.errors import UserError


class BadSteps(UserError):
    """Too many consecutive non-finite steps. Every process sees the same ones, so all can save before they stop."""


# (state, batch) -> (state, metrics); metrics are scalars by name and include `bad_steps`.
TrainStep = Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
State = Any

_LINE_EVERY = 30.0  # seconds between progress lines, if there is no terminal for a progress bar


@dataclasses.dataclass(frozen=True)
class LoopSchedule:
    """At which steps the loop logs, validates, saves and stops.

    Attributes:
      start, end: the step to start from, and the last one.
      log: fetch the metrics every N steps; in between, the host does not wait for the device.
      checkpoint, validation: save and validate every N steps, and at the end.
      max_bad_steps: consecutive skipped steps that end the run.
      images: images per step, to compute the rate.
      profile: first and last step of a trace, and the folder to write it to; None for no trace.
      shown: names of the metrics that the progress bar shows.
    """

    start: int
    end: int
    log: int
    checkpoint: int
    validation: int
    max_bad_steps: int
    images: int
    shown: tuple[str, ...]
    profile: tuple[int, int, Path] | None = None


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What the loop calls.

    Attributes:
      log: (step, values); called for every step, a few steps late.
      validate: (state, step).
      save: (state, step); starts to save a checkpoint.
    """

    log: Callable[[int, dict[str, float]], object]
    validate: Callable[[State, int], object]
    save: Callable[[State, int], object]


class StopSignal:
    """Catches SIGTERM and the first Ctrl-C, so that a run can save before it stops; a second Ctrl-C stops it at once.

    Several processes that train together must stop at the same step. JAX's coordination service notices a SIGTERM to any of
    them and chooses when. It does not handle Ctrl-C, which here becomes a SIGTERM to this process.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.together = jax.process_count() > 1
        self._interrupted, self._asked = False, 0
        if self.together:
            signal.signal(signal.SIGINT, self._pass_on)
        else:
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        tqdm.write(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr)
        if number == signal.SIGINT:
            tqdm.write("(press Ctrl-C again to stop at once, without saving)", file=sys.stderr)

    def _pass_on(self, _number: int, _frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        tqdm.write("SIGINT: all processes save and stop", file=sys.stderr)
        tqdm.write("(press Ctrl-C again to stop at once, without saving)", file=sys.stderr)
        os.kill(os.getpid(), signal.SIGTERM)

    def requested(self) -> bool:
        """Whether to stop now. All processes ask before each step.

        JAX chooses one of the next questions by their number. Steps won't do as numbers: a signal that comes before the
        first question would choose 1, which a resumed run is past.
        """
        if self.together and multihost_utils.reached_preemption_sync_point(self._asked):
            self.received = signal.SIGTERM
        self._asked += 1
        return self.received is not None


def run_loop(
    state: State,
    train_step: TrainStep,
    batches: Iterator[Any],
    schedule: LoopSchedule,
    hooks: Hooks,
    stop: StopSignal,
) -> tuple[State, int]:
    """Trains until the end of the schedule or a signal, and saves in both cases.

    Returns:
      (state, number of steps done).

    Raises:
      UserError: too many consecutive bad steps, or bad data. The state is saved first; with several processes, only
        after bad steps.
    """
    step = saved = schedule.start
    watch, trace = _Watch(schedule), _Trace(schedule.profile)
    try:
        while step < schedule.end and not stop.requested():
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            trace.before(step + 1)
            state, metrics = train_step(state, batch)
            step += 1
            watch.add(step, metrics, waited)
            trace.after(step, metrics)
            if step == schedule.start + 1:
                watch.paused()  # compilation, and the start of the workers
            last = step == schedule.end
            validating = last or step % schedule.validation == 0
            saving = last or step % schedule.checkpoint == 0
            if validating or saving or step % schedule.log == 0:
                watch.fetch(hooks.log)
            if validating:
                hooks.validate(state, step)
            if saving:
                hooks.save(state, step)
                saved = step
            if validating or saving:
                watch.paused()
        if step < schedule.end:
            watch.fetch(hooks.log)
            if step > saved:
                hooks.save(state, step)
    except UserError as error:
        # Only this process knows about its bad data, so the others would not save with it.
        if (isinstance(error, BadSteps) or jax.process_count() == 1) and step > saved:
            hooks.save(state, step)
        raise
    finally:
        trace.close()
        watch.close()
    return state, step


@contextmanager
def explained_memory(remedies: str) -> Iterator[None]:
    """Turns a device's out-of-memory error into a UserError that lists the flags that help."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")[:200]
        raise UserError(
            f"the device is out of memory ({reason}). To use less, strongest first: {remedies}"
        ) from None


class _Watch:
    """Fetches metrics from the device and shows progress and the rate."""

    def __init__(self, schedule: LoopSchedule):
        self.schedule = schedule
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.waits: list[float] = []
        self.since, self.last_line = time.perf_counter(), 0.0
        self.quiet = jax.process_index() != 0
        self.bar = tqdm(
            total=schedule.end,
            initial=schedule.start,
            unit="step",
            dynamic_ncols=True,
            disable=True if self.quiet else None,
        )

    def add(self, step: int, metrics: dict[str, jax.Array], waited: float) -> None:
        self.pending.append((step, metrics))
        self.waits.append(waited)

    def fetch(self, log: Callable[[int, dict[str, float]], object]) -> None:
        """Waits for the pending metrics, logs them, and checks for bad steps."""
        if not self.pending:
            return
        steps = [step for step, _ in self.pending]
        fetched = jax.device_get([metrics for _, metrics in self.pending])
        self.pending.clear()
        now = time.perf_counter()
        rate = self.schedule.images * len(steps) / (now - self.since)
        self.since = now
        slowest = _slowest(float(np.mean(self.waits)))
        most_bad = 0.0
        for step, metrics, waited in zip(steps, fetched, self.waits, strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            timings = {"images_per_s": round(rate, 3), "waiting_s": round(waited, 4)} | slowest
            log(step, values | timings)
            most_bad = max(most_bad, values["bad_steps"])
        self.waits.clear()
        self._show(steps[-1], values, rate, len(steps))
        if most_bad >= self.schedule.max_bad_steps:
            raise BadSteps(
                f"{most_bad:.0f} steps in a row had non-finite gradients or updates (--max_bad_steps "
                f"{self.schedule.max_bad_steps}); try --mixed_precision bf16 or no, or a lower --learning_rate or "
                "--max_grad_norm, and look at the last lines of log.jsonl"
            )

    def _show(self, step: int, values: dict[str, float], rate: float, steps: int) -> None:
        losses = {name: f"{values[name]:.4g}" for name in self.schedule.shown if name in values}
        self.bar.set_postfix(losses | {"img/s": f"{rate:.3g}"}, refresh=False)
        self.bar.update(steps)
        now = time.perf_counter()
        finished = step == self.schedule.end
        if self.bar.disable and not self.quiet and (now - self.last_line > _LINE_EVERY or finished):
            self.last_line = now
            left = (self.schedule.end - step) * self.schedule.images / rate
            shown = " ".join(f"{name} {value}" for name, value in losses.items())
            print(
                f"step {step}/{self.schedule.end}  {shown}  {rate:.3g} img/s  {_clock(left)} left", flush=True
            )

    def paused(self) -> None:
        """Excludes the time since the last fetch from the rate and from the bar's estimate."""
        self.since = time.perf_counter()
        self.bar.unpause()

    def close(self) -> None:
        self.bar.close()


def _slowest(waited: float) -> dict[str, float]:
    """With several processes: which waits longest for its data, and how long for a step. All wait for it in the next one."""
    if jax.process_count() == 1:
        return {}
    waits = multihost_utils.process_allgather(np.float32(waited)).ravel()
    return {"waiting_longest": int(waits.argmax()), "waiting_longest_s": round(float(waits.max()), 4)}


class _Trace:
    """Writes a trace of some steps, to be opened with XProf.

    Args:
      wanted: the first and the last step, and the folder; None for no trace.
    """

    def __init__(self, wanted: tuple[int, int, Path] | None):
        self.wanted, self.running = wanted, False

    def before(self, step: int) -> None:
        if self.wanted and step == self.wanted[0]:
            jax.profiler.start_trace(self.wanted[2])
            self.running = True

    def after(self, step: int, metrics: dict[str, jax.Array]) -> None:
        if self.running and self.wanted and step >= self.wanted[1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
