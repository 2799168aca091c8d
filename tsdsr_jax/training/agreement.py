"""What processes that train together must have in common, checked before a difference could let them hang or train apart."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsdsr_jax.errors import UserError
from tsdsr_jax.exchange import of_everyone
from tsdsr_jax.identity import in_short
from tsdsr_jax.training.checkpoint import Hash, leaf_name

# Network file systems may show a new file late.
_SEEN_WITHIN = 10.0
_MARK = ".shared-by-"


def check_agreement(view: Mapping[str, Any], what: str) -> None:
    """Compares what each process has; every process must call it.

    Args:
      view: name -> value, as this process has it.
      what: what is compared, for the message.

    Raises:
      UserError: in every process, if values differ. The message names only these, and which processes have which.
    """
    if jax.process_count() == 1:
        return
    texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in view.items()}
    if lines := differing_views(of_everyone(texts)):
        listed = "".join(f"\n  {line}" for line in lines)
        raise UserError(f"the processes have different {what}, so they cannot train together:{listed}")


def content_of(tree: Any) -> str:
    """Hashes a tree's arrays on the host, to be compared; empty where there is no other process, which saves the time."""
    if jax.process_count() == 1:
        return ""
    digest = Hash()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        digest.add(leaf_name(path), np.asarray(leaf))
    return digest.value()


def differing_views(views: Sequence[Mapping[str, str]]) -> list[str]:
    """Describes each value that is not the same for all processes, one line each.

    Args:
      views: for each process: name -> value as JSON.
    """
    lines = []
    for name in sorted({name for view in views for name in view}):
        having: dict[str | None, list[int]] = {}
        for process, view in enumerate(views):
            having.setdefault(view.get(name), []).append(process)
        if len(having) > 1:
            parts = [f"{_in_words(value)} in {_processes(who)}" for value, who in having.items()]
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines


def _in_words(value: str | None) -> str:
    return "nothing" if value is None else in_short(json.loads(value))


def _processes(numbers: Sequence[int]) -> str:
    """Process numbers in words; runs of more than two as ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"process{'es' * (len(numbers) > 1)} {', '.join(words)}"


def check_shared(folder: Path) -> None:
    """Checks that a folder is the same one for all processes; every process must call it.

    Process 0 creates the folder and, for a moment, a file in it, which all look for.

    Raises:
      UserError: in every process, if one of them does not see the file, or if it cannot be written.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(secrets.token_bytes(8), np.uint8)
    name = _MARK + multihost_utils.broadcast_one_to_all(token).tobytes().hex()
    first, reason = jax.process_index() == 0, ""
    if first:
        reason = _written(folder, name)
    seen = bool(reason) or _appears(folder / name)
    views = of_everyone({"reason": reason, "host": socket.gethostname(), "seen": seen, "folder": str(folder)})
    if first:
        with suppress(OSError):
            (folder / name).unlink()
    if reason := views[0]["reason"]:
        raise UserError(
            f"--output_dir {folder}: process 0 on {views[0]['host']} cannot write there ({reason})"
        )
    if without := [number for number, view in enumerate(views) if not view["seen"]]:
        hosts = ", ".join(sorted({views[number]["host"] for number in without}))
        raise UserError(
            f"--output_dir {folder}: {_processes(without)} on {hosts} do not see the folder {views[0]['folder']} of "
            f"process 0 on {views[0]['host']}; it must be on a file system that all hosts share"
        )


def _written(folder: Path, name: str) -> str:
    """Creates the file; returns why it cannot be, or nothing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _appears(path: Path) -> bool:
    """Whether a file is there within some seconds. Listing its folder makes NFS clients look again."""
    end = time.monotonic() + _SEEN_WITHIN
    while True:
        with suppress(OSError):
            if any(entry.name == path.name for entry in path.parent.iterdir()):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
