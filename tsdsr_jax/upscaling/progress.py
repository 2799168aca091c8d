"""The command line's progress: photographs, the tiles of a large one, and how long they took."""

from __future__ import annotations

import time

from tqdm import tqdm

from tsdsr_jax.compile_watch import CompileWatch
from tsdsr_jax.upscaling.engine import Progress

_STAGES = {"encode": "encoding", "tiles": "tile {} of {}", "decode": "decoding"}

_REDRAW = 0.1  # seconds between two tiles that are shown


class PhotoBar:
    """A progress bar of photographs on a terminal. Its estimate and `seconds` leave out compilation.

    Args:
      total: number of photographs.
      watch: of this process's compilations.
    """

    def __init__(self, total: int, watch: CompileWatch):
        self.bar = tqdm(total=total, unit=" images", disable=None)
        self._watch, self._compiled, self._started = watch, watch.seconds, time.perf_counter()
        self._shown = 0.0
        watch.ended = self.bar.unpause

    @property
    def stages(self) -> Progress | None:
        """What `upscale_groups` calls with the stages of large photographs; None without a terminal."""
        return None if self.bar.disable else self._show

    def _show(self, stage: str, done: int, total: int) -> None:
        self.bar.set_postfix_str(_STAGES[stage].format(min(done + 1, total), total), refresh=False)
        now = time.perf_counter()
        if done == 0 or now - self._shown > _REDRAW:
            self._shown = now
            self.bar.refresh()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - (self._watch.seconds - self._compiled)

    def update(self, count: int = 1) -> None:
        self.bar.set_postfix_str("", refresh=False)
        self.bar.update(count)

    def close(self) -> None:
        self._watch.ended = lambda: None
        self.bar.close()


def duration(seconds: float) -> str:
    """A duration: 0.034 s, 8.1 s, 2:03 min, 1:02:03 h."""
    if seconds < 99.95:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
