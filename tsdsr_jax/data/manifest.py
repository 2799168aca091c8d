"""The manifest that `train/prepare.py` writes into a prepared set of either layout.

No jax here: Grain's workers import this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdsr_jax.errors import UserError
from tsdsr_jax.git_lfs import refuse_pointer

MANIFEST = "manifest.json"
SET_FORMAT = "tsdsr_jax training set 1"


def has_manifest(root: Path) -> bool:
    """Whether `train/prepare.py` made this set; a file with the manifest's name may have another origin."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest.get("format")).startswith("tsdsr_jax")
    except (OSError, ValueError, AttributeError):
        refuse_pointer(root / MANIFEST)
        return False


def read_manifest(root: Path) -> dict[str, Any]:
    """Reads a set's manifest.

    Raises:
      UserError: it is damaged, or of another format.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == SET_FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a prepared set's manifest ({error})") from None
    if not known:
        raise UserError(f"{path}: has the format {manifest['format']!r}; this version reads {SET_FORMAT!r}")
    return manifest


def is_sharded(root: Path) -> bool:
    return has_manifest(root) and read_manifest(root)["layout"] == "shards"


def check_complete(root: Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError for a set that is not finished."""
    if not manifest["complete"]:
        raise UserError(
            f"{root}: this set is not finished; run train/prepare.py again with the same flags to continue"
        )
