"""Tells the user what to do about a missing prompt embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tsdsr_jax.hints import MODEL, command, given
from tsdsr_jax.weights.prompt_files import target_file
from tsdsr_jax.weights.text_encoders import has_encoders

ENCODERS = ("no_t5", "max_sequence_length")
PROMPT_ENCODERS = ("prompt_dtype", "prompt_device")


def encoding(options: Any, prompt: Literal["default", "null"], folder: Path) -> str | None:
    """Returns the command that makes a prompt's embedding with the options' settings; None without text encoders."""
    flags = given(options, *MODEL, *ENCODERS)
    # train/prepare.py has other names for these.
    flags |= {name.removeprefix("prompt_"): value for name, value in given(options, *PROMPT_ENCODERS).items()}
    flags["pretrained_model_name_or_path"] = model = (
        getattr(options, "text_encoder_path", None) or options.pretrained_model_name_or_path
    )
    if not has_encoders(model):
        return None
    overwrite = True if target_file(folder).exists() else None
    return command("convert/prompts.py", **{prompt: True}, **flags, output=folder, overwrite=overwrite)


def how_to_encode(options: Any, prompt: Literal["default", "null"], folder: Path) -> str:
    """A sentence that says what to do about a missing prompt embedding."""
    if made := encoding(options, prompt, folder):
        return f"Make it with: {made}"
    return f"{options.pretrained_model_name_or_path} has no text encoders to make it with: pass an embedding that fits it."
