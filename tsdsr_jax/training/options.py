"""The flags that training commands share: the run and the optimizer."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from tsdsr_jax.cli import PathOrName, at_least, check_writable, finite
from tsdsr_jax.compile_watch import say_above_bar
from tsdsr_jax.devices import DTYPES, Joining, join_processes
from tsdsr_jax.errors import UserError
from tsdsr_jax.identity import versions
from tsdsr_jax.program_cache import keep_programs
from tsdsr_jax.storage import is_copy
from tsdsr_jax.training.agreement import check_agreement, check_shared
from tsdsr_jax.training.log import ReportTo, check_trackers
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.schedules import ScheduleName
from tsdsr_jax.training.sharding import make_mesh

# Flags that may differ between processes: where one is and what it does alone, and paths, whose contents are compared.
_OWN = ("process_id", "coordinator_address", "local_rank", "dataloader_num_workers", "logging_dir", "log_name", "log_code",
        "report_to", "output_dir", "resume_from_checkpoint", "data_dir", "hr_dir", "validation_dir",
        "pretrained_model_name_or_path", "vae_dir", "default_embedding_dir", "null_embedding_dir", "teacher_lora_path",
        "checkpoint_path", "lpips_path")  # fmt: skip

# The original's `--mixed_precision` calls float32 "no".
PRECISIONS = {"bf16": DTYPES["bf16"], "fp16": DTYPES["fp16"], "no": DTYPES["fp32"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The flags that every training command has."""

    output_dir: Path = Path("tsdsr-checkpoint")
    """Folder for checkpoints, LoRAs, the log, validation pictures and curves."""
    logging_dir: Path = Path("logs")
    """Folder for TensorBoard and wandb files, inside the output folder."""
    log_name: str = "tsdsr"
    """Name of the run, used as the wandb project and as the curves' title."""
    log_code: bool = False
    """Upload the code to wandb."""
    report_to: ReportTo = "none"
    """Also report to TensorBoard, wandb or both (all)."""
    logging_steps: int = 10
    """Fetch losses from the devices every N steps. Every step is logged either way."""

    profile_steps: str | None = None
    """Write a trace of these steps to OUTPUT/profile, such as 10:15; XProf shows it."""

    train_batch_size: int = 4
    """Images per device in a batch."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""
    num_train_epochs: int = 1
    """Passes over the data; ignored if --max_train_steps is given."""
    max_train_steps: int | None = None
    """Total number of optimizer steps. Default: as --num_train_epochs says."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: uses much less memory, but is slower."""
    dataloader_num_workers: int = 0
    """Number of processes that read data; 0 uses threads."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Precision of computation; trained weights are kept in float32. fp16 uses a dynamic loss scale."""
    seed: int = 0
    """Seed of the data's order, new weights and all noise."""
    fsdp: int = 1
    """Split one copy of the weights over this many devices; with 1, every device holds a whole copy."""
    max_bad_steps: int = 20
    """Stop after this many consecutive steps with non-finite gradients or updates."""
    max_bad_samples: float = 0.01
    """Stop when more than this fraction of the samples cannot be read."""

    checkpointing_steps: int = 5000
    """Save a checkpoint every N steps, and at the end."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep; older ones are deleted. Default: keep all."""
    resume_from_checkpoint: PathOrName | None = None
    """Continue from a checkpoint folder, or from latest. If there is none yet, latest starts a new run."""
    validation_steps: int = 5000
    """Validate on fixed samples every N steps, at the start and at the end."""
    validation_dir: Path | None = None
    """Prepared set to validate on; its images must have the training images' size. Default: the first training samples."""
    num_validation_images: int = 4
    """Number of samples to validate on."""

    coordinator_address: str | None = None
    """For several machines, started by hand: host:port of the first machine."""
    num_processes: int | None = None
    """For several machines, started by hand: number of processes."""
    process_id: int | None = None
    """For several machines, started by hand: index of this process, from 0."""
    multi_host: bool | None = None
    """Train together with the other processes that srun, mpirun or torchrun has started. Default: if it has started
    several."""
    join_timeout: int = 300
    """For several machines: seconds to wait for all processes at the start."""
    peer_timeout: int = 15
    """For several machines: seconds after which a process that does not answer is given up, and all end."""
    save_timeout: int = 1800
    """For several machines: seconds in which a checkpoint must be saved; a process that waits longer for the others ends."""

    local_rank: int = -1
    """Has no effect: one process uses all its GPUs. Accepted for the original's command lines."""
    set_grads_to_none: bool = False
    """Has no effect. Accepted for the original's command lines."""

    @property
    def dtype(self) -> Any:
        return PRECISIONS[self.mixed_precision]

    @property
    def dynamic_scale(self) -> bool:
        """Whether to scale the loss: small gradients would vanish in float16."""
        return self.mixed_precision == "fp16"

    def as_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    def check(self) -> None:
        """Raises UserError for values that cannot work, before anything is loaded."""
        at_least(self, 1, "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_train_steps", "fsdp",
                 "checkpointing_steps", "validation_steps", "checkpoints_total_limit", "num_validation_images",
                 "logging_steps", "max_bad_steps", "join_timeout", "save_timeout")  # fmt: skip
        at_least(self, 3, "peer_timeout")
        finite(self)
        at_least(self, 0, "dataloader_num_workers", "max_bad_samples", "seed")
        self.profiled()
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed}: expected less than 2**32")
        check_writable(self.output_dir)
        check_trackers(self.report_to)

    def profiled(self) -> tuple[int, int] | None:
        """Returns the first and the last step of --profile_steps.

        Raises:
          UserError: it is not of that form.
        """
        if self.profile_steps is None:
            return None
        match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first <= last:
            raise UserError(
                f"--profile_steps {self.profile_steps}: expected the first and the last step, such as 10:15"
            )
        return first, last

    def notes(self) -> list[str]:
        """Returns a note for each flag that has no effect."""
        found = []
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("local_rank", "set_grads_to_none"):
            if getattr(self, name) != defaults[name]:
                found.append(f"--{name} has no effect here")
        if self.log_code and self.report_to not in ("wandb", "all"):
            found.append("--log_code has no effect without --report_to wandb")
        return found

    def start(self) -> Mesh:
        """Turns on the compilation cache, joins the other processes, if any, and returns the mesh of devices.

        Raises:
          UserError: the processes cannot be joined, or have different flags, versions, devices or output folders.
        """
        keep_programs(say_above_bar)
        join_processes(
            Joining(
                self.coordinator_address,
                self.num_processes,
                self.process_id,
                self.multi_host,
                self.join_timeout,
                self.peer_timeout,
            ),
            say_above_bar,
        )
        check_agreement(self.agreed(), "flags, versions or devices")
        if not is_copy(self.output_dir):  # each process has a copy of its own; the first one's counts
            check_shared(self.output_dir)
        try:
            return make_mesh(fsdp=self.fsdp)
        except ValueError as error:
            raise UserError(f"--fsdp {self.fsdp}: {error}") from None

    def agreed(self) -> dict[str, Any]:
        """Returns what must be the same for all processes, and is known before anything is loaded."""
        flags = {f"--{name}": value for name, value in self.as_json().items() if name not in _OWN}
        found = {name: version for name, version in versions().items() if name != "python"}
        return flags | found | {"devices": [device.device_kind for device in jax.local_devices()]}

    def rows(self, mesh: Mesh) -> int:
        """Returns the number of images in an optimizer step."""
        return self.train_batch_size * mesh.size * self.gradient_accumulation_steps

    def steps(self, samples: int, mesh: Mesh) -> int:
        return self.max_train_steps or -(-self.num_train_epochs * samples // self.rows(mesh))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How a frozen transformer is laid out."""

    scan_layers: bool | None = None
    """Compute the transformer's layers in a loop, which compiles sooner. On a GPU it is slower, because the loop copies each
    layer's weights. Default: no on GPUs, but yes with --fsdp, where a loop gathers one layer's weights at a time."""

    def scans(self, mesh: Mesh) -> bool:
        """Whether to loop over layers on these devices."""
        if self.scan_layers is not None:
            return self.scan_layers
        return mesh.devices.flat[0].platform != "gpu" or mesh.shape["fsdp"] > 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdversarialOptions:
    """The flags of a discriminator."""

    lambda_adv: float = 0.0
    """Weight of the adversarial loss; 0 trains without."""
    adversarial_start: int = 0
    """Number of steps before the adversarial loss begins."""
    learning_rate_adv: float = 1e-4
    """Peak learning rate of the discriminator, which AdamW trains with beta 1 of 0.5."""
    discriminator_width: int = 64
    """Channels of the discriminator's first convolution; a multiple of 8."""

    def check_adversarial(self) -> None:
        at_least(self, 0, "lambda_adv", "adversarial_start", "learning_rate_adv")
        if self.discriminator_width < 8 or self.discriminator_width % 8:
            raise UserError(
                f"--discriminator_width {self.discriminator_width}: expected a positive multiple of 8"
            )

    def kept_discriminator(self) -> dict[str, Any]:
        """Returns what decides on the form of the discriminator's state."""
        return {"discriminator's width": self.discriminator_width} if self.lambda_adv else {}

    def discriminator_config(self, config: OptimizerConfig) -> OptimizerConfig:
        """Returns the settings of the discriminator's optimizer, from those of the others."""
        return dataclasses.replace(config, optimizer="adamw", beta1=0.5)

    def adversarial_notes(self, steps: int) -> list[str]:
        if self.lambda_adv and self.adversarial_start >= steps:
            return [
                f"--adversarial_start {self.adversarial_start}: training has only {steps} steps, so --lambda_adv has no "
                "effect"
            ]
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The flags of the optimizer and the learning-rate schedule; defaults are the original's."""

    optimizer: Literal["AdamW", "adamw", "muon"] = "AdamW"
    """AdamW or Muon. Muon trained this project's own networks from scratch; it leaves biases and norms to AdamW."""
    lr_scheduler: ScheduleName = "constant"
    """Learning-rate schedule."""
    lr_warmup_steps: int = 500
    """Steps of linear warmup; the constant schedule has none."""
    lr_num_cycles: int = 1
    """Number of cycles of the cosine_with_restarts schedule."""
    lr_power: float = 1.0
    """Exponent of the polynomial schedule."""
    max_grad_norm: float = 1.0
    """Clip gradients to this global norm, each network separately."""
    adam_beta1: float = 0.9
    """Beta 1 of AdamW; Muon's momentum is always 0.95."""
    adam_beta2: float = 0.999
    """Beta 2 of AdamW."""
    adam_weight_decay: float = 1e-4
    """Weight decay of AdamW and Muon."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW; with muon it is always 1e-8."""
    ema_decay: float | None = None
    """Also keep and export a moving average of the trained weights with this decay, such as 0.999."""

    def check_optimizer(self) -> None:
        at_least(self, 1, "lr_num_cycles")
        at_least(self, 0, "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay")
        for name in ("max_grad_norm", "adam_epsilon"):
            # XLA treats anything below the smallest normal number as 0.
            if not np.float32(value := getattr(self, name)) >= np.finfo(np.float32).tiny:
                below = "; this is too small for float32" if value > 0 else ""
                raise UserError(f"--{name} {value:g}: expected more than 0{below}")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if (value := getattr(self, name)) is not None and not 0 <= np.float32(value) < 1:
                raise UserError(f"--{name} {value:.12g}: expected at least 0 and less than 1")

    def kept(self) -> dict[str, Any]:
        """Returns the settings that must not change when a run is resumed."""
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
            f"--lr_warmup_steps {self.lr_warmup_steps}: training has only {steps} steps, so the learning rate never reaches "
            "its peak"
        ]
