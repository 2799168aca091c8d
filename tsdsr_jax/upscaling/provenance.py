"""The flags that a result was made with, as its file says: later runs notice if theirs are others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from tsdsr_jax.errors import printable
from tsdsr_jax.weights.bundled import is_bundled

_WEIGHTS = (".safetensors", ".pt", ".bin")
_SAMPLE = 2**16


def as_text(flags: Mapping[str, object]) -> str:
    """Flags as the text that is stored in a result, without those that are None."""
    return json.dumps({name: value for name, value in flags.items() if value is not None})


def model_in_words(model: str) -> str:
    """A folder by its name and a hash of its content, not by its path: pictures are passed on. Other names stay."""
    if is_bundled(model):
        return "bundled"
    path = Path(os.path.abspath(os.path.expanduser(model)))
    return f"{printable(path.name)} {_fingerprint(path)}" if path.is_dir() else printable(model)


def _fingerprint(folder: Path) -> str:
    """A short hash of the sizes and of parts of the weights in a folder and in the folders right below it."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix in _WEIGHTS and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
            with open(path, "rb") as file:
                for start in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:8]


def differing_flags(before: str | None, now: str) -> str:
    """The flags that differ between two texts, in words; empty if none does or if a text names no flags."""
    was, is_now = flags_in(before), flags_in(now)
    if not was or not is_now:
        return ""
    names = [name for name in {**was, **is_now} if was.get(name) != is_now.get(name)]
    return ", ".join(f"--{name} {was.get(name)} instead of {is_now.get(name)}" for name in names)


def flags_in(text: str | None) -> Mapping[str, object]:
    """The flags in a text that `as_text` made; none for any other text."""
    try:
        flags = json.loads(text or "{}")
    except ValueError:  # somebody else's
        return {}
    return flags if isinstance(flags, dict) else {}
