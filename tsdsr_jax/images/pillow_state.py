"""Pillow's settings for the whole process, while pictures are read: strict, without its own limit, and quiet.

Threads read side by side, so that the settings change with the first reader and return with the last. Other users of Pillow
in the same process keep their warnings.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any, cast

import PIL
from PIL import Image, ImageFile

_PILLOW_FILES = os.path.join(os.path.dirname(PIL.__file__), "")
# Before all other filters: a warning about one file must not hide the same warning about the next.
_EVERY_WARNING = ("always", None, Warning, re.compile(r"PIL\."), 0)

_lock = threading.Lock()
_readers = 0
_limits_before: tuple[int | None, bool] = (None, False)
_show_before = warnings.showwarning
_filters_changed: list[Any] = []
_of_thread = threading.local()

# Python prints the errors of loggers without a handler; Pillow's do not name the file.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@contextlib.contextmanager
def reading_with_pillow() -> Iterator[list[Warning]]:
    """Sets Pillow up for reading; yields a list that receives its warnings in this thread, each once.

    Pillow's own pixel limit would warn or refuse below a larger limit of ours. Its leniency about truncated files, if
    another library has turned it on, would read them as half-gray photographs.
    """
    outer, heard = getattr(_of_thread, "heard", None), list[Warning]()
    with _lock:
        _enter()
    _of_thread.heard = heard
    try:
        yield heard
    finally:
        _of_thread.heard = outer
        with _lock:
            _leave()


def _enter() -> None:
    global _readers, _limits_before, _show_before, _filters_changed
    if _readers == 0:
        _limits_before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
        # Not by `filterwarnings`: that makes Python forget which warnings of other modules have been shown.
        _filters_changed = cast(list[Any], warnings.filters)
        _filters_changed.insert(0, _EVERY_WARNING)
        if warnings.showwarning is not _show:
            _show_before = warnings.showwarning
            warnings.showwarning = _show
    _readers += 1


def _leave() -> None:
    global _readers
    _readers -= 1
    if _readers == 0:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = _limits_before
        # Another thread may have exchanged the list meanwhile, as `catch_warnings` does.
        for filters in (_filters_changed, cast(list[Any], warnings.filters)):
            with contextlib.suppress(ValueError):
                filters.remove(_EVERY_WARNING)
        if warnings.showwarning is _show:
            warnings.showwarning = _show_before


def _show(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any
) -> None:
    heard = getattr(_of_thread, "heard", None)
    if heard is None or not filename.startswith(_PILLOW_FILES):
        _show_before(message, category, filename, lineno, *rest, **more)
    elif str(message) not in map(str, heard):
        heard.append(message if isinstance(message, Warning) else category(message))
