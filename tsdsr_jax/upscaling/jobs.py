"""The jobs of a run: photographs, where their results go, and a report of the outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.files import Photo, decode_photo, read_content, read_size
from tsdsr_jax.images.writing import (
    FORMAT_OF_SUFFIX,
    check_format,
    left_behind,
    read_made_with,
    write_photo,
)
from tsdsr_jax.upscaling.provenance import differing_flags

_ANY_SIZE = 2**31


class Job(Protocol):
    """One photograph and where its result goes: `FileJob`, or `upscaler.MemoryJob` without files."""

    @property
    def source(self) -> Path:
        """What messages call the photograph."""
        ...

    def size(self, max_pixels: int) -> Size:
        """Upright (height, width). Raises UserError if it cannot be read or has too many pixels."""
        ...

    def check_output(self, size: Size) -> None:
        """Raises UserError if a result of this size cannot be delivered."""
        ...

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        """The content that its noise depends on, and the photograph. Raises UserError like `size`."""
        ...

    def is_finished(self) -> bool:
        """Whether its result exists."""
        ...

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None) -> str | None:
        """Delivers the result; returns a remark, if any. Raises UserError if it cannot be written."""
        ...


@dataclasses.dataclass(frozen=True)
class FileJob:
    """A photograph's file and the file of its result.

    Attributes:
      source, target: the files; the target's suffix is the format.
      made_with: the flags that the result depends on, which are stored in it; see `provenance`.
      name: the photograph's path below the folder that was searched.
    """

    source: Path
    target: Path
    made_with: str = ""
    name: str = ""

    @property
    def format(self) -> str:
        return FORMAT_OF_SUFFIX[self.target.suffix.lower()]

    def size(self, max_pixels: int) -> Size:
        return read_size(self.source, max_pixels)

    def check_output(self, size: Size) -> None:
        check_format(self.source, self.format, *size)
        if self.target.exists() and not self.target.is_file():
            what = "a folder" if self.target.is_dir() else "not a regular file"
            raise UserError(
                f"{self.target}: is {what}, where the result of {self.source} belongs; move it away"
            )

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        content = read_content(self.source)
        return content, decode_photo(content, str(self.source), max_pixels)

    def is_finished(self) -> bool:
        """Whether its result exists; an empty file is none."""
        try:
            return self.target.stat().st_size > 0
        except OSError:
            return False

    def is_outdated(self) -> bool:
        """Whether the result is older than the photograph."""
        return self.target.stat().st_mtime < self.source.stat().st_mtime

    def difference(self, size: Size) -> str | None:
        """What tells that the file that exists is the result of other settings, or none at all.

        Args:
          size: (height, width) that the result should have.
        """
        try:
            height, width = read_size(self.target, _ANY_SIZE)
        except UserError:
            return f"{self.target} (not a readable picture)"
        if (height, width) != size:
            return f"{self.target} ({width}×{height} pixels instead of {size[1]}×{size[0]})"
        changes = differing_flags(read_made_with(self.target), self.made_with)
        return f"{self.target} ({changes})" if changes else None

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None) -> str | None:
        write_photo(self.target, rgb, photo, alpha, self.format, self.made_with)
        return left_behind(str(self.target), photo, alpha, self.format)


class Report:
    """Counts results and collects failures. Threads may share it.

    Attributes:
      written, skipped, outdated: results that were written, that existed, and of these, those older than their photographs.
      different: results that exist but are of other settings; see `FileJob.difference`.
      failures: a line for each photograph without a result, and for whatever else was left out because of an error.
      omitted: how many of the failures are no photographs.

    Args:
      note: called with each line that the user should see.
      on_done: called after each photograph, whether it succeeded or not.
    """

    def __init__(self, note: Callable[[str], object], on_done: Callable[[], object] = lambda: None):
        self.written, self.skipped, self.outdated, self.omitted = 0, 0, 0, 0
        self.different: list[str] = []
        self.failures: list[str] = []
        self.note, self.on_done, self._lock = note, on_done, Lock()

    def wrote(self) -> None:
        with self._lock:
            self.written += 1
            self.on_done()

    def failed(self, path: Path, error: Exception) -> None:
        """Records a failure: a UserError by its message, any other error with its type."""
        message = str(error) if isinstance(error, UserError) else f"{path}: {type(error).__name__}: {error}"
        with self._lock:
            self.failures.append(message)
            self.note(message)
            self.on_done()

    def left_out(self, problem: str) -> None:
        """Records something that is no photograph of the run, because it cannot be used."""
        self.omitted += 1
        self.failures.append(problem)
        self.note(problem)
