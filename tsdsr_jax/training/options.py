"""The flags that training scripts have in common: the run, the optimisers, the data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.cli import PathOrName, at_least, check_writable, finite
from tsdsr_jax.devices import DTYPES, join_processes, keep_programs
from tsdsr_jax.errors import UserError
from tsdsr_jax.training.log import ReportTo, check_trackers
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.schedules import ScheduleName
from tsdsr_jax.training.sharding import make_mesh

# The original's `--mixed_precision` calls float32 "no".
PRECISIONS = {"bf16": DTYPES["bf16"], "fp16": DTYPES["fp16"], "no": DTYPES["fp32"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags that every training script has."""

    output_dir: Path = Path("tsdsr-checkpoint")
    """Folder for checkpoints, LoRAs, log, pictures and curves."""
    logging_dir: Path = Path("logs")
    """Folder of TensorBoard and wandb, inside the output folder."""
    log_name: str = "tsdsr"
    """The run's name: wandb's project, the title of the curves."""
    log_code: bool = False
    """Send the code to wandb."""
    report_to: ReportTo = "none"
    """Besides the output folder, report to TensorBoard, wandb or both."""
    logging_steps: int = 10
    """Fetch losses from the devices every so many steps; all steps are logged in any case."""

    train_batch_size: int = 4
    """Images per device."""
    gradient_accumulation_steps: int = 1
    """Batches per optimiser step."""
    num_train_epochs: int = 1
    """Passes over the data, unless --max_train_steps is given."""
    max_train_steps: int | None = None
    """Optimiser steps in all."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: much less memory for more arithmetic."""
    dataloader_num_workers: int = 0
    """Processes that read data; 0: threads."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Computation; what is trained is kept in float32. fp16 uses a dynamic loss scale."""
    seed: int = 0
    """Of the data's order, of new parameters and of all noise."""
    fsdp: int = 1
    """Devices that share one copy of the base's weights; 1: each has its own."""
    max_bad_steps: int = 20
    """Stop after so many steps in a row whose gradients were not finite."""
    max_bad_samples: float = 0.01
    """Stop when more than this fraction of the samples cannot be read."""

    checkpointing_steps: int = 5000
    """Save every so many steps, and at the end."""
    checkpoints_total_limit: int | None = None
    """Checkpoints to keep; older ones are deleted. Default: all."""
    resume_from_checkpoint: PathOrName | None = None
    """latest, or a checkpoint folder; latest with nothing there starts new."""
    validation_steps: int = 5000
    """Try it on fixed samples every so many steps, at the start and at the end."""
    validation_dir: Path | None = None
    """Prepared set to validate on, of images of the training images' size; default: the first training samples."""
    num_validation_images: int = 4
    """Samples to validate on."""

    coordinator_address: str | None = None
    """Several machines, started by hand: host:port of the first one."""
    num_processes: int | None = None
    """Several machines, started by hand: how many processes."""
    process_id: int | None = None
    """Several machines, started by hand: this process's number, from 0."""
    multi_host: bool = False
    """Several machines, started by SLURM or mpirun."""

    local_rank: int = -1
    """Without effect; one process uses all its GPUs."""
    set_grads_to_none: bool = False
    """Without effect."""

    @property
    def dtype(self) -> Any:
        return PRECISIONS[self.mixed_precision]

    @property
    def dynamic_scale(self) -> bool:
        """Whether the loss is scaled: float16's small gradients would be lost."""
        return self.mixed_precision == "fp16"

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def check(self) -> None:
        """Refuses values that cannot work, before anything is loaded."""
        at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "fsdp",
                 "checkpointing_steps", "validation_steps", "checkpoints_total_limit", "num_validation_images",
                 "logging_steps", "max_bad_steps")  # fmt: skip
        finite(self)
        at_least(self, 0, "dataloader_num_workers", "max_bad_samples", "seed")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: expected less than 2**32")
        check_writable(self.output_dir)
        check_trackers(self.report_to)

    def notes(self) -> list[str]:
        """Flags that do nothing."""
        found = []
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("local_rank", "set_grads_to_none"):
            if getattr(self, name) != defaults[name]:
                found.append(f"--{name} has no effect here")
        if self.log_code and self.report_to not in ("wandb", "all"):
            found.append("--log_code has no effect without --report_to wandb")
        return found

    def start(self) -> Mesh:
        """Joins the other processes, if there are any, and lays out the devices. Compiled programs are kept."""
        keep_programs()
        join_processes(self.coordinator_address, self.num_processes, self.process_id, self.multi_host)
        try:
            return make_mesh(fsdp=self.fsdp)
        except ValueError as error:
            raise UserError(f"--fsdp {self.fsdp}: {error}") from None

    def rows(self, mesh: Mesh) -> int:
        """Images of an optimiser step."""
        return self.train_batch_size * mesh.size * self.gradient_accumulation_steps

    def steps(self, samples: int, mesh: Mesh) -> int:
        return self.max_train_steps or -(-self.num_train_epochs * samples // self.rows(mesh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The flags of the optimiser and of the learning rate's course; defaults are the original's."""

    optimizer: Literal["AdamW", "adamw", "muon"] = "AdamW"
    """AdamW; or muon, which networks were trained from nothing with here (biases and norms stay with AdamW)."""
    lr_scheduler: ScheduleName = "constant"
    """Course of the learning rate, or of both."""
    lr_warmup_steps: int = 500
    """Steps of linear rise; not with constant."""
    lr_num_cycles: int = 1
    """Of cosine_with_restarts."""
    lr_power: float = 1.0
    """Of polynomial."""
    max_grad_norm: float = 1.0
    """Global norm that the gradients are clipped to; each network's by itself."""
    adam_beta1: float = 0.9
    """AdamW's first decay; Muon's own is 0.95."""
    adam_beta2: float = 0.999
    """AdamW's second decay."""
    adam_weight_decay: float = 1e-4
    """Weight decay, of Muon too."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon; 1e-8 in any case with muon."""
    ema_decay: float | None = None
    """Keep a moving average of what is trained with this decay, such as 0.999; exported beside it."""

    def check_optimizer(self) -> None:
        at_least(self, 1, "lr_num_cycles")
        at_least(self, 0, "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay")
        for name in ("max_grad_norm", "adam_epsilon"):
            # Below the smallest normal number XLA counts as 0.
            if not np.float32(value := getattr(self, name)) >= np.finfo(np.float32).tiny:
                below = ", and more than float32 can tell from it" if value > 0 else ""
                raise UserError(f"--{name} {value:g}: expected more than 0{below}")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if (value := getattr(self, name)) is not None and not 0 <= np.float32(value) < 1:
                raise UserError(f"--{name} {value:.12g}: expected at least 0 and less than 1")

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of the optimiser, so that training goes on with the same only."""
        return {"optimizer": self.optimizer.lower(), "ema": self.ema_decay is not None}

    def optimizer_config(self, steps: int) -> OptimizerConfig:
        return OptimizerConfig(
            optimizer="muon" if self.optimizer == "muon" else "adamw",
            schedule=self.lr_scheduler,
            warmup=self.lr_warmup_steps,
            steps=steps,
            cycles=self.lr_num_cycles,
            power=self.lr_power,
            max_grad_norm=self.max_grad_norm,
            beta1=self.adam_beta1,
            beta2=self.adam_beta2,
            epsilon=self.adam_epsilon,
            weight_decay=self.adam_weight_decay,
            ema_decay=self.ema_decay,
        )

    def warmup_notes(self, steps: int) -> list[str]:
        if self.lr_scheduler == "constant" or self.lr_warmup_steps < steps:
            return []
        return [
            f"--lr_warmup_steps {self.lr_warmup_steps} is no less than the {steps} steps of training: the learning rate "
            "does not reach its peak"
        ]
