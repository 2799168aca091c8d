"""Runs a script's `main` in the test's process, as a shell would see it: from a working folder, with relative paths."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tsdsr_jax import cli, hints
from tsdsr_jax.places import CHECKOUT
from tsdsr_jax.training import checkpoint


@dataclasses.dataclass
class Outcome:
    status: int
    out: str
    err: str


class Command:
    """A script on a folder of models and data, which it is called in.

    Args:
      main: the script's.
      name: its path, as in `sys.argv`.
      root: the folder. What lies there or beside it, as all that pytest makes, is given by relative paths.
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
        return self.typed(self.name, *map(self.relative, self.flags(output, *more, **where)))

    def relative(self, word: str) -> str:
        below = Path(word).is_absolute() and Path(word).is_relative_to(self.root.parent)
        return os.path.relpath(word, self.root) if below else word

    def typed(self, *words: str) -> Outcome:
        """What comes of these very words."""
        self.monkeypatch.chdir(self.root)
        self.monkeypatch.setattr(sys, "argv", list(words))
        self.capsys.readouterr()
        status = 0
        try:
            cli.run(self.main)
        except SystemExit as stopped:
            status = stopped.code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(status, captured.out, captured.err)

    def obeys(self, words: Sequence[str], *more: str) -> str:
        """What a printed command prints, run as it is from the working folder; it has to succeed."""
        assert words[0] == hints.interpreter()
        script = Path(words[1]).resolve().relative_to(CHECKOUT)
        name = f"convert_{script.stem}" if script.parent.name == "convert" else script.stem
        with self.monkeypatch.context() as patch:
            patch.setattr(self, "main", importlib.import_module(f"tsdsr_jax.commands.{name}").main)
            outcome = self.typed(*words[1:], *more)
        assert outcome.status == 0, (shlex.join(words), outcome)
        return outcome.out

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


def printed(said: str) -> list[list[str]]:
    """The commands in what a script said, word for word."""
    start = f"{hints.interpreter()} "
    return [shlex.split(line[line.index(start) :]) for line in said.splitlines() if start in line]


class Reached(Exception):
    """A checkpoint's state has been read."""


# --output_dir (none: its default), --resume_from_checkpoint, and the checkpoint that is meant.
SPELLINGS = (
    ("runs/a", "latest", "runs/a/checkpoint_0000004"),
    (None, "latest", "tsdsr-checkpoint/checkpoint_0000004"),
    ("link", "runs/a/checkpoint_0000004", "runs/a/checkpoint_0000004"),
    ("runs/../runs/a/", "latest", "runs/../runs/a/checkpoint_0000004"),
    ("{here}/runs/a", "latest", "{here}/runs/a/checkpoint_0000004"),
    ("link", "latest", "link/checkpoint_0000004"),
    ("runs/a", "checkpoint_0000004", "runs/a/checkpoint_0000004"),
    ("new", "link/checkpoint_0000002", "link/checkpoint_0000002"),
    ("new", "best", "best"),
)


def resume_by_every_spelling(
    command: Command, run: Path, *flags: str, spellings: Sequence[tuple[str | None, str, str]] = SPELLINGS
) -> None:
    """Resumes a run that has checkpoints after 2 and 4 steps, as far as its state has been read.

    The run is copied into the working folder, and named in all the ways that a user may find.
    """
    here, read = command.root, checkpoint.read_state
    for folder in ("runs/a", "tsdsr-checkpoint"):
        shutil.copytree(run, here / folder, ignore=shutil.ignore_patterns("checkpoint_0000006"))
    (here / "link").symlink_to("runs/a")
    (here / "best").symlink_to("runs/a/checkpoint_0000002")

    def reading(path: Path, like: object) -> None:
        read(path, like)
        raise Reached(path)

    command.monkeypatch.setattr(checkpoint, "read_state", reading)
    for output, wanted, expected in spellings:
        words = command.flags(
            Path("unused"), *flags, "--max_train_steps", "9", "--resume_from_checkpoint", wanted
        )
        words = [command.relative(word) for word in words]
        where = words.index("--output_dir")
        words[where : where + 2] = ["--output_dir", output.format(here=here)] if output else []
        with pytest.raises(Reached) as reached:
            command.typed(command.name, *words)
        # As the user spelled it.
        assert str(reached.value.args[0]) == expected.format(here=here)
