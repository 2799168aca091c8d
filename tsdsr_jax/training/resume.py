"""Resuming a run: the checkpoint to continue from, and whether this run may continue it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import mismatches
from tsdsr_jax.training import checkpoint
from tsdsr_jax.training.options import RunOptions

# Parts of a run's identity that checkpoints of earlier versions may lack.
_LATER = ("schedule's shift",)
# Flags that may change between two parts of a run without changing what it computes.
_HARMLESS = ("resume_from_checkpoint", "output_dir", "logging_dir", "log_name", "log_code", "report_to", "logging_steps",
             "coordinator_address", "process_id", "num_processes", "multi_host", "dataloader_num_workers",
             "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "validation_dir",
             "num_validation_images",
             # The identity has what lies there.
             "data_dir", "hr_dir", "pretrained_model_name_or_path", "vae_dir", "default_embedding_dir", "null_embedding_dir",
             "teacher_lora_path")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins: at nothing, or in the middle of an earlier one.

    Attributes:
      step: steps done.
      samples: samples seen.
      path: the checkpoint.
    """

    step: int = 0
    samples: int = 0
    path: Path | None = None


def find_start(options: RunOptions) -> Path | None:
    """The checkpoint to resume, if any; cheap, for before anything is loaded.

    Raises:
      UserError: no such checkpoint, or the run would overwrite, delete or mix with checkpoints of another.
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
            f"{folder}: holds {newest.name} of a run of its own; choose another --output_dir to go on from {path}"
        )
    if (checkpoint.step_of(newest) or 0) > (checkpoint.step_of(path) or 0):
        raise UserError(
            f"{folder}: holds {newest.name}, later than {path.name}; remove the later ones, or choose another --output_dir "
            f"to go on from {path}"
        )
    return path


def check_identity(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses the checkpoint of a run on other data, weights or settings."""
    lacking = {name: now.get(name) for name in _LATER}
    if differing := mismatches(lacking | dict(saved), now):
        listed = "".join(f"\n  {line}" for line in differing)
        raise UserError(
            f"{path}: belongs to another run than this, and is not resumed. What differs:{listed}"
        )


def check_rows(path: Path, before: int, now: int, by_epochs: bool) -> None:
    """Another number of images in a step: fine, if the length of the run is given in steps."""
    if by_epochs:
        raise UserError(
            f"{path}: had {before} images in a step, this run has {now}, so epochs take another number of steps; "
            "give the total with --max_train_steps, or keep devices × --train_batch_size × accumulation as it was"
        )


def changed_flags(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Flags that differ from the checkpoint's and may change the result, one line each."""
    before, after = (
        {name: value for name, value in flags.items() if name not in _HARMLESS} for flags in (saved, now)
    )
    return mismatches(before, after)


def check_processes(step: int, identity: Mapping[str, Any]) -> None:
    """Raises UserError, in every process, unless all begin at the same step and see the same data and weights."""
    if jax.process_count() == 1:
        return
    steps = multihost_utils.process_allgather(np.int32(step)).ravel().tolist()
    if len(set(steps)) > 1:
        raise UserError(
            f"the processes found checkpoints of different steps ({', '.join(map(str, steps))}); --output_dir must be a "
            "folder that all of them share"
        )
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).digest()[:4]
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.int32)).ravel().tolist()
    if len(set(digests)) > 1:
        told = ", ".join(f"{name} {str(value)[:12]}" for name, value in identity.items())
        raise UserError(
            f"the processes see different data or weights; process {jax.process_index()} has: {told}. Photographs, sets and "
            "models must be the same for all of them"
        )
