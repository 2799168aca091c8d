"""The flags that a result was made with, as its file says: later runs notice if theirs are others."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from tsdsr_jax.errors import printable
from tsdsr_jax.weights.bundled import is_bundled


def as_text(flags: Mapping[str, object]) -> str:
    """Flags as the text that is stored in a result, without those that are None."""
    return json.dumps({name: value for name, value in flags.items() if value is not None})


def model_in_words(model: str) -> str:
    """A folder by the last three parts of its path: no more of it is of use elsewhere. A hub id or "none" stays."""
    if is_bundled(model):
        return "bundled"
    if not os.path.exists(os.path.expanduser(model)):
        return printable(model)
    path = Path(os.path.abspath(os.path.expanduser(model)))
    return printable("/".join(path.parts[-3:]))


def differing_flags(before: str | None, now: str) -> str:
    """The flags that differ between two texts, in words; empty if none does or if a text names no flags."""
    was, is_now = _read(before), _read(now)
    if not was or not is_now:
        return ""
    names = [name for name in {**was, **is_now} if was.get(name) != is_now.get(name)]
    return ", ".join(f"--{name} {was.get(name)} instead of {is_now.get(name)}" for name in names)


def _read(text: str | None) -> Mapping[str, object]:
    try:
        flags = json.loads(text or "{}")
    except ValueError:  # somebody else's
        return {}
    return flags if isinstance(flags, dict) else {}
