"""Notices when another process of a run ends, and tells the others when this one does.

A process that is gone would leave the others waiting in a collective operation for minutes, or for ever. Each one therefore
counts in the key-value store of JAX's coordination service, which process 0 keeps, and looks at the others' counts. Whoever
fails leaves its reason there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

# The status of a process that ends because another one did: EX_TEMPFAIL of sysexits.h, "try again".
PEER_ENDED = 75
# Seconds between two looks.
_INTERVAL = 1.0
# Seconds that a process has to end by itself after another has ended, for example because of the same bad step.
_GRACE = 3.0
# Seconds that process 0 waits for the others to read why it ends: the store ends with it.
_READING = 5.0
# Seconds for each thing that is to be done before this process ends because of another one.
_LAST_ACTS = 60.0
_ROOT = "tsdsr_jax/"

_last_acts: list[Callable[[], object]] = []


def before_giving_up(act: Callable[[], object]) -> None:
    """Has something done before this process ends because of another one, in at most a minute."""
    _last_acts.append(act)


class Store(Protocol):
    """The coordination service's key-value store."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]: ...


class Peers:
    """The other processes of a run.

    Args:
      store: what they share.
      index, count: this process's number, and how many there are.
      timeout: seconds after which a process whose count stands still is given up.
      exit_now: ends this process with a status.
      say: prints a line.
    """

    def __init__(
        self,
        store: Store,
        index: int,
        count: int,
        timeout: float,
        exit_now: Callable[[int], Any] = os._exit,
        say: Callable[[str], Any] = lambda line: print(line, file=sys.stderr, flush=True),
    ):
        self.index, self.count, self.timeout = index, count, timeout
        self._store, self._exit, self._say = store, exit_now, say
        self._host = socket.gethostname()
        self._beats = 0
        self._last: dict[int, tuple[str, float]] = {}  # count of each other process, and when it was new
        self._hosts: dict[int, str] = {}
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Starts to count and to look."""
        self._beat()
        self._thread.start()

    def leave(self) -> None:
        """Says that this process ends as it should."""
        self._left.set()
        with contextlib.suppress(Exception):  # the others may have ended before
            self._set("ended", "")

    def fail(self, status: int, reason: str) -> None:
        """Says why this process ends, and ends it."""
        self._left.set()
        with contextlib.suppress(Exception):
            self._set("ended", reason.split("\n")[0][:500] or f"status {status}")
            end = time.monotonic() + _READING
            while self.index == 0 and time.monotonic() < end and len(self._told()) < self.count:
                time.sleep(0.1)
        self._end(status)

    def _told(self) -> set[int]:
        """The processes that know of an end: they have read of it, or end themselves."""
        return {*self._read("read"), *self._read("ended")}

    def wait_for_reason(self) -> None:
        """Gives the watching thread the time to find which process has ended, and to end this one."""
        self._left.wait(self.timeout + 2 * _GRACE)

    # --- the watching thread ---------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._left.wait(_INTERVAL):
            try:
                self._beat()
                reason = self.gone(time.monotonic())
            except Exception as error:  # the store is gone, and process 0 with it
                reason = f"process 0{self._on(0)} cannot be reached ({str(error).splitlines()[0][:200]})"
            if reason:
                self._give_up(reason)

    def gone(self, now: float) -> str:
        """Says which other process has failed or stands still at a time in seconds; empty if none."""
        ended, beats = self._read("ended"), self._read("alive")
        for process, text in beats.items():
            count, _, self._hosts[process] = text.partition(" ")
            if self._last.get(process, ("", 0.0))[0] != count:
                self._last[process] = (count, now)
        for process, reason in ended.items():
            if process != self.index and reason:
                return f"process {process}{self._on(process)} has ended: {reason}"
        for process, (_, since) in self._last.items():
            if process not in (*ended, self.index) and now - since > self.timeout:
                return f"process {process}{self._on(process)} has not answered for {now - since:.0f} s"
        return ""

    def _give_up(self, reason: str) -> None:
        with contextlib.suppress(Exception):
            self._set("read", "")
        if self._left.wait(_GRACE):  # this process is ending, too
            return
        self._say(f"stopping process {self.index}{self._on(self.index)}: {reason}")
        for act in _last_acts:
            thread = threading.Thread(target=act, daemon=True)
            thread.start()
            thread.join(_LAST_ACTS)
        self._end(PEER_ENDED)

    def _end(self, status: int) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._exit(status)

    # --- the store ---------------------------------------------------------------------------------

    def _beat(self) -> None:
        self._beats += 1
        self._set("alive", f"{self._beats} {self._host}")

    def _set(self, kind: str, value: str) -> None:
        self._store.key_value_set(f"{_ROOT}{kind}/{self.index}", value or " ", allow_overwrite=True)

    def _read(self, kind: str) -> dict[int, str]:
        """What each process has left under a kind of key."""
        found = self._store.key_value_dir_get(f"{_ROOT}{kind}/")
        return {int(key.rpartition("/")[2]): value.strip() for key, value in found}

    def _on(self, process: int) -> str:
        host = self._host if process == self.index else self._hosts.get(process)
        return f" on {host}" if host else ""


_joined: Peers | None = None


def give_up_joining(index: int | None, reason: str) -> None:
    """Ends this process because others have not come; to be called from another thread than the one that waits for them.

    Its status is 1: a wrong address is as likely as a slow peer, and the same command would wait in vain again.

    Args:
      index: this process's number; None if it is not known yet.
      reason: what to print.
    """
    process = "this process" if index is None else f"process {index}"
    print(f"stopping {process} on {socket.gethostname()}: {reason}", file=sys.stderr, flush=True)
    os._exit(1)


def watch(peers: Peers) -> None:
    """Watches the other processes from now on."""
    global _joined
    _joined = peers
    peers.start()
    _explain_abort(peers)


def has_peers() -> bool:
    """Whether there are other processes."""
    return _joined is not None


def wait_for_reason() -> None:
    """Waits for the end of this process, if an error in it may come from another one that has ended."""
    if _joined is not None:
        _joined.wait_for_reason()


def ended(status: int, reason: str = "") -> None:
    """Tells the other processes that this one ends. Does nothing if there are none.

    Args:
      status: the status it ends with.
      reason: why it failed, which ends it at once; empty if it ends as it should.
    """
    if _joined is None:
        return
    if reason:
        _joined.fail(status, reason)
    else:
        _joined.leave()


_handlers: list[Any] = []  # ctypes' callbacks live as long as something refers to them


def _explain_abort(peers: Peers) -> None:
    """Says in words why JAX aborts the process: process 0, and with it the coordination service, has ended.

    JAX has no way to be told otherwise, and the thread that looks after the others would be too late.
    """

    def handler(_: int) -> None:
        host = peers._on(0)
        peers._say(
            f"stopping process {peers.index}{peers._on(peers.index)}: process 0{host} has ended or cannot be reached"
        )
        peers._end(PEER_ENDED)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    _handlers.append(callback)
    ctypes.CDLL(None).signal(signal.SIGABRT, callback)
