"""The small model bundled with this package, `weights/tiny` in the repository: the default if no model is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from tsdsr_jax.errors import UserError
from tsdsr_jax.places import shipped

FOLDER = shipped("tiny", "weights/tiny")
PROMPT = FOLDER / "prompt" / "default"


def is_bundled(model: str | None) -> bool:
    """Whether `model` is the bundled one, however its path is spelled."""
    return (
        model is not None
        and model != ""
        and os.path.realpath(os.path.expanduser(model)) == os.path.realpath(FOLDER)
    )


def prompt_folder(model: str | None, prompt: Literal["default", "null"]) -> Path:
    """Where to look for the embedding of the default or the empty prompt, unless a flag says otherwise."""
    return FOLDER / "prompt" / prompt if is_bundled(model) else Path("dataset") / prompt


def bundled_model() -> Path:
    """The folder of the bundled model, in diffusers' layout with LoRAs merged in.

    Raises:
      UserError: it is missing from this installation.
    """
    if not (FOLDER / "transformer" / "config.json").is_file():
        raise UserError(
            f"pass a model with --pretrained_model_name_or_path; the bundled one is missing from {FOLDER}"
        )
    return FOLDER
