"""The small model that comes along, in the repository as `weights/tiny`: taken where no other is named."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tsdsr_jax.errors import UserError
from tsdsr_jax.places import shipped

FOLDER = shipped("tiny", "weights/tiny")
PROMPT = FOLDER / "prompt" / "default"


def is_bundled(model: str | None) -> bool:
    """Whether a model's name means this one, however it is spelled."""
    return bool(model) and Path(model).expanduser().resolve() == FOLDER.resolve()


def prompt_folder(model: str | None, prompt: Literal["default", "null"]) -> Path:
    """Where the embedding of the default or the empty prompt is looked for, unless a flag says so."""
    return FOLDER / "prompt" / prompt if is_bundled(model) else Path("dataset") / prompt


def bundled_model() -> Path:
    """Its folder, in diffusers' layout, LoRAs merged in.

    Raises:
      UserError: it is not there: parts of the package are missing.
    """
    if not (FOLDER / "transformer" / "config.json").is_file():
        raise UserError(
            f"give a model with --pretrained_model_name_or_path: the small one that comes along is not in {FOLDER}"
        )
    return FOLDER
