"""Times a training step of the student against PyTorch with PEFT, in the same run, with the same weights and losses.

    python bench/training.py --size tiny --device cpu --side 128       # minutes on two cores
    python bench/training.py --batch 2 --use_dasm                      # SD3-medium on a GPU

PyTorch does what TSD-SR's script does, in eager mode: one transformer with three adapters beside its weights, which are
switched on in turn, and a step of the student followed by a step of the auxiliary network. Both evaluate guidance in one
call, and both omit LPIPS. The teacher sees both latents in one call in ours, and one after the other in PyTorch. Losses must
agree before anything is timed.
"""

from __future__ import annotations

import os

# Two frameworks share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tests" / "support")]
import timing
from torch_networks import TOKENS, configs, params_of
from torch_training import RATE, RATE_AUXILIARY, TorchStep

import oracle_models
import parity
from tsdsr_jax import cli, devices
from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Base, Batch, Draws, LossConfig, Losses, Student
from tsdsr_jax.distillation.tsd import TSDConfig
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT
from tsdsr_jax.models.vae import AutoencoderKL
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.sharding import make_mesh, replicated
from tsdsr_jax.training.step import Trainer, jit_step

# Relative difference of each loss.
FARTHEST = {"fp32": 1e-3, "fp16": 0.05, "bf16": 0.1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    size: Literal["tiny", "half", "full"] = "full"
    """Size of both networks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device for both frameworks."""
    mixed_precision: Literal["fp16", "bf16", "fp32"] | None = None
    """Default: bf16 on a GPU, fp32 on a CPU."""
    side: int = 512
    """Side of the training images, in pixels."""
    batch: int = 2
    """Images per step."""
    rank: int = 64
    """Rank of all adapters."""
    use_dasm: bool = True
    """Use four points of a trajectory instead of one."""
    gradient_checkpointing: bool = False
    """Use gradient checkpointing on both sides."""
    seconds: float = 5.0
    """Least number of seconds to time each for."""
    json: Path | None = None
    """JSON file for the results."""

    @property
    def config(self) -> LossConfig:
        tsd = TSDConfig() if self.use_dasm else TSDConfig().without_dasm()
        return LossConfig(tsd=tsd, weight_lpips=0.0)


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU; --device cpu runs the small sizes")
    if options.side % 16 or options.batch < 1:
        raise UserError(
            f"--side {options.side}, --batch {options.batch}: expected a multiple of 16, and at least 1"
        )
    cli.at_least(options, 1, "rank")
    if options.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        torch.set_num_threads(devices.cores())
    timing.check_device(options.device)
    precision = options.mixed_precision or ("fp32" if options.device == "cpu" else "bf16")
    data = random_data(options)
    theirs = TorchStep(
        *(options.size, options.device, precision, options.config),
        *(options.rank, options.gradient_checkpointing),
    )
    ours = OurStep(options, precision, theirs)
    losses = theirs.losses(data), ours.losses(data)
    apart = max(abs(losses[1][name] / value - 1) for name, value in losses[0].items())
    if not apart <= FARTHEST[precision]:
        raise UserError(f"losses differ by {apart:.2g}: PyTorch {losses[0]}, ours {losses[1]}")
    steps = {"ours": partial(ours.step, data), "torch": partial(theirs.step, data)}
    times = timing.in_turn(steps, options.seconds)
    seconds = {name: timing.median(found) for name, found in times.items()}
    ratio = seconds["torch"] / seconds["ours"]
    print(
        f"{jax.devices()[0].device_kind}, {precision}, {options.size}, {options.batch} × {options.side}²: "
        f"{seconds['ours'] * 1e3:.0f} ms per step, PyTorch {seconds['torch'] * 1e3:.0f}, ratio {ratio:.2f}; "
        f"losses {apart:.1e} apart"
    )
    memory = {"ours_gb": ours.memory(data) / 1e9, "torch_gb": theirs.memory() / 1e9}
    if options.device == "cuda":
        print(
            f"memory: {memory['ours_gb']:.1f} GB as planned, PyTorch {memory['torch_gb']:.1f} GB at its peak"
        )
    if options.json:
        told = dataclasses.asdict(options) | {"json": None, "precision": precision}
        figures = {"options": told, "seconds": times, "ratio": ratio, "apart": apart, "memory": memory}
        figures["versions"] = timing.versions("torch", "diffusers", "peft", "optax")
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def random_data(options: Options) -> dict[str, np.ndarray]:
    """A batch and a step's random draws, by name; images and latents are NCHW."""
    random = np.random.default_rng(0)
    transformer, vae = configs(options.size)
    batch, side, latent = options.batch, options.side, options.side // vae.factor

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    images, latents = (batch, 3, side, side), (batch, vae.latent_channels, latent, latent)
    index = random.integers(50, 950, batch)
    return {
        "lr": np.tanh(normal(*images)), "hr": np.tanh(normal(*images)), "latent_hr": normal(*latents),
        "states": normal(batch, TOKENS, transformer.joint_attention_dim),
        "pooled": normal(batch, transformer.pooled_projection_dim),
        "posterior": normal(*latents), "noise": normal(*latents), "auxiliary_noise": normal(*latents),
        "index": index, "auxiliary_index": random.integers(50, 950, batch),
        "bias": np.minimum(random.integers(-25, 25, batch), 950 - index),
        "normal": normal(batch), "uniform": random.uniform(size=batch).astype(np.float32),
    }  # fmt: skip


# --- ours -------------------------------------------------------------------------------------------


class OurStep:
    """Our training step, which draws on the device, and its losses at given draws."""

    def __init__(self, options: Options, precision: str, theirs: TorchStep):
        self.dtype = devices.DTYPES[precision]
        networks = configs(options.size)
        transformer, vae = theirs.networks.transformer, theirs.networks.vae
        params = [
            jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), base_of(model, config))
            for model, config in zip((transformer, vae), networks, strict=True)
        ]
        adapter = partial(parity.lora_of, oracle_models)
        width, pooled = networks[0].joint_attention_dim, networks[0].pooled_projection_dim
        null = Text(jnp.zeros((1, TOKENS, width), self.dtype), jnp.zeros((1, pooled), self.dtype))
        teacher = jax.tree.map(lambda leaf: jnp.asarray(leaf, self.dtype), adapter(transformer, "teacher"))
        self.base = Base(params[0], params[1], teacher, null)
        self.student = Student(adapter(transformer, "student"), adapter(vae))
        self.auxiliary = adapter(transformer, "auxiliary")
        remat = options.gradient_checkpointing
        self.objective = Losses(
            MMDiT(networks[0], self.dtype, remat=remat),
            AutoencoderKL(networks[1], self.dtype, remat=remat),
            options.config,
        )
        rates = {"student": RATE, "auxiliary": RATE_AUXILIARY}
        trainer = Trainer(self.objective, OptimizerConfig(schedule="constant"), rates, branch=False)
        self.state = jax.jit(trainer.init)({"student": self.student, "auxiliary": self.auxiliary})
        mesh = make_mesh()
        self.run = jit_step(trainer, mesh, replicated(mesh))

    def losses(self, data: dict[str, np.ndarray]) -> dict[str, float]:
        text = Text(data["states"], data["pooled"])
        batch = Batch(*(parity.nhwc(data[name]) for name in ("lr", "hr", "latent_hr")), text, text)
        draws = Draws(**{
            name: parity.nhwc(data[name]) if data[name].ndim == 4 else jnp.asarray(data[name]) for name in Draws._fields
        })  # fmt: skip

        @jax.jit
        def both(base: Base, student: Student, auxiliary: Any) -> dict[str, jax.Array]:
            _, (fake, metrics) = self.objective.student(student, base, auxiliary, batch, draws)
            return metrics | {"auxiliary": self.objective.auxiliary(auxiliary, base, fake, batch, draws)}

        with devices.matmul_precision(self.dtype):
            found = both(self.base, self.student, self.auxiliary)
        return {name: float(value) for name, value in found.items()}

    def samples(self, data: dict[str, np.ndarray]) -> Record:
        """A batch as it comes from a training set to the device, with one accumulation part."""
        lr, hr = (((parity.nhwc(data[name]) + 1) * 127.5).astype(np.uint8)[None] for name in ("lr", "hr"))
        text = (data[name][None].astype(np.float16) for name in ("states", "pooled"))
        return jax.device_put(Record(lr, hr, parity.nhwc(data["latent_hr"])[None], *text))

    def step(self, data: dict[str, np.ndarray]) -> None:
        with devices.matmul_precision(self.dtype):
            self.state, metrics = self.run(self.state, self.base, self.samples(data), jax.random.key(0))
        jax.block_until_ready(metrics)

    def memory(self, data: dict[str, np.ndarray]) -> float:
        """Planned bytes of the compiled step, arguments included; the state is donated."""
        with devices.matmul_precision(self.dtype):
            lowered = self.run.lower(self.state, self.base, self.samples(data), jax.random.key(0))
        found = lowered.compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes


def base_of(model: Any, config: Any) -> Any:
    """Our parameters of a network with adapters."""
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }

    class Bare:
        def state_dict(self) -> dict[str, Tensor]:
            return state

    return params_of(Bare(), config)


if __name__ == "__main__":
    cli.run(main)
