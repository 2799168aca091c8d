"""The sizes of photographs, read from their headers.

Large folders keep them in a hidden file, so that the next run need not open every photograph, which network file systems
make slow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tsdsr_jax.atomic import replacing
from tsdsr_jax.errors import UserError
from tsdsr_jax.images.files import read_size

# Half a gigabyte decoded, one per worker; no camera's pictures are larger.
MAX_PHOTOGRAPH_PIXELS = 180_000_000
KEPT_FILE = ".tsdsr-sizes.json"
# A folder with fewer photographs gets no file.
WORTH_KEEPING = 1000


class KnownSize(NamedTuple):
    """A photograph's upright size, and what its file looked like when it was read."""

    height: int
    width: int
    bytes: int
    modified_ns: int


# A file, and the folder below which it was found.
Found = tuple[Path, Path]


class KnownSizes:
    """The sizes that some folders of photographs have kept.

    A size counts only while its file has the same number of bytes and the same time of its last change. What cannot be read
    is as good as not there.
    """

    def __init__(self, roots: Sequence[Path]):
        self._kept = {root: _read(root / KEPT_FILE) for root in dict.fromkeys(roots)}

    def look(
        self, files: Sequence[Found], progress: Callable[[int], object] = lambda count: None
    ) -> list[KnownSize | str]:
        """Returns for each file its size, kept or read from its header, or why it cannot be used.

        Args:
          files: the photographs.
          progress: called with the number of files looked at since the last call.
        """

        def each(file: Found) -> KnownSize | str:
            size = self._look(*file)
            progress(1)
            return size

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(each, files))

    def _look(self, path: Path, root: Path) -> KnownSize | str:
        try:
            str(path).encode()  # a name can be printed and stored in a manifest; on POSIX it may be any bytes
        except UnicodeEncodeError:
            return f"{str(path)!a}: its name is not UTF-8"
        try:
            status = os.stat(path)
        except OSError:  # reading it will say why
            status = None
        kept = self._kept[root].get(_name(path, root))
        if kept and status and (kept.bytes, kept.modified_ns) == (status.st_size, status.st_mtime_ns):
            return kept
        try:
            size = read_size(path, MAX_PHOTOGRAPH_PIXELS)
        except UserError as error:
            return str(error)
        return KnownSize(*size, *((status.st_size, status.st_mtime_ns) if status else (0, 0)))

    def keep(self, files: Sequence[Found], sizes: Sequence[KnownSize | str]) -> None:
        """Writes what is new into the folders' files, where folders are large enough and can be written to."""
        for root, before in self._kept.items():
            now = {
                _name(path, below): size
                for (path, below), size in zip(files, sizes, strict=True)
                if below == root and isinstance(size, KnownSize)
            }
            if len(now) < WORTH_KEEPING or now == before:
                continue
            with suppress(OSError, UserError), replacing(root / KEPT_FILE) as temporary:
                temporary.write_text(json.dumps(now))


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _read(path: Path) -> dict[str, KnownSize]:
    try:
        return {name: KnownSize(*map(int, values)) for name, values in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
