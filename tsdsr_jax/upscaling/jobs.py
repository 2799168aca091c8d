"""The jobs of a run: photographs, where their results go, and a report of the outcomes."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.buckets import Size
from tsdsr_jax.images.files import Photo, decode_photo, read_content, read_size
from tsdsr_jax.images.search import find_photographs
from tsdsr_jax.images.writing import check_format, left_behind, write_photo


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
    """A photograph's file and the file of its result, whose suffix is the format."""

    source: Path
    target: Path

    @property
    def format(self) -> str:
        return self.target.suffix[1:]

    def size(self, max_pixels: int) -> Size:
        return read_size(self.source, max_pixels)

    def check_output(self, size: Size) -> None:
        check_format(self.source, self.format, *size)

    def read(self, max_pixels: int) -> tuple[bytes, Photo]:
        content = read_content(self.source)
        return content, decode_photo(content, str(self.source), max_pixels)

    def is_finished(self) -> bool:
        return self.target.exists()

    def is_outdated(self) -> bool:
        """Whether the result is older than the photograph."""
        return self.target.stat().st_mtime < self.source.stat().st_mtime

    def deliver(self, rgb: np.ndarray, photo: Photo, alpha: np.ndarray | None) -> str | None:
        write_photo(self.target, rgb, photo, alpha, self.format)
        return left_behind(str(self.target), photo, alpha, self.format)


class Report:
    """Counts results and collects failures. Threads may share it.

    Args:
      note: called with each line that the user should see.
      on_done: called after each photograph, whether it succeeded or not.
    """

    def __init__(self, note: Callable[[str], object], on_done: Callable[[], object] = lambda: None):
        self.written, self.skipped, self.outdated = 0, 0, 0
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


def find_jobs(source: Path, output: Path, format: str, *, overwrite: bool = False) -> list[FileJob]:
    """The photographs of a file or folder (`find_photographs`), each with its target in `output`.

    The tree below a folder is kept. If targets would coincide (a.jpg, a.png), the photographs' own suffixes become
    part of the names (a_jpg.png).

    Args:
      format: suffix of the targets, without the dot.
      overwrite: whether results that exist will be replaced.

    Raises:
      UserError: the path does not exist, holds no images, or results would be written among the photographs.
    """
    if source.is_file():
        files, root = [source], source.parent
    elif source.is_dir():
        files, root = find_photographs(source, output), source
    else:
        raise UserError(f"{source}: no such file or folder")
    plain = [(output / file.relative_to(root)).with_suffix(f".{format}") for file in files]
    targets = _distinct_targets(files, plain)
    photographs = {os.path.realpath(file) for file in files}
    for target in targets:
        # Beside a single photograph, a file with the result's name may be another photograph.
        beside = (
            overwrite
            and source.is_file()
            and os.path.realpath(target.parent) == os.path.realpath(root)
            and target.exists()
        )
        if beside or os.path.realpath(target) in photographs:
            raise UserError(
                f"{target}: lies among the photographs, and the result would replace it; choose another --output_dir"
            )
    return [FileJob(file, target) for file, target in zip(files, targets, strict=True)]


def _distinct_targets(files: Sequence[Path], targets: list[Path]) -> list[Path]:
    """Puts the file's own suffix into the name (a_jpg.png) wherever targets coincide, ignoring case."""
    while True:
        taken = Counter(str(target).casefold() for target in targets)
        renamed = [
            target.with_name(f"{file.stem}_{file.suffix[1:]}{target.suffix}")
            if taken[str(target).casefold()] > 1
            else target
            for file, target in zip(files, targets, strict=True)
        ]
        # Repeat until nothing changes: a new name may be another file's plain one (a.jpg, a.png, a_jpg.bmp).
        if renamed == targets:
            return targets
        targets = renamed
