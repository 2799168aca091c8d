"""Git LFS pointers: what a clone without Git LFS has in place of a large file."""

from __future__ import annotations

from pathlib import Path

from tsdsr_jax.errors import UserError

_START = b"version https://git-lfs"
POINTER_BYTES = len(_START)


def is_pointer(start: bytes) -> bool:
    """Whether a file with these first bytes, `POINTER_BYTES` or more, is a pointer."""
    return start.startswith(_START)


def refuse_pointer(path: Path) -> None:
    """Raises UserError if the file is a pointer. Call it where a file cannot be read as what it should be."""
    try:
        with open(path, "rb") as file:
            start = file.read(POINTER_BYTES)
    except OSError:
        return
    if is_pointer(start):
        raise pointer_error(path)


def pointer_error(path: Path | str) -> UserError:
    return UserError(f"{path}: is a Git LFS pointer, not the file itself; fetch the file with `git lfs pull`")
