"""Training in processes of their own, as a user starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


class TrainingProcesses:
    """Processes that run a script of train/ on CPUs, each with its output in a file, `printed`.

    Args:
      folder: for these files.
      programs: folder for compiled programs.
    """

    def __init__(self, folder: Path, programs: Path):
        self.folder, self.programs = folder, programs
        self._running: list[subprocess.Popen] = []

    def start(
        self, script: str, flags: Sequence[str], devices: int = 1, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(self.programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        printed = self.folder / f"printed {len(self._running)}"
        command = [sys.executable, f"train/{script}.py", *flags]
        environment |= dict(variables or {})
        with open(printed, "w") as log:  # the process keeps it open
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        process.printed = printed
        self._running.append(process)
        return process

    def end(self) -> None:
        for process in self._running:
            process.kill()
            process.wait()
