"""The small model that lies in the repository, `weights/tiny`: taken where no other is named."""

from __future__ import annotations

from pathlib import Path

from tsdsr_jax.errors import UserError

FOLDER = Path(__file__).resolve().parents[1] / "weights" / "tiny"
PROMPT = FOLDER / "prompt" / "default"


def bundled_model() -> Path:
    """Its folder, in diffusers' layout, LoRAs merged in.

    Raises:
      UserError: it is not there: the package was installed without the repository.
    """
    if not (FOLDER / "transformer" / "config.json").is_file():
        raise UserError(
            f"give a model with --pretrained_model_name_or_path: the small one of the repository is not in {FOLDER}"
        )
    return FOLDER
