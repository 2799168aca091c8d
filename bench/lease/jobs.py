"""Who measures what in a lease, in the order in which they start and take their turns."""

from __future__ import annotations

from typing import NamedTuple


class Job(NamedTuple):
    """A worker process.

    Attributes:
      name: its name in results and logs.
      script: its script in this folder.
      flags: for the script.
      gigabytes: of the GPU's memory that it takes at most, at full size. Jobs whose sum fits run side by side.
    """

    name: str
    script: str
    flags: tuple[str, ...]
    gigabytes: float


MODEL = Job("model", "make_model.py", (), 12)


def jobs(large_batch: int) -> tuple[Job, ...]:
    """All jobs; upscaling is measured at this batch and at one image. What takes longest to compile starts first."""
    both = "--batches", f"{large_batch},1"
    return (
        Job("ours", "infer_ours.py", both, 10),
        Job("compiled", "infer_torch.py", ("--how", "compiled", "--batches", f"{large_batch}"), 14),
        Job("compiled-1", "infer_torch.py", ("--how", "compiled", "--batches", "1"), 8),
        Job("train", "train_ours.py", (), 21),
        Job("train-checkpointing", "train_ours.py", ("--checkpointing",), 12),
        Job("fp8", "infer_ours.py", ("--weights", "fp8", *both), 8),
        Job("int8", "infer_ours.py", ("--weights", "int8", *both), 8),
        Job("eager", "infer_torch.py", ("--how", "eager", *both), 15),
        Job("lora", "infer_torch.py", ("--how", "lora", *both), 15),
        Job("torch-train-checkpointing", "train_torch.py", ("--checkpointing",), 25),
        Job("torch-train", "train_torch.py", (), 45),
    )
