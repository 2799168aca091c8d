"""Writes files that are either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tsdsr_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block succeeds.

    The temporary name is hidden and has no suffix of an image or tensor file. Unless the process is killed, the file is
    removed when the block fails. Parent folders are created.

    Raises:
      UserError: `path` cannot be written, or the disk is full.
    """
    # Not derived from the file's own name, which may already be as long as the file system allows.
    temporary = path.parent / f".{uuid4().hex}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder, its permissions and free space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
