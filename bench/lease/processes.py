"""Stops, resumes and ends a process with everything that it started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def family(pid: int) -> list[int]:
    """The process and all its descendants, whatever group or session they are in."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for member in found:  # grows as it is read
        found += children.get(member, [])
    return found


def tell(pids: Iterable[int], number: signal.Signals) -> None:
    """Sends a signal to the processes and their descendants."""
    for pid in pids:
        for member in family(pid):
            with suppress(ProcessLookupError):
                os.kill(member, number)


def end(pids: Iterable[int]) -> None:
    """Ends the processes and their descendants, stopped ones too."""
    members = [member for pid in pids for member in family(pid)]
    for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL):
        for member in members:
            with suppress(ProcessLookupError):
                os.kill(member, number)
        time.sleep(0.2)
