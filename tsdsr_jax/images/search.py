"""Finds the images below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import IMAGE_SUFFIXES


def find_photographs(root: Path, output: Path | None = None) -> list[Path]:
    """The image files below a folder, in its subfolders too, sorted; hidden ones are left out. Follows links to folders.

    Args:
      root: the folder.
      output: a folder that may lie below it and whose images are results, not photographs.

    Raises:
      UserError: no such folder, or no images in it.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; expected one with photographs")
    if output and output.resolve() == root.resolve():
        raise UserError(f"{root}: is the output folder, too; results would mix with the photographs")
    found: list[Path] = []
    seen = {os.path.realpath(output)} if output else set()

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); all of {root} must be readable"
        )

    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        # A link to a folder above would never end.
        real = os.path.realpath(folder)
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        if real not in seen:
            images = (name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)
            # A broken link is kept, to be named as unreadable; a pipe or device would be waited for.
            found += [
                Path(folder, name) for name in images
                if not name.startswith(".") and not _is_special(os.path.join(folder, name))
            ]  # fmt: skip
        seen.add(real)
    if not found:
        raise UserError(
            f"{root}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, in subfolders too)"
        )
    return sorted(found)


def _is_special(path: str) -> bool:
    return os.path.exists(path) and not os.path.isfile(path)
