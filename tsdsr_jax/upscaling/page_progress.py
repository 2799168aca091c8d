"""The page's progress bar, which moves as evenly as the stages' times are known."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

# Stage -> its share of the time before any photograph has been timed, and the words above the bar.
_STAGES = {
    "encode": (0.33, "Encoding"),
    "tiles": (0.17, "Tile {} of {}"),
    "decode": (0.45, "Decoding"),
    "write": (0.05, "Writing"),
}
_TICK_SECONDS = 0.5
# Within a step the bar approaches the step's end but does not reach it.
_MOST_OF_A_STEP = 0.95


class StageTimes:
    """The stages' seconds per pixel, as the last photographs took them that compiled nothing."""

    def __init__(self) -> None:
        self._per_pixel: dict[str, float] = {}

    def learn(self, seconds: Mapping[str, float], pixels: int) -> None:
        self._per_pixel |= {stage: took / pixels for stage, took in seconds.items()}

    def expected(self, stage: str, pixels: int) -> float | None:
        """The seconds that a stage will take; None until one has been timed."""
        return self._per_pixel[stage] * pixels if stage in self._per_pixel else None

    def span(self, stage: str) -> tuple[float, float]:
        """Where on the bar a stage begins and ends."""
        known = self._per_pixel if self._per_pixel.keys() >= _STAGES.keys() else None
        shares = {name: known[name] if known else share for name, (share, _) in _STAGES.items()}
        before, total = 0.0, sum(shares.values()) or 1.0
        for name, share in shares.items():
            if name == stage:
                return before / total, (before + share) / total
            before += share
        raise ValueError(f"no stage {stage}")


class ProgressBar:
    """Shows the stages of a photograph; see `page_pictures.upscale_photo`. Use it in a `with` statement.

    Between two steps, the bar moves as far as the time that a step is expected to take has passed.

    Args:
      show: Gradio's progress, called with a fraction and words.
      check: called at every step; may raise.
      times: of earlier photographs; it learns from this one.
    """

    def __init__(self, show: Callable[..., object], check: Callable[[], object], times: StageTimes):
        self.show, self.check, self.times = show, check, times
        self.pixels, self.compiles = 1, False
        self._seconds: dict[str, float] = {}
        # Stage, steps done, their number, words, and when this step began; shared with the ticker.
        self._step: tuple[str, int, int, str, float] | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        # Gradio keeps the visit that a bar belongs to in a context variable.
        context = contextvars.copy_context()
        self._ticker = threading.Thread(target=lambda: context.run(self._tick), daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._lock:
            self._leave_step()
            self._step = None
        self._ended.set()
        self._ticker.join()
        if kind is None and not self.compiles and self._seconds.keys() >= _STAGES.keys():
            self.times.learn(self._seconds, self.pixels)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.check()
        if stage == "start":
            self.pixels = total
        elif stage == "compile":
            self.compiles = True
        else:
            words = _STAGES[stage][1].format(min(done + 1, total), total)
            if self.compiles and done == 0 and stage != "write":
                words += ", compiling for this size"
            with self._lock:
                self._leave_step()
                self._step = stage, done, total, words, time.monotonic()
                self._show(0)

    def _leave_step(self) -> None:
        if self._step:
            stage, *_, began = self._step
            self._seconds[stage] = self._seconds.get(stage, 0) + time.monotonic() - began

    def _show(self, passed: float) -> None:
        """Shows the current step when this fraction of it has passed."""
        assert self._step
        stage, done, total, words, _ = self._step
        start, end = self.times.span(stage)
        self.show(start + (end - start) * min(1, (done + passed) / total), desc=words)

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_SECONDS):
            with self._lock:
                if self._step and not self.compiles:
                    stage, _, total, _, began = self._step
                    if expected := self.times.expected(stage, self.pixels):
                        passed = (time.monotonic() - began) / (expected / total)
                        self._show(min(_MOST_OF_A_STEP, passed))
