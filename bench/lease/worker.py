"""A worker's side: it prepares, asks for its turn, measures while every other worker is stopped, and reports figures."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

WORK = Path(os.environ["WORK"])
FULL = os.environ["LEASE_SIZE"] == "full"
SIDE, RANK = (512, 64) if FULL else (64, 4)
MODEL, PROMPT, ADAPTERS = WORK / "model", WORK / "prompt", WORK / "adapters"
MADE = WORK / "complete"
SECONDS = 1.0 if FULL else 0.3


class Worker:
    """The connection to the coordinator, which started this process."""

    def __init__(self) -> None:
        self._connection = Connection(int(os.environ["LEASE_CONNECTION"]))
        self.name = os.environ["LEASE_WORKER"]

    def report(self, **figures: Any) -> None:
        """Sends figures, which the coordinator writes at once."""
        print(figures, flush=True)
        self._connection.send(("figures", figures))

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Waits for this worker's turn; nobody else runs until the block ends."""
        print(f"waiting for a turn: {what}", flush=True)
        self._connection.send(("ready", what))
        self._connection.recv()
        try:
            yield
        finally:
            self._connection.send(("done", what))

    def wait_for_model(self) -> None:
        """Waits until make_model.py has written everything."""
        while not MADE.exists():
            time.sleep(0.1)

    def keep(self, part: str, batch: int, result: np.ndarray) -> None:
        """Keeps a part's result, (B, h, w, C), which the coordinator compares with the other workers'."""
        target = WORK / "outputs" / self.name / f"{part}-{batch}.npy"
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, result)


def connected() -> bool:
    return "LEASE_CONNECTION" in os.environ


if not connected():
    sys.exit("bench/lease/coordinator.py starts this; see bench/lease/README.md")
