"""Files that are complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tsdsr_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, and moves it there when the block ends well.

    The name is hidden and no image's or tensor file's; it is gone whatever happens short of a kill. Folders are made.

    Raises:
      UserError: the place cannot be written, or the disk is full.
    """
    # Not built from the file's own name, which may already be as long as the file system allows.
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
