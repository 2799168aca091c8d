"""Runs a script's `main` in the test's process, as a shell would see it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tsdsr_jax import cli


@dataclasses.dataclass
class Outcome:
    status: int
    out: str
    err: str


class Command:
    """A script on a folder of models and data.

    Args:
      main: the script's.
      name: its path, as in `sys.argv`.
      root: the folder.
      monkeypatch, capsys: pytest's.
    """

    def __init__(
        self,
        main: Callable[[], object],
        name: str,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ):
        self.main, self.name, self.root = main, name, root
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def flags(self, output: Path, *more: str) -> Sequence[str]:
        """All flags of a run; later ones win."""
        raise NotImplementedError

    def __call__(self, output: Path, *more: str, **where: object) -> Outcome:
        self.monkeypatch.setattr(sys, "argv", [self.name, *self.flags(output, *more, **where)])
        self.capsys.readouterr()
        status = 0
        try:
            cli.run(self.main)
        except SystemExit as stopped:
            status = stopped.code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)

    def done(self, output: Path, *more: str, **where: object) -> str:
        """What it printed; it has to succeed."""
        outcome = self(output, *more, **where)
        assert outcome.status == 0, outcome
        return outcome.out

    def refused(self, output: Path, *more: str, **where: object) -> str:
        """Its message; it has to refuse."""
        outcome = self(output, *more, **where)
        assert outcome.status in (1, 2), outcome
        return outcome.err
