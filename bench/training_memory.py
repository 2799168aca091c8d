"""Prints how much memory a training step of the full-size SD3 needs on each device, without running it.

    python bench/training_memory.py                      # batch 1, 2, 4; gradient checkpointing on and off
    python bench/training_memory.py --fsdp 8 --batch 2   # eight virtual devices that share one base

The step is compiled for CPUs from shapes alone, and the figures are XLA's plans. They are an upper bound for a GPU:
attention on a CPU keeps its scores, which flash attention on a GPU does not, and a CPU computes much of bfloat16 in float32.
Use Python 3.12 or newer: older JAX copies whole stacks of bfloat16 weights to float32 on CPUs.
"""

from __future__ import annotations

if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tsdsr_jax import cli
from tsdsr_jax.data.record import Record
from tsdsr_jax.distillation.losses import Base, LossConfig, Losses, Student
from tsdsr_jax.distillation.tsd import TSDConfig
from tsdsr_jax.errors import UserError
from tsdsr_jax.models import lora
from tsdsr_jax.models.guidance import Text
from tsdsr_jax.models.lpips import LPIPS
from tsdsr_jax.models.mmdit import MMDiT, MMDiTConfig
from tsdsr_jax.models.params import abstract_params
from tsdsr_jax.models.vae import AutoencoderKL, VAEConfig
from tsdsr_jax.training.optimizer import OptimizerConfig
from tsdsr_jax.training.options import PRECISIONS
from tsdsr_jax.training.sharding import base_shardings, batch_sharding, make_mesh, placement, replicated
from tsdsr_jax.training.step import Trainer, jit_step

TOKENS = 333
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Options:
    batch: tuple[int, ...] = (1, 2, 4)
    """Images per device."""
    size: int = 512
    """Side of the training images."""
    rank: int = 64
    """Rank of all LoRAs."""
    mixed_precision: Literal["bf16", "fp16", "no"] = "bf16"
    """Precision of computation and frozen weights."""
    gradient_checkpointing: Literal["both", "on", "off"] = "both"
    """Whether to compile with gradient checkpointing on, off, or both."""
    use_dasm: bool = True
    """Use four points of a trajectory, one after another, instead of one; costs time, not memory."""
    split_guidance: bool = False
    """Evaluate empty and real prompt one after the other."""
    lambda_lpips: float = 1.0
    """Weight of LPIPS; 0 omits LPIPS and the decoder."""
    fsdp: int = 1
    """Virtual devices that share one base."""
    json: Path | None = None
    """JSON file for the results."""


def main() -> None:
    options = cli.parse(Options, description=__doc__)
    if options.fsdp < 1:
        raise UserError(f"--fsdp {options.fsdp}: expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.fsdp)
    print(
        f"SD3-medium, {options.size}×{options.size}, {options.mixed_precision}, rank {options.rank}, jax {jax.__version__}"
    )
    print(
        f"{'batch':>5} {'remat':>6} {'arguments':>10} {'temporary':>10} {'together':>10}   GB per device; (compile time)"
    )
    wanted = {"both": (True, False), "on": (True,), "off": (False,)}[options.gradient_checkpointing]
    rows = []
    for batch in options.batch:
        for remat in wanted:
            rows.append(measure(options, batch, remat))
            row = rows[-1]
            print(
                f"{batch:5} {'on' if remat else 'off':>6} {row['arguments']:10.2f} {row['temporary']:10.2f}"
                f" {row['together']:10.2f}   ({row['compile_s']:.0f} s)",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2) + "\n")


def measure(options: Options, batch: int, remat: bool) -> dict[str, Any]:
    """Compiles one step from shapes; returns gigabytes per device."""
    mesh = make_mesh(fsdp=options.fsdp)
    dtype = PRECISIONS[options.mixed_precision]
    configs = MMDiTConfig.sd3_medium(), VAEConfig.sd3()
    networks = tuple(map(abstract_params, configs))
    pinned = placement(mesh) if options.fsdp > 1 else None
    perceptual = LPIPS()
    losses = Losses(
        MMDiT(configs[0], dtype=dtype, remat=remat, placement=pinned),
        AutoencoderKL(configs[1], dtype=dtype, remat=remat, placement=pinned),
        LossConfig(
            tsd=TSDConfig() if options.use_dasm else TSDConfig().without_dasm(),
            weight_lpips=options.lambda_lpips,
            split_guidance=options.split_guidance,
        ),
        (lambda params, a, b: perceptual.apply({"params": params}, a, b)) if options.lambda_lpips else None,
    )
    rates = {"student": 5e-6, "auxiliary": 1e-6}
    dynamic = options.mixed_precision == "fp16"
    trainer = Trainer(losses, OptimizerConfig(), rates, dynamic_scale=dynamic, branch=False)
    whole, rows = replicated(mesh), batch_sharding(mesh, axis=1)

    def adapter(params: Any, targets: tuple[str, ...]) -> Any:
        return jax.eval_shape(
            partial(lora.init, targets=targets, rank=options.rank), jax.random.key(0), params
        )

    def shape(*sides: int, dtype: Any = jnp.float32, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype, sharding=sharding)

    def placed(tree: Any, dtype: Any = None, shardings: Any = None) -> Any:
        shardings = shardings or jax.tree.map(lambda leaf: whole, tree)
        return jax.tree.map(
            lambda leaf, s: shape(*leaf.shape, dtype=dtype or leaf.dtype, sharding=s), tree, shardings
        )

    transformer, vae = placed(networks, dtype, base_shardings(networks, mesh))
    teacher = adapter(networks[0], lora.STUDENT_TARGETS)
    text = Text(shape(1, TOKENS, configs[0].joint_attention_dim, dtype=dtype), shape(1, 2048, dtype=dtype))
    image = shape(1, 64, 64, 3)
    lpips = (
        jax.eval_shape(perceptual.init, jax.random.key(0), image, image)["params"]
        if options.lambda_lpips
        else {}
    )
    base = Base(transformer, vae, placed(teacher, dtype), text, text, placed(lpips))
    student = Student(teacher, adapter(networks[1], lora.VAE_ENCODER_TARGETS))
    parts = {"student": student, "auxiliary": adapter(networks[0], lora.AUXILIARY_TARGETS)}
    state = placed(jax.eval_shape(trainer.init, parts))
    count, latent = batch * mesh.size, options.size // configs[1].factor
    images = shape(1, count, options.size, options.size, 3, dtype=jnp.uint8, sharding=rows)
    prompts = (
        shape(1, count, TOKENS, configs[0].joint_attention_dim, dtype=jnp.float16, sharding=rows),
        shape(1, count, 2048, dtype=jnp.float16, sharding=rows),
    )
    samples = Record(images, images, shape(1, count, latent, latent, 16, sharding=rows), *prompts)
    began = time.perf_counter()
    compiled = jit_step(trainer, mesh, whole).lower(state, base, samples, jax.random.key(0)).compile()
    memory = compiled.memory_analysis()
    # The state is donated: the new one reuses the old one's memory.
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    together += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "batch": batch,
        "remat": remat,
        "arguments": memory.argument_size_in_bytes / GB,
        "temporary": memory.temp_size_in_bytes / GB,
        "together": together / GB,
        "compile_s": time.perf_counter() - began,
    }


if __name__ == "__main__":
    cli.run(main)
