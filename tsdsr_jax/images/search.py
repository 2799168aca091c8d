"""Finds the images below a folder."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import IMAGE_SUFFIXES


def find_photographs(root: Path, output: Path | None = None) -> list[Path]:
    """The image files in a folder and its subfolders, sorted, without hidden ones.

    Links to files and folders are followed. Each file is found once: under its own path if that lies below `root`,
    otherwise under the first link to it. Broken links are also returned, so that they are reported when they are read.

    Args:
      root: the folder.
      output: a folder that may lie below `root`; images in it are results, not photographs.

    Raises:
      UserError: there is no such folder, it is the output folder, it cannot be read, or there are no images in it.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder; expected one with photographs")
    if output and output.resolve() == root.resolve():
        raise UserError(f"{root}: is also the output folder; results would mix with the photographs")
    search = _Search(root, output)
    try:
        search.run()
    except OSError as error:
        raise UserError(
            f"{error.filename}: cannot be read ({error.strerror}); all of {root} must be readable"
        ) from None
    if not search.found:
        raise UserError(
            f"{root}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, in subfolders too)"
        )
    return sorted(search.found.values())


class _Search:
    """Attributes:
    found: real path of a file -> the path that it was found under.
    """

    def __init__(self, root: Path, output: Path | None):
        self.found: dict[str, Path] = {}
        self._root, self._output = root, Path(os.path.realpath(output)) if output else None
        self._visited: set[str] = set()  # real paths: a link to a folder above would never end
        self._links: deque[Path] = deque()

    def run(self) -> None:
        self._visit(self._root)
        while self._links:  # after everything that is no link
            link = self._links.popleft()
            if link.is_dir():
                self._visit(link)
            elif _is_image(link) and not self._is_result(link):
                self.found.setdefault(os.path.realpath(link), link)

    def _visit(self, folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in self._visited or Path(real) == self._output:
            return
        self._visited.add(real)
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in sorted(visible, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.is_symlink():
                self._links.append(path)
            elif entry.is_dir():
                self._visit(path)
            elif _is_image(path):
                self.found.setdefault(os.path.join(real, entry.name), path)

    def _is_result(self, link: Path) -> bool:
        """Whether the path links to a file in the output folder, unless that folder also holds the photographs."""
        if self._output is None or self._output in self._root.resolve().parents:
            return False
        return self._output in link.resolve().parents


def _is_image(path: Path) -> bool:
    """Whether the path has an image's suffix and is a file or a broken link. Reading a pipe or a device could block."""
    return path.suffix.lower() in IMAGE_SUFFIXES and (path.is_file() or not path.exists())
