"""What to do where a prompt's embedding is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tsdsr_jax.hints import MODEL, command, given
from tsdsr_jax.weights.prompt_files import target_file
from tsdsr_jax.weights.text_encoders import has_encoders

ENCODERS = ("no_t5", "max_sequence_length")
PROMPT_ENCODERS = ("prompt_dtype", "prompt_device")


def encoding(options: Any, prompt: Literal["default", "null"], folder: Path) -> str | None:
    """The command that makes a prompt's embedding as the options encode texts; None where no text encoders are at hand."""
    flags = given(options, *MODEL, *ENCODERS)
    # What train/prepare.py calls otherwise.
    flags |= {name.removeprefix("prompt_"): value for name, value in given(options, *PROMPT_ENCODERS).items()}
    flags["pretrained_model_name_or_path"] = model = (
        getattr(options, "text_encoder_path", None) or options.pretrained_model_name_or_path
    )
    if not has_encoders(model):
        return None
    overwrite = True if target_file(folder).exists() else None
    return command("convert/prompts.py", **{prompt: True}, **flags, output=folder, overwrite=overwrite)


def how_to_encode(options: Any, prompt: Literal["default", "null"], folder: Path) -> str:
    """What to do where a prompt's embedding is missing; a sentence."""
    if made := encoding(options, prompt, folder):
        return f"Make it with: {made}"
    return f"{options.pretrained_model_name_or_path} has no text encoders to make it with: give an embedding that fits it."
