"""Finds the images below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import IMAGE_SUFFIXES


def find_photographs(root: Path, output: Path | None = None) -> list[Path]:
    """The image files in a folder and its subfolders, sorted, without hidden ones.

    Links to files and folders are followed. An image is found under each of its names, but a folder only once, under the
    first of its names: a link to a folder above would never end. Broken links to images are also returned, so that they
    are reported when they are read.

    Args:
      root: the folder.
      output: a folder that may lie below `root`; images in it are results, not photographs.

    Raises:
      UserError: there is no such folder, it is the output folder, it cannot be read, or there are no images in it.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; expected one with photographs")
    if output and os.path.realpath(output) == os.path.realpath(root):
        raise UserError(f"{root}: is also the output folder; results would mix with the photographs")

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); all of {root} must be readable"
        )

    results, found, seen = _results(root, output), list[Path](), set[str]()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen or _lies_in(real, results):
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths = (os.path.join(folder, name) for name in names if not name.startswith("."))
        found += [Path(path) for path in paths if _is_image(path) and not _is_result(path, results)]
    if not found:
        raise UserError(
            f"{root}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, in subfolders too)"
        )
    return sorted(found)


def _results(root: Path, output: Path | None) -> str | None:
    """The real path of the folder with results; None if there is none, or if the photographs lie in it."""
    if output is None or _lies_in(os.path.realpath(root), os.path.realpath(output)):
        return None
    return os.path.realpath(output)


def _lies_in(path: str, folder: str | None) -> bool:
    return folder is not None and (path == folder or path.startswith(os.path.join(folder, "")))


def _is_result(path: str, results: str | None) -> bool:
    """Whether the path links to a result; other files have been told by their folder."""
    return os.path.islink(path) and _lies_in(os.path.realpath(path), results)


def _is_image(path: str) -> bool:
    """Whether the path has an image's suffix and is a file or a broken link. Reading a pipe or a device could block."""
    suffix = os.path.splitext(path)[1].lower()
    return suffix in IMAGE_SUFFIXES and (os.path.isfile(path) or not os.path.exists(path))
