"""Writes a prepared set's manifest, which several machines may share."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from tsdsr_jax.atomic import replacing
from tsdsr_jax.cli import Share
from tsdsr_jax.data.crops import SetLayout
from tsdsr_jax.data.manifest import MANIFEST, SET_FORMAT, has_manifest, read_manifest
from tsdsr_jax.data.writers import SetWriter
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import mismatches

_STALE_SECONDS = 24 * 3600


class ManifestWriter:
    """Keeps a set's settings, and the list of samples that cannot be made.

    Args:
      root: the set's folder.
      layout: the set's layout.
      settings: what all runs that write the set must share.
      part: this machine's share.
    """

    def __init__(self, root: Path, layout: SetLayout, settings: Mapping[str, Any], part: Share):
        self.root, self.layout, self.settings, self.part = root, layout, dict(settings), part

    def check(self) -> None:
        """Refuses a folder that holds another set, or anything else.

        Raises:
          UserError: it lists what differs.
        """
        names = os.listdir(self.root) if self.root.is_dir() else []
        if has_manifest(self.root):
            self._check(read_manifest(self.root))
        elif any(not name.startswith(".") for name in names):
            raise UserError(
                f"{self.root}: is not empty and holds no prepared set of train/prepare.py; choose another --output_dir"
            )

    def begin(self) -> None:
        """Writes the manifest before anything else is written; if another machine already has, checks that one."""
        self.check()
        if not has_manifest(self.root):
            self._write({"complete": False}, new=True)
            # Another machine may have been faster.
            self._check(read_manifest(self.root))

    def _check(self, found: Mapping[str, Any]) -> None:
        theirs = {"layout": found.get("layout")} | found.get("settings", {})
        differing = mismatches(theirs, {"layout": self.layout} | self.settings)
        if differing:
            listed = "".join(f"\n  {line}" for line in differing)
            raise UserError(
                f"{self.root}: holds a prepared set made with other settings; choose another --output_dir, or give the "
                f"flags that it was made with. What differs:{listed}"
            )

    def _write(self, entries: Mapping[str, Any], new: bool = False) -> None:
        content = {"format": SET_FORMAT, "layout": self.layout, **entries, "settings": self.settings}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        path = self.root / MANIFEST
        if not new:
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return
        # Written under another name and then linked, so that one of two machines that begin together wins.
        own = self.root / f".{uuid4().hex}.part"
        with replacing(own) as temporary:
            temporary.write_text(text, encoding="utf-8")
        try:
            os.link(own, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        finally:
            own.unlink(missing_ok=True)

    def note_problem(self, position: int, message: str) -> None:
        """Notes that a sample cannot be made. An empty message means that it now can."""
        # Starts with a newline because a killed run may have left its last line unfinished.
        line = "\n" + json.dumps({"sample": position, "problem": message})
        try:
            with open(self.root / f"problems-{self.part}.jsonl", "a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.root}: cannot be written ({error.strerror})") from None

    def problems(self) -> dict[int, str]:
        """Position -> message, from all machines."""
        found: dict[int, str] = {}
        for path in sorted(self.root.glob("problems-*.jsonl"), key=lambda path: path.stat().st_mtime_ns):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # empty, or cut off by a kill: its sample is made again
                found[entry["sample"]] = entry["problem"]
        return {position: message for position, message in found.items() if message}

    def _sweep(self) -> None:
        """Removes files that killed runs have left. Files younger than a day stay: another machine may still write them."""
        for path in self.root.rglob(".*.part"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()

    def finish(self, writer: SetWriter, more: Mapping[str, Any]) -> int:
        """Marks the set as complete if nothing is missing; returns how many pieces are missing."""
        self.begin()
        problems = self.problems()
        missing = writer.missing(problems)
        if not missing:
            self._sweep()
            left_out = [problems[position] for position in sorted(problems)]
            self._write({"complete": True, **writer.counts(), "damaged": left_out, **more})
        return missing
