"""Finds the images below a folder, and names what is left out."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tsdsr_jax.errors import UserError, listed
from tsdsr_jax.images.files import IMAGE_SUFFIXES

# Suffixes of pictures that are not read: newer formats, those of editors, and cameras' raw data.
_UNREAD_SUFFIXES = frozenset((
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd", ".psb", ".xcf", ".tga", ".exr", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pcx", ".sgi", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2",
    ".raf", ".orf", ".rw2", ".pef", ".srw", ".x3f", ".3fr", ".iiq", ".erf", ".kdc", ".dcr", ".mrw", ".rwl",
))  # fmt: skip
# A broken link with such a suffix was a file; one without could have been a folder of photographs.
_SUFFIX_OF_A_FILE = re.compile(r"\.[A-Za-z]\w{0,5}$")


class FoundPhotographs(NamedTuple):
    """The outcome of a search.

    Attributes:
      files: the image files, sorted.
      unread: the pictures of formats that are not read, sorted.
      problems: a line for each folder, link or file that cannot be used because of an error.
    """

    files: list[Path]
    unread: list[Path]
    problems: list[str]

    def left_out(self) -> list[str]:
        """A line for each reason why something is left out, errors first."""
        return self.problems + unread_pictures(self.unread)


def unread_pictures(paths: Iterable[Path]) -> list[str]:
    """A line that counts and names the pictures among some files whose formats are not read; no line if there are none."""
    unread = [path for path in paths if path.suffix.lower() in _UNREAD_SUFFIXES]
    if not unread:
        return []
    suffixes = ", ".join(sorted({path.suffix.lower() for path in unread}))
    count = "1 picture cannot" if len(unread) == 1 else f"{len(unread)} pictures cannot"
    return [
        f"{count} be used ({suffixes} is not read; export as PNG or JPEG): {listed([str(path) for path in unread], 5)}"
    ]


def composed(name: str) -> str:
    """A name in composed Unicode. Names that look the same may differ in form: macOS decomposes é into e and an accent."""
    return unicodedata.normalize("NFC", name)


def beside(path: Path, suffix: str) -> Path | None:
    """The file with the same name and another suffix, in either Unicode form; None if there is none."""
    plain = path.with_suffix(suffix)
    forms = (unicodedata.normalize(form, plain.name) for form in ("NFC", "NFD"))
    return next((each for each in (plain, *map(plain.with_name, forms)) if each.is_file()), None)


def find_photographs(root: Path, output: Path | None = None) -> FoundPhotographs:
    """Finds the image files in a folder and its subfolders, without hidden ones.

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
    found = FoundPhotographs([], [], [])
    results, seen = _results(root, output), set[tuple[int, int] | str]()
    for folder, below, names in os.walk(
        root, followlinks=True, onerror=lambda error: _unreadable(error, found)
    ):
        if _lies_in(os.path.realpath(folder), results) or (same := _identity(folder)) in seen:
            below.clear()
            continue
        seen.add(same)
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                _enter(os.path.join(folder, name), results, found)
    if not found.files:
        looked = f"{root}: no images in it (looked for {', '.join(IMAGE_SUFFIXES)}, in subfolders too)"
        raise UserError("; ".join([looked, *found.left_out()]))
    return FoundPhotographs(sorted(found.files), sorted(found.unread), sorted(found.problems))


def _unreadable(error: OSError, found: FoundPhotographs) -> None:
    found.problems.append(
        f"{error.filename}: is left out, because the folder cannot be read ({error.strerror}); check its permissions"
    )


def _identity(folder: str) -> tuple[int, int] | str:
    """What all names of a folder share: device and inode, or its real path where the file system has no inodes."""
    try:
        status = os.stat(folder)
    except OSError:
        return os.path.realpath(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def _enter(path: str, results: str | None, found: FoundPhotographs) -> None:
    """Enters a path that is not a folder where it belongs; results and files other than pictures belong nowhere."""
    suffix = os.path.splitext(path)[1].lower()
    if os.path.islink(path) and _lies_in(
        os.path.realpath(path), results
    ):  # other results have been told by folder
        return
    if suffix in _UNREAD_SUFFIXES:
        found.unread.append(Path(path))
    elif suffix in IMAGE_SUFFIXES:
        if os.path.isfile(path) or not os.path.exists(path):
            found.files.append(Path(path))
        else:  # reading a pipe or a device could block
            found.problems.append(f"{path}: is left out, because it is not a regular file")
    elif not os.path.exists(path) and not _SUFFIX_OF_A_FILE.search(path):
        found.problems.append(
            f"{path}: is left out, because the link leads nowhere; remove it, or restore what it links to"
        )


def _results(root: Path, output: Path | None) -> str | None:
    """The real path of the folder with results; None if there is none, or if the photographs lie in it."""
    if output is None or _lies_in(os.path.realpath(root), os.path.realpath(output)):
        return None
    return os.path.realpath(output)


def _lies_in(path: str, folder: str | None) -> bool:
    return folder is not None and (path == folder or path.startswith(os.path.join(folder, "")))
