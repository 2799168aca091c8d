"""Resuming a run: finds the checkpoint to continue from, and checks that this run may continue it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import mismatches
from tsdsr_jax.training import checkpoint
from tsdsr_jax.training.options import RunOptions

# Parts of a run's identity that checkpoints of earlier versions may lack.
_LATER = ("schedule's shift", "photographs' prompts")
# Flags that may differ in a resumed run, because they do not change what it computes.
_HARMLESS = ("resume_from_checkpoint", "output_dir", "logging_dir", "log_name", "log_code", "report_to", "logging_steps",
             "profile_steps", "join_timeout", "peer_timeout", "save_timeout",
             "coordinator_address", "process_id", "num_processes", "multi_host", "dataloader_num_workers",
             "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_dir",
             "num_validation_images", "scan_layers",
             # The identity covers the contents of these folders.
             "data_dir", "hr_dir", "pretrained_model_name_or_path", "vae_dir", "default_embedding_dir", "null_embedding_dir",
             "teacher_lora_path")  # fmt: skip

# Versions on which the last bits of a step depend.
_ARITHMETIC = ("training arithmetic", "jax", "jaxlib")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: at zero, or where an earlier run stopped.

    Attributes:
      step: number of steps done.
      samples: number of samples seen.
      path: the checkpoint; None for a new run.
    """

    step: int = 0
    samples: int = 0
    path: Path | None = None


def find_start(options: RunOptions) -> Path | None:
    """Finds the checkpoint to resume, if any. It is cheap enough to call before anything is loaded.

    Raises:
      UserError: there is no such checkpoint, or the run would overwrite, delete or mix with another run's checkpoints.
    """
    folder, wanted = options.output_dir, options.resume_from_checkpoint
    path = checkpoint.find(folder, wanted) if wanted else None
    newest = checkpoint.find(folder, "latest")
    if newest is None:
        return path
    if path is None:
        raise UserError(
            f"{folder}: holds {newest.name} of an earlier run; continue it with --resume_from_checkpoint latest, or choose "
            "another --output_dir"
        )
    if path.resolve().parent != folder.resolve():
        raise UserError(
            f"{folder}: holds {newest.name} of another run; choose another --output_dir to continue from {path}"
        )
    if (checkpoint.step_of(newest) or 0) > (checkpoint.step_of(path) or 0):
        raise UserError(
            f"{folder}: holds {newest.name}, later than {path.name}; remove the later ones, or choose another --output_dir "
            f"to continue from {path}"
        )
    return path


def check_identity(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if the checkpoint belongs to a run on other data, weights or settings."""
    lacking = {name: now.get(name) for name in _LATER}
    if differing := mismatches(lacking | dict(saved), now):
        listed = "".join(f"\n  {line}" for line in differing)
        raise UserError(
            f"{path}: belongs to a different run and cannot be resumed by this one. Differences:{listed}"
        )


def check_rows(path: Path, before: int, now: int, by_epochs: bool) -> None:
    """Called if the images per step changed: raises UserError if the run's length is given in epochs."""
    if by_epochs:
        raise UserError(
            f"{path}: had {before} images per step, this run has {now}, so its epochs have a different number of steps; set "
            "the total with --max_train_steps, or keep devices × --train_batch_size × --gradient_accumulation_steps the same"
        )


def changed_flags(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes the flags that differ from the checkpoint's and may change the result, one line each."""
    before, after = (
        {name: value for name, value in flags.items() if name not in _HARMLESS} for flags in (saved, now)
    )
    # A flag that the checkpoint's version did not have, and that is off.
    after = {name: value for name, value in after.items() if name in saved or value}
    return mismatches(before, after)


def changed_arithmetic(saved: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Describes the versions by which a step rounds differently than the checkpoint's, one line each."""
    before, after = ({name: versions.get(name) for name in _ARITHMETIC} for versions in (saved, now))
    return mismatches(before, after)
