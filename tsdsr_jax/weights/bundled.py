"""The small model bundled with this package, `weights/tiny` in the repository: the default if no model is named."""

from __future__ import annotations

import filecmp
import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from tsdsr_jax.errors import UserError
from tsdsr_jax.places import shipped

FOLDER = shipped("tiny", "weights/tiny")
PROMPT = FOLDER / "prompt" / "default"
# The student's LoRAs.
LORAS = FOLDER / "lora"


def is_bundled(model: str | None) -> bool:
    """Whether `model` is the bundled one, however its path is spelled, or a copy of it.

    A checkout has a copy if its scripts run the package that `pip install .` has put elsewhere.
    """
    if not model:
        return False
    path = os.path.realpath(os.path.expanduser(model))
    return path == os.path.realpath(FOLDER) or _is_copy(path, str(FOLDER))


@lru_cache
def _is_copy(path: str, original: str) -> bool:
    """Whether a folder holds a model with the original's files, byte for byte."""
    files = [
        file.relative_to(original)
        for file in Path(original).rglob("*")
        if file.suffix in (".json", ".safetensors")
    ]
    try:
        return bool(files) and all(
            filecmp.cmp(Path(path) / file, Path(original) / file, shallow=False) for file in files
        )
    except OSError:  # a file is missing
        return False


def prompt_folder(model: str | None, prompt: Literal["default", "null"]) -> Path:
    """Where to look for the embedding of the default or the empty prompt, unless a flag says otherwise."""
    return FOLDER / "prompt" / prompt if is_bundled(model) else Path("dataset") / prompt


def bundled_model() -> Path:
    """The folder of the bundled model, in diffusers' layout. Its LoRAs are in `LORAS`.

    Raises:
      UserError: it is missing from this installation.
    """
    if not (FOLDER / "transformer" / "config.json").is_file():
        raise UserError(
            f"pass a model with --pretrained_model_name_or_path; the bundled one is missing from {FOLDER}"
        )
    return FOLDER
