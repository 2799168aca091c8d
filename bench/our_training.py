"""Our training step of the student and the auxiliary network, for benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inputs import TOKENS
from jax.typing import DTypeLike

from tsdsr_jax import devices
from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Base, Batch, Draws, LossConfig, Losses, Student
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import Tree
from tsdsr_jax.models.stacks import take_apart
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.options import LayerOptions
from tsdsr_jax.training.sharding import make_mesh, replicated
from tsdsr_jax.training.step import Trainer, jit_step
from tsdsr_jax.weights.lora_files import load_lora

RATE, RATE_AUXILIARY = 5e-6, 1e-6


def load_adapters(folder: Path, transformer: MMDiTConfig, vae: VAEConfig) -> dict[str, Tree]:
    """Reads the adapters that `torch_training.save_adapters` wrote."""
    return {
        "student": load_lora(folder / "transformer.safetensors", transformer),
        "encoder": load_lora(folder / "vae.safetensors", vae),
        "teacher": load_lora(folder / "teacher.safetensors", transformer),
        "auxiliary": load_lora(folder / "transformer_reg.safetensors", transformer),
    }


class OurStep:
    """Our training step, which draws on the device, and its losses at given draws.

    Args:
      configs: of transformer and autoencoder.
      params: of both.
      adapters: see `load_adapters`.
      dtype: dtype of the computation and of everything that is not trained.
      config: the losses.
      remat: gradient checkpointing in both networks.
    """

    def __init__(
        self,
        configs: tuple[MMDiTConfig, VAEConfig],
        params: tuple[Tree, Tree],
        adapters: Mapping[str, Tree],
        dtype: DTypeLike,
        config: LossConfig,
        remat: bool,
    ):
        self.dtype = dtype

        def on_device(tree: Tree) -> Tree:
            return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

        mesh = make_mesh()
        scanned = LayerOptions().scans(mesh)
        transformer, vae = map(on_device, params)
        if not scanned:
            transformer = take_apart(configs[0], transformer)
        width, pooled = configs[0].joint_attention_dim, configs[0].pooled_projection_dim
        null = Text(jnp.zeros((1, TOKENS, width), dtype), jnp.zeros((1, pooled), dtype))
        self.base = Base(transformer, vae, on_device(adapters["teacher"]), null)
        self.student = Student(adapters["student"], adapters["encoder"])
        self.auxiliary = adapters["auxiliary"]
        self.objective = Losses(
            MMDiT(configs[0], dtype, remat=remat, scanned=scanned),
            AutoencoderKL(configs[1], dtype, remat=remat),
            config,
        )
        rates = {"student": RATE, "auxiliary": RATE_AUXILIARY}
        trainer = Trainer(self.objective, OptimizerConfig(schedule="constant"), rates, branch=False)
        self.state = jax.jit(trainer.init)({"student": self.student, "auxiliary": self.auxiliary})
        self.run = jit_step(trainer, mesh, replicated(mesh))

    def losses(self, data: dict[str, np.ndarray]) -> dict[str, float]:
        text = Text(data["states"], data["pooled"])
        batch = Batch(*(_nhwc(data[name]) for name in ("lr", "hr", "latent_hr")), text, text)
        draws = Draws(**{
            name: _nhwc(data[name]) if data[name].ndim == 4 else jnp.asarray(data[name]) for name in Draws._fields
        })  # fmt: skip

        @jax.jit
        def both(base: Base, student: Student, auxiliary: Any) -> dict[str, jax.Array]:
            _, (made, metrics) = self.objective.student(student, base, auxiliary, batch, draws)
            return metrics | {
                "auxiliary": self.objective.auxiliary(auxiliary, base, made.latent, batch, draws)
            }

        with devices.matmul_precision(self.dtype):
            found = both(self.base, self.student, self.auxiliary)
        return {name: float(value) for name, value in found.items()}

    def samples(self, data: dict[str, np.ndarray]) -> Record:
        """A batch as it comes from a training set to the device, with one accumulation part."""
        lr, hr = (((_nhwc(data[name]) + 1) * 127.5).astype(np.uint8)[None] for name in ("lr", "hr"))
        text = (data[name][None].astype(np.float16) for name in ("states", "pooled"))
        return jax.device_put(Record(lr, hr, _nhwc(data["latent_hr"])[None], *text))

    def step(self, samples: Record) -> None:
        with devices.matmul_precision(self.dtype):
            self.state, metrics = self.run(self.state, self.base, samples, jax.random.key(0))
        jax.block_until_ready(metrics)

    def memory(self, samples: Record) -> float:
        """Planned bytes of the compiled step, arguments included; the state is donated."""
        with devices.matmul_precision(self.dtype):
            lowered = self.run.lower(self.state, self.base, samples, jax.random.key(0))
        found = lowered.compile().memory_analysis()
        return found.argument_size_in_bytes + found.temp_size_in_bytes


def _nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))
