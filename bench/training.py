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
import tempfile
from pathlib import Path
from typing import Any, Literal

import jax
import timing
import torch
from inputs import training_inputs
from our_training import OurStep, load_adapters
from torch import Tensor
from torch_networks import Size, TorchNetworks, configs, params_of
from torch_pipeline import DTYPES
from torch_training import TorchStep, add_random_adapters, farthest_apart, save_adapters

from tsdsr_jax import cli, devices
from tsdsr_jax.distillation.losses import LossConfig
from tsdsr_jax.distillation.tsd import TSDConfig
from tsdsr_jax.errors import UserError
from tsdsr_jax.models.params import Tree

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
    transformer, vae = configs(options.size)
    widths = transformer.joint_attention_dim, transformer.pooled_projection_dim
    data = training_inputs(options.batch, options.side, vae.latent_channels, *widths)
    networks = TorchNetworks.random(options.size, options.device, DTYPES[precision])
    add_random_adapters(networks, options.rank)
    theirs = TorchStep(networks, precision, options.config, options.gradient_checkpointing)
    ours = OurStep(
        (transformer, vae),
        (base_of(networks.transformer, transformer), base_of(networks.vae, vae)),
        adapters_of(networks, options.size),
        devices.DTYPES[precision],
        options.config,
        options.gradient_checkpointing,
    )
    losses = theirs.losses(data), ours.losses(data)
    apart = farthest_apart(losses[1], losses[0])
    if not apart <= FARTHEST[precision]:
        raise UserError(f"losses differ by {apart:.2g}: PyTorch {losses[0]}, ours {losses[1]}")
    steps = {
        "ours": lambda: ours.step(ours.samples(data)),
        "torch": lambda: theirs.step(theirs.on_device(data)),
    }
    times = timing.in_turn(steps, options.seconds)
    seconds = {name: timing.median(found) for name, found in times.items()}
    ratio = seconds["torch"] / seconds["ours"]
    print(
        f"{jax.devices()[0].device_kind}, {precision}, {options.size}, {options.batch} × {options.side}²: "
        f"{seconds['ours'] * 1e3:.0f} ms per step, PyTorch {seconds['torch'] * 1e3:.0f}, ratio {ratio:.2f}; "
        f"losses {apart:.1e} apart"
    )
    memory = {"ours_gb": ours.memory(ours.samples(data)) / 1e9, "torch_gb": theirs.memory() / 1e9}
    if options.device == "cuda":
        print(
            f"memory: {memory['ours_gb']:.1f} GB as planned, PyTorch {memory['torch_gb']:.1f} GB at its peak"
        )
    if options.json:
        told = dataclasses.asdict(options) | {"json": None, "precision": precision}
        figures = {"options": told, "seconds": times, "ratio": ratio, "apart": apart, "memory": memory}
        figures["versions"] = timing.versions("torch", "diffusers", "peft", "optax")
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


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


def adapters_of(networks: TorchNetworks, size: Size) -> dict[str, Tree]:
    """Our trees of a network's adapters, through files."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(networks, Path(folder))
        return load_adapters(Path(folder), *configs(size))


if __name__ == "__main__":
    cli.run(main)
