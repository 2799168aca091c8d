"""Says that XLA compiles when that takes long, and how long it took in all."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax.monitoring
from tqdm import tqdm

_BEGIN = "/jax/compilation_cache/compile_requests_use_cache"
_END = "/jax/core/compile/backend_compile_duration"
# Loading a program from the cache takes less.
_PATIENCE = 3.0
_AGAIN = 30.0

COMPILING = "compiling (once; kept for later runs)"
STILL_COMPILING = "still compiling ({:.0f} s so far)"


def say_above_bar(line: str) -> None:
    """Prints a line on stderr, above a progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class CompileWatch:
    """Watches the compilations of this process, in all threads. Use it as a context.

    Where programs are not kept, JAX does not report when a compilation begins, and this says nothing.

    Args:
      say: called with `COMPILING` when compilations have lasted some seconds. While these or others last, it is called
        again, every half a minute, with the time that all have taken so far.
      ended: called when the last of the compilations that are under way has ended.
      patience, again: these times, in seconds.
    """

    def __init__(
        self,
        say: Callable[[str], object] = say_above_bar,
        ended: Callable[[], object] = lambda: None,
        patience: float = _PATIENCE,
        again: float = _AGAIN,
    ):
        self.ended = ended
        self._say, self._patience, self._again = say, patience, again
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._since = self._done = 0.0
        self._said = float("-inf")
        self._timer: threading.Timer | None = None

    def __enter__(self) -> CompileWatch:
        jax.monitoring.register_event_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._begin)
        jax.monitoring.unregister_event_duration_listener(self._end)
        with self._lock:
            self._stop()

    @property
    def seconds(self) -> float:
        """How long compilations have taken so far; those at the same time count once."""
        with self._lock:
            return self._done + (time.perf_counter() - self._since if self._threads else 0)

    def _begin(self, event: str, **_: Any) -> None:
        if event != _BEGIN:
            return
        with self._lock:
            if not self._threads:
                self._since = time.perf_counter()
                self._start_timer(self._patience)
            self._threads.add(threading.get_ident())

    def _end(self, event: str, duration_secs: float, **_: Any) -> None:
        if event != _END:
            return
        with self._lock:
            self._threads.discard(threading.get_ident())
            last = self._timer is not None and not self._threads
            if last:
                self._done += time.perf_counter() - self._since
                self._stop()
        if last:
            self.ended()

    def _announce(self) -> None:
        with self._lock:
            if self._timer is None:
                return
            now = time.perf_counter()
            if now < self._said + self._again:
                self._start_timer(self._said + self._again - now)
                return
            line = COMPILING
            if self._said > float("-inf"):
                line = STILL_COMPILING.format(self._done + now - self._since)
            self._said = now
            self._start_timer(self._again)
        self._say(line)

    def _start_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
